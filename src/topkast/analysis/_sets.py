"""Sets of weights from any source, as one bit for each weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from array_api_compat import is_array_api_obj
from numpy.typing import NDArray

from topkast._errors import MismatchError
from topkast._inspect import Masks, masks
from topkast._primitives import Array, is_traced
from topkast.selection._distribution import Shape
from topkast.selection._support import Support
from topkast.testing import to_numpy

Bits: TypeAlias = NDArray[np.uint8]  # eight weights a byte, in C order; unused bits are zero
Flags: TypeAlias = NDArray[np.bool_]
T = TypeVar("T")


@dataclass(frozen=True)
class ByTensor(Generic[T]):
    """A result for each tensor, and for all of them together.

    Attributes
    ----------
    tensors
        Results by the tensors' names.
    total
        The result for all tensors: counts are added up before they are divided, so large tensors
        have more weight than small ones.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.analysis import mask_change
    >>> before = {"a": np.asarray([True, False]), "b": np.asarray([True, True, True, False])}
    >>> after = {"a": np.asarray([False, True]), "b": np.asarray([True, True, True, False])}
    >>> change = mask_change(before, after)
    >>> change.tensors["a"].forward, change.tensors["b"].forward, change.total.forward
    (1.0, 0.0, 0.25)
    """

    tensors: Mapping[str, T]
    total: T

    def to_dict(self) -> dict[str, Any]:
        """Convert to built-in types, for JSON; NaN becomes None."""
        return {
            "total": to_builtin(self.total),
            "tensors": {name: to_builtin(value) for name, value in self.tensors.items()},
        }


def to_builtin(value: Any) -> Any:
    """Convert a number or a named tuple of numbers; NaN, which JSON lacks, becomes None."""
    if hasattr(value, "_asdict"):
        return {name: to_builtin(entry) for name, entry in value._asdict().items()}
    return None if isinstance(value, float) and math.isnan(value) else value


@dataclass(frozen=True)
class TensorSets:
    """The sets of one tensor."""

    shape: Shape
    forward: Bits
    backward: Bits

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def mask(self) -> Flags:
        """The mask of A."""
        return unpack(self.forward, self.shape)

    @property
    def backward_mask(self) -> Flags:
        """The mask of B."""
        return unpack(self.backward, self.shape)


Sets: TypeAlias = dict[str, TensorSets]


def count(bits: Bits) -> int:
    """Number of weights in a set."""
    return int(np.bitwise_count(bits).sum(dtype=np.int64))


def unpack(bits: Bits, shape: Shape) -> Flags:
    """Make the mask of a set."""
    return np.unpackbits(bits, count=math.prod(shape)).view(np.bool_).reshape(shape)


def share(numerator: float, denominator: float) -> float:
    """Divide; a share of nothing is NaN."""
    return numerator / denominator if denominator else math.nan


def shares_by_tensor(
    make: Callable[..., T], counts: Mapping[str, Sequence[tuple[int, int]]]
) -> ByTensor[T]:
    """Make results from pairs (numerator, denominator) of each tensor and from their sums."""
    sums = [
        tuple(map(sum, zip(*pairs, strict=True))) for pairs in zip(*counts.values(), strict=True)
    ]
    return ByTensor(
        {name: make(*(share(*pair) for pair in pairs)) for name, pairs in counts.items()},
        make(*(share(*pair) for pair in sums)),
    )


def read_sets(sets: Any, params: Any = None, *, what: str = "the sets") -> Sets:
    """Read sets from anything that the package accepts; `what` is the subject of errors."""
    if isinstance(sets, (Support, Masks)) or is_array_api_obj(sets):
        return {"": _read_tensor("", sets, params, what)}
    if isinstance(sets, Mapping) and sets and all(isinstance(v, TensorSets) for v in sets.values()):
        return dict(sets)
    if isinstance(sets, Mapping) and all(map(_is_tensor_set, sets.values())):
        by_name = dict(sets)
    else:
        by_name = dict(_inspected(sets, params, what))
    if not by_name:
        raise MismatchError(f"{what} are empty: expected the sets of at least one tensor")
    for name in by_name:
        if not isinstance(name, str):
            raise MismatchError(f"{what} are by name, but {name!r} is no string")
    return {
        name: _read_tensor(name, tensor, _params_of(name, tensor, params, what), what)
        for name, tensor in by_name.items()
    }


def check_same_tensors(first: Mapping[str, Shape], second: Sets, *, names: tuple[str, str]) -> None:
    """Raise :class:`MismatchError` unless both have the same tensors, of the same shapes."""
    for one, other, here, there in (
        (first, second, *names),
        (second, first, *reversed(names)),
    ):
        missing = sorted(set(one) - set(other))
        if missing:
            raise MismatchError(
                f"{here} and {there} differ in tensors: {', '.join(map(repr, missing))} only "
                f"in {here}; compare sets of the same tensors"
            )
    for name, shape in first.items():
        if shape != second[name].shape:
            raise MismatchError(
                f"{_label(name)} has the shape {shape} in {names[0]} and {second[name].shape} in "
                f"{names[1]}: compare sets of one network"
            )


def shapes_of(sets: Sets) -> dict[str, Shape]:
    return {name: tensor.shape for name, tensor in sets.items()}


def check_not_empty(sets: Sets, what: str) -> None:
    """Raise :class:`MismatchError` if A has no weight in any tensor: it has no shares."""
    if not any(tensor.forward.any() for tensor in sets.values()):
        raise MismatchError(f"{what} have no weight in A: expected at least one, for shares of A")


def _is_tensor_set(value: Any) -> bool:
    return isinstance(value, (Support, Masks)) or is_array_api_obj(value)


def _inspected(x: Any, params: Any, what: str) -> Mapping[str, Masks]:
    try:
        return masks(x, params)
    except MismatchError as error:
        raise MismatchError(
            f"{what}: {error} (or pass masks by name, topkast.Masks, a topkast.Support, or a "
            "boolean array)"
        ) from None


def _params_of(name: str, tensor: Any, params: Any, what: str) -> Any:
    """The weights that one of several supports belongs to."""
    if not isinstance(tensor, Support) or params is None:
        return None
    if not isinstance(params, Mapping) or name not in params:
        raise MismatchError(
            f"{what} have a Support named {name!r}, but params has no weights of this name: pass "
            "params={name: weights}, or the whole state of the optimizer"
        )
    return params[name]


def _read_tensor(name: str, tensor: Any, params: Any, what: str) -> TensorSets:
    if isinstance(tensor, Support):
        return _read_support(name, tensor, params, what)
    if isinstance(tensor, Masks):
        forward, backward = (_flags(name, mask, what) for mask in tensor)
        if forward.shape != backward.shape:
            raise MismatchError(
                f"{_label(name)} of {what} has an A of shape {forward.shape} and a B of shape "
                f"{backward.shape}: expected the tensor's shape twice"
            )
        if (forward & ~backward).any():
            raise MismatchError(
                f"{_label(name)} of {what} has {int((forward & ~backward).sum())} weights in A "
                "that are not in B: expected A to be a subset of B"
            )
        return TensorSets(forward.shape, pack(forward), pack(backward))
    forward = _flags(name, tensor, what)
    bits = pack(forward)
    return TensorSets(forward.shape, bits, bits)


def _read_support(name: str, support: Support, params: Any, what: str) -> TensorSets:
    if not hasattr(params, "shape"):
        raise MismatchError(
            f"{_label(name)} of {what} is a Support, which knows no shape: pass the weights that "
            "it belongs to as params"
        )
    shape = tuple(params.shape)
    size = math.prod(shape)
    support.check(size, f"{_label(name)} of {what}")
    entries = to_numpy(support.entries)
    flags = np.zeros(size, dtype=np.bool_)
    flags[entries[: support.forward_size]] = True
    forward = pack(flags)
    flags[entries] = True
    return TensorSets(shape, forward, pack(flags))


def _flags(name: str, mask: Array, what: str) -> Flags:
    if not is_array_api_obj(mask):
        raise MismatchError(
            f"{_label(name)} of {what} is of type {type(mask).__name__}: expected a boolean array"
        )
    if is_traced(mask):
        raise MismatchError(
            f"{_label(name)} of {what} has no values inside jax.jit: analyse it outside"
        )
    flags = to_numpy(mask)
    if flags.dtype != np.bool_:
        raise MismatchError(
            f"{_label(name)} of {what} has dtype {flags.dtype}: expected booleans; for weights "
            "that are zero outside A, pass weights != 0"
        )
    return flags


def _label(name: str) -> str:
    return repr(name) if name else "the tensor"


def pack(flags: Flags) -> Bits:
    return np.packbits(flags.reshape(-1))
