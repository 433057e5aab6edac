"""Layouts: the order in which the kernels visit the entries of a sparse matrix."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from topkast.kernels._layout_arrays import (
    LAYOUT_ARRAYS,
    make_layout_arrays,
    make_row_layout_arrays,
    make_transposed_arrays,
)
from topkast.kernels.runtime._arguments import define_record, fill_record
from topkast.kernels.runtime._partition import (
    MAX_PANEL,
    divide_rows,
    indexed_panel_width,
    row_panel_width,
)
from topkast.kernels.runtime._vector import PREFETCH_DISTANCE

Vector = np.ndarray[Any, Any]

LAYOUT = define_record(
    "chunks",
    "panels",
    "panel_width",
    "rows",
    "width",
    "pitch",
    "columns",
    "value_index",
    "chunk_rows",
    "chunk_entries",
    "panel_segments",
    "segment_rows",
    "segment_lengths",
    "segment_starts",
)

_ABSENT = dict.fromkeys(("pitch", "columns", "value_index", "segment_starts"), 0)


@dataclass(frozen=True, eq=False)
class Segments:
    """Entries of a sparse matrix (`rows` × `width`), cut into segments for the caches.

    Rows are cut into chunks, which threads take one by one; columns are cut into panels. A segment
    holds the entries of one row inside one panel. Segments are ordered by chunk, then by panel,
    then by length. So the rows of the dense matrix that a panel needs stay in the L1 cache, and
    consecutive loops have nearly equal lengths.

    Attributes
    ----------
    chunk_rows
        First row of each chunk; int32 (chunks + 1,).
    chunk_entries
        First entry of each chunk; int32 (chunks + 1,).
    panel_segments
        First segment of each panel of each chunk; int32 (chunks · panels + 1,).
    segment_rows
        Row of each segment, counted from the first row of its chunk; uint16 (segments,).
    segment_lengths
        Number of entries of each segment; uint16 (segments,).
    panel_width
        Columns of a panel.
    rows, width
        Shape of the matrix.
    """

    chunk_rows: Vector
    chunk_entries: Vector
    panel_segments: Vector
    segment_rows: Vector
    segment_lengths: Vector
    panel_width: int
    rows: int
    width: int

    @cached_property
    def max_chunk_rows(self) -> int:
        """Rows of the largest chunk."""
        return int(self.chunk_rows[1]) if self.rows else 0

    @property
    def panels(self) -> int:
        """Number of panels."""
        return -(-max(self.width, 1) // self.panel_width)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that belong to this layout alone."""
        arrays = (getattr(self, field.name) for field in fields(self))
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))

    @cached_property
    def _record(self) -> Vector:
        """Sizes and addresses of arrays for the kernels."""
        sizes = {"chunks": len(self.chunk_rows) - 1, "panels": self.panels}
        values = _ABSENT | self.__dict__ | sizes
        return fill_record(LAYOUT, **{name: values[name] for name in LAYOUT.names or ()})

    def __reduce__(self) -> Any:  # drops `_record`: a copy has other addresses
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, eq=False)
class RowLayout(Segments):
    """A layout of entries that the compact vector holds by row, then by column.

    It stores nothing for each entry: the values of a segment are contiguous in the compact vector,
    and columns are read from an existing array.

    Attributes
    ----------
    segment_starts
        Position in the compact vector of the first entry of each segment; int32 (segments,).
    columns
        ``row · pitch + column`` of each entry of the compact vector; int32, not copied.
    pitch
        0 if `columns` holds columns, the width if it holds flat indices.
    """

    segment_starts: Vector
    columns: Vector
    pitch: int

    @cached_property
    def start(self) -> int:
        """Position in the compact vector of the first entry."""
        return int(self.chunk_entries[0])

    @cached_property
    def stop(self) -> int:
        """Position in the compact vector after the last entry."""
        return int(self.chunk_entries[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, excluding `columns`."""
        return super().nbytes - self.columns.nbytes

    @cached_property
    def partition(self) -> tuple[Any, ...]:
        """Key that is equal for layouts with the same chunks and panels."""
        return self.rows, self.width, self.panel_width, self.pitch, self.chunk_rows.tobytes()

    def check(self) -> None:
        """Raise ValueError if `columns` was overwritten with columns out of range."""
        end = self.pitch * (self.rows - 1) + self.width
        start, stop = self.start, self.stop
        if stop > start and not (self.columns[start] >= 0 and self.columns[stop - 1] < end):
            raise ValueError(
                "the columns of a layout were overwritten: make a new layout for new columns"
            )


@dataclass(frozen=True, eq=False)
class Layout(Segments):
    """A layout of entries in any order of the compact vector, for example of a transpose.

    Attributes
    ----------
    value_index
        Position of each entry in the compact vector, followed by zeros that the kernels prefetch;
        int32.
    columns
        Column of each entry, counted from the first one of its panel; uint16 (entries,).
    required_length
        Minimum length of the compact vector.
    """

    value_index: Vector
    columns: Vector
    required_length: int

    @property
    def order(self) -> Vector:
        """Position of each entry in the compact vector; int32 (entries,)."""
        return self.value_index[: len(self.columns)]


def make_row_layout(
    columns: Vector,
    row_starts: Vector,
    /,
    *,
    shape: tuple[int, int],
    pitch: int = 0,
    panel_width: int | None = None,
    max_rows: int | None = None,
) -> RowLayout:
    """Make the layout of entries that the compact vector holds by row, then by column.

    Parameters
    ----------
    columns
        ``row · pitch + column`` of each entry of the compact vector; int32, contiguous. The layout
        refers to this array without a copy: do not write to it while the layout is used.
    row_starts
        Position in the compact vector of the first entry of each row; integers (rows + 1,).
        Entries before the first and after the last one do not belong to the matrix.
    shape
        Shape of the matrix.
    pitch
        0 if `columns` holds columns, the width if it holds flat indices.
    panel_width
        Columns of a panel; by default wide enough for segments to pay for their loops.
    max_rows
        Maximum rows of a chunk. By default each thread has several chunks, and the output of a
        chunk stays in a cache. Results do not depend on it.

    Raises
    ------
    TypeError
        If `columns` is not int32.
    ValueError
        If the columns of a row do not ascend in [0, width), or another argument is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import make_row_layout
    >>> indices, row_starts = np.asarray([1, 3, 8], np.int32), np.asarray([0, 2, 2, 3])
    >>> layout = make_row_layout(indices, row_starts, shape=(3, 4), pitch=4)
    >>> layout.segment_lengths.sum(), layout.start, layout.stop
    (np.uint64(3), 0, 3)
    """
    height, width = shape
    if columns.dtype != np.int32:
        raise TypeError(f"columns must be int32, got {columns.dtype}")
    if columns.ndim != 1 or not columns.flags.c_contiguous:
        raise ValueError(f"columns must be a contiguous vector, got shape {columns.shape}")
    if pitch not in (0, width):
        raise ValueError(f"pitch must be 0 or the width, {width}, got {pitch}")
    starts = np.ascontiguousarray(row_starts, dtype=np.int64)
    steps = np.diff(starts)
    if starts.shape != (height + 1,) or (
        height and (starts[0] < 0 or starts[-1] > len(columns) or steps.min() < 0)
    ):
        raise ValueError(
            f"row_starts must be {height + 1} ascending positions in [0, {len(columns)}]"
        )
    if panel_width is None:
        entries = int(starts[-1] - starts[0]) if height else 0
        panel_width = row_panel_width(entries, shape)
    if not 1 <= panel_width <= MAX_PANEL:
        raise ValueError(f"panel_width must lie in [1, {MAX_PANEL}], got {panel_width}")
    return _make_row_layout(columns, starts, shape, pitch, panel_width, max_rows, finds_rows=False)


def find_row_layout(
    indices: Vector, entries: slice, /, *, shape: tuple[int, int], panel_width: int
) -> tuple[RowLayout, Vector]:
    """The layout of a slice of flat indices, contiguous int32, and the starts of its rows."""
    height, width = shape
    starts = np.empty(height + 1, dtype=np.int64)
    starts[0], starts[-1], _ = entries.indices(len(indices))
    layout = _make_row_layout(indices, starts, shape, width, panel_width, None, finds_rows=True)
    return layout, starts


def _make_row_layout(
    columns: Vector,
    starts: Vector,
    shape: tuple[int, int],
    pitch: int,
    panel_width: int,
    max_rows: int | None,
    *,
    finds_rows: bool,
) -> RowLayout:
    height, width = shape
    chunk_rows = divide_rows(height, max_rows)
    is_valid, *arrays = make_row_layout_arrays(
        columns, starts, pitch, width, chunk_rows, panel_width, finds_rows=finds_rows
    )
    if not is_valid:
        what, end = ("indices", height * width) if finds_rows else ("the columns of a row", width)
        raise ValueError(f"{what} must ascend in [0, {end})")
    chunk_entries, panel_segments, segment_rows, segment_lengths, segment_starts = arrays
    return RowLayout(
        chunk_rows,
        chunk_entries,
        panel_segments,
        segment_rows,
        segment_lengths,
        panel_width,
        height,
        width,
        segment_starts,
        columns,
        pitch,
    )


def make_layout(
    rows: Vector,
    columns: Vector,
    value_index: Vector,
    /,
    *,
    shape: tuple[int, int],
    max_rows: int | None = None,
) -> Layout:
    """Make the layout of a matrix with entries at `rows` and `columns`.

    Parameters
    ----------
    rows, columns
        Row and column of each entry; int32 (entries,). Entries of one row keep their order within
        a panel.
    value_index
        Position of each entry in the compact vector; int32 (entries,).
    shape, max_rows
        As for :func:`make_row_layout`.

    Raises
    ------
    ValueError
        If the arrays differ in length, an entry lies outside of `shape`, `max_rows` is out of
        range, or an index is negative.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import make_layout
    >>> rows, columns = np.asarray([[0, 0, 2], [1, 3, 0]], np.int32)
    >>> layout = make_layout(rows, columns, np.arange(3, dtype=np.int32), shape=(3, 4))
    >>> layout.order, layout.columns
    (array([0, 1, 2], dtype=int32), array([1, 3, 0], dtype=uint16))
    """
    height, width = shape
    entries = len(rows)
    if not len(columns) == len(value_index) == entries:
        raise ValueError(
            "rows, columns and value_index must have the same length, got "
            f"{entries}, {len(columns)} and {len(value_index)}"
        )
    for name, array, size in (("rows", rows, height), ("columns", columns, width)):
        if entries and not 0 <= array.min() <= array.max() < size:
            raise ValueError(f"{name} must lie in [0, {size})")
    if entries and value_index.min() < 0:
        raise ValueError(f"value_index must not be negative, got {value_index.min()}")
    chunk_rows = divide_rows(height, max_rows)
    panel_width = indexed_panel_width(entries, shape)
    arrays = make_layout_arrays(
        rows, columns, value_index, chunk_rows, panel_width, width, PREFETCH_DISTANCE
    )
    return Layout(
        chunk_rows=chunk_rows,
        panel_width=panel_width,
        rows=height,
        width=width,
        required_length=int(value_index.max(initial=-1)) + 1,
        **dict(zip(LAYOUT_ARRAYS, arrays, strict=True)),
    )


def make_transposed_layout(
    columns: Vector, row_starts: Vector, /, *, shape: tuple[int, int], pitch: int = 0
) -> Layout:
    """Make the layout of the transpose of the matrix of a :class:`RowLayout`.

    Parameters
    ----------
    columns, row_starts, shape, pitch
        As for :func:`make_row_layout`, which checks them.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import make_transposed_layout
    >>> indices, row_starts = np.asarray([1, 3, 9], np.int32), np.asarray([0, 2, 2, 3])
    >>> layout = make_transposed_layout(indices, row_starts, shape=(3, 4), pitch=4)
    >>> layout.order, layout.columns
    (array([0, 2, 1], dtype=int32), array([0, 2, 0], dtype=uint16))
    """
    height, width = shape
    entries = int(row_starts[-1] - row_starts[0])
    chunk_rows = divide_rows(width, None)
    panel_width = indexed_panel_width(entries, (width, height))
    starts = np.ascontiguousarray(row_starts, dtype=np.int64)
    arrays = make_transposed_arrays(
        columns, starts, pitch, width, chunk_rows, panel_width, PREFETCH_DISTANCE
    )
    return Layout(
        chunk_rows=chunk_rows,
        panel_width=panel_width,
        rows=width,
        width=height,
        required_length=int(row_starts[-1]) if entries else 0,
        **dict(zip(LAYOUT_ARRAYS, arrays, strict=True)),
    )
