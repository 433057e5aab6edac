"""The largest magnitudes of a tensor: their threshold, and the entries that reach it.

Without its sign a float is ordered as its bits are, read as an unsigned integer: these bits are
the *key* of an entry. NaN and infinity have the largest keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.backends._candidates import Threshold
from topkast.backends._threads import default_threads
from topkast.kernels.runtime._arguments import (
    THREAD_COUNTER,
    Vector,
    array_at,
    define_arguments,
    run_kernel,
)
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import as_pointer, fetch_add

_CHUNK = 1 << 15  # entries that a thread takes at a time
_BLOCK = 1 << 6  # entries of a chunk that are skipped together if none is kept
_DIGIT = 16  # bits of a key that one pass counts; the counts stay in a second-level cache

_COUNT = define_arguments(
    "values", "size", "digits", "prefix", "prefix_shift", "digit_shift", "digit_bits"
)
_COLLECT = define_arguments("flat", "size", "bound", "starts", "writes", "indices", "values")


def find_thresholds(
    lists: Sequence[Vector], counts: Sequence[int], /, *, threads: int | None = None
) -> tuple[list[Threshold], int]:
    """Find the `count`-th largest magnitude of all entries of some vectors, for several counts.

    The keys are counted by their first 16 bits, then those that share these bits with the
    threshold by their next 16 bits, until all bits of the threshold are known.

    Parameters
    ----------
    lists
        Contiguous vectors of float32, or of float64.
    counts
        Each from 1 to the number of all entries.
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
    ([Threshold(magnitude=1.0, surplus=1)], 0)
    """
    dtype = lists[0].dtype
    for values in lists:
        _check(values, dtype)
    size = sum(map(len, lists))
    if not all(1 <= count <= size for count in counts):
        raise ValueError(f"each count must be from 1 to {size}, got {list(counts)}")
    shift = _width(dtype) - _DIGIT
    digits = _count_digits(lists, 0, shift + _DIGIT, shift, _DIGIT, threads)
    not_finite = int(digits[key_of_magnitude(np.inf, dtype) >> shift :].sum())
    return [_find_threshold(lists, count, digits, threads) for count in counts], not_finite


def collect(flat: Vector, bound: float, /, *, threads: int | None = None) -> tuple[Vector, Vector]:
    """Ascending indices of the entries of `flat` (n,) of magnitude `bound` or more, and these.

    The indices are int32: n must be below 2³¹.

    Raises
    ------
    TypeError, ValueError
        For other dtypes, for a vector that is not contiguous, and for a longer one.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import collect
    >>> collect(np.asarray([0.5, -2.0, 1.0, 0.0]), 1.0)
    (array([1, 2], dtype=int32), array([-2.,  1.]))
    """
    _check(flat, flat.dtype)
    if len(flat) >= 1 << 31:
        raise ValueError(f"the vector must have fewer than 2**31 entries, got {len(flat)}")
    starts = np.zeros(-(-len(flat) // _CHUNK) + 1, dtype=np.int64)
    indices, values = np.empty(0, np.int32), np.empty(0, flat.dtype)
    for writes in (0, 1):
        run_kernel(
            (_collect_single, _collect_double),
            flat.dtype,
            threads,
            _COLLECT,
            flat=flat,
            size=len(flat),
            bound=key_of_magnitude(bound, flat.dtype),
            starts=starts,
            writes=writes,
            indices=indices,
            values=values,
        )
        if not writes:
            np.cumsum(starts, out=starts)
            count = int(starts[-1])
            indices, values = np.empty(count, np.int32), np.empty(count, flat.dtype)
    return indices, values


def _check(vector: Vector, dtype: Any) -> None:
    if vector.dtype not in (np.float32, np.float64) or vector.dtype != dtype:
        raise TypeError(
            f"expected vectors of one dtype, float32 or float64, got {vector.dtype} and {dtype}"
        )
    if vector.ndim != 1 or not vector.flags.c_contiguous:
        raise ValueError(f"expected contiguous vectors, got shape {vector.shape}")


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
            magnitude = np.asarray(key, _unsigned(dtype)).view(dtype)
            return Threshold(float(magnitude), equal - rank)
        bits = min(_DIGIT, unknown)
        digits = _count_digits(lists, key, unknown, unknown - bits, bits, threads)


def key_of_magnitude(magnitude: float, dtype: Any) -> int:
    """Return the key of a magnitude that is a number of `dtype`."""
    return int(np.asarray(magnitude, dtype).view(_unsigned(dtype)))


def _unsigned(dtype: Any) -> Any:
    return np.uint32 if np.dtype(dtype).itemsize == 4 else np.uint64


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
    counts = np.zeros((threads or default_threads(), 1 << digit_bits), dtype=np.int32)
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


@njit(inline="always")  # type: ignore[untyped-decorator]
def key_of(bits: Any, unsigned: Any) -> Any:
    """Clear the sign of a float, given as an unsigned integer."""
    return unsigned(bits & unsigned(~unsigned(0)) >> unsigned(1))


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


@njit  # type: ignore[untyped-decorator]
def _collect(address: Any, unsigned: Any) -> None:
    arguments = carray(as_pointer(address), 1, _COLLECT)[0]
    flat = array_at(arguments.flat, arguments.size, unsigned)
    chunks = (arguments.size + _CHUNK - 1) // _CHUNK
    starts = array_at(arguments.starts, chunks + 1, np.int64)
    bound = unsigned(arguments.bound)
    while True:
        chunk = fetch_add(address)
        if chunk >= chunks:
            break
        first = chunk * _CHUNK
        part = flat[first : min(first + _CHUNK, len(flat))]
        if arguments.writes == 0:
            starts[chunk + 1] = _count_large(part, bound, unsigned)
            continue
        size = starts[chunk + 1] - starts[chunk]
        indices = array_at(arguments.indices + 4 * starts[chunk], size, np.int32)
        values = array_at(arguments.values + part.itemsize * starts[chunk], size, unsigned)
        _write_large(part, first, bound, indices, values, unsigned)


@njit  # type: ignore[untyped-decorator]
def _count_large(entries: Any, bound: Any, unsigned: Any) -> Any:
    count = 0
    for bits in entries:  # compared as vectors
        count += key_of(bits, unsigned) >= bound
    return count


@njit  # type: ignore[untyped-decorator]
def _write_large(
    entries: Any, first: Any, bound: Any, indices: Any, values: Any, unsigned: Any
) -> None:
    """Write the entries of a key of `bound` or more, and their indices, which begin at `first`."""
    kept, start = 0, 0
    while kept < len(indices):
        block = entries[start : start + _BLOCK]
        stop = kept + _count_large(block, bound, unsigned)
        # Every entry is written, and the next one over it unless it is kept: there is no branch.
        position = 0
        while kept < stop:
            bits = block[position]
            indices[kept], values[kept] = first + start + position, bits
            kept += np.int64(key_of(bits, unsigned) >= bound)
            position += 1
        start += _BLOCK


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _count_single(address: Any) -> None:
    _count(address, np.uint32)


@kernel(_KERNEL)
def _count_double(address: Any) -> None:
    _count(address, np.uint64)


@kernel(_KERNEL)
def _collect_single(address: Any) -> None:
    _collect(address, np.uint32)


@kernel(_KERNEL)
def _collect_double(address: Any) -> None:
    _collect(address, np.uint64)
