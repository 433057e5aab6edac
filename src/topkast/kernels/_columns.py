"""From flat indices of a weight to the columns and rows of the matrix that multiplies."""

from __future__ import annotations

from typing import Any

import numpy as np

from topkast.kernels.runtime._arguments import Vector


def find_columns(
    indices: Vector, /, *, shape: tuple[int, int], groups: int = 1
) -> tuple[Vector, int]:
    """Columns and pitch, as :func:`make_row_layout` takes them, of flat indices of a weight.

    Parameters
    ----------
    indices
        Of entries of a weight of ``(rows, width / groups)``; int32 or int64.
    shape
        Of the matrix, (rows, width).
    groups
        Of rows, each of which has columns of its own.

    Returns
    -------
    columns, pitch
        The indices themselves and the width, where int32 holds them and there is one group; else
        new columns, int32, and 0.

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
    own = max(width // groups, 1)
    rows = indices // own
    first = rows * groups // max(height, 1) * own
    return np.ascontiguousarray(indices - rows * own + first, dtype=np.int32), 0


def find_row_starts(
    indices: Vector, part: slice, /, *, shape: tuple[int, int], groups: int = 1
) -> Vector:
    """Position of the first entry of each row, among ascending indices in one part of a vector.

    Parameters
    ----------
    indices, shape, groups
        As for :func:`find_columns`.
    part
        Of `indices`: that of A, say.

    Returns
    -------
    array
        int64 (rows + 1,); the last one is where the part ends.

    Raises
    ------
    ValueError
        If the indices of the part do not ascend, or lie outside of the weight.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import find_row_starts
    >>> find_row_starts(np.asarray([1, 3, 0, 2], np.int32), slice(2, 4), shape=(2, 2))
    array([2, 3, 4])
    """
    height, width = shape[0], shape[1] // groups
    start, stop, _ = part.indices(len(indices))
    own = indices[start:stop]
    if len(own) and not (0 <= own[0] <= own[-1] < height * width and np.all(own[1:] > own[:-1])):
        raise ValueError(f"indices must ascend in [0, {height * width})")
    edges = (np.arange(height, dtype=np.int64) * width).astype(indices.dtype)
    return np.append(np.searchsorted(own, edges) + start, stop)


def rows_and_columns(columns: Vector, pitch: int, row_starts: Vector) -> tuple[Vector, Vector]:
    """Of the entries that lie in rows their row and their column; int32 (entries,) each."""
    rows: Any = np.arange(len(row_starts) - 1, dtype=np.int32)
    rows = np.repeat(rows, np.diff(row_starts))
    part = columns[row_starts[0] : row_starts[-1]]
    return rows, part - rows * np.int32(pitch) if pitch else part
