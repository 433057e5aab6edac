"""Candidates counted and written by their next part: what :func:`divide` runs on each range.

The parts are A, B∖A, the reserve, and the entries below its bound. `keys` are the smallest keys of
the first three; `ties` are the ascending indices of the entries with the first two keys that do not
belong to A and to B.

Many entries change their part, and which ones no processor can predict. So there are no branches
on values or indices: a block of candidates is merged, divided, and written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from topkast.kernels.refresh._magnitudes import key_of

_BLOCK = 1 << 9  # candidates merged together: what is known of them stays in the L1 cache


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
def _merge(
    active: Any, exploring: Any, reserve: Any, positions: Any, order: Any, indices: Any
) -> None:
    """Merge ``len(order)`` entries of three lists of ascending indices; no list ends on the way.

    `order` receives the position of each entry: in the vector that holds the first two lists, or
    the complement of its position in the third. `positions` (3,) are the next ones.
    """
    first, second, third = positions[0], positions[1], positions[2]
    for k in range(len(order)):
        one, two = active[np.uint64(first)], exploring[np.uint64(second)]
        three = reserve[np.uint64(third)]
        one_first, two_first = np.int64(one < two), np.int64(two < three)
        from_one = one_first & np.int64(one < three)
        from_two = two_first & (one_first ^ 1)
        from_three = 1 - from_one - from_two
        indices[k] = min(one, two, three)
        order[k] = first & -from_one | second & -from_two | ~third & -from_three
        first, second, third = first + from_one, second + from_two, third + from_three
    positions[0], positions[1], positions[2] = first, second, third


@njit  # type: ignore[untyped-decorator]
def _gather(order: Any, inside: Any, reserve: Any, out: Any) -> None:
    """Read the value at each position of `order`, in the vector that the position counts in."""
    for k in range(len(order)):
        position = order[k]
        from_inside = position >= 0
        one = inside[np.uint64(position if from_inside else 0)]
        other = reserve[np.uint64(0 if from_inside else ~position)]
        out[k] = one if from_inside else other


@njit  # type: ignore[untyped-decorator]
def _count_equal(values: Any, keys: Any, unsigned: Any) -> Any:
    """Number of entries whose key is the smallest one of A or of B."""
    forward, backward, _ = keys
    count = 0
    for k in range(len(values)):
        key = key_of(values[k], unsigned)
        count += (key == forward) | (key == backward)
    return count


@njit  # type: ignore[untyped-decorator]
def _find_parts(indices: Any, values: Any, keys: Any, ties: Any, parts: Any, unsigned: Any) -> None:
    forward, backward, bound = keys
    if (len(ties[0]) or len(ties[1])) and _count_equal(values, keys, unsigned):
        for k in range(len(values)):
            parts[k] = _find_part(key_of(values[k], unsigned), indices[k], keys, ties)
        return
    for k in range(len(values)):
        key = key_of(values[k], unsigned)
        parts[k] = np.uint8(key < forward) + np.uint8(key < backward) + np.uint8(key < bound)


@njit  # type: ignore[untyped-decorator]
def _write(order: Any, indices: Any, values: Any, parts: Any, places: Any, outputs: Any) -> None:
    """Write each entry at the next place of its part."""
    out_indices, out_values, out_source, out_survives = outputs
    for k in range(len(order)):
        part = np.uint64(parts[k])
        place = np.uint64(places[part])
        places[part] = place + np.uint64(1)
        out_indices[place], out_values[place] = indices[k], values[k]
        # A maximum, since a conditional expression would become a branch.
        out_source[place], out_survives[place] = max(order[k], 0), order[k] >= 0


@njit  # type: ignore[untyped-decorator]
def write_parts(
    inside: Any,
    reserve: Any,
    edges: Any,
    places: Any,
    keys: Any,
    ties: Any,
    outputs: Any,
    unsigned: Any,
) -> None:
    """Write the candidates of one range of the tensor, part by part.

    Parameters
    ----------
    inside, reserve
        Indices and values of A and of B∖A behind each other, and of the reserve.
    edges
        First positions in A, B∖A and the reserve, and those behind the last ones; (3, 2).
    places
        First place in the outputs for each part (4,); overwritten.
    outputs
        Indices, values, positions in B, and whether the entry was in B.
    """
    integer = inside[0].dtype.type
    active, exploring, others = inside[0], inside[0], reserve[0]
    inside_values, reserve_values = inside[1], reserve[1]
    if not len(inside_values):  # then nothing of it is used, but it is read
        inside_values = reserve_values
    if not len(reserve_values):
        reserve_values = inside_values
    behind_all = np.full(1, np.iinfo(integer).max, dtype=integer)
    positions, remaining = edges[:, 0].copy(), edges[:, 1] - edges[:, 0]
    order, indices = np.empty(_BLOCK, dtype=np.int32), np.empty(_BLOCK, dtype=integer)
    values, parts = np.empty(_BLOCK, dtype=unsigned), np.empty(_BLOCK, dtype=np.uint8)
    while remaining[0] + remaining[1] + remaining[2] > 0:
        count = np.int64(_BLOCK)
        # A list that has ended is replaced by an index that is larger than all others.
        if remaining[0]:
            count = min(count, remaining[0])
        else:
            active, positions[0] = behind_all, 0
        if remaining[1]:
            count = min(count, remaining[1])
        else:
            exploring, positions[1] = behind_all, 0
        if remaining[2]:
            count = min(count, remaining[2])
        else:
            others, positions[2] = behind_all, 0
        remaining += positions
        _merge(active, exploring, others, positions, order[:count], indices)
        remaining -= positions
        _gather(order[:count], inside_values, reserve_values, values)
        _find_parts(indices, values[:count], keys, ties, parts, unsigned)
        _write(order[:count], indices, values, parts, places, outputs)
