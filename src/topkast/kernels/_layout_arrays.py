"""The arrays of layouts, in time linear in the number of entries, on all cores where it pays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels._columns import count_row
from topkast.kernels.runtime._arguments import Vector, array_at, define_arguments, update_record
from topkast.kernels.runtime._compile import compiled, kernel
from topkast.kernels.runtime._partition import count_entries, count_segments
from topkast.kernels.runtime._pool import run
from topkast.kernels.runtime._vector import as_pointer, fetch_add

# What the functions for a Layout return.
LAYOUT_ARRAYS = (
    "chunk_entries",
    "panel_segments",
    "segment_rows",
    "segment_lengths",
    "value_index",
    "columns",
)
_SEGMENTS = "first_segments", "panel_segments", "segment_rows", "segment_lengths", "segments"
_OUTPUTS = "is_valid", *_SEGMENTS, "segment_starts", "ordered_index", "ordered_columns"
_ARGUMENTS = define_arguments(
    "columns",
    "columns_size",
    "row_starts",
    "height",
    "width",
    "pitch",
    "panel_width",
    "panels",
    "chunk_rows",
    "chunks",
    "chunk_entries",
    "entries",
    "counts",
    "starts",
    *_OUTPUTS,
)


def make_row_layout_arrays(
    columns: Vector,
    row_starts: Vector,
    pitch: int,
    width: int,
    chunk_rows: Vector,
    panel_width: int,
    *,
    finds_rows: bool = False,
) -> tuple[Any, ...]:
    """Whether the columns of each row ascend in [0, width), and the arrays of a RowLayout.

    If `finds_rows`, the columns are flat indices, and all `row_starts` but the first and the last
    are written.
    """
    height, panels = len(row_starts) - 1, -(-max(width, 1) // panel_width)
    counts, starts = np.zeros((2, panels, height), dtype=np.int32)
    is_valid = np.ones(len(chunk_rows) - 1, dtype=np.bool_)
    record = _fill(columns, row_starts, width, pitch, panel_width, chunk_rows, counts)
    count_rows = _find_rows if finds_rows else _count_rows
    _run(count_rows, record, starts=starts, is_valid=is_valid)
    segments = _empty_segments(counts, chunk_rows)
    segment_starts = np.empty(segments["segments"], dtype=np.int32)
    _run(_sort_rows, record, **segments, segment_starts=segment_starts)
    chunk_entries = row_starts[chunk_rows].astype(np.int32)
    arrays = (segments[name] for name in _SEGMENTS[1:4])
    return bool(is_valid.all()), chunk_entries, *arrays, segment_starts


def make_transposed_arrays(
    columns: Vector,
    row_starts: Vector,
    pitch: int,
    width: int,
    chunk_rows: Vector,
    panel_width: int,
    prefetch_distance: int,
) -> tuple[Any, ...]:
    """The arrays of the Layout of a transpose, from the columns of valid rows.

    `chunk_rows` and `panel_width` divide the transpose, so that a panel is a range of rows here.
    """
    height, entries = len(row_starts) - 1, int(row_starts[-1] - row_starts[0])
    panels = -(-max(height, 1) // panel_width)
    counts = np.zeros((panels, width), dtype=np.int32)
    record = _fill(columns, row_starts, width, pitch, panel_width, chunk_rows, counts)
    _run(_count_columns, record)
    segments = _empty_segments(counts, chunk_rows)
    chunk_entries = np.empty(len(chunk_rows), dtype=np.int32)
    count_entries(counts, chunk_rows, chunk_entries)
    _run(_sort_columns, record, chunk_entries=chunk_entries, entries=entries, **segments)
    ordered_index = np.empty(entries + prefetch_distance, dtype=np.int32)
    ordered_index[entries:] = 0
    ordered_columns = np.empty(entries, dtype=np.uint16)
    _run(_place_entries, record, ordered_index=ordered_index, ordered_columns=ordered_columns)
    arrays = (segments[name] for name in _SEGMENTS[1:4])
    return chunk_entries, *arrays, ordered_index, ordered_columns


def _fill(
    columns: Vector,
    row_starts: Vector,
    width: int,
    pitch: int,
    panel_width: int,
    chunk_rows: Vector,
    counts: Vector,
) -> Vector:
    """The arguments that all kernels read."""
    record = np.zeros(len(_ARGUMENTS.names or ()), dtype=np.int64)
    update_record(
        record,
        _ARGUMENTS,
        columns=columns,
        columns_size=len(columns),
        row_starts=row_starts,
        height=len(row_starts) - 1,
        width=width,
        pitch=pitch,
        panel_width=panel_width,
        panels=len(counts),
        chunk_rows=chunk_rows,
        chunks=len(chunk_rows) - 1,
        counts=counts,
    )
    return record


def _run(kernel: Any, record: Vector, **values: Any) -> None:
    """Run a kernel on the arguments of a record and these."""
    update_record(record, _ARGUMENTS, **values)
    run(kernel, record)


def _empty_segments(counts: Vector, chunk_rows: Vector) -> dict[str, Any]:
    """Arrays for the segments of each chunk, given the entries of each panel and row."""
    first_segments = np.empty(len(chunk_rows), dtype=np.int32)
    segments = count_segments(counts, chunk_rows, first_segments)
    chunk_panels = (len(chunk_rows) - 1) * len(counts)
    panel_segments = np.full(chunk_panels + 1, segments, dtype=np.int32)
    rows, lengths = np.empty(segments, dtype=np.uint16), np.empty(segments, dtype=np.uint16)
    values = first_segments, panel_segments, rows, lengths, segments
    return dict(zip(_SEGMENTS, values, strict=True))


@njit  # type: ignore[untyped-decorator]
def _read(arguments: Any, rows: Any) -> Any:
    """The columns, row starts, chunks, and counts of the `rows` of a layout in each panel."""
    columns = array_at(arguments.columns, arguments.columns_size, np.int32)
    row_starts = array_at(arguments.row_starts, arguments.height + 1, np.int64)
    chunk_rows = array_at(arguments.chunk_rows, arguments.chunks + 1, np.int32)
    counts = carray(as_pointer(arguments.counts), (arguments.panels, rows), np.int32)
    return columns, row_starts, chunk_rows, counts


@njit  # type: ignore[untyped-decorator]
def _segments_of(arguments: Any) -> Any:
    """First segment of each chunk; first of each panel of it, rows and lengths of all segments."""
    first_segments = array_at(arguments.first_segments, arguments.chunks + 1, np.int32)
    return first_segments, (
        array_at(arguments.panel_segments, arguments.chunks * arguments.panels + 1, np.int32),
        array_at(arguments.segment_rows, arguments.segments, np.uint16),
        array_at(arguments.segment_lengths, arguments.segments, np.uint16),
    )


@njit  # type: ignore[untyped-decorator]
def _sort_chunk(counts: Any, chunk: Any, chunk_rows: Any, first: Any, segments: Any) -> None:
    """Sort the segments of each panel of a chunk by length, from the position `first` on."""
    panels, start, stop = counts.shape[0], chunk_rows[chunk], chunk_rows[chunk + 1]
    panel_segments, segment_rows, segment_lengths = segments
    max_length = 1
    for panel in range(panels):
        for row in range(start, stop):
            max_length = max(max_length, counts[panel, row])
    next_segment = np.empty(max_length + 2, dtype=np.int32)  # next position, by length
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
                position = next_segment[length]
                segment_rows[position], segment_lengths[position] = row - start, length
                next_segment[length] = position + 1
        first = next_segment[max_length]


@njit  # type: ignore[untyped-decorator]
def _segments_in(panel: Any, chunk: Any, counts: Any, first_segments: Any, segments: Any) -> Any:
    """First segment of a panel of a sorted chunk, and the end; the next chunk may be unsorted."""
    panels, panel_segments = counts.shape[0], segments[0]
    number = chunk * panels + panel
    is_last = panel + 1 == panels
    stop = first_segments[chunk + 1] if is_last else panel_segments[number + 1]
    return panel_segments[number], stop


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _count_rows(address: Any) -> None:
    arguments = carray(as_pointer(address), 1, _ARGUMENTS)[0]
    columns, row_starts, chunk_rows, counts = _read(arguments, arguments.height)
    starts = carray(as_pointer(arguments.starts), counts.shape, np.int32)
    is_valid = array_at(arguments.is_valid, arguments.chunks, np.uint8)
    sizes = arguments.width, arguments.panel_width
    while True:
        chunk = fetch_add(address)
        if chunk >= arguments.chunks:
            break
        for row in range(chunk_rows[chunk], chunk_rows[chunk + 1]):
            panels, offset = (counts[:, row], starts[:, row]), row * arguments.pitch
            first, stop = row_starts[row], row_starts[row + 1]
            if count_row(columns, first, stop, offset, sizes, panels) != stop:
                is_valid[chunk] = 0
                break


@kernel(_KERNEL)
def _find_rows(address: Any) -> None:
    """What `_count_rows` does, for flat indices, whose rows it finds."""
    arguments = carray(as_pointer(address), 1, _ARGUMENTS)[0]
    columns, row_starts, chunk_rows, counts = _read(arguments, arguments.height)
    starts = carray(as_pointer(arguments.starts), counts.shape, np.int32)
    is_valid = array_at(arguments.is_valid, arguments.chunks, np.uint8)
    sizes, pitch = (arguments.width, arguments.panel_width), arguments.pitch
    first, stop = row_starts[0], row_starts[arguments.height]
    while True:
        chunk = fetch_add(address)
        if chunk >= arguments.chunks:
            break
        row, last = np.int64(chunk_rows[chunk]), np.int64(chunk_rows[chunk + 1])
        entry = first
        if row:
            entry = first + np.searchsorted(columns[first:stop], np.int64(row * pitch))
        while row < last and entry >= 0:
            if row:
                row_starts[row] = entry
            panels = counts[:, row], starts[:, row]
            entry = count_row(columns, entry, stop, row * pitch, sizes, panels)
            row += 1
        end = stop
        if row < arguments.height:
            end = first + np.searchsorted(columns[first:stop], np.int64(row * pitch))
        is_valid[chunk] = entry == end


@kernel(_KERNEL)
def _sort_rows(address: Any) -> None:
    arguments = carray(as_pointer(address), 1, _ARGUMENTS)[0]
    _, _, chunk_rows, counts = _read(arguments, arguments.height)
    starts = carray(as_pointer(arguments.starts), counts.shape, np.int32)
    segment_starts = array_at(arguments.segment_starts, arguments.segments, np.int32)
    first_segments, segments = _segments_of(arguments)
    segment_rows = segments[1]
    while True:
        chunk = fetch_add(address)
        if chunk >= arguments.chunks:
            break
        _sort_chunk(counts, chunk, chunk_rows, first_segments[chunk], segments)
        for panel in range(arguments.panels):
            first, stop = _segments_in(panel, chunk, counts, first_segments, segments)
            for segment in range(first, stop):
                segment_starts[segment] = starts[panel, chunk_rows[chunk] + segment_rows[segment]]


@kernel(_KERNEL)
def _count_columns(address: Any) -> None:
    arguments = carray(as_pointer(address), 1, _ARGUMENTS)[0]
    columns, row_starts, _, counts = _read(arguments, arguments.width)
    while True:
        panel = fetch_add(address)
        if panel >= arguments.panels:
            break
        first_row = panel * arguments.panel_width
        for row in range(first_row, min(first_row + arguments.panel_width, arguments.height)):
            offset = row * arguments.pitch
            for entry in range(row_starts[row], row_starts[row + 1]):
                counts[panel, np.uint64(columns[entry] - offset)] += 1


@kernel(_KERNEL)
def _sort_columns(address: Any) -> None:
    """Sort the segments of a transpose; the counts become the first position of each segment."""
    arguments = carray(as_pointer(address), 1, _ARGUMENTS)[0]
    _, _, chunk_columns, counts = _read(arguments, arguments.width)
    chunk_entries = array_at(arguments.chunk_entries, arguments.chunks + 1, np.int32)
    first_segments, segments = _segments_of(arguments)
    _, segment_columns, segment_lengths = segments
    while True:
        chunk = fetch_add(address)
        if chunk >= arguments.chunks:
            break
        _sort_chunk(counts, chunk, chunk_columns, first_segments[chunk], segments)
        entry = chunk_entries[chunk]
        for panel in range(arguments.panels):
            first, stop = _segments_in(panel, chunk, counts, first_segments, segments)
            for segment in range(first, stop):
                counts[panel, chunk_columns[chunk] + segment_columns[segment]] = entry
                entry += segment_lengths[segment]


@kernel(_KERNEL)
def _place_entries(address: Any) -> None:
    arguments = carray(as_pointer(address), 1, _ARGUMENTS)[0]
    columns, row_starts, _, positions = _read(arguments, arguments.width)
    ordered_index = array_at(arguments.ordered_index, arguments.entries, np.int32)
    ordered_columns = array_at(arguments.ordered_columns, arguments.entries, np.uint16)
    while True:
        panel = fetch_add(address)
        if panel >= arguments.panels:
            break
        first_row = panel * arguments.panel_width
        for row in range(first_row, min(first_row + arguments.panel_width, arguments.height)):
            offset = row * arguments.pitch
            for entry in range(row_starts[row], row_starts[row + 1]):
                column = np.uint64(columns[entry] - offset)
                target = np.uint64(positions[panel, column])
                positions[panel, column] = target + np.uint64(1)
                ordered_index[target], ordered_columns[target] = entry, row - first_row


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
    by_panel, chunks = counts.reshape(panels, height), len(chunk_rows) - 1
    segments = (
        np.empty(chunks * panels + 1, dtype=np.int32),
        np.empty(np.count_nonzero(counts), dtype=np.uint16),
        np.empty(np.count_nonzero(counts), dtype=np.uint16),
    )
    panel_segments, segment_rows, segment_lengths = segments
    chunk_entries = np.zeros(len(chunk_rows), dtype=np.int32)
    next_entry, entry = by_panel, 0  # reuses `counts`: position of the next entry of each segment
    panel_segments[0] = 0
    for chunk in range(chunks):
        first_segment = panel_segments[chunk * panels]
        in_chunk = np.count_nonzero(by_panel[:, chunk_rows[chunk] : chunk_rows[chunk + 1]])
        _sort_chunk(by_panel, chunk, chunk_rows, first_segment, segments)
        panel_segments[(chunk + 1) * panels] = first_segment + in_chunk
        chunk_entries[chunk] = entry
        for panel in range(panels):
            number = chunk * panels + panel
            for segment in range(panel_segments[number], panel_segments[number + 1]):
                next_entry[panel, chunk_rows[chunk] + segment_rows[segment]] = entry
                entry += segment_lengths[segment]
    chunk_entries[-1] = entry
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
