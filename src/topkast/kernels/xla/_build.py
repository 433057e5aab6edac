"""The handler that builds the vector of layouts from the indices of A and B∖A."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels._columns import _locate_rows
from topkast.kernels._layout_arrays import (
    _ARGUMENTS,
    _count_columns,
    _count_rows,
    _place_entries,
    _sort_columns,
    _sort_rows,
)
from topkast.kernels.runtime._arguments import array_at
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._partition import count_entries, count_segments
from topkast.kernels.runtime._vector import as_pointer, keep
from topkast.kernels.xla._frame import (
    BAD_BUFFERS,
    BAD_INDICES,
    DATA,
    answer_handshake,
    argument,
    fail,
    result,
    size_of,
)
from topkast.kernels.xla._native import link, symbol_address
from topkast.kernels.xla._structure import (
    ACTIVE,
    EXPLORING,
    HEADER_LENGTH,
    MAGIC,
    TRANSPOSED,
    header_at,
    section_at,
)
from topkast.kernels.xla._threads import run, threads_for

_KERNELS = {
    "topkast_xla_count_rows": _count_rows,
    "topkast_xla_sort_rows": _sort_rows,
    "topkast_xla_count_columns": _count_columns,
    "topkast_xla_sort_columns": _sort_columns,
    "topkast_xla_place_entries": _place_entries,
}
_count_rows_address, _sort_rows_address, _count_columns_address, _sort_columns_address, _place = (
    symbol_address(name) for name in _KERNELS
)
_WORDS = len(_ARGUMENTS.names or ())


def link_build() -> None:
    """Link the kernels that this handler runs."""
    for name, function in _KERNELS.items():
        link(name, function.address)


@njit  # type: ignore[untyped-decorator]
def _divide(vector: Any, section: Any) -> Any:
    """Write the first row of each chunk of a layout."""
    chunk_rows = array_at(vector + 4 * section.chunk_rows, section.chunks + 1, np.int32)
    for chunk in range(section.chunks + 1):
        chunk_rows[chunk] = min(chunk * section.chunk_size, section.rows)
    return chunk_rows


@njit  # type: ignore[untyped-decorator]
def _fill_arguments(
    arguments: Any, vector: Any, section: Any, indices: Any, starts: Any, counts: Any
) -> None:
    """Fill the arguments of the kernels that are common to all layouts."""
    arguments.columns, arguments.columns_size = indices.ctypes.data, len(indices)
    arguments.row_starts, arguments.height = starts.ctypes.data, len(starts) - 1
    arguments.panel_width, arguments.panels = section.panel_width, section.panels
    arguments.chunk_rows = vector + 4 * section.chunk_rows
    arguments.chunks = section.chunks
    arguments.chunk_entries = vector + 4 * section.chunk_entries
    arguments.counts = counts.ctypes.data
    arguments.panel_segments = vector + 4 * section.panel_segments
    arguments.segment_rows = vector + 4 * section.segment_rows
    arguments.segment_lengths = vector + 4 * section.segment_lengths
    arguments.segment_starts = vector + 4 * section.segment_starts
    arguments.ordered_index = vector + 4 * section.value_index
    arguments.ordered_columns = vector + 4 * section.columns


@njit  # type: ignore[untyped-decorator]
def _finish_counting(
    arguments: Any, section: Any, counts: Any, chunk_rows: Any, firsts: Any
) -> None:
    """Find the first segment of each chunk, once entries are counted."""
    segments = count_segments(counts, chunk_rows, firsts)
    array_at(arguments.panel_segments, section.chunks * section.panels + 1, np.int32)[:] = segments
    arguments.first_segments, arguments.segments = firsts.ctypes.data, segments


@njit  # type: ignore[untyped-decorator]
def _build_rows(frame: Any, vector: Any, number: Any, indices: Any, starts: Any) -> Any:
    """Whether the entries between the row starts ascend inside their rows; their layout by row."""
    section = section_at(vector, number)
    record = np.zeros(_WORDS, dtype=np.int64)
    arguments = carray(as_pointer(record.ctypes.data), 1, _ARGUMENTS)[0]
    chunk_rows = _divide(vector, section)
    counts = np.zeros((section.panels, section.rows), dtype=np.int32)
    firsts_in_panels = np.zeros((section.panels, section.rows), dtype=np.int32)
    is_valid = np.ones(section.chunks, dtype=np.uint8)
    firsts = np.empty(section.chunks + 1, dtype=np.int32)
    _fill_arguments(arguments, vector, section, indices, starts, counts)
    arguments.width, arguments.pitch = section.width, section.width
    arguments.starts, arguments.is_valid = firsts_in_panels.ctypes.data, is_valid.ctypes.data
    threads = threads_for(frame, section.chunks)
    run(frame, _count_rows_address(), record.ctypes.data, threads)
    keep(record)
    if not is_valid.all():
        return False
    _finish_counting(arguments, section, counts, chunk_rows, firsts)
    run(frame, _sort_rows_address(), record.ctypes.data, threads)
    keep(record)
    keep(firsts)
    keep(counts)
    keep(firsts_in_panels)
    entries = array_at(arguments.chunk_entries, section.chunks + 1, np.int32)
    for chunk in range(section.chunks + 1):
        entries[chunk] = starts[chunk_rows[chunk]]
    return True


@njit  # type: ignore[untyped-decorator]
def _build_columns(frame: Any, vector: Any, indices: Any, starts: Any) -> None:
    """The layout of the transpose, of valid entries."""
    section = section_at(vector, TRANSPOSED)
    record = np.zeros(_WORDS, dtype=np.int64)
    arguments = carray(as_pointer(record.ctypes.data), 1, _ARGUMENTS)[0]
    chunk_rows = _divide(vector, section)
    counts = np.zeros((section.panels, section.rows), dtype=np.int32)
    firsts = np.empty(section.chunks + 1, dtype=np.int32)
    _fill_arguments(arguments, vector, section, indices, starts, counts)
    arguments.width, arguments.pitch = section.rows, section.rows  # of the matrix itself
    arguments.entries = starts[-1] - starts[0]
    run(frame, _count_columns_address(), record.ctypes.data, threads_for(frame, section.panels))
    _finish_counting(arguments, section, counts, chunk_rows, firsts)
    count_entries(
        counts, chunk_rows, array_at(arguments.chunk_entries, section.chunks + 1, np.int32)
    )
    run(frame, _sort_columns_address(), record.ctypes.data, threads_for(frame, section.chunks))
    run(frame, _place(), record.ctypes.data, threads_for(frame, section.panels))
    keep(record)
    keep(counts)
    keep(firsts)


@kernel(types.intp(types.intp))
def build(frame: Any) -> Any:
    r"""(indices (\|B\|,), header) -> vector; the header is that of :func:`plan_structure`."""
    if answer_handshake(frame):
        return 0
    entries, plan, output = argument(frame, 0), argument(frame, 1), result(frame, 0)
    if size_of(plan) != HEADER_LENGTH:
        return fail(frame, BAD_BUFFERS)
    header = header_at(plan[DATA])
    if (
        header.magic != MAGIC
        or header.length != size_of(output)
        or header.backward != size_of(entries)
    ):
        return fail(frame, BAD_BUFFERS)
    vector = output[DATA]
    words = array_at(vector, header.length, np.int32)
    words[:] = 0
    words[:HEADER_LENGTH] = array_at(plan[DATA], HEADER_LENGTH, np.int32)
    indices = array_at(entries[DATA], header.backward, np.int32)
    forward, height, width = header.forward, header.rows, header.width
    active = _locate_rows(indices[:forward], height, width)
    exploring = _locate_rows(indices[forward:], height, width) + forward
    if active[0] != 0 or exploring[0] != forward:  # an index is negative
        return fail(frame, BAD_INDICES)
    if not _build_rows(frame, vector, ACTIVE, indices, active):
        return fail(frame, BAD_INDICES)
    if not _build_rows(frame, vector, EXPLORING, indices, exploring):
        return fail(frame, BAD_INDICES)
    _build_columns(frame, vector, indices, active)
    return 0
