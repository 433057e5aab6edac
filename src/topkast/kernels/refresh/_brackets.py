"""Thresholds inside of brackets, in which they are expected: one pass over the magnitudes.

It counts the keys above each bracket, and copies those inside, with their positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.backends._candidates import Threshold, threshold_among
from topkast.kernels.refresh._magnitudes import (
    count_inside,
    key_of,
    key_of_magnitude,
    unsigned_of,
    write_inside,
    write_inside_lanes,
)
from topkast.kernels.runtime._arguments import Vector, array_at, define_arguments, run_kernel
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._lanes import (
    EVERY,
    HAS_LANES,
    LANE_BYTES,
    LANES,
    at_least,
    below,
    count,
    first_lanes,
    load,
    splat,
    without_sign,
)
from topkast.kernels.runtime._pool import address_of
from topkast.kernels.runtime._vector import as_pointer, fetch_add, fetch_add_many

_CHUNK = 1 << 13  # entries that a thread takes at a time: they stay in the L1 cache
_SHARE = 1 << 3  # entries for each one that may lie inside a bracket
_BRACKETS = define_arguments(
    "table",
    "lists",
    "keys",
    "brackets",
    "infinite",
    "counts",
    "inside",
    "positions",
    "capacity",
    "filled",
)


def find_inside(
    lists: Sequence[Vector],
    counts: Sequence[int],
    brackets: Sequence[tuple[float, float]],
    threads: int | None,
) -> tuple[list[Threshold] | None, int]:
    """The thresholds if each lies in its bracket, else None; the number of NaN and infinities."""
    dtype, table, total, chunks = lists[0].dtype, [], 0, 0
    for values in lists:
        table.append((address_of(values), len(values), total, chunks))
        total, chunks = total + len(values), chunks - (-len(values) // _CHUNK)
    if total >= 1 << 31:
        return None, 0  # positions are int32
    keys = [[key_of_magnitude(end, dtype) for end in ends] for ends in brackets]
    # Number of keys above each bracket, by chunk; in the last column, of those not finite.
    larger = np.zeros((chunks, len(brackets) + 1), dtype=np.int64)
    inside = np.empty((len(brackets), total // _SHARE + _CHUNK), dtype=dtype)
    positions = np.empty(inside.shape, dtype=np.int32)
    filled = np.zeros(len(brackets), dtype=np.int64)
    run_kernel(
        (_BRACKET, _bracket_double),
        dtype,
        threads,
        _BRACKETS,
        table=np.asarray([*table, (0, 0, total, chunks)], dtype=np.int64),
        lists=len(lists),
        keys=np.asarray(keys, dtype=unsigned_of(dtype)),
        brackets=len(brackets),
        infinite=key_of_magnitude(np.inf, dtype),
        counts=larger,
        inside=inside,
        positions=positions,
        capacity=inside.shape[1],
        filled=filled,
    )
    *above, not_finite = larger.sum(axis=0).tolist()
    thresholds = []
    columns = counts, above, inside, positions, filled.tolist()
    for wanted, more, found, places, size in zip(*columns, strict=True):
        rank = wanted - more
        if not 1 <= rank <= size <= len(found):
            return None, 0
        thresholds.append(threshold_among(np.abs(found[:size]), rank, places))
    return thresholds, not_finite


@njit  # type: ignore[untyped-decorator]
def _count_above(entries: Any, key: Any, unsigned: Any) -> Any:
    count = 0
    for position in range(len(entries)):  # an iterator over the array would not be vectorised
        count += key_of(entries[position], unsigned) > key
    return count


@njit  # type: ignore[untyped-decorator]
def _count_plain(entries: Any, low: Any, high: Any, infinite: Any, unsigned: Any) -> Any:
    """Numbers of keys above a bracket, inside it, and of those that are not finite."""
    return (
        _count_above(entries, high, unsigned),
        count_inside(entries, low, unsigned(high - low), unsigned),
        _count_above(entries, unsigned(infinite - 1), unsigned),
    )


@njit(inline="always")  # type: ignore[untyped-decorator]
def _count_block(bits: Any, valid: Any, ends: Any) -> Any:
    """:func:`_count_plain` for the lanes of a mask; the second number is of all from `low` on."""
    key, (low, high, infinite) = without_sign(bits), ends
    return (
        count(below(high, key) & valid),
        count(at_least(key, low) & valid),
        count(at_least(key, infinite) & valid),
    )


@njit  # type: ignore[untyped-decorator]
def _count_lanes(entries: Any, low: Any, high: Any, infinite: Any, unsigned: Any) -> Any:
    """:func:`_count_plain` in lanes."""
    ends = splat(np.int32(low)), splat(np.int32(high)), splat(np.int32(infinite))
    source, size = entries.ctypes.data, len(entries)
    whole = size - size % LANES
    above, reached, not_finite = 0, 0, 0
    for first in range(0, whole, LANES):
        found = _count_block(load(source + LANE_BYTES * first, EVERY), EVERY, ends)
        above, reached, not_finite = above + found[0], reached + found[1], not_finite + found[2]
    valid = first_lanes(size - whole)
    found = _count_block(load(source + LANE_BYTES * whole, valid), valid, ends)
    above, reached, not_finite = above + found[0], reached + found[1], not_finite + found[2]
    return above, reached - above, not_finite


@njit  # type: ignore[untyped-decorator]
def _bracket(address: Any, unsigned: Any, in_lanes: Any) -> None:
    """Count keys above brackets, write those inside; `in_lanes` is True for lanes, or None."""
    arguments = carray(as_pointer(address), 1, _BRACKETS)[0]
    # Address, size, first position and first chunk of each list, and the ends of the last one.
    table = carray(as_pointer(arguments.table), (arguments.lists + 1, 4), np.int64)
    brackets, capacity = arguments.brackets, arguments.capacity
    keys = carray(as_pointer(arguments.keys), (brackets, 2), unsigned)
    chunks = table[arguments.lists, 3]
    counts = carray(as_pointer(arguments.counts), (chunks, brackets + 1), np.int64)
    inside = carray(as_pointer(arguments.inside), (brackets, capacity), unsigned)
    positions = carray(as_pointer(arguments.positions), (brackets, capacity), np.int32)
    while True:
        chunk = fetch_add(address)
        if chunk >= chunks:
            break
        number = 0
        while table[number + 1, 3] <= chunk:
            number += 1
        start = (chunk - table[number, 3]) * _CHUNK
        values = array_at(table[number, 0], table[number, 1], unsigned)
        entries = values[start : min(start + _CHUNK, len(values))]
        position = table[number, 2] + start
        for bracket in range(brackets):
            low, high = keys[bracket, 0], keys[bracket, 1]
            ends = low, high, unsigned(arguments.infinite)
            if in_lanes is None:
                above, size, not_finite = _count_plain(entries, *ends, unsigned)
            else:
                above, size, not_finite = _count_lanes(entries, *ends, unsigned)
            counts[chunk, bracket], counts[chunk, brackets] = above, not_finite
            place = fetch_add_many(arguments.filled + 8 * bracket, size)
            if size and place + size <= capacity:
                own = slice(place, place + size)
                out = positions[bracket, own], inside[bracket, own]
                span = unsigned(high - low)
                if in_lanes is None:
                    write_inside(entries, position, low, span, *out, unsigned)
                else:
                    write_inside_lanes(entries, position, low, span, *out, True)


_KERNEL = types.void(types.intp)


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
