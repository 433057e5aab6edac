"""The order in which the kernels visit the entries of a sparse matrix."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from topkast.kernels._arrange import arrange, arrange_rows
from topkast.kernels.runtime._arguments import fill, record_of
from topkast.kernels.runtime._pool import default_threads
from topkast.kernels.runtime._vector import AHEAD

Vector = np.ndarray[Any, Any]

LAYOUT = record_of(
    "chunks",
    "blocks",
    "block",
    "rows",
    "width",
    "pitch",
    "columns",
    "value_index",
    "chunk_rows",
    "chunk_entries",
    "block_segments",
    "segment_rows",
    "segment_lengths",
    "segment_starts",
)

_MIN_BLOCK = 96  # columns: their rows of a tile of 128 floats fill a first cache of 48 KiB
_MAX_BLOCK = (1 << 16) - 1  # segments are no longer, and a uint16 holds their length
_MAX_CHUNK = 1 << 16  # rows that a uint16 can tell apart
_SEGMENT = 12  # entries that a segment should have at least, for its loop to be worth starting
_ROW_SEGMENT = 20  # the same where they are summed in groups, and lie apart from the segment before
_CHUNK = 512  # rows at most, whose part of the output stays in the second cache
_CHUNKS = 4  # for each thread, at least: some have more to do than others


@dataclass(frozen=True, eq=False)
class Segments:
    """Entries of a sparse matrix (`rows` × `width`), cut into segments for the caches.

    The rows are cut into chunks, which threads take one by one; the columns into blocks. A segment
    holds the entries of one row inside one block. Chunk by chunk and block by block the segments
    follow each other, the short ones first: so the rows of the other matrix that a block needs stay
    in the first cache, and the length of a loop is that of the loop before.

    Attributes
    ----------
    chunk_rows
        First row of each chunk; int32 (chunks + 1,).
    chunk_entries
        First entry of each chunk; int32 (chunks + 1,).
    block_segments
        First segment of each block of each chunk; int32 (chunks · blocks + 1,).
    segment_rows
        Row of each segment, counted from the first one of its chunk; uint16 (segments,).
    segment_lengths
        Entries of each segment; uint16 (segments,).
    block
        Columns of a block.
    rows, width
        Size of the matrix.
    """

    chunk_rows: Vector
    chunk_entries: Vector
    block_segments: Vector
    segment_rows: Vector
    segment_lengths: Vector
    block: int
    rows: int
    width: int

    @cached_property
    def chunk(self) -> int:
        """Rows of the largest chunk."""
        return int(self.chunk_rows[1]) if self.rows else 0

    @property
    def blocks(self) -> int:
        """Number of blocks of columns."""
        return -(-max(self.width, 1) // self.block)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that the layout does not share with others."""
        arrays = (getattr(self, field.name) for field in fields(self))
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))

    @cached_property
    def _record(self) -> Vector:
        """What the kernels read: sizes and addresses."""
        absent = dict.fromkeys(("pitch", "columns", "value_index", "segment_starts"), 0)
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        values = absent | known | {"chunks": len(self.chunk_rows) - 1, "blocks": self.blocks}
        return fill(LAYOUT, **{name: values[name] for name in LAYOUT.names or ()})

    def __reduce__(self) -> Any:  # a copy has other addresses
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, eq=False)
class RowLayout(Segments):
    """A layout of entries that the compact vector holds by row, then by column.

    It keeps nothing for each entry: their values are runs of the compact vector, and their columns
    are read where they are anyway.

    Attributes
    ----------
    segment_starts
        Position in the compact vector of the first entry of each segment; int32 (segments,).
    columns
        Of each entry of the compact vector, ``row · pitch + column``; int32, not copied.
    pitch
        0 where columns are given as they are, or the width where they are flat indices.
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
        """Position in the compact vector behind the last entry."""
        return int(self.chunk_entries[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, without `columns`."""
        return super().nbytes - self.columns.nbytes

    @cached_property
    def cut(self) -> tuple[Any, ...]:
        """Equal for layouts that are cut into the same chunks and blocks."""
        return self.rows, self.width, self.block, self.pitch, self.chunk_rows.tobytes()

    def check(self) -> None:
        """Raise ValueError if someone wrote other columns into the array that was given."""
        last = self.pitch * (self.rows - 1) + self.width
        start, stop = self.start, self.stop
        if stop > start and not (self.columns[start] >= 0 and self.columns[stop - 1] < last):
            raise ValueError(
                "the columns of a layout were overwritten: make a new one for new columns"
            )


