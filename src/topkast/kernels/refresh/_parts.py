"""Candidates counted and written by their next part: what :func:`divide` runs on each range.

The parts are A, B∖A, the reserve, and the entries below its bound. `keys` are the smallest keys of
the first three; `ties` are the ascending indices of the entries with the first two keys that do not
belong to A and to B.

Many entries change their part, and which ones no processor can predict. So there are no branches
on values or indices. Each part has a bitmap of the range, with a mark at the index of each of its
entries: the marks before an entry are its rank. So three ascending lists are merged without a
comparison of indices. Where candidates are few among many weights, their indices are compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from topkast.kernels.refresh._magnitudes import key_of

PARTS = 4
_WORD = np.uint64(63)  # a bitmap has words of 64 bits


@njit  # type: ignore[untyped-decorator]
def is_tie(index: Any, ties: Any) -> Any:
    position = np.searchsorted(ties, index)
    return position < len(ties) and ties[position] == index


@njit  # type: ignore[untyped-decorator]
def _find_part(key: Any, index: Any, keys: Any, ties: Any) -> Any:
    """Return 0 for A, 1 for B∖A, 2 for the reserve, 3 for entries below its bound."""
    forward, backward, bound = keys
    if key > forward or (key == forward and not is_tie(index, ties[0])):
        return 0
    if key > backward or (key == backward and not is_tie(index, ties[1])):
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


@intrinsic  # type: ignore[untyped-decorator]
def _count_bits(context: Any, word: Any) -> Any:
    """The number of ones in an unsigned integer of 64 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@njit  # type: ignore[untyped-decorator]
def _mark(indices: Any, first_index: Any, parts: Any, marks: Any, words: Any) -> None:
    """Mark the index of each entry in the bitmap of its part."""
    for k in range(len(indices)):
        index = np.uint64(indices[k] - first_index)
        word = np.uint64(parts[k]) * words + (index >> np.uint64(6))
        marks[word] |= np.uint64(1) << (index & _WORD)


@njit  # type: ignore[untyped-decorator]
def _sum_marks(marks: Any, places: Any, starts: Any, words: Any) -> None:
    """Write the place of the first mark of each word, given that of each part, and move these."""
    for part in range(PARTS):
        place = places[part]
        for word in range(part * words, (part + 1) * words):
            starts[word] = place
            place += np.int64(_count_bits(marks[word]))
        places[part] = place


@njit  # type: ignore[untyped-decorator]
def _write_ranked(
    entries: Any,
    first_index: Any,
    position: Any,
    parts: Any,
    marks: Any,
    starts: Any,
    words: Any,
    outputs: Any,
) -> None:
    """Write each entry of a list at its rank; the first one has this position in B, or -1."""
    indices, values = entries
    out_indices, out_values, out_source, out_survives = outputs
    survives = np.uint8(position >= 0)
    start, step = max(position, 0), np.int64(survives)
    for k in range(len(indices)):
        index = np.uint64(indices[k] - first_index)
        word = np.uint64(parts[k]) * words + (index >> np.uint64(6))
        before = marks[word] & ((np.uint64(1) << (index & _WORD)) - np.uint64(1))
        place = np.uint64(starts[word]) + _count_bits(before)
        out_indices[place], out_values[place] = indices[k], values[k]
        out_source[place], out_survives[place] = start + step * k, survives


@njit  # type: ignore[untyped-decorator]
def _write_merged(lists: Any, positions: Any, parts: Any, places: Any, outputs: Any) -> None:
    """Write the entries of three lists by comparing their indices; `positions` as above."""
    out_indices, out_values, out_source, out_survives = outputs
    heads = np.zeros(3, dtype=np.int64)
    count = 0
    for own in parts:
        count += len(own)
    for _ in range(count):
        first = -1
        for number in range(3):
            head = heads[number]
            if head < len(parts[number]) and (
                first < 0 or lists[number][0][head] < lists[first][0][heads[first]]
            ):
                first = number
        k = heads[first]
        heads[first] += 1
        part = parts[first][k]
        place = places[part]
        places[part] += 1
        out_indices[place], out_values[place] = lists[first][0][k], lists[first][1][k]
        position = positions[first]
        out_source[place] = position + k if position >= 0 else 0
        out_survives[place] = position >= 0


@njit  # type: ignore[untyped-decorator]
def entries_between(lists: Any, bounds: Any) -> Any:
    """The entries of the three lists in one range of the tensor."""
    one, two, three = bounds[0], bounds[1], bounds[2]
    return (
        (lists[0][0][one[0] : one[1]], lists[0][1][one[0] : one[1]]),
        (lists[1][0][two[0] : two[1]], lists[1][1][two[0] : two[1]]),
        (lists[2][0][three[0] : three[1]], lists[2][1][three[0] : three[1]]),
    )


@njit  # type: ignore[untyped-decorator]
def write_parts(
    lists: Any,
    bounds: Any,
    ranges: Any,
    places: Any,
    keys: Any,
    ties: Any,
    outputs: Any,
    unsigned: Any,
) -> None:
    """Write the candidates of consecutive ranges of the tensor, part by part.

    Parameters
    ----------
    lists
        Indices and values of the entries of A, of B∖A and of the reserve.
    bounds
        First entry and end of each list in each range (ranges, 3, 2).
    ranges
        The number of the first range, and the number of words of a bitmap of a range.
    places
        First place in the outputs for each part (4,); moved behind what is written.
    outputs
        Indices, values, positions in B, and whether the entry was in B.
    """
    first, words = ranges
    for number in range(len(bounds)):
        own = bounds[number]
        first_index = (first + number) * words * 64
        positions = own[0, 0], len(lists[0][0]) + own[1, 0], np.int64(-1)
        _write_range(
            entries_between(lists, own),
            positions,
            np.int64(first_index),
            words,
            places,
            keys,
            ties,
            outputs,
            unsigned,
        )


@njit  # type: ignore[untyped-decorator]
def _write_range(
    lists: Any,
    positions: Any,
    first_index: Any,
    words: Any,
    places: Any,
    keys: Any,
    ties: Any,
    outputs: Any,
    unsigned: Any,
) -> None:
    """Write the candidates of one range, whose first index is given.

    The lists are those of this range, and `positions` those of their first entries in B, -1 for the
    reserve.
    """
    one, two = len(lists[0][0]), len(lists[0][0]) + len(lists[1][0])
    every = np.empty(two + len(lists[2][0]), dtype=np.uint8)
    parts = every[:one], every[one:two], every[two:]
    for number in range(3):
        indices, values = lists[number]
        _find_parts(indices, values, keys, ties, parts[number], unsigned)
    if len(every) < words:  # bitmaps would be read for longer than entries are
        _write_merged(lists, positions, parts, places, outputs)
        return
    marks = np.zeros(PARTS * words, dtype=np.uint64)
    starts = np.empty(PARTS * words, dtype=np.int64)
    words_of_part = np.uint64(words)
    for number in range(3):
        _mark(lists[number][0], first_index, parts[number], marks, words_of_part)
    _sum_marks(marks, places, starts, words)
    for number in range(3):
        _write_ranked(
            lists[number],
            first_index,
            positions[number],
            parts[number],
            marks,
            starts,
            words_of_part,
            outputs,
        )
