"""Compiled construction of the arrays of a layout, in time linear in the number of entries."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from topkast.kernels.runtime._compile import compiled

Vector = np.ndarray[Any, Any]


@compiled
def make_row_layout_arrays(
    columns: Vector,
    row_starts: Vector,
    pitch: int,
    width: int,
    chunk_rows: Vector,
    panel_width: int,
) -> Any:
    """Whether the columns of each row ascend in [0, width), and the arrays of a RowLayout."""
    height, panels = len(row_starts) - 1, -(-max(width, 1) // panel_width)
    counts = np.zeros((panels, height), dtype=np.int32)
    starts = np.empty((panels, height), dtype=np.int32)
    is_valid, segments = True, 0
    for row in range(height):
        first, panel, panel_end, previous = row_starts[row], 0, panel_width, -1
        for entry in range(row_starts[row], row_starts[row + 1]):
            column = columns[entry] - row * pitch
            is_valid = is_valid and previous < column < width
            previous = column
            if column >= panel_end and is_valid:
                if entry > first:
                    counts[panel, row], starts[panel, row] = entry - first, first
                    segments += 1
                first, panel = entry, column // panel_width
                panel_end = (panel + 1) * panel_width
        if row_starts[row + 1] > first:
            counts[panel, row], starts[panel, row] = row_starts[row + 1] - first, first
            segments += 1
    panel_segments, segment_rows, segment_lengths = _sort_segments(counts, chunk_rows, segments)
    chunk_entries = np.empty(len(chunk_rows), dtype=np.int32)
    for chunk in range(len(chunk_rows)):
        chunk_entries[chunk] = row_starts[chunk_rows[chunk]]
    segment_starts = np.empty(segments, dtype=np.int32)
    for chunk in range(len(chunk_rows) - 1):
        for panel in range(panels):
            chunk_panel = chunk * panels + panel
            for segment in range(panel_segments[chunk_panel], panel_segments[chunk_panel + 1]):
                row = chunk_rows[chunk] + segment_rows[segment]
                segment_starts[segment] = starts[panel, row]
    return is_valid, chunk_entries, panel_segments, segment_rows, segment_lengths, segment_starts


@compiled
def make_layout_arrays(
    rows: Vector,
    columns: Vector,
    value_index: Vector,
    chunk_rows: Vector,
    panel_width: int,
    width: int,
    prefetch_distance: int,
) -> Any:
    """The arrays of a Layout; `prefetch_distance` zeros follow the indices of values."""
    height, panels, entries = chunk_rows[-1], -(-max(width, 1) // panel_width), len(rows)
    # A cell is a row inside a panel. Tables save a division for each entry. Numbers that cannot be
    # negative are unsigned, because others are checked as indices.
    first_cells, panel_columns = np.empty(width, dtype=np.uint32), np.empty(width, dtype=np.uint16)
    for column in range(width):
        first_cells[column] = column // panel_width * height
        panel_columns[column] = column % panel_width
    counts = np.zeros(panels * height, dtype=np.int32)
    for entry in range(entries):
        first_cell = first_cells[np.uint32(columns[entry])]
        counts[np.uint32(first_cell + np.uint32(rows[entry]))] += 1
    segments = np.count_nonzero(counts)
    by_panel = counts.reshape(panels, height)
    panel_segments, segment_rows, segment_lengths = _sort_segments(by_panel, chunk_rows, segments)
    chunk_entries = np.zeros(len(chunk_rows), dtype=np.int32)
    next_entry, first = by_panel, 0  # reuses `counts`: position of the next entry of each segment
    for chunk in range(len(chunk_rows) - 1):
        chunk_entries[chunk] = first
        for panel in range(panels):
            chunk_panel = chunk * panels + panel
            for segment in range(panel_segments[chunk_panel], panel_segments[chunk_panel + 1]):
                next_entry[panel, chunk_rows[chunk] + segment_rows[segment]] = first
                first += segment_lengths[segment]
    chunk_entries[-1] = first
    ordered_index = np.empty(entries + prefetch_distance, dtype=np.int32)
    ordered_index[entries:] = 0
    ordered_columns = np.empty(entries, dtype=np.uint16)
    for entry in range(entries):
        column_number = np.uint32(columns[entry])
        cell = np.uint32(first_cells[column_number] + np.uint32(rows[entry]))
        target = np.uint32(counts[cell])
        counts[cell] = target + 1
        ordered_index[target] = value_index[entry]
        ordered_columns[target] = panel_columns[column_number]
    return (
        chunk_entries,
        panel_segments,
        segment_rows,
        segment_lengths,
        ordered_index,
        ordered_columns,
    )


@njit  # type: ignore[untyped-decorator]
def _sort_segments(counts: Vector, chunk_rows: Vector, segments: int) -> Any:
    """Sort the segments of each panel of each chunk by length: panel starts, rows and lengths."""
    panels, chunks = counts.shape[0], len(chunk_rows) - 1
    panel_segments = np.empty(chunks * panels + 1, dtype=np.int32)
    segment_rows = np.empty(segments, dtype=np.uint16)
    segment_lengths = np.empty(segments, dtype=np.uint16)
    max_length = 0
    for count in counts.flat:
        max_length = max(max_length, count)
    next_segment = np.empty(max_length + 2, dtype=np.int32)  # next position, by length
    first = 0
    for chunk in range(chunks):
        start, stop = chunk_rows[chunk], chunk_rows[chunk + 1]
        for panel in range(panels):
            panel_segments[chunk * panels + panel] = first
            next_segment[:] = 0
            for row in range(start, stop):
                next_segment[counts[panel, row] + 1] += 1
            next_segment[1] = first
            for length in range(2, max_length + 2):
                next_segment[length] += next_segment[length - 1]
            for row in range(start, stop):
                length = counts[panel, row]
                if length:
                    segment_rows[next_segment[length]] = row - start
                    segment_lengths[next_segment[length]] = length
                    next_segment[length] += 1
            first = next_segment[max_length]
    panel_segments[chunks * panels] = first
    return panel_segments, segment_rows, segment_lengths
