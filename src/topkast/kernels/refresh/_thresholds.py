"""Thresholds: the smallest of the largest magnitudes of some vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.backends._candidates import Threshold
from topkast.backends._threads import default_threads
from topkast.kernels.refresh._magnitudes import (
    check_magnitudes,
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
from topkast.kernels.runtime._lanes import (
    EVERY,
    HAS_LANES,
    LANE_BYTES,
    LANES,
    at_least,
    count,
    first_lanes,
    load,
    pack,
    splat,
    store,
    without_sign,
)
from topkast.kernels.runtime._pool import address_of
from topkast.kernels.runtime._vector import as_pointer, fetch_add, fetch_add_many

_CHUNK = 1 << 13  # entries that a thread takes at a time: they stay in the L1 cache
_SHARE = 1 << 3  # entries for each one that may lie inside a bracket
_BLOCK = 1 << 6  # entries of a chunk that are skipped together if none is inside a bracket
_DIGIT = 16  # bits of a key that one pass counts; the counts stay in a second-level cache

_COUNT = define_arguments(
    "values", "size", "digits", "prefix", "prefix_shift", "digit_shift", "digit_bits"
)
_BRACKETS = define_arguments(
    "addresses",
    "sizes",
    "first_chunks",
    "lists",
    "lows",
    "highs",
    "brackets",
    "infinite",
    "counts",
    "inside",
    "capacity",
    "filled",
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
    ([Threshold(magnitude=1.0, surplus=1)], 0)
    """
    dtype = lists[0].dtype
    for values in lists:
        check_magnitudes(values, dtype)
    size = sum(map(len, lists))
    if not all(1 <= count <= size for count in counts):
        raise ValueError(f"each count must be from 1 to {size}, got {list(counts)}")
    if brackets is not None and all(low <= high for low, high in brackets):
        found, not_finite = _find_inside(lists, counts, brackets, threads)
        if found is not None:
            return found, not_finite
    shift = _width(dtype) - _DIGIT
    digits = _count_digits(lists, 0, shift + _DIGIT, shift, _DIGIT, threads)
    not_finite = int(digits[key_of_magnitude(np.inf, dtype) >> shift :].sum())
    return [_find_threshold(lists, count, digits, threads) for count in counts], not_finite


