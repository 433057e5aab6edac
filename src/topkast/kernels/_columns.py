"""Rows and columns of a sparse matrix from flat indices of a weight."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels.runtime._arguments import Vector, array_at, define_arguments, fill_record
from topkast.kernels.runtime._compile import compiled, kernel
from topkast.kernels.runtime._pool import run
from topkast.kernels.runtime._vector import as_pointer, fetch_add

_ROWS = 1 << 8  # rows that a thread takes at a time
_LOCATE = define_arguments("flat", "size", "height", "width", "first", "starts")


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
    return locate_rows(indices, entries, shape=(height, width))


def locate_rows(indices: Vector, entries: slice, /, *, shape: tuple[int, int]) -> Vector:
    """:func:`find_row_starts` of one group, unchecked."""
    height, width = shape
    start, stop, _ = entries.indices(len(indices))
    starts = np.empty(height + 1, dtype=np.int64)
    flat = np.ascontiguousarray(indices[start:stop])
    if flat.dtype != np.int32:
        found: Vector = _locate_rows(flat, height, width)
        return found + start
    record = fill_record(
        _LOCATE,
        next_item=0,
        next_thread=0,
        flat=flat,
        size=len(flat),
        height=height,
        width=width,
        first=start,
        starts=starts,
    )
    run(_locate, record)
    return starts


@compiled
def _locate_rows(flat: Vector, height: int, width: int) -> Vector:
    """Position of the first entry of each row, and the end (height + 1,)."""
    starts = np.empty(height + 1, dtype=np.int64)
    _locate_some(flat, 0, height, height, width, starts)
    starts[height] = len(flat)
    return starts


@njit  # type: ignore[untyped-decorator]
def _locate_some(flat: Any, first: Any, stop: Any, height: Any, width: Any, starts: Any) -> None:
    """Search the first entry of some rows, from that of the row before on."""
    low = 0
    row_length = len(flat) // max(height, 1) + 1
    for row in range(first, stop):
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


@kernel(types.void(types.intp))
def _locate(address: Any) -> None:
    arguments = carray(as_pointer(address), 1, _LOCATE)[0]
    height = arguments.height
    flat = array_at(arguments.flat, arguments.size, np.int32)
    starts = array_at(arguments.starts, height + 1, np.int64)
    while True:
        first = fetch_add(address) * _ROWS
        if first > height:
            break
        stop = min(first + _ROWS, height)
        _locate_some(flat, first, stop, height, arguments.width, starts)
        for row in range(first, stop):
            starts[row] += arguments.first
        if stop == height:
            starts[height] = arguments.first + len(flat)


def rows_and_columns(columns: Vector, pitch: int, row_starts: Vector) -> tuple[Vector, Vector]:
    """Row and column of each entry between the first and the last row start; int32 (entries,)."""
    rows: Any = np.arange(len(row_starts) - 1, dtype=np.int32)
    rows = np.repeat(rows, np.diff(row_starts))
    used = columns[row_starts[0] : row_starts[-1]]
    return rows, used - rows * np.int32(pitch) if pitch else used
