"""The products, from their arguments to the threads: ``A · X`` and ``dY · Xᵀ`` on B."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels._compile import kernel
from topkast.kernels._layout import Layout, Vector
from topkast.kernels._packing import transpose
from topkast.kernels._pool import default_threads, run
from topkast.kernels._vector import (
    AHEAD,
    VECTOR_BYTES,
    as_pointer,
    dot_products_1,
    dot_products_2,
    dot_products_4,
    dot_products_8,
    row_product_1,
    row_product_2,
    row_product_4,
    row_product_8,
    shifted_dots_1,
    shifted_dots_2,
    shifted_dots_4,
    shifted_dots_8,
    take_ticket,
)

_BAND = 16  # columns that are transposed at a time: as many pages are written to
_OVERHEAD = 3  # what an entry costs in a tile, besides its vectors, in vectors


def tile_width(columns: int, dtype: Any) -> int:
    """Columns of a tile into which so many columns of activations are to be packed.

    A wide one shares what an entry costs among many columns; a narrow one wastes fewer of them.

    Parameters
    ----------
    columns
        Their number: the batch, times what else a layer is applied to.
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
    layout: Layout,
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
        Of W; its ``source`` points into `values`.
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
    >>> from topkast.kernels import arrange, multiply, tile_width
    >>> place = np.arange(2, dtype=np.int32)
    >>> diagonal = arrange(place, place, place, shape=(2, 2))
    >>> x = np.ones((1, 2, tile_width(1, "float32")), dtype="float32")
    >>> out = np.empty((1, 2), dtype="float32")
    >>> multiply(diagonal, np.asarray([2, 3], dtype="float32"), x, out)
    >>> out
    array([[2., 3.]], dtype=float32)
    """
    tiles, _, width = x.shape
    columns = len(out)
    if columns > tiles * width:
        raise ValueError(f"{columns} rows from {tiles} tiles of {width}")
    check(
        values.dtype,
        ("values", values, (max(values.size, layout.extent),)),
        ("x", x, (tiles, layout.width, width)),
        ("out", out, (columns, layout.rows)),
        *([] if bias is None else [("bias", bias, (layout.rows,))]),
    )
    if len(layout.source) != len(layout.columns) + AHEAD:
        raise ValueError("multiply needs a layout of arrange(..., runs=False)")
    chunk = int(layout.chunk_rows[1]) if layout.rows else 0
    count = threads or default_threads()
    scratch = np.empty((count * chunk + 1, width), dtype=values.dtype)
    start(
        _multiply_single if values.dtype == np.float32 else _multiply_double,
        layout,
        (
            tiles,
            _registers(width, values.dtype),
            values,
            x,
            out,
            columns,
            0 if bias is None else bias,
            scratch,
            chunk,
            0,
        ),
        count,
    )


def sampled_product(
    layout: Layout,
    y: Vector,
    x: Vector,
    out: Vector,
    /,
    *,
    threads: int | None = None,
) -> None:
    """``out = (y · xᵀ)[row, column]`` for the entries of a layout, and no others.

    Parameters
    ----------
    layout
        The entries wanted; its segments must be runs of `out` (``arrange(..., runs=True)``).
    y, x
        Packed, (tiles, layout.rows, width) and (tiles, layout.width, width), contiguous.
    out
        Compact vector.
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        As :func:`multiply`.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import arrange, sampled_product, tile_width
    >>> place = np.arange(2, dtype=np.int32)
    >>> diagonal = arrange(place, place, place, shape=(2, 2), runs=True)
    >>> x = np.zeros((1, 2, tile_width(1, "float32")), dtype="float32")
    >>> x[0, :, 0] = [2, 3]
    >>> out = np.empty(2, dtype="float32")
    >>> sampled_product(diagonal, x, x, out)
    >>> out
    array([4., 9.], dtype=float32)
    """
    tiles, _, width = x.shape
    check(
        out.dtype,
        ("x", x, (tiles, layout.width, width)),
        ("y", y, (tiles, layout.rows, width)),
        ("out", out, (max(out.size, layout.extent),)),
    )
    if len(layout.source) != len(layout.segment_rows):
        raise ValueError("sampled_product needs a layout of arrange(..., runs=True)")
    count = _registers(width, out.dtype)
    sample(layout, 0, tiles, layout.width * count, count, 0, count, count, x, y, out, threads)


def sample(layout: Layout, shifts: Any, *arguments: Any) -> None:
    """Run the kernel: the tiles of :func:`sampled_product` are slabs of planes one tile long.

    The arguments are, in vectors where they are lengths: slabs, length of a slab of x, length of a
    plane of y, where its first place is, places, places at a time, x, y, out, and threads.
    """
    *numbers, out, threads = arguments
    kernel = _sample_single if out.dtype == np.float32 else _sample_double
    start(kernel, layout, (shifts, *numbers, out), threads)


def check(dtype: Any, *arrays: tuple[str, Vector, tuple[int, ...]]) -> None:
    """The kernels trust addresses: whatever they get must be as large as they think."""
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"products are of float32 or float64, got {dtype}")
    for name, array, shape in arrays:
        if array.dtype != dtype:
            raise TypeError(f"{name} is {array.dtype}, the compact vector {dtype}")
        if name == "out" and not array.flags.writeable:
            raise ValueError("out is read-only")
        if array.shape != shape or not array.flags.c_contiguous:
            raise ValueError(
                f"{name} must be contiguous and of shape {shape}, got {array.shape} with strides "
                f"{array.strides}"
            )


def _registers(width: int, dtype: Any) -> int:
    registers, rest = divmod(width * int(dtype.itemsize), VECTOR_BYTES)
    if rest or registers not in (1, 2, 4, 8):
        raise ValueError(f"a tile cannot have {width} columns of {dtype}: see tile_width")
    return registers


def start(kernel: Any, layout: Layout, arguments: tuple[Any, ...], threads: int | None) -> None:
    """Hand a kernel numbers and the addresses of arrays, which live until it returns."""
    numbers = [
        argument.ctypes.data if isinstance(argument, np.ndarray) else argument
        for argument in arguments
    ]
    run(kernel, np.asarray([0, *layout._numbers, *numbers], dtype=np.int64), threads)


@njit(inline="always")  # type: ignore[untyped-decorator]
def integers(address: Any, count: Any) -> Any:
    return carray(as_pointer(address), count, np.int32)


@njit  # type: ignore[untyped-decorator]
def _multiply(address: Any, kind: Any) -> None:
    numbers = carray(as_pointer(address), 21, np.int64)
    chunks, rows, width = numbers[1], numbers[2], numbers[3]
    sources, columns = numbers[4], numbers[5]
    tiles, registers, values = numbers[11], numbers[12], numbers[13]
    x, out, extent, bias_at = numbers[14], numbers[15], numbers[16], numbers[17]
    scratch, chunk_size = numbers[18], numbers[19]
    zero = kind(0)
    chunk_rows = integers(numbers[9], chunks + 1)
    chunk_segments = integers(numbers[10], chunks + 1)
    segments = chunk_segments[chunks]
    segment_rows = integers(numbers[6], segments)
    segment_columns = integers(numbers[7], segments)
    starts = integers(numbers[8], segments + 1)
    bias = carray(as_pointer(bias_at), rows, kind)
    size = bias.itemsize
    tile_bytes = registers * VECTOR_BYTES
    lanes = tile_bytes // size
    turned = carray(as_pointer(out), (extent, rows), kind)
    # A thread computes its part of the output in memory of its own, to be transposed.
    slot = take_ticket(address + 20 * 8)
    own = -(-scratch // VECTOR_BYTES) * VECTOR_BYTES + slot * chunk_size * tile_bytes
    while True:
        item = take_ticket(address)
        if item >= tiles * chunks:
            break
        place, chunk = item // chunks, item % chunks
        first, last = chunk_rows[chunk], chunk_rows[chunk + 1]
        part = carray(as_pointer(own), (last - first, lanes), kind)
        for row in range(first, last):
            part[row - first] = bias[row] if bias_at else zero
        tile_x = x + place * width * tile_bytes
        for segment in range(chunk_segments[chunk], chunk_segments[chunk + 1]):
            start, stop = starts[segment], starts[segment + 1]
            tile = tile_x + segment_columns[segment] * tile_bytes
            target = own + (segment_rows[segment] - first) * tile_bytes
            if registers == 8:
                row_product_8(zero, values, sources, columns, start, stop, tile, target)
            elif registers == 4:
                row_product_4(zero, values, sources, columns, start, stop, tile, target)
            elif registers == 2:
                row_product_2(zero, values, sources, columns, start, stop, tile, target)
            else:
                row_product_1(zero, values, sources, columns, start, stop, tile, target)
        there = min(lanes, extent - place * lanes)
        for column in range(0, there, _BAND):
            stop = min(there, column + _BAND)
            target_rows = turned[place * lanes + column : place * lanes + stop, first:last]
            transpose(part[:, column:stop], target_rows)


@njit  # type: ignore[untyped-decorator]
def _sample(address: Any, kind: Any) -> None:
    numbers = carray(as_pointer(address), 21, np.int64)
    chunks, rows, columns, shifts = numbers[1], numbers[2], numbers[5], numbers[11]
    slabs, slab_length, slope_length = numbers[12], numbers[13], numbers[14]
    lead, places, at_a_time = numbers[15], numbers[16], numbers[17]
    x, y, out_at = numbers[18], numbers[19], numbers[20]
    zero = kind(0)
    chunk_segments = integers(numbers[10], chunks + 1)
    segments = chunk_segments[chunks]
    sources = integers(numbers[4], segments)
    segment_rows = integers(numbers[6], segments)
    segment_columns = integers(numbers[7], segments)
    starts = integers(numbers[8], segments + 1)
    size = carray(as_pointer(out_at), 1, kind).itemsize
    tile_bytes, plane_bytes = at_a_time * VECTOR_BYTES, slope_length * VECTOR_BYTES
    tiles = places // at_a_time
    while True:
        chunk = take_ticket(address)
        if chunk >= chunks:
            break
        first, last = chunk_segments[chunk], chunk_segments[chunk + 1]
        for segment in range(first, last):
            length = starts[segment + 1] - starts[segment]
            carray(as_pointer(out_at + sources[segment] * size), length, kind)[:] = zero
        for item in range(slabs * tiles):
            slab, tile = item // tiles, item % tiles
            tile_x = x + slab * slab_length * VECTOR_BYTES + tile * tile_bytes
            tile_y = y + slab * rows * plane_bytes + lead * VECTOR_BYTES + tile * tile_bytes
            for segment in range(first, last):
                start, stop = starts[segment], starts[segment + 1]
                row = tile_y + segment_rows[segment] * plane_bytes
                source = tile_x + segment_columns[segment] * tile_bytes
                target = out_at + sources[segment] * size
                if at_a_time == 8 and shifts:
                    shifted_dots_8(zero, shifts, start, stop, tile_x, row, target)
                elif at_a_time == 8:
                    dot_products_8(zero, columns, start, stop, source, row, target)
                elif at_a_time == 4 and shifts:
                    shifted_dots_4(zero, shifts, start, stop, tile_x, row, target)
                elif at_a_time == 4:
                    dot_products_4(zero, columns, start, stop, source, row, target)
                elif at_a_time == 2 and shifts:
                    shifted_dots_2(zero, shifts, start, stop, tile_x, row, target)
                elif at_a_time == 2:
                    dot_products_2(zero, columns, start, stop, source, row, target)
                elif shifts:
                    shifted_dots_1(zero, shifts, start, stop, tile_x, row, target)
                else:
                    dot_products_1(zero, columns, start, stop, source, row, target)


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _multiply_single(address: Any) -> None:
    _multiply(address, np.float32)


@kernel(_KERNEL)
def _multiply_double(address: Any) -> None:
    _multiply(address, np.float64)


@kernel(_KERNEL)
def _sample_single(address: Any) -> None:
    _sample(address, np.float32)


@kernel(_KERNEL)
def _sample_double(address: Any) -> None:
    _sample(address, np.float64)
