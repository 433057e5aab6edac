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
    for bits in values:  # no branches, so that a vector of keys is compared at once
        key = key_of(bits, unsigned)
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
def _copy_moved(
    entries: Any, part: Any, keys: Any, ties: Any, moved: Any, starts: Any, unsigned: Any
) -> None:
    """Copy the entries of a list that leave its part; `starts` (4,) become their ends."""
    indices, values, first_source, step = entries
    moved_indices, moved_values, moved_source = moved
    lower, span = _inner_keys_of(part, keys, unsigned)
    for entry in range(len(indices)):
        bits = values[entry]
        key = key_of(bits, unsigned)
        if unsigned(key - lower) < span:
            continue
        target = _find_part(key, indices[entry], keys, ties)
        if target != part:
            position = starts[target]
            starts[target] = position + 1
            moved_indices[position], moved_values[position] = indices[entry], bits
            moved_source[position] = first_source + step * entry


@njit  # type: ignore[untyped-decorator]
def _merge(
    entries: Any,
    part: Any,
    keys: Any,
    ties: Any,
    moved: Any,
    ranges: Any,
    outputs: Any,
    start: Any,
    unsigned: Any,
) -> None:
    """Write one part in one range of the tensor: what stays, and the two moved `ranges`."""
    indices, values, first_source, step = entries
    out_indices, out_values, out_source = outputs
    moved_indices, moved_values, moved_source = moved
    lower, span = _inner_keys_of(part, keys, unsigned)
    first, first_stop, second, second_stop = ranges
    behind = np.iinfo(indices.dtype).max
    first_index = moved_indices[first] if first < first_stop else behind
    second_index = moved_indices[second] if second < second_stop else behind
    entry = 0
    while True:
        moved_index = min(first_index, second_index)
        while entry < len(indices) and indices[entry] < moved_index:
            bits = values[entry]
            key = key_of(bits, unsigned)
            if unsigned(key - lower) < span or (
                _find_part(key, indices[entry], keys, ties) == part
            ):
                out_indices[start], out_values[start] = indices[entry], bits
                out_source[start] = first_source + step * entry
                start += 1
            entry += 1
        if moved_index == behind:
            break
        if first_index < second_index:
            position = first
            first += 1
            first_index = moved_indices[first] if first < first_stop else behind
        else:
            position = second
            second += 1
            second_index = moved_indices[second] if second < second_stop else behind
        out_indices[start], out_values[start] = moved_indices[position], moved_values[position]
        out_source[start] = moved_source[position]
        start += 1


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
    keys: Any,
    ties: Any,
    moved: Any,
    outputs: Any,
    unsigned: Any,
) -> None:
    """Write all parts in one range of the tensor.

    Few entries change their part. These are copied first, list by list. Then each part is what
    stays of its own list, merged with what moved there from the two others.
    """
    for part in range(3):
        entries = entries_of(lists, edges, part, number)
        _copy_moved(entries, part, keys, ties, moved, moved_starts[part], unsigned)
    for part in range(3):
        one, two = (1 if part == 0 else 0), (1 if part == 2 else 2)  # the other lists
        one_stop, two_stop = moved_starts[one, part], moved_starts[two, part]
        ranges = one_stop - counts[one, part], one_stop, two_stop - counts[two, part], two_stop
        entries = entries_of(lists, edges, part, number)
        _merge(entries, part, keys, ties, moved, ranges, outputs, starts[part], unsigned)
    start = starts[3]
    for part in range(3):
        stop = moved_starts[part, 3]
        for position in range(stop - counts[part, 3], stop):
            outputs[0][start], outputs[1][start] = moved[0][position], moved[1][position]
            outputs[2][start] = moved[2][position]
            start += 1
