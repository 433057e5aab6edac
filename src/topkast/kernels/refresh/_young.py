"""Displacements of young entries scaled by their age, on all cores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels.runtime._arguments import (
    Vector,
    array_at,
    check_arrays,
    check_writable,
    define_arguments,
    run_kernel,
)
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import as_pointer, fetch_add

_CHUNK = 1 << 14  # entries that a thread takes at a time

_SCALE = define_arguments("values", "before", "ages", "size", "factors", "last", "since")


def scale_displacement(
    values: Vector,
    before: Vector,
    ages: Vector,
    factors: Vector,
    /,
    *,
    since: int,
    threads: int | None = None,
) -> None:
    """Move each entry by its displacement times the factor of its age.

    Entries with the factor 1 keep their bits.

    Parameters
    ----------
    values
        Entries after a step (k,), contiguous, float32 or float64; overwritten.
    before
        Entries before the step (k,), contiguous, of the dtype of `values`.
    ages
        Updates since the entry of each at an earlier time (k,), contiguous, int16. An age that is
        still negative after `since` updates counts as 0.
    factors
        Factor by age, contiguous, of the dtype of `values`; the last one is for all greater ages.
    since
        Updates since the time of `ages`.
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        For other dtypes or shapes, for arrays that are not contiguous, and if `since` is negative
        or there are no factors.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import scale_displacement
    >>> values, ages = np.asarray([3.0, 3.0]), np.asarray([0, 5], np.int16)
    >>> scale_displacement(values, np.ones(2), ages, np.asarray([0.25, 0.5, 1.0]), since=1)
    >>> values
    array([2., 3.])
    """
    size = (len(values),)
    if since < 0 or not len(factors):
        raise ValueError(
            f"since must not be negative and factors not empty, got {since}, {factors}"
        )
    check_arrays(values.dtype, ("values", values, size), ("before", before, size))
    check_arrays(values.dtype, ("factors", factors, (len(factors),)))
    check_writable(values=values)
    if ages.dtype != np.int16 or ages.shape != size or not ages.flags.c_contiguous:
        raise ValueError(f"ages must be contiguous int16 {size}, got {ages.dtype} {ages.shape}")
    run_kernel(
        (_scale_single, _scale_double),
        values.dtype,
        threads,
        _SCALE,
        values=values,
        before=before,
        ages=ages,
        size=len(values),
        factors=factors,
        last=len(factors) - 1,
        since=min(since, len(factors) + (1 << 15)),  # beyond all ages
    )


@njit  # type: ignore[untyped-decorator]
def _scale(address: Any, dtype: Any) -> None:
    arguments = carray(as_pointer(address), 1, _SCALE)[0]
    size, last, since = arguments.size, np.int32(arguments.last), np.int32(arguments.since)
    values = array_at(arguments.values, size, dtype)
    before = array_at(arguments.before, size, dtype)
    ages = array_at(arguments.ages, size, np.int16)
    factors = array_at(arguments.factors, last + 1, dtype)
    while True:
        start = fetch_add(address) * _CHUNK
        if start >= size:
            break
        stop = min(start + _CHUNK, size)
        _scale_part(values[start:stop], before[start:stop], ages[start:stop], factors, since, last)


@njit  # type: ignore[untyped-decorator]
def _scale_part(values: Any, before: Any, ages: Any, factors: Any, since: Any, last: Any) -> None:
    for k in range(len(values)):  # no branches, so that a vector is scaled at once
        factor = factors[np.uint32(max(min(np.int32(ages[k]) + since, last), np.int32(0)))]
        scaled = before[k] + (values[k] - before[k]) * factor
        values[k] = scaled if factor != 1 else values[k]


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _scale_single(address: Any) -> None:
    _scale(address, np.float32)


@kernel(_KERNEL)
def _scale_double(address: Any) -> None:
    _scale(address, np.float64)
