"""The options of :func:`topkast.wrap_optimizer`, validated in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

from topkast._errors import OptionError

PenaltyKind: TypeAlias = Literal["l2", "l1"]
Explore: TypeAlias = Literal["magnitude", "random"]
Distribution: TypeAlias = Literal["uniform", "erk", "global"]
Dense: TypeAlias = bool | str | Sequence[str] | Callable[[str, Any], bool] | None


@dataclass(frozen=True, kw_only=True)
class Options:
    """See :func:`topkast.wrap_optimizer`, which documents each of them."""

    fwd: float
    bwd: float
    refresh_every: int = 100
    penalty: float = 1e-4
    penalty_kind: PenaltyKind = "l2"
    explore: Explore = "magnitude"
    explore_until: int | None = None
    distribution: Distribution = "uniform"
    dense: Dense = None
    seed: int = 0
    probe: bool = True

    def __post_init__(self) -> None:
        check_sparsities(self.fwd, self.bwd)
        _check_integer("refresh_every", self.refresh_every, least=1)
        _check_integer("seed", self.seed, least=0)
        if self.explore_until is not None:
            _check_integer("explore_until", self.explore_until, least=0)
        if not (_is_real(self.penalty) and 0 <= self.penalty < math.inf):
            raise OptionError(
                f"penalty must be a finite number of at least 0, got {self.penalty!r}"
            )
        _check_choice("penalty_kind", self.penalty_kind, get_args(PenaltyKind))
        _check_choice("explore", self.explore, get_args(Explore))
        _check_choice("distribution", self.distribution, get_args(Distribution))
        _check_dense(self.dense)

    def override(self, options: Mapping[str, Any]) -> Options:
        """These options with those of `options` that are in :data:`GROUP_OPTIONS` or `dense`."""
        names = (*GROUP_OPTIONS, "dense")
        return replace(self, **{name: options[name] for name in names if name in options})

    def for_group(self) -> dict[str, Any]:
        """The options that may differ between the parameter groups of one optimizer."""
        return {name: getattr(self, name) for name in GROUP_OPTIONS}


# What the sizes of compact vectors follow from: it cannot change while training.
FIXED_OPTIONS = ("fwd", "bwd", "distribution")

# `dense` is a group option too, but is spent when the group is added: it may be a function,
# and what stays in a group is saved in checkpoints.
GROUP_OPTIONS = tuple(
    field.name for field in fields(Options) if field.name not in ("dense", "seed", "probe")
)


def check_sparsities(fwd: float, bwd: float) -> None:
    """Raise :class:`OptionError` unless ``0 <= bwd <= fwd < 1``."""
    for name, value in (("fwd", fwd), ("bwd", bwd)):
        if not (_is_real(value) and 0 <= value < 1):
            raise OptionError(
                f"{name} is a sparsity, the share of zeros: it must lie in [0, 1), got {value!r}"
            )
    if bwd > fwd:
        raise OptionError(
            f"bwd must not exceed fwd, got bwd={bwd!r} and fwd={fwd!r}: every weight that the "
            "forward pass uses (set A) gets a gradient (set B)"
        )


def kept_dense(tensors: Mapping[str, Any], dense: Dense) -> set[str]:
    """Names in `tensors` (name -> array) that stay dense under the option `dense`.

    Tensors with fewer than two dimensions and empty ones stay dense; `dense` adds to them.
    ``dense=False`` sparsifies the one-dimensional ones too.
    """
    least = 1 if dense is False else 2
    small = {
        name
        for name, tensor in tensors.items()
        if len(tensor.shape) < least or 0 in tuple(tensor.shape)
    }
    if dense is None or isinstance(dense, bool):
        return set(tensors) if dense else small
    if callable(dense):
        large = (name for name in tensors if name not in small)
        return small | {name for name in large if dense(name, tensors[name])}
    patterns = _patterns(dense)
    return small | {
        name for name in tensors if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def check_patterns(names: Iterable[str], dense: Dense) -> None:
    """Raise :class:`OptionError` for a pattern that matches no name.

    A misspelt one would sparsify a layer in silence.
    """
    names = list(names)
    for pattern in _patterns(dense):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise OptionError(
                f"dense={pattern!r} matches none of the tensors {sorted(names)}; name them by "
                "building a PyTorch optimizer from model.named_parameters()"
            )


def _patterns(dense: Dense) -> Sequence[str]:
    if dense is None or isinstance(dense, bool) or callable(dense):
        return []
    return [dense] if isinstance(dense, str) else dense


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_integer(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not (isinstance(value, Integral) and int(value) >= least):
        raise OptionError(f"{name} must be an integer of at least {least}, got {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_dense(dense: object) -> None:
    if dense is None or isinstance(dense, (bool, str)) or callable(dense):
        return
    if not isinstance(dense, Sequence) or not all(isinstance(item, str) for item in dense):
        raise OptionError(
            "dense must be a name or glob, a sequence of them, a predicate (name, tensor) -> bool, "
            f"or a bool, got {dense!r}"
        )
