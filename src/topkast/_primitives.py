"""The few things that the array-API standard lacks: a fast path per library, then a portable one.

No framework is imported here for its own sake: an array of a library can only come from a
program that has imported that library already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from array_api_compat import (
    array_namespace,
    is_cupy_array,
    is_jax_array,
    is_numpy_array,
    is_torch_array,
)
from array_api_compat import device as _device

Array: TypeAlias = Any  # an array of any library of the array-API standard
Namespace: TypeAlias = Any  # its namespace
T = TypeVar("T")
# From positions (k,) in a vector to int64 (k,) of 32 bits, all of which differ.
Ranks: TypeAlias = Callable[[Array], Array]

# Under this name an adapter registers a function that returns its FastPaths, by the library's name.
PATHS = "topkast.primitives"

# What JAX need not check of our indices.
_TRUSTED: dict[str, Any] = {
    "unique_indices": True,
    "mode": "promise_in_bounds",
    "wrap_negative_indices": False,
}


class FastPaths(Protocol):
    """What an adapter does better for arrays of its library than the standard's functions can."""

    def check(self, name: str, array: Array) -> None:
        """Raise an error that names `array`, if these paths cannot work on it."""

    def largest(self, flat: Array, count: int, ranks: Ranks) -> tuple[Array, Array]:
        """Ascending indices of the `count` largest magnitudes of a vector, and its entries there.

        Equal magnitudes rank by `ranks`, the largest first. Raises :class:`topkast.NonFiniteError`.
        """

    def largest_flags(self, flat: Array, count: int, ranks: Ranks) -> Array:
        """The same as flags (n,), for floats or integers of at most 30 bits."""

    def true_indices(self, mask: Array, count: int) -> Array:
        """As the function of this module."""

    def put(self, flat: Array, indices: Array, values: Array) -> None:
        """Write `values` at `indices` into the vector `flat`, in place."""

    def step(
        self, rule: Any, plan: Any, grads: Any, state: Any, params: Any
    ) -> tuple[dict[str, Array], Any, dict[str, Array]] | None:
        """The next parameters, the rule's next state, and ages; None for a rule of others."""


def fast_paths(array: Array) -> FastPaths | None:
    """Those that an installed package brings for the library of an array, if one does.

    Its entry point in the group ``topkast.primitives`` is called as the library's package is.
    """
    kind: Any = type(array)
    return _load_paths(kind)


@functools.cache
def _load_paths(kind: Any) -> FastPaths | None:
    for base in kind.__mro__:
        for entry in entry_points(group=PATHS, name=base.__module__.partition(".")[0]):
            paths: FastPaths = entry.load()()
            return paths
    return None


def host_view(array: Array) -> np.ndarray[Any, Any] | None:
    """The same memory as a NumPy array, or None where it cannot be read from here.

    It cannot on an accelerator, in a traced computation, and for libraries that hide theirs.
    Floats that NumPy lacks or is slow at (bfloat16, float16) come as float32, which holds each
    of their values exactly.
    """
    if is_numpy_array(array):
        view = array
    elif is_torch_array(array):
        if array.device.type != "cpu":
            return None
        array = array.detach()
        view = (array.float() if array.dtype.itemsize <= 2 else array).numpy()
    elif is_jax_array(array):
        if is_traced(array) or {place.platform for place in array.devices()} != {"cpu"}:
            return None
        view = np.asarray(array)
    else:
        return None
    return view.astype(np.float32) if view.dtype.itemsize <= 2 else view


def is_traced(array: Array) -> bool:
    """Whether `array` stands for values that are not known yet (inside ``jax.jit``)."""
    if not is_jax_array(array):
        return False
    import jax

    return isinstance(array, jax.core.Tracer)


def possibly_true(flag: Array) -> bool:
    """Whether a 0-d flag is true, or not known yet."""
    return is_traced(flag) or bool(flag)


def device(array: Array) -> Any:
    """Where to make an array that works together with `array`."""
    if not is_jax_array(array):
        return _device(array)
    if is_traced(array) or not array.committed:
        return None  # to choose a place would commit what is computed from it to that place
    from topkast import _xla

    return _xla.beside(array)


def zero_count(beside: Array) -> Array:
    """A 0-d int32 zero that can be read without waiting for a device, for arrays like `beside`."""
    if is_cupy_array(beside):
        return np.zeros((), dtype=np.int32)
    xp = array_namespace(beside)
    return xp.zeros((), dtype=xp.int32, device="cpu" if is_torch_array(beside) else device(beside))


def index_dtype(xp: Namespace, place: Any = None) -> Any:
    """The library's own dtype for indices (int64; int32 in JAX unless 64 bits are enabled)."""
    return xp.__array_namespace_info__().default_dtypes(device=place)["indexing"]


