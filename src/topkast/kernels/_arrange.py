"""Entries sorted into the segments of a layout, in time that grows with their number."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from topkast.kernels.runtime._compile import compiled

Vector = np.ndarray[Any, Any]


@compiled
def arrange_rows(
    columns: Vector, row_starts: Vector, pitch: int, width: int, chunk_rows: Vector, block: int
) -> Any:
    """Whether the columns of each row ascend in [0, width), and the arrays of a RowLayout."""
    height, blocks = len(row_starts) - 1, -(-max(width, 1) // block)
    counts = np.zeros((blocks, height), dtype=np.int32)
    starts = np.empty((blocks, height), dtype=np.int32)
    valid, segments = True, 0
    for row in range(height):
        first, place, end, previous = row_starts[row], 0, block, -1
        for entry in range(row_starts[row], row_starts[row + 1]):
            column = columns[entry] - row * pitch
            valid = valid and previous < column < width
            previous = column
            if column >= end and valid:
                if entry > first:
                    counts[place, row], starts[place, row] = entry - first, first
                    segments += 1
                first, place = entry, column // block
                end = (place + 1) * block
        if row_starts[row + 1] > first:
            counts[place, row], starts[place, row] = row_starts[row + 1] - first, first
            segments += 1
    block_segments, segment_rows, segment_lengths = _order(counts, chunk_rows, segments)
    chunk_entries = np.empty(len(chunk_rows), dtype=np.int32)
    for chunk in range(len(chunk_rows)):
        chunk_entries[chunk] = row_starts[chunk_rows[chunk]]
    segment_starts = np.empty(segments, dtype=np.int32)
    for chunk in range(len(chunk_rows) - 1):
        for place in range(blocks):
            at = chunk * blocks + place
            for segment in range(block_segments[at], block_segments[at + 1]):
                row = chunk_rows[chunk] + segment_rows[segment]
                segment_starts[segment] = starts[place, row]
    return valid, chunk_entries, block_segments, segment_rows, segment_lengths, segment_starts


@compiled
def arrange(
    rows: Vector,
    columns: Vector,
    value_index: Vector,
    chunk_rows: Vector,
    block: int,
    width: int,
    ahead: int,
) -> Any:
    """The arrays of a Layout, with `ahead` zeros behind the indices, which kernels prefetch."""
    height, blocks = chunk_rows[-1], -(-max(width, 1) // block)
    places = np.empty(width, dtype=np.int32)  # a table instead of a division for each entry
    for column in range(width):
        places[column] = column // block
    counts = np.zeros((blocks, height), dtype=np.int32)
    segments = 0
    for entry in range(len(rows)):
        place, row = places[columns[entry]], rows[entry]
        segments += counts[place, row] == 0
        counts[place, row] += 1
    block_segments, segment_rows, segment_lengths = _order(counts, chunk_rows, segments)
    chunk_entries = np.zeros(len(chunk_rows), dtype=np.int32)
    following, first = counts, 0  # from here on: the position of a segment's next entry
    for chunk in range(len(chunk_rows) - 1):
        chunk_entries[chunk] = first
        for place in range(blocks):
            at = chunk * blocks + place
            for segment in range(block_segments[at], block_segments[at + 1]):
                following[place, chunk_rows[chunk] + segment_rows[segment]] = first
                first += segment_lengths[segment]
    chunk_entries[-1] = first
    ordered_index = np.zeros(len(rows) + ahead, dtype=np.int32)
    ordered_columns = np.empty(len(rows), dtype=np.uint16)
    for entry in range(len(rows)):
        place, row = places[columns[entry]], rows[entry]
        target = following[place, row]
        ordered_index[target] = value_index[entry]
        ordered_columns[target] = columns[entry] - place * block
        following[place, row] = target + 1
    return (
        chunk_entries,
        block_segments,
        segment_rows,
        segment_lengths,
        ordered_index,
        ordered_columns,
    )


@njit  # type: ignore[untyped-decorator]
def _order(counts: Vector, chunk_rows: Vector, segments: int) -> Any:
    """The segments of each block of each chunk by length: where they begin, rows and lengths."""
    blocks, chunks = counts.shape[0], len(chunk_rows) - 1
    block_segments = np.empty(chunks * blocks + 1, dtype=np.int32)
    segment_rows = np.empty(segments, dtype=np.uint16)
    segment_lengths = np.empty(segments, dtype=np.uint16)
    longest = 0
    for count in counts.flat:
        longest = max(longest, count)
    following = np.empty(longest + 2, dtype=np.int32)  # by length: where its next segment goes
    first = 0
    for chunk in range(chunks):
        start, stop = chunk_rows[chunk], chunk_rows[chunk + 1]
        for place in range(blocks):
            block_segments[chunk * blocks + place] = first
            following[:] = 0
            for row in range(start, stop):
                following[counts[place, row] + 1] += 1
            following[1] = first
            for length in range(2, longest + 2):
                following[length] += following[length - 1]
            for row in range(start, stop):
                length = counts[place, row]
                if length:
                    segment_rows[following[length]] = row - start
                    segment_lengths[following[length]] = length
                    following[length] += 1
            first = following[longest]
    block_segments[chunks * blocks] = first
    return block_segments, segment_rows, segment_lengths
