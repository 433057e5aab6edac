"""Thresholds: the smallest of the largest magnitudes of some vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.backends._candidates import Threshold
from topkast.backends._threads import default_threads
from topkast.kernels.refresh._brackets import find_inside
from topkast.kernels.refresh._magnitudes import (
    check_magnitudes,
    collect,
    key_of,
    key_of_magnitude,
    unsigned_of,
)
from topkast.kernels.runtime._arguments import (
    THREAD_COUNTER,
    Vector,
    array_at,
    define_arguments,
    run_kernel,
)
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import as_pointer, fetch_add

_CHUNK = 1 << 13  # entries that a thread takes at a time: they stay in the L1 cache
_DIGIT = 16  # bits of a key that one pass counts; the counts stay in a second-level cache

_COUNT = define_arguments(
    "values", "size", "digits", "prefix", "prefix_shift", "digit_shift", "digit_bits"
)


def find_thresholds(
    lists: Sequence[Vector],
    counts: Sequence[int],
    /,
    *,
    brackets: Sequence[tuple[float, float]] | None = None,
    threads: int | None = None,
) -> tuple[list[Threshold], int]:
    """Find the `count`-th largest magnitude of all entries of some vectors, for several counts.

    If brackets are given, one pass counts the keys above them and copies those inside. Otherwise,
    or if a threshold lies outside of its bracket, the keys are counted by their first 16 bits, then
    those that share these bits with the threshold by their next 16 bits, until all bits of the
    threshold are known.

    Parameters
    ----------
    lists
        Contiguous vectors of float32, or of float64.
    counts
        Each from 1 to the number of all entries.
    brackets
        Smallest and largest magnitude of each threshold that are expected; None: unknown. Results
        do not depend on them.
    threads
        As for :func:`multiply`.

    Returns
    -------
    tuple
        The thresholds, and the number of entries that are NaN or infinite. If there are any, they
        count as the largest.

    Raises
    ------
    TypeError, ValueError
        For other dtypes, for vectors that are not contiguous, and for counts out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import find_thresholds
    >>> find_thresholds([np.asarray([0.5, -2.0]), np.asarray([1.0, -1.0])], [2])
    ([Threshold(magnitude=1.0, surplus=1, equal=array([2, 3]))], 0)
    """
    dtype = lists[0].dtype
    for values in lists:
        check_magnitudes(values, dtype)
    size = sum(map(len, lists))
    if not all(1 <= count <= size for count in counts):
        raise ValueError(f"each count must be from 1 to {size}, got {list(counts)}")
    if brackets is not None and all(low <= high for low, high in brackets):
        found, not_finite = find_inside(lists, counts, brackets, threads)
        if found is not None:
            return found, not_finite
    shift = _width(dtype) - _DIGIT
    digits = _count_digits(lists, 0, shift + _DIGIT, shift, _DIGIT, threads)
    not_finite = int(digits[key_of_magnitude(np.inf, dtype) >> shift :].sum())
    return [_find_threshold(lists, count, digits, threads) for count in counts], not_finite


def _find_threshold(
    lists: Sequence[Vector], count: int, digits: Vector, threads: int | None
) -> Threshold:
    """Find one threshold, given the number of keys with each first digit."""
    dtype = lists[0].dtype
    key, rank, unknown = 0, count, _width(dtype)
    bits = _DIGIT
    while True:
        reached = np.cumsum(digits[::-1])
        steps = int(np.searchsorted(reached, rank))
        digit = len(digits) - 1 - steps
        equal = int(digits[digit])
        rank -= int(reached[steps]) - equal
        key, unknown = key << bits | digit, unknown - bits
        if not unknown:
            magnitude = float(np.asarray(key, unsigned_of(dtype)).view(dtype))
            surplus = equal - rank
            return Threshold(magnitude, surplus, _find_equal(lists, magnitude, surplus, threads))
        bits = min(_DIGIT, unknown)
        digits = _count_digits(lists, key, unknown, unknown - bits, bits, threads)


def _find_equal(
    lists: Sequence[Vector], magnitude: float, surplus: int, threads: int | None
) -> Vector:
    """Positions of the entries with a magnitude in the vectors, one after the other."""
    positions, first = [np.zeros(0, dtype=np.int64)], 0
    for values in lists if surplus else ():
        found, _ = collect(values, magnitude, magnitude, threads=threads)
        positions.append(found + np.int64(first))
        first += len(values)
    return np.concatenate(positions)


def _width(dtype: Any) -> int:
    """Number of bits in a key."""
    return 8 * int(np.dtype(dtype).itemsize) - 1


def _count_digits(
    lists: Sequence[Vector],
    prefix: int,
    prefix_shift: int,
    digit_shift: int,
    digit_bits: int,
    threads: int | None,
) -> Vector:
    """Number of keys with each digit among those with a prefix; (2 ** digit_bits,)."""
    threads = threads or default_threads()  # once: each thread has a row of its own
    counts = np.zeros((threads, 1 << digit_bits), dtype=np.int32)
    for values in lists:
        run_kernel(
            (_count_single, _count_double),
            values.dtype,
            threads,
            _COUNT,
            values=values,
            size=len(values),
            digits=counts,
            prefix=prefix,
            prefix_shift=prefix_shift,
            digit_shift=digit_shift,
            digit_bits=digit_bits,
        )
    digits: Vector = counts.sum(axis=0, dtype=np.int64)
    return digits


@njit  # type: ignore[untyped-decorator]
def _count(address: Any, unsigned: Any) -> None:
    arguments = carray(as_pointer(address), 1, _COUNT)[0]
    values = array_at(arguments.values, arguments.size, unsigned)
    thread = fetch_add(address + THREAD_COUNTER)
    digits = array_at(
        arguments.digits + (thread << (arguments.digit_bits + 2)),
        1 << arguments.digit_bits,
        np.int32,
    )
    prefix = unsigned(arguments.prefix)
    prefix_shift, digit_shift = unsigned(arguments.prefix_shift), unsigned(arguments.digit_shift)
    mask = unsigned((1 << arguments.digit_bits) - 1)
    while True:
        start = fetch_add(address) * _CHUNK
        if start >= len(values):
            break
        for entry in range(start, min(start + _CHUNK, len(values))):
            key = key_of(values[entry], unsigned)
            if key >> prefix_shift == prefix:
                digits[key >> digit_shift & mask] += 1


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _count_single(address: Any) -> None:
    _count(address, np.uint32)


@kernel(_KERNEL)
def _count_double(address: Any) -> None:
    _count(address, np.uint64)