@dataclass(frozen=True, eq=False)
class Layout(Segments):
    """A layout of entries that lie anywhere in the compact vector, such as those of a transpose.

    Attributes
    ----------
    value_index
        Where each entry is in the compact vector, int32, (entries,) and some zeros, since the
        kernels look ahead.
    columns
        Column of each entry in its block; uint16 (entries,).
    extent
        Length that the compact vector must have at least.
    """

    value_index: Vector
    columns: Vector
    extent: int

    @property
    def order(self) -> Vector:
        """Where each entry is in the compact vector; int32 (entries,)."""
        return self.value_index[: len(self.columns)]


def make_row_layout(
    columns: Vector,
    row_starts: Vector,
    /,
    *,
    shape: tuple[int, int],
    pitch: int = 0,
    block: int | None = None,
    max_rows: int | None = None,
) -> RowLayout:
    """The layout of entries that the compact vector holds by row, then by column.

    Parameters
    ----------
    columns
        Of each entry of the compact vector, ``row · pitch + column``; int32, contiguous. It is
        kept, not copied, and must not be written to while the layout is used.
    row_starts
        Position in the compact vector of the first entry of each row; integers (rows + 1,). What
        lies outside of them does not belong to the matrix.
    shape
        Of the matrix.
    pitch
        0 where `columns` are columns; the width where they are flat indices.
    block
        Columns of a block; by default enough for segments to be worth their loops.
    max_rows
        Of a chunk; by default few enough for each thread to have several chunks, and for the
        output of one to stay in a cache. No result depends on it.

    Raises
    ------
    TypeError
        For columns that are not int32.
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
        raise ValueError(f"columns must be a contiguous vector, got one of shape {columns.shape}")
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
    entries = int(starts[-1] - starts[0]) if height else 0
    chunks = _chunks(height, max_rows)
    used = row_block(entries, shape) if block is None else block
    if not 1 <= used <= _MAX_BLOCK:
        raise ValueError(f"a block has from 1 to {_MAX_BLOCK} columns, got {used}")
    valid, *arrays = arrange_rows(columns, starts, pitch, width, chunks, used)
    if not valid:
        raise ValueError(f"the columns of a row must ascend in [0, {width})")
    chunk_entries, block_segments, segment_rows, segment_lengths, segment_starts = arrays
    return RowLayout(
        chunks,
        chunk_entries,
        block_segments,
        segment_rows,
        segment_lengths,
        used,
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
    """The layout of a matrix with entries at `rows` and `columns`.

    Parameters
    ----------
    rows, columns
        Place of each entry; int32 (entries,). Those of one row keep their order within a block.
    value_index
        Where each entry is in the compact vector; int32 (entries,).
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
            "each entry has a row, a column and an index of its value: got "
            f"{entries} rows, {len(columns)} columns and {len(value_index)} indices"
        )
    for name, place, size in (("rows", rows, height), ("columns", columns, width)):
        if entries and not 0 <= place.min() <= place.max() < size:
            raise ValueError(f"{name} must lie in [0, {size})")
    if entries and value_index.min() < 0:
        raise ValueError("value_index must not be negative")
    chunks, block = _chunks(height, max_rows), _block(entries, shape, _SEGMENT)
    found = arrange(rows, columns, value_index, chunks, block, width, AHEAD)
    chunk_entries, block_segments, segment_rows, segment_lengths, kept, places = found
    return Layout(
        chunks,
        chunk_entries,
        block_segments,
        segment_rows,
        segment_lengths,
        block,
        height,
        width,
        kept,
        places,
        int(value_index.max(initial=-1)) + 1,
    )


def row_block(entries: int, shape: tuple[int, int]) -> int:
    """Columns of a block of a :class:`RowLayout`, by its number of entries."""
    return _block(entries, shape, _ROW_SEGMENT)


def _block(entries: int, shape: tuple[int, int], segment: int) -> int:
    height, width = shape
    wanted = segment * height * width // entries if entries else width
    return max(_MIN_BLOCK, min(_MAX_BLOCK, wanted))


def _chunks(height: int, max_rows: int | None) -> Vector:
    if max_rows is not None and not 1 <= max_rows <= _MAX_CHUNK:
        raise ValueError(f"max_rows must be positive, and {_MAX_CHUNK} at most, got {max_rows}")
    chunk = max_rows or max(1, min(_CHUNK, height // (_CHUNKS * default_threads())))
    return np.append(np.arange(0, height, chunk, dtype=np.int32), np.int32(height))
