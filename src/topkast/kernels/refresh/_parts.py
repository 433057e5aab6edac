"""Candidates counted and written by their next part: what :func:`divide` runs on each range.

The parts are A, B∖A, the reserve, and the entries below its bound. `keys` are the smallest keys of
the first three; `ties` are the ascending indices of the entries with the first two keys that do not
belong to A and to B.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from topkast.kernels.refresh._magnitudes import key_of

_BLOCK = 1 << 5  # entries of a list that are skipped together if all of them stay


@njit  # type: ignore[untyped-decorator]
def _is_tie(index: Any, ties: Any) -> Any:
    position = np.searchsorted(ties, index)
    return position < len(ties) and ties[position] == index


@njit  # type: ignore[untyped-decorator]
def _find_part(key: Any, index: Any, keys: Any, ties: Any) -> Any:
    """Return 0 for A, 1 for B∖A, 2 for the reserve, 3 for entries below its bound."""
    forward, backward, bound = keys
    if key > forward or (key == forward and not _is_tie(index, ties[0])):
        return 0
    if key > backward or (key == backward and not _is_tie(index, ties[1])):
        return 1
    return 2 if key >= bound else 3


@njit  # type: ignore[untyped-decorator]
def count_parts(
    indices: Any, values: Any, keys: Any, ties: Any, counts: Any, unsigned: Any
) -> None:
    """Count the entries of a list, in one range of the tensor, that go to each part (4,)."""
    forward, backward, bound = keys
    first, second, third, equal = 0, 0, 0, 0
    for entry in range(len(values)):  # no branches, so that a vector of keys is compared at once
        key = key_of(values[entry], unsigned)
        first += key >= forward
        second += key >= backward
        third += key >= bound
        equal += (key == forward) | (key == backward)
    if equal and (len(ties[0]) or len(ties[1])):
        for entry in range(len(indices)):
            counts[_find_part(key_of(values[entry], unsigned), indices[entry], keys, ties)] += 1
        return
    counts[0], counts[1], counts[2] = first, second - first, third - second
    counts[3] = len(values) - third


@njit  # type: ignore[untyped-decorator]
def _inner_keys_of(part: Any, keys: Any, unsigned: Any) -> Any:
    """First key and number of keys whose entries belong to a part whatever their index is."""
    forward, backward, bound = keys
    if part == 0:
        lower, upper = forward, unsigned(~unsigned(0))
    elif part == 1:
        lower, upper = backward, forward
    else:
        lower, upper = bound, backward
    return unsigned(lower + 1), unsigned(max(upper, unsigned(lower + 1)) - lower - 1)


@njit  # type: ignore[untyped-decorator]
def _count_outside(values: Any, lower: Any, span: Any, unsigned: Any) -> Any:
    """Number of entries whose keys do not alone decide that they stay in their part."""
    count = 0
    for entry in range(len(values)):  # an iterator over the array would not be vectorised
        count += unsigned(key_of(values[entry], unsigned) - lower) >= span
    return count


@njit  # type: ignore[untyped-decorator]
def _copy_moved(
    entries: Any, part: Any, keys: Any, ties: Any, moved: Any, starts: Any, gone: Any, unsigned: Any
) -> None:
    """Copy the entries of a list that leave its part, and write their positions to `gone`.

    `starts` (4,), the first place for those that go to each part, become their ends.
    """
    indices, values, first_source, step = entries
    moved_indices, moved_values, moved_source = moved
    lower, span = _inner_keys_of(part, keys, unsigned)
    count, block = 0, 0
    while count < len(gone) and block < len(indices):
        stop = min(block + _BLOCK, len(indices))
        if _count_outside(values[block:stop], lower, span, unsigned):
            for entry in range(block, stop):
                bits = values[entry]
                key = key_of(bits, unsigned)
                if unsigned(key - lower) < span:
                    continue
                target = _find_part(key, indices[entry], keys, ties)
                if target != part:
                    place = starts[target]
                    starts[target] = place + 1
                    moved_indices[place], moved_values[place] = indices[entry], bits
                    moved_source[place] = first_source + step * entry
                    gone[count] = entry
                    count += 1
        block = stop


@njit  # type: ignore[untyped-decorator]
def _find_place(indices: Any, index: Any, start: Any) -> Any:
    """Position of the first of the ascending indices that is larger, at `start` or behind it."""
    step, low, high = 8, start, start
    while high < len(indices) and indices[high] < index:
        low, high, step = high + 1, high + step, 2 * step
    high = min(high, len(indices))
    while low < high:
        middle = (low + high) >> 1
        if indices[middle] < index:
            low = middle + 1
        else:
            high = middle
    return low


@njit  # type: ignore[untyped-decorator]
def _copy(entries: Any, out: Any) -> None:
    for k in range(len(out)):
        out[k] = entries[k]


@njit  # type: ignore[untyped-decorator]
def _copy_kept(
    entries: Any, entry: Any, stop: Any, gone: Any, leaving: Any, outputs: Any, start: Any
) -> Any:
    """Copy the entries of a list from one position to another, without those that leave.

    Returns the next place in the outputs, and the number of entries that have left.
    """
    indices, values, first_source, step = entries
    out_indices, out_values, out_source = outputs
    while entry < stop:
        leaves = leaving < len(gone) and gone[leaving] < stop
        length = (gone[leaving] if leaves else stop) - entry
        stop_out, stop_in = start + length, entry + length
        _copy(indices[entry:stop_in], out_indices[start:stop_out])
        _copy(values[entry:stop_in], out_values[start:stop_out])
        numbers, first = out_source[start:stop_out], first_source + step * entry
        for k in range(length):
            numbers[k] = first + step * k
        start, entry = start + length, entry + length
        if leaves:
            entry, leaving = entry + 1, leaving + 1
    return start, leaving


@njit  # type: ignore[untyped-decorator]
def _merge(entries: Any, gone: Any, moved: Any, ranges: Any, outputs: Any, start: Any) -> None:
    """Write one part in one range of the tensor: what stays, and the two moved `ranges`."""
    out_indices, out_values, out_source = outputs
    moved_indices, moved_values, moved_source = moved
    first, first_stop, second, second_stop = ranges
    indices, entry, leaving = entries[0], 0, 0
    while first < first_stop or second < second_stop:
        if second == second_stop or (
            first < first_stop and moved_indices[first] < moved_indices[second]
        ):
            place, first = first, first + 1
        else:
            place, second = second, second + 1
        stop = _find_place(indices, moved_indices[place], entry)
        start, leaving = _copy_kept(entries, entry, stop, gone, leaving, outputs, start)
        entry = stop
        out_indices[start], out_values[start] = moved_indices[place], moved_values[place]
        out_source[start] = moved_source[place]
        start += 1
    _copy_kept(entries, entry, len(indices), gone, leaving, outputs, start)


@njit  # type: ignore[untyped-decorator]
def entries_of(lists: Any, edges: Any, part: Any, number: Any) -> Any:
    """Indices and values of a list in one range, its first position in B, and the step there."""
    first, stop = edges[part, number], edges[part, number + 1]
    indices, values = lists[part]
    source, step = (-1, 0) if part == 2 else (first + (len(lists[0][0]) if part == 1 else 0), 1)
    return indices[first:stop], values[first:stop], source, step


@njit  # type: ignore[untyped-decorator]
def write_parts(
    lists: Any,
    edges: Any,
    number: Any,
    counts: Any,
    starts: Any,
    moved_starts: Any,
    gone_starts: Any,
    keys: Any,
    ties: Any,
    moved: Any,
    gone: Any,
    inside: Any,
    outside: Any,
    unsigned: Any,
) -> None:
    """Write all parts in one range of the tensor: A and B∖A to `inside`, the others to `outside`.

    Few entries change their part. These are copied first, list by list. Then each part is what
    stays of its own list, run by run, merged with what moved there from the two others.
    """
    for part in range(3):
        entries = entries_of(lists, edges, part, number)
        left = gone[gone_starts[part] : gone_starts[part] + len(entries[0]) - counts[part, part]]
        _copy_moved(entries, part, keys, ties, moved, moved_starts[part], left, unsigned)
    for part in range(3):
        one, two = (1 if part == 0 else 0), (1 if part == 2 else 2)  # the other lists
        one_stop, two_stop = moved_starts[one, part], moved_starts[two, part]
        ranges = one_stop - counts[one, part], one_stop, two_stop - counts[two, part], two_stop
        entries = entries_of(lists, edges, part, number)
        left = gone[gone_starts[part] : gone_starts[part] + len(entries[0]) - counts[part, part]]
        if part < 2:
            _merge(entries, left, moved, ranges, inside, starts[part])
        else:
            _merge(entries, left, moved, ranges, outside, starts[part])
    start = starts[3]
    for part in range(3):
        stop = moved_starts[part, 3]
        for position in range(stop - counts[part, 3], stop):
            outside[0][start], outside[1][start] = moved[0][position], moved[1][position]
            outside[2][start] = moved[2][position]
            start += 1
