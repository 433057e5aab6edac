"""The order in which the kernels visit the entries of a sparse matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from topkast.kernels._compile import compiled
from topkast.kernels._pool import default_threads
from topkast.kernels._vector import AHEAD

Vector = np.ndarray[Any, Any]

_LEAST_BLOCK = 96  # columns: their rows of a tile of 128 floats fill a first cache of 48 KiB
_MOST_BLOCK = 1 << 16  # what a uint16 can tell apart
_SEGMENT = 12  # entries that a segment should have at least, for its loop to be worth starting
_RUN = 24  # the same where they are summed in groups
_CHUNK = 512  # rows at most, whose part of the output stays in the second cache
_CHUNKS = 4  # for each thread, at least: some have more to do than others


@dataclass(frozen=True, eq=False)
class Layout:
    """Entries of a sparse matrix (`rows` × `width`), ordered for the caches.

    The rows are cut into chunks, which threads take one by one; the columns into blocks. A segment
    is what a row has in a block. Chunk by chunk and block by block the segments follow each other,
    the short ones first: so all entries are read in one stream, the rows of the other matrix that
    a block needs stay in the first cache, and the length of a loop is that of the loop before.

    Attributes
    ----------
    source
        Where each entry is in the vector that the matrix is compacted to, int32, (entries,) and
        some zeros, since the kernels look ahead; or, where segments are runs of that vector, where
        each of these starts, (segments,).
    columns
        Column of each entry in its block; uint16 (entries,).
    segment_rows, segment_columns, segment_starts
        Row of each segment, first column of its block, and its first entry; int32 (segments,),
        (segments,) and (segments + 1,).
    chunk_rows, chunk_segments
        First row and first segment of each chunk; int32 (chunks + 1,).
    rows, width
        Size of the matrix.
    extent
        Length that the compact vector must have at least.
    """

    source: Vector
    columns: Vector
    segment_rows: Vector
    segment_columns: Vector
    segment_starts: Vector
    chunk_rows: Vector
    chunk_segments: Vector
    rows: int
    width: int
    extent: int

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays)

    @property
    def order(self) -> Vector:
        """Where each entry is in the compact vector; int32 (entries,).

        Raises ValueError for a layout by runs.
        """
        if len(self.source) != len(self.columns) + AHEAD:
            raise ValueError("a layout of arrange(..., runs=True) keeps where runs start alone")
        return self.source[: len(self.columns)]

    @property
    def _arrays(self) -> tuple[Vector, ...]:
        return (
            self.source,
            self.columns,
            self.segment_rows,
            self.segment_columns,
            self.segment_starts,
            self.chunk_rows,
            self.chunk_segments,
        )

    @cached_property
    def _numbers(self) -> tuple[int, ...]:
        """What the kernels are told: sizes and addresses."""
        addresses = [array.ctypes.data for array in self._arrays]
        return len(self.chunk_rows) - 1, self.rows, self.width, *addresses

    def __reduce__(self) -> Any:  # a copy has other addresses
        return type(self), (*self._arrays, self.rows, self.width, self.extent)


def arrange(
    rows: Vector,
    columns: Vector,
    source: Vector,
    /,
    *,
    shape: tuple[int, int],
    runs: bool = False,
    most_rows: int | None = None,
) -> Layout:
    """The layout of a matrix with entries at `rows` and `columns`.

    Parameters
    ----------
    rows, columns
        Place of each entry; int32 (entries,). Those of one row keep their order within a block.
    source
        Where each entry is in the compact vector; int32 (entries,).
    shape
        Of the matrix.
    most_rows
        Of a chunk; by default so few that there are some chunks for each thread, and that the
        output of one stays in a cache. No result depends on it.
    runs
        Keep of `source` where each segment starts, since it is a run of the compact vector: that
        has all entries by row, then by column.

    Returns
    -------
    Layout

    Raises
    ------
    ValueError
        If the arrays differ in length, a place lies outside of `shape`, `most_rows` is not
        positive, or `source` has no such runs.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import arrange
    >>> rows, columns = np.asarray([[0, 0, 2], [1, 3, 0]], np.int32)
    >>> arrange(rows, columns, np.arange(3, dtype=np.int32), shape=(3, 4)).segment_rows
    array([0, 2], dtype=int32)
    """
    height, width = shape
    entries = len(rows)
    if not len(columns) == len(source) == entries:
        raise ValueError(f"{entries} rows, {len(columns)} columns, {len(source)} sources")
    for name, place, size in (("rows", rows, height), ("columns", columns, width)):
        if entries and not 0 <= place.min() <= place.max() < size:
            raise ValueError(f"{name} must lie in [0, {size})")
    if most_rows is not None and most_rows < 1:
        raise ValueError(f"most_rows must be positive, got {most_rows}")
    if entries and source.min() < 0:
        raise ValueError("source must not be negative")
    density = entries / max(height * width, 1)
    wanted = int((_RUN if runs else _SEGMENT) / density) if density else width
    block = max(_LEAST_BLOCK, min(_MOST_BLOCK, wanted))
    chunk = most_rows or max(1, min(_CHUNK, height // (_CHUNKS * default_threads())))
    starts = np.append(np.arange(0, height, chunk, dtype=np.int32), np.int32(height))
    blocks = -(-max(width, 1) // block)
    found: tuple[Vector, ...] = _arrange(rows, columns, source, starts, blocks, block)
    kept, places, segment_rows, segment_columns, segment_starts, chunk_segments = found
    if runs:
        if not _are_runs(kept, segment_starts):
            raise ValueError(
                "runs=True needs entries by row, then by column: the positions of those that one "
                "row has in a block of columns must follow each other in `source`"
            )
        kept = kept[segment_starts[:-1]]
    extent = int(source.max(initial=-1)) + 1
    return Layout(
        kept,
        places,
        segment_rows,
        segment_columns,
        segment_starts,
        starts,
        chunk_segments,
        height,
        width,
        extent,
    )


@compiled
def _are_runs(source: Vector, segment_starts: Vector) -> bool:
    for segment in range(len(segment_starts) - 1):
        for entry in range(segment_starts[segment] + 1, segment_starts[segment + 1]):
            if source[entry] != source[entry - 1] + 1:
                return False
    return True


@compiled
def _arrange(
    rows: Vector, columns: Vector, source: Vector, chunk_rows: Vector, blocks: int, block: int
) -> Any:
    height, chunks = chunk_rows[-1], len(chunk_rows) - 1
    counts = np.zeros((blocks, height), dtype=np.int32)
    for entry in range(len(rows)):
        counts[columns[entry] // block, rows[entry]] += 1
    segments = 0
    for count in counts.flat:
        segments += count > 0
    segment_rows = np.empty(segments, dtype=np.int32)
    segment_columns = np.empty(segments, dtype=np.int32)
    segment_starts = np.empty(segments + 1, dtype=np.int32)
    chunk_segments = np.empty(chunks + 1, dtype=np.int32)
    following = np.empty((blocks, height), dtype=np.int32)  # place of a row's next entry
    segment, first = 0, 0
    for chunk in range(chunks):
        chunk_segments[chunk] = segment
        start, stop = chunk_rows[chunk], chunk_rows[chunk + 1]
        for place in range(blocks):
            for row in start + np.argsort(counts[place, start:stop], kind="mergesort"):
                if counts[place, row]:
                    segment_rows[segment] = row
                    segment_columns[segment] = place * block
                    segment_starts[segment] = first
                    following[place, row] = first
                    first += counts[place, row]
                    segment += 1
    chunk_segments[chunks] = segment
    segment_starts[segment] = first
    ordered_source = np.zeros(len(source) + AHEAD, dtype=np.int32)
    ordered_columns = np.empty(len(columns), dtype=np.uint16)
    for entry in range(len(rows)):
        place, row = columns[entry] // block, rows[entry]
        target = following[place, row]
        ordered_source[target] = source[entry]
        ordered_columns[target] = columns[entry] - place * block
        following[place, row] += 1
    return (
        ordered_source,
        ordered_columns,
        segment_rows,
        segment_columns,
        segment_starts,
        chunk_segments,
    )
