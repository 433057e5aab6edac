"""The layouts of a sparse matrix as one vector of int32, whose length depends on counts alone.

The vector starts with a header, which holds sizes and the positions of all arrays, and one section
for each layout: the entries of A by row, those of B∖A by row, and those of A by column. Arrays of
segments have their maximum length, of which the kernels read what `panel_segments` refers to. So a
new choice of A and B needs no new shapes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from topkast.backends._threads import CORES
from topkast.kernels._layout import LAYOUT, Vector
from topkast.kernels.runtime._partition import chunk_size, indexed_panel_width, row_panel_width
from topkast.kernels.runtime._vector import PREFETCH_DISTANCE, as_pointer

MAGIC = 0x544B3031  # changes with the format
_ALIGNMENT = 16  # int32 numbers: the length of a cache line

_HEADER_NAMES = "magic", "length", "rows", "width", "forward", "backward"
HEADER = np.dtype([(name, np.int32) for name in (*_HEADER_NAMES, "reserved", "reserved_too")])
_SIZES = "rows", "width", "chunks", "chunk_size", "panels", "panel_width", "segments"
_ARRAYS = (  # positions in the vector
    "chunk_rows",
    "chunk_entries",
    "panel_segments",
    "segment_rows",
    "segment_lengths",
    "segment_starts",
    "value_index",
    "columns",
)
SECTION = np.dtype([(name, np.int32) for name in (*_SIZES, *_ARRAYS, "reserved")])

ACTIVE, EXPLORING, TRANSPOSED = 0, 1, 2
_SECTIONS = 3
_HEADER_BYTES, _SECTION_BYTES = HEADER.itemsize, SECTION.itemsize
HEADER_LENGTH = (_HEADER_BYTES + _SECTIONS * _SECTION_BYTES) // 4


def plan_structure(shape: tuple[int, int], forward: int, backward: int) -> Vector:
    r"""Plan the vector for a matrix of this shape: its header, int32 (header,).

    Parameters
    ----------
    shape
        Shape of the matrix, (rows, width).
    forward, backward
        \|A\| and \|B\|.

    Raises
    ------
    ValueError
        If the positions of the vector do not fit in int32.

    Examples
    --------
    >>> from topkast.kernels.xla import plan_structure
    >>> header = plan_structure((4, 4), 2, 5)
    >>> header[2:6]
    array([4, 4, 2, 5], dtype=int32)
    """
    height, width = shape
    panel_width = row_panel_width(forward, shape)
    sections = [
        (height, width, panel_width, forward),
        (height, width, panel_width, backward - forward),
        (width, height, indexed_panel_width(forward, (width, height)), forward),
    ]
    position, values = HEADER_LENGTH, list[int]()
    for number, section in enumerate(sections):
        sizes, lengths = _plan_section(*section, is_transposed=number == TRANSPOSED)
        values += [sizes[name] for name in _SIZES]
        for name in _ARRAYS:
            position = -(-position // _ALIGNMENT) * _ALIGNMENT
            values.append(position)
            position += lengths.get(name, 0)
        values.append(0)
    if position > np.iinfo(np.int32).max:
        raise ValueError(f"the layouts of a matrix of {height} × {width} do not fit in 8 GiB")
    start = [MAGIC, position, height, width, forward, backward, 0, 0]
    return np.asarray([*start, *values], dtype=np.int32)


def _plan_section(
    rows: int, width: int, panel_width: int, entries: int, *, is_transposed: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of a layout, and lengths of its arrays in int32 numbers."""
    size = chunk_size(rows, CORES)
    chunks, panels = -(-rows // size), -(-max(width, 1) // panel_width)
    segments = min(entries, panels * rows)
    sizes = dict(
        zip(_SIZES, (rows, width, chunks, size, panels, panel_width, segments), strict=True)
    )
    halves = -(-segments // 2)  # of numbers that take two bytes
    lengths = {
        "chunk_rows": chunks + 1,
        "chunk_entries": chunks + 1,
        "panel_segments": chunks * panels + 1,
        "segment_rows": halves,
        "segment_lengths": halves,
    }
    if is_transposed:
        lengths |= {"value_index": entries + PREFETCH_DISTANCE, "columns": -(-entries // 2)}
    else:
        lengths["segment_starts"] = segments
    return sizes, lengths


@njit  # type: ignore[untyped-decorator]
def header_at(vector: Any) -> Any:
    """The header of the vector at an address."""
    return carray(as_pointer(vector), 1, HEADER)[0]


@njit  # type: ignore[untyped-decorator]
def section_at(vector: Any, number: Any) -> Any:
    """A section of the vector at an address."""
    return carray(as_pointer(vector + _HEADER_BYTES + number * _SECTION_BYTES), 1, SECTION)[0]


@njit  # type: ignore[untyped-decorator]
def fill_layout(record: Any, vector: Any, number: Any, indices: Any) -> None:
    """Fill the record of a layout, for the kernels, from a section of the vector."""
    section = section_at(vector, number)
    layout = carray(as_pointer(record), 1, LAYOUT)[0]
    layout.chunks, layout.panels = section.chunks, section.panels
    layout.panel_width = section.panel_width
    layout.rows, layout.width = section.rows, section.width
    layout.chunk_rows = vector + 4 * section.chunk_rows
    layout.chunk_entries = vector + 4 * section.chunk_entries
    layout.panel_segments = vector + 4 * section.panel_segments
    layout.segment_rows = vector + 4 * section.segment_rows
    layout.segment_lengths = vector + 4 * section.segment_lengths
    if number == TRANSPOSED:
        layout.pitch, layout.segment_starts = 0, 0
        layout.columns = vector + 4 * section.columns
        layout.value_index = vector + 4 * section.value_index
    else:
        layout.pitch, layout.value_index = section.width, 0
        layout.columns = indices
        layout.segment_starts = vector + 4 * section.segment_starts
