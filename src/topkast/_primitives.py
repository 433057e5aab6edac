"""Array operations beyond the array-API standard, dispatched to the backend of the array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np
from array_api_compat import array_namespace

from topkast.backends import backend_of

Array: TypeAlias = Any  # an array of any library of the array-API standard
Namespace: TypeAlias = Any  # its namespace
T = TypeVar("T")


def device(array: Array) -> Any:
    """The device on which new arrays can be combined with `array`."""
    return backend_of(array).device(array)


def is_traced(array: Array) -> bool:
    """Whether the values of `array` are unknown, as inside ``jax.jit``."""
    return backend_of(array).is_traced(array)


def possibly_true(flag: Array) -> bool:
    """Whether a 0-d flag is true or traced."""
    return is_traced(flag) or bool(flag)


def asarray_like(host: np.ndarray[Any, Any], array: Array, dtype: Any = None) -> Array:
    """Convert `host` to the library and device of `array`."""
    return array_namespace(array).asarray(host, dtype=dtype, device=device(array))


def flatten(array: Array) -> Array:
    """A tensor as a vector (n,)."""
    array = backend_of(array).unsharded(array)
    return array_namespace(array).reshape(array, (-1,))


def take(flat: Array, indices: Array) -> Array:
    """Read the entries (k,) of a vector (n,) at `indices` (unique, below n)."""
    return backend_of(flat).take(flat, indices)


def scatter_flat(values: Array, indices: Array, size: int, fill: float) -> Array:
    """Make a vector of `size` entries: `values` (k,) at `indices` (unique), `fill` elsewhere."""
    return backend_of(values).scatter(values, indices, size, fill)


def cond(due: Array, change: Callable[..., T], state: T, *operands: Any) -> T:
    """``change(state, *operands) if due else state``, for a flag that may be traced."""
    return backend_of(due).cond(due, change, state, *operands)


def where(flags: Array, array: Array, other: float) -> Array:
    """`array` where `flags` are true, and `other` in the array's dtype elsewhere."""
    xp = array_namespace(array)
    return xp.where(flags, array, xp.full((), other, dtype=array.dtype, device=device(array)))


def fill_like(entry: Array, fresh: Array | float) -> Array:
    """A number as an array (), or an array as a vector, of the dtype of `entry`."""
    if isinstance(fresh, (int, float)):
        return backend_of(entry).full(fresh, entry)
    xp = array_namespace(entry)
    return xp.astype(xp.reshape(fresh, (-1,)), entry.dtype)