def _find_inside(
    lists: Sequence[Vector],
    counts: Sequence[int],
    brackets: Sequence[tuple[float, float]],
    threads: int | None,
) -> tuple[list[Threshold] | None, int]:
    """The thresholds if each lies in its bracket, else None; the number of NaN and infinities."""
    dtype = lists[0].dtype
    lows, highs = (
        np.asarray([key_of_magnitude(one, dtype) for one in ends], dtype=unsigned_of(dtype))
        for ends in zip(*brackets, strict=True)
    )
    sizes = np.asarray([len(values) for values in lists], dtype=np.int64)
    first_chunks = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum(-(-sizes // _CHUNK), out=first_chunks[1:])
    # Number of keys above each bracket, by chunk; in the last column, of those not finite.
    larger = np.zeros((first_chunks[-1], len(brackets) + 1), dtype=np.int64)
    inside = np.empty((len(brackets), sizes.sum() // _SHARE + _CHUNK), dtype=dtype)
    filled = np.zeros(len(brackets), dtype=np.int64)
    run_kernel(
        (_BRACKET, _bracket_double),
        dtype,
        threads,
        _BRACKETS,
        addresses=np.asarray([address_of(values) for values in lists], dtype=np.int64),
        sizes=sizes,
        first_chunks=first_chunks,
        lists=len(lists),
        lows=lows,
        highs=highs,
        brackets=len(brackets),
        infinite=key_of_magnitude(np.inf, dtype),
        counts=larger,
        inside=inside,
        capacity=inside.shape[1],
        filled=filled,
    )
    *above, not_finite = larger.sum(axis=0).tolist()
    thresholds = []
    for wanted, more, found, size in zip(counts, above, inside, filled.tolist(), strict=True):
        rank = wanted - more
        if not 1 <= rank <= size <= len(found):
            return None, 0
        magnitudes = np.abs(found[:size])
        position = len(magnitudes) - rank
        magnitudes.partition(position)
        threshold = magnitudes[position]
        surplus = int(np.count_nonzero(magnitudes >= threshold)) - rank
        thresholds.append(Threshold(float(threshold), surplus))
    return thresholds, not_finite


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
            magnitude = np.asarray(key, unsigned_of(dtype)).view(dtype)
            return Threshold(float(magnitude), equal - rank)
        bits = min(_DIGIT, unknown)
        digits = _count_digits(lists, key, unknown, unknown - bits, bits, threads)


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


@njit  # type: ignore[untyped-decorator]
def _count_above(entries: Any, key: Any, unsigned: Any) -> Any:
    count = 0
    for position in range(len(entries)):  # an iterator over the array would not be vectorised
        count += key_of(entries[position], unsigned) > key
    return count


@njit  # type: ignore[untyped-decorator]
def _count_between(entries: Any, low: Any, high: Any, unsigned: Any) -> Any:
    span, count = unsigned(high - low), 0
    for position in range(len(entries)):
        count += unsigned(key_of(entries[position], unsigned) - low) <= span
    return count


@njit  # type: ignore[untyped-decorator]
def _write_between(entries: Any, low: Any, high: Any, out: Any, count: Any, unsigned: Any) -> None:
    """Write the `count` entries whose keys lie in [low, high]."""
    span: Any = unsigned(high - low)
    kept: Any = 0
    start: Any = 0
    while kept < count:
        block = entries[start : start + _BLOCK]
        # Every entry is written, and the next one over it unless it is kept: there is no branch.
        stop, position = kept + _count_between(block, low, high, unsigned), 0
        while kept < stop:
            bits = block[position]
            out[kept] = bits
            kept += np.int64(unsigned(key_of(bits, unsigned) - low) <= span)
            position += 1
        start += _BLOCK


@njit(inline="always")  # type: ignore[untyped-decorator]
def _pack_between(bits: Any, valid: Any, ends: Any, target: Any) -> Any:
    """Write the lanes between two ends to an address; return the address behind them."""
    key = without_sign(bits)
    mask = at_least(key, ends[0]) & at_least(ends[1], key) & valid
    if mask:
        found = count(mask)
        store(pack(bits, mask), target, first_lanes(found))
        target += LANE_BYTES * found
    return target


@njit  # type: ignore[untyped-decorator]
def _write_between_lanes(
    entries: Any, low: Any, high: Any, out: Any, number: Any, unsigned: Any
) -> None:
    """:func:`_write_between` with AVX-512."""
    ends = splat(np.int32(low)), splat(np.int32(high))
    source, target, size = entries.ctypes.data, np.int64(out.ctypes.data), len(entries)
    whole = size - size % LANES
    for first in range(0, whole, LANES):
        target = _pack_between(load(source + LANE_BYTES * first, EVERY), EVERY, ends, target)
    valid = first_lanes(size - whole)
    _pack_between(load(source + LANE_BYTES * whole, valid), valid, ends, target)


@njit  # type: ignore[untyped-decorator]
def _bracket(address: Any, unsigned: Any, in_lanes: Any) -> None:
    """Count keys above brackets, write those inside; `in_lanes` is True for AVX-512, or None."""
    arguments = carray(as_pointer(address), 1, _BRACKETS)[0]
    addresses = array_at(arguments.addresses, arguments.lists, np.int64)
    sizes = array_at(arguments.sizes, arguments.lists, np.int64)
    first_chunks = array_at(arguments.first_chunks, arguments.lists + 1, np.int64)
    brackets, capacity = arguments.brackets, arguments.capacity
    lows = array_at(arguments.lows, brackets, unsigned)
    highs = array_at(arguments.highs, brackets, unsigned)
    chunks = first_chunks[-1]
    counts = carray(as_pointer(arguments.counts), (chunks, brackets + 1), np.int64)
    inside = carray(as_pointer(arguments.inside), (brackets, capacity), unsigned)
    while True:
        chunk = fetch_add(address)
        if chunk >= chunks:
            break
        number = np.searchsorted(first_chunks, chunk, side="right") - 1
        start = (chunk - first_chunks[number]) * _CHUNK
        values = array_at(addresses[number], sizes[number], unsigned)
        entries = values[start : min(start + _CHUNK, len(values))]
        counts[chunk, brackets] = _count_above(entries, unsigned(arguments.infinite - 1), unsigned)
        for bracket in range(brackets):
            low, high = lows[bracket], highs[bracket]
            counts[chunk, bracket] = _count_above(entries, high, unsigned)
            size = _count_between(entries, low, high, unsigned)
            place = fetch_add_many(arguments.filled + 8 * bracket, size)
            if place + size <= capacity:
                out = inside[bracket, place : place + size]
                if in_lanes is None:
                    _write_between(entries, low, high, out, size, unsigned)
                else:
                    _write_between_lanes(entries, low, high, out, size, unsigned)


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _count_single(address: Any) -> None:
    _count(address, np.uint32)


@kernel(_KERNEL)
def _count_double(address: Any) -> None:
    _count(address, np.uint64)


@kernel(_KERNEL)
def _bracket_single(address: Any) -> None:
    _bracket(address, np.uint32, None)


@kernel(_KERNEL)
def _bracket_packed(address: Any) -> None:
    _bracket(address, np.uint32, True)


@kernel(_KERNEL)
def _bracket_double(address: Any) -> None:
    _bracket(address, np.uint64, None)


_BRACKET = _bracket_packed if HAS_LANES else _bracket_single
