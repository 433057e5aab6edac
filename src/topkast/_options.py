"""The options of :func:`topkast.wrap_optimizer`, validated in one place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal, TypeAlias, get_args

from topkast._errors import OptionError
from topkast._method import PROVIDED, Method
from topkast._patterns import (
    Dense,
    Patterns,
    check_dense,
    check_names_of,
    check_patterns,
    matches,
)
from topkast.selection._groups import check_pattern, pattern_densities
from topkast.selection._units import BlockScore

PenaltyKind: TypeAlias = Literal["l2", "l1"]
Explore: TypeAlias = Literal["magnitude", "random"]
Distribution: TypeAlias = Literal["uniform", "erk", "global"]
Overrides: TypeAlias = Mapping[str, Mapping[str, Any]] | None
ReservoirKind: TypeAlias = Literal["device", "host", "disk", "seeded"]
FolderPath: TypeAlias = str | PathLike[str] | None


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of :func:`topkast.wrap_optimizer`, which documents each of them."""

    fwd: float
    bwd: float
    refresh_every: int = 1
    penalty: float = 1e-4
    penalty_kind: PenaltyKind = "l2"
    explore: Explore = "magnitude"
    explore_until: int | None = None
    distribution: Distribution = "uniform"
    block: tuple[int, int] | None = None
    block_score: BlockScore = "sum"
    pattern: tuple[int, int] | None = None
    dense: Dense = None
    stacked: Patterns = None
    method: Method | None = None
    reservoir: ReservoirKind = "device"
    reservoir_path: FolderPath = None
    overrides: Overrides = None
    power: float = 1.0
    seed: int = 0
    probe: bool = True

    def __post_init__(self) -> None:
        fwd, bwd = check_sparsities(self.fwd, self.bwd)
        until = self.explore_until
        normalised = {
            "fwd": fwd,
            "bwd": bwd,
            "refresh_every": _check_integer("refresh_every", self.refresh_every, min=1),
            "penalty": _check_penalty(self.penalty),
            "explore_until": (
                None if until is None else _check_integer("explore_until", until, min=0)
            ),
            "block": check_block(self.block),
            "pattern": check_pattern(self.pattern),
            "power": _check_power(self.power),
            "seed": _check_integer("seed", self.seed, min=0),
        }
        for name, value in normalised.items():  # Python numbers replace NumPy's scalars
            object.__setattr__(self, name, value)
        _check_choice("penalty_kind", self.penalty_kind, get_args(PenaltyKind))
        _check_choice("explore", self.explore, get_args(Explore))
        _check_choice("distribution", self.distribution, get_args(Distribution))
        check_block_score(self.block_score)
        _check_block_distribution(self.block, self.distribution)
        check_dense(self.dense)
        check_names_of("stacked", self.stacked)
        _check_method(self.method, self.explore)
        self._check_fit()
        self._check_pattern()
        _check_choice("reservoir", self.reservoir, get_args(ReservoirKind))
        self._check_overrides()
        self._check_path()

    def override(self, options: Mapping[str, Any]) -> Options:
        """Replace options by those in `options` that a parameter group may set."""
        if "reservoir" in options or "reservoir_path" in options:
            raise OptionError(
                "a parameter group cannot set reservoir or reservoir_path: pass them to "
                "wrap_optimizer, with overrides={name: {'reservoir': ...}} for single tensors"
            )
        changes = {name: options[name] for name in (*GROUP_OPTIONS, "dense") if name in options}
        for name in [*changes]:
            if type(changes[name]) is type(own := getattr(self, name)) and changes[name] == own:
                del changes[name]  # it was checked already
        method = options.get("method")
        if isinstance(method, Method) and method is not self.method:  # not the inner optimizer's
            changes["method"] = method
        return replace(self, **changes) if changes else self

    def for_group(self) -> dict[str, Any]:
        """Return the options that may differ between parameter groups of one optimizer."""
        return {name: getattr(self, name) for name in GROUP_OPTIONS}

    def for_tensor(self, name: str) -> Options:
        """Apply the `overrides` of a tensor; if several globs match, the last one wins."""
        changes = self.overrides_of(name)
        try:
            return replace(self, overrides=None, **changes) if changes else self
        except OptionError as error:
            raise OptionError(f"overrides of {name!r}: {error}") from None

    def overrides_of(self, name: str) -> dict[str, Any]:
        """Return the options that `overrides` sets for the tensor `name`."""
        changes: dict[str, Any] = {}
        for pattern, values in (self.overrides or {}).items():
            if fnmatchcase(name, pattern):
                changes |= values
        return changes

    def reservoir_kinds(self) -> set[ReservoirKind]:
        """The values of `reservoir` for all tensors."""
        overrides = (self.overrides or {}).values()
        return {self.reservoir} | {values.get("reservoir", self.reservoir) for values in overrides}

    def check_functional(self) -> None:
        """Raise :class:`OptionError` for options that the functional form cannot have."""
        kinds = sorted(self.reservoir_kinds() - {"device"})
        if kinds:
            raise OptionError(
                f"reservoir={kinds[0]!r} is of PyTorch's optimizers: here the weights are the "
                "`params` of the caller, wherever these are. Leave the option out"
            )

    @property
    def methods(self) -> list[Method]:
        """The methods that are given for all tensors or for some."""
        overrides = (self.overrides or {}).values()
        given = [self.method, *(values.get("method") for values in overrides)]
        return [method for method in given if method is not None]

    def _check_fit(self) -> None:
        """Refuse sparsities, units and rankings that the method does not take."""
        method = self.method
        if method is None:
            return
        name = type(method).__name__
        if self.power != 1 and method.forgets and method.refreshes:
            raise OptionError(
                f"power={self.power} stops weights that start at zero, as {name} starts them, from "
                "moving: pass power=1, or a method that keeps weights, such as TopKAST"
            )
        if method.backward == "equal" and self.bwd != self.fwd:
            raise OptionError(
                f"{name} has one set, which is both A and B: pass bwd={self.fwd}, as fwd, got "
                f"bwd={self.bwd}"
            )
        if method.backward == "none" and self.bwd != 0:
            raise OptionError(
                f"{name} keeps all weights and their gradients: pass bwd=0, got bwd={self.bwd}"
            )
        if not method.needs & {"sets", "gradient", "momentum"} and not method.schedules:
            return
        if self.block not in (None, (1, 1)):
            raise OptionError(f"{name} chooses single weights: pass block=None, got {self.block}")
        if self.stacked is not None:
            raise OptionError(
                f"{name} cannot rank the layers of a stacked tensor separately: leave out stacked, "
                "or keep these tensors dense"
            )

    def without_functions(self) -> Options:
        """Drop a `dense` predicate that cannot be pickled, for a copy of the optimizer."""
        name = getattr(self.dense, "__qualname__", "")
        return replace(self, dense=_refuse) if "<" in name else self

    def is_stacked(self, name: str) -> bool:
        """Whether the tensor's first axis numbers layers that are ranked separately."""
        return matches(name, self.stacked)

    def check_names(self, names: Iterable[str]) -> None:
        """Raise :class:`OptionError` if a name or glob in any option matches no tensor."""
        names = list(names)
        if not callable(self.dense) and not isinstance(self.dense, bool):
            check_patterns(names, "dense", self.dense)
        check_patterns(names, "stacked", self.stacked)
        check_patterns(names, "overrides", list(self.overrides or {}))

    def _check_path(self) -> None:
        path: Any = self.reservoir_path
        if path is None and "disk" in self.reservoir_kinds():
            raise OptionError(
                "reservoir='disk' needs reservoir_path, the folder for the files of the weights"
            )
        if path is not None and not isinstance(path, (str, PathLike)):
            raise OptionError(f"reservoir_path must be a path or None, got {path!r}")

    def _check_pattern(self) -> None:
        pattern, method = self.pattern, self.method
        if pattern is None:
            return
        check_pattern_block(pattern, self.block)
        if self.distribution != "uniform":
            raise OptionError(
                f"pattern={pattern} cannot be combined with distribution={self.distribution!r}: it "
                "gives every tensor the same density. Choose distribution='uniform' or pattern=None"
            )
        pattern_densities(pattern, self.fwd, self.bwd)
        if method is not None and not method.by_group:
            raise OptionError(
                f"{type(method).__name__} does not choose by groups, which pattern={pattern} "
                "needs. Choose another method or pattern=None; if it respects the group_size of a "
                "view, set by_group = True in its class"
            )

    def _check_overrides(self) -> None:
        overrides: Any = {} if self.overrides is None else self.overrides
        if not isinstance(overrides, Mapping) or not all(
            isinstance(pattern, str) and isinstance(values, Mapping)
            for pattern, values in overrides.items()
        ):
            raise OptionError(
                'overrides must map names or globs to options, as {"head.*": {"fwd": 0.5}}, got '
                f"{overrides!r}"
            )
        for pattern, values in overrides.items():
            unknown = sorted(map(str, set(values) - set(TENSOR_OPTIONS)))
            if unknown:
                raise OptionError(
                    f"overrides[{pattern!r}] sets {', '.join(unknown)}, which a single tensor "
                    f"cannot have: expected {', '.join(TENSOR_OPTIONS)}"
                )
            if self.distribution == "global" and {"fwd", "bwd"} & set(values):
                raise OptionError(
                    f"overrides[{pattern!r}] sets a sparsity, but distribution='global' ranks all "
                    "tensors as one, with one sparsity: choose one of the two"
                )
            # for_tensor checks both sparsities once all globs that match the tensor are applied.
            set_elsewhere = {name for other in overrides.values() for name in other}
            harmless = {"fwd": values.get("bwd", self.fwd), "bwd": 0.0}
            changes = {name: harmless[name] for name in harmless if name in set_elsewhere}
            changes |= values
            by_others = {name for glob, own in overrides.items() if glob != pattern for name in own}
            try:
                if by_others & {"fwd", "bwd", "block", "pattern", "explore", "method"}:
                    check_pattern(changes.get("pattern"))  # for_tensor checks whether it fits
                    changes["pattern"] = None
                if {"fwd", "bwd", "method"} & by_others - {*values}:
                    _check_method(changes.get("method"), "magnitude")  # and whether the method does
                    changes["method"] = None
                replace(self, overrides=None, **changes)
            except OptionError as error:
                raise OptionError(f"overrides[{pattern!r}]: {error}") from None


