"""Entries of a long vector at ascending indices: read, written, and kept while others are cleared.

A library's own functions for it run on one core and wait for memory at each entry.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels.runtime._arguments import Vector, slots, start, vector
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import as_pointer, fetch_add

_CHUNK = 1 << 14  # entries that a thread takes at a time: what the first two caches hold

_MOVE = slots("flat", "size", "indices", "values", "count")
_COMPRESS = slots(
    "flat",
    "size",
    "indices",
    "values",
    "count",
    "other_indices",
    "other_values",
    "other_count",
)


def gather(flat: Vector, indices: Vector, out: Vector, /, *, threads: int | None = None) -> None:
    """``out = flat[indices]``.

    Parameters
    ----------
    flat
        (n,), contiguous, float32 or float64.
    indices
        Ascending, int32 (k,), contiguous.
    out
        (k,), contiguous, of the dtype of `flat`.
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        For other dtypes and shapes, for arrays that are not contiguous, and if the first or the
        last index lies outside of `flat`.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import gather
    >>> out = np.empty(2)
    >>> gather(np.asarray([1.0, 2.0, 3.0]), np.asarray([0, 2], np.int32), out)
    >>> out
    array([1., 3.])
    """
    _check(flat, (indices, out))
    take(flat, indices, out, threads)


def put(flat: Vector, indices: Vector, values: Vector, /, *, threads: int | None = None) -> None:
    """``flat[indices] = values``; parameters and errors as for :func:`gather`.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import put
    >>> flat = np.zeros(3)
    >>> put(flat, np.asarray([0, 2], np.int32), np.asarray([1.0, 3.0]))
    >>> flat
    array([1., 0., 3.])
    """
    _check(flat, (indices, values))
    _run((_put_single, _put_double), flat, indices, values, threads)


def compress(flat: Vector, *parts: tuple[Vector, Vector], threads: int | None = None) -> None:
    """Gather the entries of one or two parts, and clear all others, in one pass.

    Parameters
    ----------
    flat
        (n,), contiguous, float32 or float64.
    parts
        Of each part its indices and the vector that its entries are written to, as for
        :func:`gather`. No index may be in both.
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        As :func:`gather`.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import compress
    >>> flat, out = np.asarray([1.0, 2.0, 3.0]), np.empty(1)
    >>> compress(flat, (np.asarray([1], np.int32), out))
    >>> flat, out
    (array([0., 2., 0.]), array([2.]))
    """
    for part in parts:
        _check(flat, part)
    if len(parts) == 1:
        parts = (*parts, (parts[0][0][:0], parts[0][1][:0]))
    (indices, values), (other_indices, other_values) = parts
    start(
        (_compress_single, _compress_double),
        flat.dtype,
        threads,
        _COMPRESS,
        flat=flat,
        size=len(flat),
        indices=indices,
        values=values,
        count=len(indices),
        other_indices=other_indices,
        other_values=other_values,
        other_count=len(other_indices),
    )


def take(flat: Vector, indices: Vector, out: Vector, threads: int | None = None) -> None:
    """:func:`gather` without checks, of indices in any order."""
    _run((_gather_single, _gather_double), flat, indices, out, threads)


def _check(flat: Vector, part: tuple[Vector, Vector]) -> None:
    indices, values = part
    if flat.dtype != values.dtype or flat.dtype not in (np.float32, np.float64):
        raise TypeError(f"expected float32 or float64, got {flat.dtype} and {values.dtype}")
    if indices.dtype != np.int32:
        raise TypeError(f"indices must be int32, got {indices.dtype}")
    for array in (flat, indices, values):
        if array.ndim != 1 or not array.flags.c_contiguous:
            raise ValueError(f"expected contiguous vectors, got one of shape {array.shape}")
    if len(indices) != len(values):
        raise ValueError(f"{len(indices)} indices for {len(values)} values")
    if len(indices) and not 0 <= indices[0] <= indices[-1] < len(flat):
        raise ValueError(f"indices must ascend in [0, {len(flat)})")


def _run(
    kernels: tuple[Any, Any], flat: Vector, indices: Vector, values: Vector, threads: int | None
) -> None:
    start(
        kernels,
        flat.dtype,
        threads,
        _MOVE,
        flat=flat,
        size=len(flat),
        indices=indices,
        values=values,
        count=len(indices),
    )


@njit  # type: ignore[untyped-decorator]
def _move(address: Any, dtype: Any, reading: bool) -> None:
    arguments = carray(as_pointer(address), 1, _MOVE)[0]
    flat = vector(arguments.flat, arguments.size, dtype)
    indices = vector(arguments.indices, arguments.count, np.int32)
    values = vector(arguments.values, arguments.count, dtype)
    while True:
        start = fetch_add(address) * _CHUNK
        if start >= len(indices):
            break
        for k in range(start, min(start + _CHUNK, len(indices))):
            if reading:
                values[k] = flat[indices[k]]
            else:
                flat[indices[k]] = values[k]


@njit  # type: ignore[untyped-decorator]
def _compress(address: Any, dtype: Any) -> None:
    arguments = carray(as_pointer(address), 1, _COMPRESS)[0]
    flat = vector(arguments.flat, arguments.size, dtype)
    first = vector(arguments.indices, arguments.count, np.int32)
    second = vector(arguments.other_indices, arguments.other_count, np.int32)
    first_values = vector(arguments.values, arguments.count, dtype)
    second_values = vector(arguments.other_values, arguments.other_count, dtype)
    while True:
        start = fetch_add(address) * _CHUNK
        if start >= len(flat):
            break
        stop = min(start + _CHUNK, len(flat))
        a, b = np.searchsorted(first, start), np.searchsorted(second, start)
        k, m = a, b
        while k < len(first) and first[k] < stop:
            first_values[k] = flat[first[k]]
            k += 1
        while m < len(second) and second[m] < stop:
            second_values[m] = flat[second[m]]
            m += 1
        flat[start:stop] = 0
        for place in range(a, k):
            flat[first[place]] = first_values[place]
        for place in range(b, m):
            flat[second[place]] = second_values[place]


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _gather_single(address: Any) -> None:
    _move(address, np.float32, True)


@kernel(_KERNEL)
def _gather_double(address: Any) -> None:
    _move(address, np.float64, True)


@kernel(_KERNEL)
def _put_single(address: Any) -> None:
    _move(address, np.float32, False)


@kernel(_KERNEL)
def _put_double(address: Any) -> None:
    _move(address, np.float64, False)


@kernel(_KERNEL)
def _compress_single(address: Any) -> None:
    _compress(address, np.float32)


@kernel(_KERNEL)
def _compress_double(address: Any) -> None:
    _compress(address, np.float64)
