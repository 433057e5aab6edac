"""Rows and columns of a sparse matrix from flat indices of a weight."""

from __future__ import annotations

from typing import Any

import numpy as np

from topkast.kernels.runtime._arguments import Vector
from topkast.kernels.runtime._compile import compiled


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
    starts: Vector = _locate_rows(indices[start:stop], height, width)
    starts += start
    return starts


@compiled
def _locate_rows(flat: Vector, height: int, width: int) -> Vector:
    """Search the first entry of each row, from that of the row before on."""
    starts, low = np.empty(height + 1, dtype=np.int64), 0
    for row in range(height):
        edge, step, high = row * width, 1, low
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