def _refuse(name: str, tensor: Any) -> bool:
    raise OptionError(
        "a copy of the optimizer does not keep the predicate that was given as `dense`: set "
        "`dense` in the added group, as {'params': ..., 'dense': ...}"
    )


# Options that determine the sizes of compact vectors: they cannot change during training.
FIXED_OPTIONS = ("fwd", "bwd", "distribution", "block", "pattern")

_NOT_OF_GROUPS = (
    "dense",
    "stacked",
    "method",
    "reservoir",
    "reservoir_path",
    "overrides",
    "power",
    "seed",
    "probe",
)

# A group may set `dense` too, but does not keep it: it may be a function, and the entries of a
# group are saved in checkpoints.
GROUP_OPTIONS = tuple(field.name for field in fields(Options) if field.name not in _NOT_OF_GROUPS)

# Options that `overrides` may set for a tensor.
TENSOR_OPTIONS = *(name for name in GROUP_OPTIONS if name != "distribution"), "method", "reservoir"


def check_sparsities(fwd: float, bwd: float) -> tuple[float, float]:
    """Return both as Python floats; raise :class:`OptionError` unless ``0 <= bwd <= fwd < 1``."""
    sparsities = []
    for name, value in (("fwd", fwd), ("bwd", bwd)):
        sparsity = _real(value)
        if sparsity is None or not 0 <= sparsity < 1:
            raise OptionError(
                f"{name} is a sparsity, the share of zeros: it must lie in [0, 1), got {value!r}"
            )
        sparsities.append(sparsity)
    forward, backward = sparsities
    if backward > forward:
        raise OptionError(
            f"bwd must not exceed fwd, got bwd={bwd!r} and fwd={fwd!r}: every weight that the "
            "forward pass uses (set A) gets a gradient (set B)"
        )
    return forward, backward