def like(host: np.ndarray[Any, Any], array: Array, dtype: Any = None) -> Array:
    """`host` as an array of the library and on the device of `array`."""
    return array_namespace(array).asarray(host, dtype=dtype, device=device(array))


def _wide(indices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Indices as NumPy wants them: it converts narrower ones piece by piece, which is slower."""
    return indices.astype(np.intp, copy=False)


def take(flat: Array, indices: Array) -> Array:
    """Entries (k,) of a vector (n,) at `indices` (unique, below n)."""
    if is_jax_array(flat):
        return flat.at[indices].get(**_TRUSTED)
    if is_numpy_array(flat):
        return flat.take(_wide(indices))
    return array_namespace(flat).take(flat, indices)


def lookup(table: Array, indices: Array) -> Array:
    """Entries (k,) of a short vector `table` at `indices` (k,), in any order and below its size."""
    if is_jax_array(table):
        return table.at[indices].get(mode="promise_in_bounds")
    return array_namespace(table).take(table, indices)


def scatter_flat(values: Array, indices: Array, size: int, fill: float) -> Array:
    """A vector of `size` entries, `values` at `indices` (unique, in any order), `fill` elsewhere.

    `values` has shape (k,) and `indices` shape (k,); the result has the dtype of `values`.
    """
    xp = array_namespace(values, indices)
    base = xp.full((size,), fill, dtype=values.dtype, device=device(values))
    paths = fast_paths(values)
    if paths is not None:
        paths.put(base, indices, values)
        return base
    if is_torch_array(values):
        return base.scatter_(0, indices.long(), values)
    if is_jax_array(values):
        return base.at[indices].set(values, **_TRUSTED)
    if is_numpy_array(values):
        base[_wide(indices)] = values
        return base
    if not values.shape[0]:
        return base
    order = xp.argsort(indices)
    indices, values = xp.take(indices, order), xp.take(values, order)
    place = xp.searchsorted(indices, xp.arange(size, dtype=indices.dtype))
    place = xp.minimum(place, xp.asarray(values.shape[0] - 1, dtype=place.dtype))
    hit = xp.take(indices, place) == xp.arange(size, dtype=indices.dtype)
    return xp.where(hit, xp.take(values, place), base)


def put(flat: Array, indices: Array, values: Array) -> Array:
    """A copy of the vector `flat` (n,) with `values` (k,) at `indices` (unique, in any order)."""
    if is_jax_array(flat):
        return flat.at[indices].set(values, **_TRUSTED)
    if is_torch_array(flat):
        return flat.scatter(0, indices.long(), values)
    xp = array_namespace(flat)
    paths = fast_paths(flat)
    if paths is not None:
        copy = xp.asarray(flat, copy=True)
        paths.put(copy, indices, values)
        return copy
    if is_numpy_array(flat):
        copy = flat.copy()
        copy[_wide(indices)] = values
        return copy
    everywhere = xp.ones(indices.shape[0], dtype=xp.bool, device=device(flat))
    inside = scatter_flat(everywhere, indices, flat.shape[0], False)
    return xp.where(inside, scatter_flat(values, indices, flat.shape[0], 0.0), flat)


def true_indices(mask: Array, count: int) -> Array:
    """Ascending indices of the `count` true entries of a mask (n,), `count` being known.

    The shape does not depend on the data, so that this can be traced.
    """
    if is_jax_array(mask):
        from topkast import _xla

        return _xla.true_indices(mask, count)
    paths = fast_paths(mask)
    if paths is not None:
        return paths.true_indices(mask, count)
    if is_torch_array(mask):
        return mask.nonzero().view(-1)
    if is_numpy_array(mask):
        return np.flatnonzero(mask)
    xp = array_namespace(mask)
    dtype = index_dtype(xp, device(mask))
    seen = xp.cumulative_sum(xp.astype(mask, dtype), dtype=dtype)
    wanted = xp.arange(1, count + 1, dtype=dtype, device=device(mask))
    return xp.astype(xp.searchsorted(seen, wanted), dtype)


def when(due: Array, change: Callable[..., T], state: T, *operands: Any) -> T:
    """``change(state, *operands) if due else state``, also where `due` is traced."""
    if is_traced(due):
        from topkast import _xla

        return _xla.when(due, change, state, *operands)
    return change(state, *operands) if bool(due) else state


def where(flags: Array, array: Array, other: float) -> Array:
    """`array` where `flags` are true, and the number `other` in its dtype elsewhere."""
    xp = array_namespace(array)
    return xp.where(flags, array, xp.full((), other, dtype=array.dtype, device=device(array)))
