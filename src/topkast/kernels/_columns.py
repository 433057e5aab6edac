"""Rows and columns of a sparse matrix from flat indices of a weight, and panels of columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from topkast.kernels.runtime._arguments import Vector
from topkast.kernels.runtime._compile import compiled
from topkast.kernels.runtime._lanes import (
    EVERY,
    HAS_LANES,
    LANE_BYTES,
    LANES,
    below,
    count,
    first_lanes,
    load,
    splat,
)

_LARGEST = np.iinfo(np.int32).max


def find_columns(
    indices: Vector, /, *, shape: tuple[int, int], groups: int = 1
) -> tuple[Vector, int]:
    """Columns and pitch for :func:`make_row_layout`, from flat indices of a weight.

    Parameters
    ----------
    indices
        Flat indices of entries of a weight (rows, width / groups); int32 or int64.
    shape
        Shape of the matrix, (rows, width).
    groups
        Number of groups of rows; each group has columns of its own.

    Returns
    -------
    columns, pitch
        `indices` itself and the width, if it is contiguous int32 and there is one group; else a
        new int32 array of columns, and 0.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import find_columns
    >>> find_columns(np.asarray([1, 3], np.int32), shape=(2, 2))
    (array([1, 3], dtype=int32), 2)
    >>> find_columns(np.asarray([1, 3], np.int32), shape=(2, 4), groups=2)
    (array([1, 3], dtype=int32), 0)
    """
    height, width = shape
    if indices.dtype == np.int32 and groups == 1 and indices.flags.c_contiguous:
        return indices, width
    group_width = max(width // groups, 1)
    rows = indices // group_width
    first = rows * groups // max(height, 1) * group_width
    return np.ascontiguousarray(indices - rows * group_width + first, dtype=np.int32), 0


def find_row_starts(
    indices: Vector, entries: slice, /, *, shape: tuple[int, int], groups: int = 1
) -> Vector:
    """Position of the first entry of each row, in a slice of ascending indices.

    Parameters
    ----------
    indices, shape, groups
        As for :func:`find_columns`.
    entries
        Slice of `indices`, for example A.

    Returns
    -------
    array
        Positions in `indices`, int64 (rows + 1,); the last one is the end of the slice.

    Raises
    ------
    ValueError
        If the indices in the slice do not ascend, or lie outside of the weight.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import find_row_starts
    >>> find_row_starts(np.asarray([1, 3, 0, 2], np.int32), slice(2, 4), shape=(2, 2))
    array([2, 3, 4])
    """
    height, width = shape[0], shape[1] // groups
    start, stop, _ = entries.indices(len(indices))
    flat = indices[start:stop]
    if len(flat) and not (
        0 <= flat[0] <= flat[-1] < height * width and np.all(flat[1:] > flat[:-1])
    ):
        raise ValueError(f"indices must ascend in [0, {height * width})")
    found: Vector = _locate_rows(np.ascontiguousarray(flat), height, width)
    return found + start


@compiled
def _locate_rows(flat: Vector, height: int, width: int) -> Vector:
    """Position of the first entry of each row, and the end (height + 1,).

    Each is searched from that of the row before on.
    """
    starts = np.empty(height + 1, dtype=np.int64)
    low, row_length = 0, len(flat) // max(height, 1) + 1
    for row in range(height):
        edge, step, high = np.int64(row) * width, row_length, low
        while high < len(flat) and flat[high] < edge:
            low, high, step = high + 1, high + step, 2 * step
        high = min(high, len(flat))
        while low < high:
            middle = (low + high) // 2
            if flat[middle] < edge:
                low = middle + 1
            else:
                high = middle
        starts[row] = low
    starts[height] = len(flat)
    return starts


def rows_and_columns(columns: Vector, pitch: int, row_starts: Vector) -> tuple[Vector, Vector]:
    """Row and column of each entry between the first and the last row start; int32 (entries,)."""
    rows: Any = np.arange(len(row_starts) - 1, dtype=np.int32)
    rows = np.repeat(rows, np.diff(row_starts))
    used = columns[row_starts[0] : row_starts[-1]]
    return rows, used - rows * np.int32(pitch) if pitch else used


@njit  # type: ignore[untyped-decorator]
def _count_row_by_entry(
    columns: Any, first: Any, stop: Any, offset: Any, sizes: Any, panels: Any
) -> Any:
    """Count the entries of one row by panel, and find the first of each.

    The columns are those of the entries from `first` on, less `offset`. Returns the position after
    the last entry of the row, `stop` or before, or -1 if the columns do not ascend.
    """
    width, panel_width = sizes
    counts, starts = panels
    panel, panel_end, previous, start, entry = 0, panel_width, -1, first, first
    while entry < stop:
        column = columns[entry] - offset
        if column >= width:
            break
        if column <= previous:
            return -1
        previous = column
        if column >= panel_end:
            if entry > start:
                counts[panel], starts[panel] = entry - start, start
            start, panel = entry, column // panel_width
            panel_end = (panel + 1) * panel_width
        entry += 1
    if entry > start:
        counts[panel], starts[panel] = entry - start, start
    return entry


@njit(inline="always")  # type: ignore[untyped-decorator]
def _load_some(address: Any, entry: Any, size: Any) -> Any:
    """A register of entries of an array of this size, from `entry` on; 0 behind its end."""
    place = address + LANE_BYTES * entry
    return load(place, EVERY) if entry + LANES <= size else load(place, first_lanes(size - entry))


@njit  # type: ignore[untyped-decorator]
def _count_row_in_lanes(
    columns: Any, first: Any, stop: Any, offset: Any, sizes: Any, panels: Any
) -> Any:
    """:func:`_count_row_by_entry`, which compares a register of columns with the end of a panel."""
    width, panel_width = sizes
    counts, starts = panels
    if first < stop and columns[first] < offset:
        return -1
    address, size, entry = np.int64(columns.ctypes.data), len(columns), first
    for panel in range(len(counts)):
        start, end = entry, offset + min((panel + 1) * panel_width, width)
        ends, inside = splat(np.int32(min(end, _LARGEST))), EVERY
        while inside == EVERY and entry < stop:
            inside = below(_load_some(address, entry, size), ends) & first_lanes(stop - entry)
            entry += count(inside)
        if entry > start:
            counts[panel], starts[panel] = entry - start, start
    for pair in range(first, entry - 1, LANES):
        pairs = first_lanes(entry - 1 - pair)
        ascends = below(_load_some(address, pair, size), _load_some(address, pair + 1, size))
        if ascends & pairs != pairs:
            return -1
    return entry


count_row = _count_row_in_lanes if HAS_LANES else _count_row_by_entry
