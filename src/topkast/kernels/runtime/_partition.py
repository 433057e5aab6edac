"""Division of a sparse matrix into chunks of rows and panels of columns, for threads and caches."""

from __future__ import annotations

from typing import Any

import numpy as np

from topkast.backends._threads import default_threads
from topkast.kernels.runtime._caches import CACHES, max_chunk_rows, panel_columns
from topkast.kernels.runtime._compile import compiled
from topkast.kernels.runtime._vector import VECTOR_BYTES

Vector = np.ndarray[Any, Any]

_TILE_ROW = 8 * VECTOR_BYTES  # bytes of a row of the widest tile
_MIN_PANEL = panel_columns(CACHES, _TILE_ROW)  # with AVX-512: 96 for 48 KiB, 64 for 32 KiB
MAX_PANEL = (1 << 16) - 1  # columns: the length of a segment fits in a uint16
_MAX_CHUNK = 1 << 16  # rows that a uint16 can number
_SEGMENT_ENTRIES = 12  # average length of a segment, enough for its loop to pay off
_ROW_SEGMENT_ENTRIES = 20  # the same for a RowLayout: summed in groups, scattered in memory
_CHUNK_ROWS = min(max_chunk_rows(CACHES, _TILE_ROW), 512)  # maximum rows of a chunk
_CHUNKS_PER_THREAD = 4  # minimum, since chunks differ in work


def row_panel_width(entries: int, shape: tuple[int, int]) -> int:
    """Default width of the panels of a `RowLayout` with `entries` entries."""
    return _panel_width(entries, shape, _ROW_SEGMENT_ENTRIES)


def indexed_panel_width(entries: int, shape: tuple[int, int]) -> int:
    """Width of the panels of a `Layout` with `entries` entries."""
    return _panel_width(entries, shape, _SEGMENT_ENTRIES)


def _panel_width(entries: int, shape: tuple[int, int], segment_entries: int) -> int:
    height, width = shape
    panel_width = segment_entries * height * width // entries if entries else width
    return max(_MIN_PANEL, min(MAX_PANEL, panel_width))


def chunk_size(height: int, threads: int) -> int:
    """Default number of rows of a chunk."""
    return max(1, min(_CHUNK_ROWS, height // (_CHUNKS_PER_THREAD * threads)))


def divide_rows(height: int, max_rows: int | None) -> Vector:
    """First row of each chunk, int32 (chunks + 1,); the last one is `height`."""
    if max_rows is not None and not 1 <= max_rows <= _MAX_CHUNK:
        raise ValueError(f"max_rows must lie in [1, {_MAX_CHUNK}], got {max_rows}")
    step = max_rows or chunk_size(height, default_threads())
    chunk_rows = np.arange(0, height + step, step, dtype=np.int32)
    chunk_rows[-1] = height
    return chunk_rows


@compiled
def count_segments(counts: Vector, chunk_rows: Vector, first_segments: Vector) -> int:
    """Write the first segment of each chunk, given the entries of each panel and row; the total."""
    total, panels = 0, counts.shape[0]
    for chunk in range(len(chunk_rows) - 1):
        first_segments[chunk] = total
        for panel in range(panels):
            for row in range(chunk_rows[chunk], chunk_rows[chunk + 1]):
                total += counts[panel, row] > 0
    first_segments[-1] = total
    return total


@compiled
def count_entries(counts: Vector, chunk_rows: Vector, chunk_entries: Vector) -> None:
    """Write the first entry of each chunk, given the entries of each panel and row."""
    total, panels = 0, counts.shape[0]
    for chunk in range(len(chunk_rows) - 1):
        chunk_entries[chunk] = total
        for panel in range(panels):
            for row in range(chunk_rows[chunk], chunk_rows[chunk + 1]):
                total += counts[panel, row]
    chunk_entries[-1] = total