def _real(value: Any) -> float | None:
    """Convert a number by its decimal digits, so that np.float32(0.9) becomes 0.9."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value) if isinstance(value, (int, Fraction)) else float(str(value))


def _check_penalty(value: object) -> float:
    penalty = _real(value)
    if penalty is None or not 0 <= penalty < math.inf:
        raise OptionError(f"penalty must be a finite number of at least 0, got {value!r}")
    return penalty


def _check_power(value: object) -> float:
    power = _real(value)
    if power is None or not 1 <= power < math.inf:
        raise OptionError(f"power must be a finite number of at least 1, got {value!r}")
    return power


def _check_integer(name: str, value: object, *, min: int) -> int:  # noqa: A002 - the word for it
    if isinstance(value, bool) or not (isinstance(value, Integral) and int(value) >= min):
        raise OptionError(f"{name} must be an integer of at least {min}, got {value!r}")
    return int(value)


def check_block(block: object) -> tuple[int, int] | None:
    """Validate the option `block`: two Python integers or None, else :class:`OptionError`."""
    if block is None:
        return None
    sides = list(block) if isinstance(block, Sequence) and not isinstance(block, str) else []
    if len(sides) != 2 or any(
        isinstance(side, bool) or not isinstance(side, Integral) or side < 1 for side in sides
    ):
        raise OptionError(
            "block must be two positive integers, the rows and columns of a block of weights, such "
            f"as (4, 4), or None for single weights, got {block!r}"
        )
    rows, columns = map(int, sides)
    return rows, columns


def check_pattern_block(pattern: tuple[int, int], block: tuple[int, int] | None) -> None:
    """Raise :class:`OptionError` for a pattern of blocks."""
    if block not in (None, (1, 1)):
        raise OptionError(
            f"pattern={pattern} ranks single weights, and block={block} whole blocks: choose one "
            "of the two, and pass None for the other"
        )


def check_block_score(score: object) -> None:
    """Raise :class:`OptionError` unless `score` is a value of the option `block_score`."""
    _check_choice("block_score", score, get_args(BlockScore))


def _check_block_distribution(block: tuple[int, int] | None, distribution: str) -> None:
    if block not in (None, (1, 1)) and distribution == "global":
        raise OptionError(
            f"block={block} cannot be combined with distribution='global', which ranks the weights "
            "of all tensors as one vector: blocks are cut from the matrix of each tensor. Choose "
            "distribution='uniform' or 'erk', or block=None"
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise OptionError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_method(method: object, explore: str) -> None:
    if method is None:
        return
    if not isinstance(method, Method):
        hint = f": construct it first, {method.__name__}()" if isinstance(method, type) else ""
        raise OptionError(f"method must be a topkast.methods.Method or None, got {method!r}{hint}")
    if explore != "magnitude":
        raise OptionError(
            f"explore={explore!r} is a shorthand for a method, but method={method!r} was given "
            "too: choose one of the two"
        )
    unknown = sorted(method.needs - PROVIDED)
    if unknown:
        raise OptionError(
            f"{type(method).__name__} needs {', '.join(unknown)}, but a method can need only "
            f"{', '.join(sorted(PROVIDED))}"
        )
