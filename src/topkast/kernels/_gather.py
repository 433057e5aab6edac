"""Gather, scatter and compression of a long vector at ascending indices, on several threads.

The libraries' own functions run on one core and wait for memory at each entry.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels.runtime._arguments import (
    Vector,
    array_at,
    check_writable,
    define_arguments,
    run_kernel,
)
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import as_pointer, fetch_add

_CHUNK = 1 << 14  # entries that a thread takes at a time: they fit in the L1 and L2 caches

_COPY = define_arguments("flat", "size", "indices", "values", "count")
_COMPRESS = define_arguments(
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
        For other dtypes and shapes, for arrays that are not contiguous, if the first or the last
        index lies outside of `flat`, and if what is written to is read-only.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import gather
    >>> out = np.empty(2)
    >>> gather(np.asarray([1.0, 2.0, 3.0]), np.asarray([0, 2], np.int32), out)
    >>> out
    array([1., 3.])
    """
    _check(flat, indices, out)
    _check_ends(flat, indices)
    check_writable(out=out)
    gather_unchecked(flat, indices, out, threads)


def put(
    flat: Vector,
    indices: Vector,
    values: Vector,
    /,
    *,
    ascending: bool = True,
    threads: int | None = None,
) -> None:
    """``flat[indices] = values``; parameters and errors as for :func:`gather`.

    The indices differ; unless `ascending`, their order is free.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import put
    >>> flat = np.zeros(3)
    >>> put(flat, np.asarray([0, 2], np.int32), np.asarray([1.0, 3.0]))
    >>> flat
    array([1., 0., 3.])
    """
    _check(flat, indices, values)
    check_writable(flat=flat)
    if ascending:
        _check_ends(flat, indices)
    elif len(indices) and not 0 <= indices.min() <= indices.max() < len(flat):
        raise ValueError(f"indices must lie in [0, {len(flat)})")
    _run_copy((_put_single, _put_double), flat, indices, values, threads)


def compress(flat: Vector, *sets: tuple[Vector, Vector], threads: int | None = None) -> None:
    """Gather the entries of one or two index sets, and zero all others, in one pass.

    Parameters
    ----------
    flat
        (n,), contiguous, float32 or float64.
    sets
        One or two pairs of indices and output vector, as for :func:`gather`. No index may be in
        both sets.
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
    for indices, out in sets:
        _check(flat, indices, out)
        _check_ends(flat, indices)
        check_writable(flat=flat, out=out)
    if len(sets) == 1:
        sets = (*sets, (sets[0][0][:0], sets[0][1][:0]))
    (indices, values), (other_indices, other_values) = sets
    run_kernel(
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


def gather_unchecked(
    flat: Vector, indices: Vector, out: Vector, threads: int | None = None
) -> None:
    """:func:`gather` without checks, for indices in any order."""
    _run_copy((_gather_single, _gather_double), flat, indices, out, threads)


def _check(flat: Vector, indices: Vector, values: Vector) -> None:
    if flat.dtype != values.dtype or flat.dtype not in (np.float32, np.float64):
        raise TypeError(
            "flat and values must have the same dtype, float32 or float64, got "
            f"{flat.dtype} and {values.dtype}"
        )
    if indices.dtype != np.int32:
        raise TypeError(f"indices must be int32, got {indices.dtype}")
    for array in (flat, indices, values):
        if array.ndim != 1 or not array.flags.c_contiguous:
            raise ValueError(
                "flat, indices and values must be contiguous vectors, got an array of shape "
                f"{array.shape}"
            )
    if len(indices) != len(values):
        raise ValueError(
            f"indices and values must have the same length, got {len(indices)} and {len(values)}"
        )


def _check_ends(flat: Vector, indices: Vector) -> None:
    if len(indices) and not 0 <= indices[0] <= indices[-1] < len(flat):
        raise ValueError(f"indices must ascend in [0, {len(flat)})")


def _run_copy(
    kernels: tuple[Any, Any], flat: Vector, indices: Vector, values: Vector, threads: int | None
) -> None:
    run_kernel(
        kernels,
        flat.dtype,
        threads,
        _COPY,
        flat=flat,
        size=len(flat),
        indices=indices,
        values=values,
        count=len(indices),
    )


@njit  # type: ignore[untyped-decorator]
def _copy(address: Any, dtype: Any, is_gather: bool) -> None:
    arguments = carray(as_pointer(address), 1, _COPY)[0]
    flat = array_at(arguments.flat, arguments.size, dtype)
    indices = array_at(arguments.indices, arguments.count, np.int32)
    values = array_at(arguments.values, arguments.count, dtype)
    while True:
        start = fetch_add(address) * _CHUNK
        if start >= len(indices):
            break
        for k in range(start, min(start + _CHUNK, len(indices))):
            if is_gather:
                values[k] = flat[indices[k]]
            else:
                flat[indices[k]] = values[k]


@njit  # type: ignore[untyped-decorator]
def _compress(address: Any, dtype: Any) -> None:
    arguments = carray(as_pointer(address), 1, _COMPRESS)[0]
    flat = array_at(arguments.flat, arguments.size, dtype)
    first = array_at(arguments.indices, arguments.count, np.int32)
    second = array_at(arguments.other_indices, arguments.other_count, np.int32)
    first_values = array_at(arguments.values, arguments.count, dtype)
    second_values = array_at(arguments.other_values, arguments.other_count, dtype)
    while True:
        start = fetch_add(address) * _CHUNK
        if start >= len(flat):
            break
        stop = min(start + _CHUNK, len(flat))
        first_start, second_start = np.searchsorted(first, start), np.searchsorted(second, start)
        first_stop, second_stop = first_start, second_start
        while first_stop < len(first) and first[first_stop] < stop:
            first_values[first_stop] = flat[first[first_stop]]
            first_stop += 1
        while second_stop < len(second) and second[second_stop] < stop:
            second_values[second_stop] = flat[second[second_stop]]
            second_stop += 1
        flat[start:stop] = 0
        for k in range(first_start, first_stop):
            flat[first[k]] = first_values[k]
        for k in range(second_start, second_stop):
            flat[second[k]] = second_values[k]


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _gather_single(address: Any) -> None:
    _copy(address, np.float32, True)


@kernel(_KERNEL)
def _gather_double(address: Any) -> None:
    _copy(address, np.float64, True)


@kernel(_KERNEL)
def _put_single(address: Any) -> None:
    _copy(address, np.float32, False)


@kernel(_KERNEL)
def _put_double(address: Any) -> None:
    _copy(address, np.float64, False)


@kernel(_KERNEL)
def _compress_single(address: Any) -> None:
    _compress(address, np.float32)


@kernel(_KERNEL)
def _compress_double(address: Any) -> None:
    _compress(address, np.float64)
