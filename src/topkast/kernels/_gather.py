"""Entries of a long vector at ascending indices: read, written, and kept while others are cleared.

A library's own functions for it run on one core and wait for memory at each entry.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels._compile import kernel
from topkast.kernels._layout import Vector
from topkast.kernels._pool import run
from topkast.kernels._vector import as_pointer, take_ticket

_CHUNK = 1 << 14  # entries that a thread takes at a time: what the first two caches hold


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
    _start(_gather_single, _gather_double, threads, flat, (indices, out))


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
    _start(_put_single, _put_double, threads, flat, (indices, values))


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
    first, second = parts
    _start(_compress_single, _compress_double, threads, flat, first, second)


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


def _start(
    single: Any, double: Any, threads: int | None, flat: Vector, *parts: tuple[Vector, Vector]
) -> None:
    numbers = [0, flat.ctypes.data, len(flat)]
    for indices, values in parts:
        numbers += [indices.ctypes.data, values.ctypes.data, len(indices)]
    chosen = single if flat.dtype == np.float32 else double
    run(chosen, np.asarray(numbers, dtype=np.int64), threads)


@njit  # type: ignore[untyped-decorator]
def _move(address: Any, kind: Any, reading: bool) -> None:
    numbers = carray(as_pointer(address), 6, np.int64)
    flat = carray(as_pointer(numbers[1]), numbers[2], kind)
    indices = carray(as_pointer(numbers[3]), numbers[5], np.int32)
    values = carray(as_pointer(numbers[4]), numbers[5], kind)
    while True:
        start = take_ticket(address) * _CHUNK
        if start >= len(indices):
            break
        for k in range(start, min(start + _CHUNK, len(indices))):
            if reading:
                values[k] = flat[indices[k]]
            else:
                flat[indices[k]] = values[k]


@njit  # type: ignore[untyped-decorator]
def _compress(address: Any, kind: Any) -> None:
    numbers = carray(as_pointer(address), 9, np.int64)
    flat = carray(as_pointer(numbers[1]), numbers[2], kind)
    first = carray(as_pointer(numbers[3]), numbers[5], np.int32)
    second = carray(as_pointer(numbers[6]), numbers[8], np.int32)
    first_values = carray(as_pointer(numbers[4]), numbers[5], kind)
    second_values = carray(as_pointer(numbers[7]), numbers[8], kind)
    while True:
        start = take_ticket(address) * _CHUNK
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
