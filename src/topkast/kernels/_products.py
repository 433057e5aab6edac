"""The products, from their arguments to the threads: ``A · X`` and ``dY · Xᵀ`` on B."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels._layout import LAYOUT, Layout, RowLayout, Vector
from topkast.kernels._packing import transpose
from topkast.kernels._sampling import SEGMENTS_AHEAD, sample
from topkast.kernels.runtime._arguments import THREAD, check, empty, slots, start, vector
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._pool import default_threads
from topkast.kernels.runtime._vector import (
    VECTOR_BYTES,
    as_pointer,
    fetch_add,
    indexed_product_1,
    indexed_product_2,
    indexed_product_4,
    indexed_product_8,
    prefetch,
    row_product_1,
    row_product_2,
    row_product_4,
    row_product_8,
)

_BAND = 16  # columns that are transposed at a time: as many pages are written to
_OVERHEAD = 3  # what an entry costs in a tile, besides its vectors, in vectors

_MULTIPLY = slots(
    "layout", "values", "x", "out", "bias", "scratch", "chunk", "tiles", "registers", "batch"
)


def tile_width(columns: int, dtype: Any) -> int:
    """Width of the tiles that a number of columns of activations is packed into.

    A wide tile shares the cost of an entry among many columns; a narrow one wastes fewer columns.

    Parameters
    ----------
    columns
        Number of columns: the batch, times the other axes that a layer is applied along.
    dtype
        float32 or float64.

    Returns
    -------
    int
        A power of two: with AVX-512 from 16 to 128 floats.

    Examples
    --------
    >>> from topkast.kernels import tile_width
    >>> tile_width(1, "float32") <= tile_width(1024, "float32")
    True
    """
    lanes = VECTOR_BYTES // int(np.dtype(dtype).itemsize)
    cost: dict[int, int] = {
        lanes * registers: -(-columns // (lanes * registers)) * (registers + _OVERHEAD)
        for registers in (8, 4, 2, 1)
    }
    return min(cost, key=lambda width: cost[width])


def multiply(
    layout: RowLayout | Layout,
    values: Vector,
    x: Vector,
    out: Vector,
    /,
    *,
    bias: Vector | None = None,
    threads: int | None = None,
) -> None:
    """``out = (W · x + bias)ᵀ`` for a sparse matrix W, or its transpose.

    Parameters
    ----------
    layout
        Of W, whose entries are in `values`.
    values
        Compact vector, float32 or float64.
    x
        Packed activations, (tiles, layout.width, width), contiguous.
    out
        Where the result goes, by row as most libraries keep it: (batch, layout.rows), contiguous,
        with ``batch <= tiles · width``.
    bias
        (layout.rows,)
    threads
        None: as many as PyTorch uses, or one for each core. The result does not depend on it.

    Raises
    ------
    TypeError, ValueError
        For other dtypes and shapes, and for arrays that are not contiguous.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import make_row_layout, multiply, tile_width
    >>> columns = np.arange(2, dtype=np.int32)
    >>> diagonal = make_row_layout(columns, np.arange(3), shape=(2, 2))
    >>> x = np.ones((1, 2, tile_width(1, "float32")), dtype="float32")
    >>> out = np.empty((1, 2), dtype="float32")
    >>> multiply(diagonal, np.asarray([2, 3], dtype="float32"), x, out)
    >>> out
    array([[2., 3.]], dtype=float32)
    """
    tiles, _, width = x.shape
    batch, dtype = len(out), values.dtype
    if batch > tiles * width:
        raise ValueError(f"{batch} rows do not fit {tiles} tiles of {width}")
    check(
        dtype,
        ("values", values, (max(values.size, extent_of(layout)),)),
        ("x", x, (tiles, layout.width, width)),
        ("out", out, (batch, layout.rows)),
        *([] if bias is None else [("bias", bias, (layout.rows,))]),
    )
    if isinstance(layout, RowLayout):
        layout.check()
    threads = threads or default_threads()
    start(
        (_multiply_single, _multiply_double),
        dtype,
        threads,
        _MULTIPLY,
        layout=layout._record,
        values=values,
        x=x,
        out=out,
        bias=0 if bias is None else bias,
        scratch=empty((threads * layout.chunk, width), dtype),
        chunk=layout.chunk,
        tiles=tiles,
        registers=_registers(width, dtype),
        batch=batch,
    )


def sampled_product(
    layout: RowLayout,
    y: Vector,
    x: Vector,
    out: Vector,
    /,
    *,
    other: RowLayout | None = None,
    threads: int | None = None,
) -> None:
    """``out = (y · xᵀ)[row, column]`` for the entries of a layout or of two, and no others.

    Parameters
    ----------
    layout
        The entries wanted.
    y, x
        Packed, (tiles, layout.rows, width) and (tiles, layout.width, width), contiguous.
    out
        Compact vector.
    other
        More entries wanted, of the same compact vector: those of B∖A, say. It must be cut into
        the same chunks and blocks, so that both find the same activations in the caches.
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        As :func:`multiply`.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import make_row_layout, sampled_product, tile_width
    >>> columns = np.arange(2, dtype=np.int32)
    >>> diagonal = make_row_layout(columns, np.arange(3), shape=(2, 2))
    >>> x = np.zeros((1, 2, tile_width(1, "float32")), dtype="float32")
    >>> x[0, :, 0] = [2, 3]
    >>> out = np.empty(2, dtype="float32")
    >>> sampled_product(diagonal, x, x, out)
    >>> out
    array([4., 9.], dtype=float32)
    """
    tiles, _, width = x.shape
    extent = max(extent_of(layout), 0 if other is None else extent_of(other))
    check(
        out.dtype,
        ("x", x, (tiles, layout.width, width)),
        ("y", y, (tiles, layout.rows, width)),
        ("out", out, (max(out.size, extent),)),
    )
    count = _registers(width, out.dtype)
    for one in (layout,) if other is None else (layout, other):
        if not isinstance(one, RowLayout):
            raise TypeError("sampled_product needs layouts of make_row_layout")
        one.check()
    sample(
        layout,
        other,
        threads,
        out,
        columns=layout.columns,
        other_columns=0 if other is None else other.columns,
        pitch=layout.pitch,
        stride=count * VECTOR_BYTES,
        x=x,
        y=y,
        slabs=tiles,
        slab_length=layout.width * count,
        plane_length=count,
        lead=0,
        places=count,
        at_a_time=count,
    )


def extent_of(layout: RowLayout | Layout) -> int:
    """Length that the compact vector must have at least."""
    return layout.stop if isinstance(layout, RowLayout) else layout.extent


def _registers(width: int, dtype: Any) -> int:
    registers, rest = divmod(width * int(dtype.itemsize), VECTOR_BYTES)
    if rest or registers not in (1, 2, 4, 8):
        raise ValueError(f"a tile cannot have {width} columns of {dtype}: see tile_width")
    return registers


@njit  # type: ignore[untyped-decorator]
def _multiply(address: Any, dtype: Any) -> None:
    arguments = carray(as_pointer(address), 1, _MULTIPLY)[0]
    layout = carray(as_pointer(arguments.layout), 1, LAYOUT)[0]
    registers, batch, tiles = arguments.registers, arguments.batch, arguments.tiles
    chunks, rows = layout.chunks, layout.rows
    chunk_rows = vector(layout.chunk_rows, chunks + 1, np.int32)
    bias = vector(arguments.bias, rows, dtype)
    tile_bytes = registers * VECTOR_BYTES
    lanes = tile_bytes // bias.itemsize
    output = carray(as_pointer(arguments.out), (batch, rows), dtype)
    # A thread computes its part of the output in memory of its own, to be transposed.
    thread = fetch_add(address + THREAD)
    own = arguments.scratch + thread * arguments.chunk * tile_bytes
    while True:
        item = fetch_add(address)
        if item >= tiles * chunks:
            break
        tile, chunk = item // chunks, item % chunks
        first, last = chunk_rows[chunk], chunk_rows[chunk + 1]
        part = carray(as_pointer(own), (last - first, lanes), dtype)
        for row in range(first, last):
            part[row - first] = bias[row] if arguments.bias else dtype(0)
        tile_x = arguments.x + tile * layout.width * tile_bytes
        if layout.value_index:
            _add_indexed(layout, chunk, arguments.values, tile_x, registers, own, dtype)
        else:
            _add_rows(layout, chunk, first, arguments.values, tile_x, registers, own, dtype)
        present = min(lanes, batch - tile * lanes)
        for column in range(0, present, _BAND):
            stop = min(present, column + _BAND)
            target = output[tile * lanes + column : tile * lanes + stop, first:last]
            transpose(part[:, column:stop], target)


@njit  # type: ignore[untyped-decorator]
def _add_rows(
    layout: Any,
    chunk: Any,
    first: Any,
    values: Any,
    tile_x: Any,
    registers: Any,
    out: Any,
    dtype: Any,
) -> None:
    """Add the products of a chunk of a RowLayout, whose first row is `first`."""
    zero, stride, columns = dtype(0), registers * VECTOR_BYTES, layout.columns
    row_bytes = layout.pitch * stride
    edges = vector(layout.block_segments, layout.chunks * layout.blocks + 1, np.int32)
    begin, end = edges[chunk * layout.blocks], edges[(chunk + 1) * layout.blocks]
    segment_rows = vector(layout.segment_rows, end, np.uint16)
    lengths = vector(layout.segment_lengths, end, np.uint16)
    starts = vector(layout.segment_starts, end, np.int32)
    for segment in range(begin, end):
        later = min(segment + SEGMENTS_AHEAD, end - 1)
        prefetch(np.int32(0), columns, starts[later], starts[later] + lengths[later])
        prefetch(zero, values, starts[later], starts[later] + lengths[later])
        row, start = segment_rows[segment], starts[segment]
        stop = start + lengths[segment]
        x, target = tile_x - (first + row) * row_bytes, out + row * stride
        if registers == 8:
            row_product_8(zero, values, columns, start, stop, x, stride, target)
        elif registers == 4:
            row_product_4(zero, values, columns, start, stop, x, stride, target)
        elif registers == 2:
            row_product_2(zero, values, columns, start, stop, x, stride, target)
        else:
            row_product_1(zero, values, columns, start, stop, x, stride, target)


@njit  # type: ignore[untyped-decorator]
def _add_indexed(
    layout: Any, chunk: Any, values: Any, tile_x: Any, registers: Any, out: Any, dtype: Any
) -> None:
    """Add the products of a chunk of a Layout."""
    zero, stride = dtype(0), registers * VECTOR_BYTES
    index, columns = layout.value_index, layout.columns
    edges = vector(layout.block_segments, layout.chunks * layout.blocks + 1, np.int32)
    segments = edges[(chunk + 1) * layout.blocks]
    segment_rows = vector(layout.segment_rows, segments, np.uint16)
    lengths = vector(layout.segment_lengths, segments, np.uint16)
    start = np.int64(vector(layout.chunk_entries, layout.chunks + 1, np.int32)[chunk])
    for block in range(layout.blocks):
        at = chunk * layout.blocks + block
        x = tile_x + block * layout.block * stride
        for segment in range(edges[at], edges[at + 1]):
            stop, target = start + lengths[segment], out + segment_rows[segment] * stride
            if registers == 8:
                indexed_product_8(zero, values, index, columns, start, stop, x, target)
            elif registers == 4:
                indexed_product_4(zero, values, index, columns, start, stop, x, target)
            elif registers == 2:
                indexed_product_2(zero, values, index, columns, start, stop, x, target)
            else:
                indexed_product_1(zero, values, index, columns, start, stop, x, target)
            start = stop


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _multiply_single(address: Any) -> None:
    _multiply(address, np.float32)


@kernel(_KERNEL)
def _multiply_double(address: Any) -> None:
    _multiply(address, np.float64)
