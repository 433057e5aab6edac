"""The products, from their arguments to the threads: ``A · X`` and ``dY · Xᵀ`` on B."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from topkast.kernels._layout import Layout, Vector
from topkast.kernels._pool import run
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
    take_ticket,
)

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
    """``out = W · x + bias`` for a sparse matrix W.

    Parameters
    ----------
    layout
        Of W; its ``source`` points into `values`.
    values
        Compact vector, float32 or float64.
    x
        Packed activations, (tiles, layout.width, width), contiguous.
    out
        Where the result goes: (layout.rows, tiles · width), contiguous.
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
    >>> out = np.empty((2, x.shape[2]), dtype="float32")
    >>> multiply(diagonal, np.asarray([2, 3], dtype="float32"), x, out)
    >>> out[:, 0]
    array([2., 3.], dtype=float32)
    """
    tiles, _, width = x.shape
    _check(
        values.dtype,
        ("values", values, (max(values.size, layout.extent),)),
        ("x", x, (tiles, layout.width, width)),
        ("out", out, (layout.rows, tiles * width)),
        *([] if bias is None else [("bias", bias, (layout.rows,))]),
    )
    if len(layout.source) != len(layout.columns) + AHEAD:
        raise ValueError("multiply needs a layout of arrange(..., runs=False)")
    chunks = len(layout.chunk_rows) - 1
    _start(
        _multiply_single if values.dtype == np.float32 else _multiply_double,
        (
            tiles * chunks,
            chunks,
            _registers(width, values.dtype),
            layout.rows,
            layout.width,
            values,
            layout.source,
            layout.columns,
            layout.segment_rows,
            layout.segment_columns,
            layout.segment_starts,
            layout.chunk_rows,
            layout.chunk_segments,
            x,
            out,
            tiles * width,
            0 if bias is None else bias,
        ),
        threads,
    )


def sampled_product(
    layout: Layout,
    y: Vector,
    x: Vector,
    out: Vector,
    /,
    *,
    accumulate: bool = False,
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
    accumulate
        Add to what is there.
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
    _check(
        out.dtype,
        ("x", x, (tiles, layout.width, width)),
        ("y", y, (tiles, layout.rows, width)),
        ("out", out, (max(out.size, layout.extent),)),
    )
    if len(layout.source) != len(layout.segment_rows):
        raise ValueError("sampled_product needs a layout of arrange(..., runs=True)")
    chunks = len(layout.chunk_rows) - 1
    _start(
        _sample_single if out.dtype == np.float32 else _sample_double,
        (
            chunks,
            tiles,
            _registers(width, out.dtype),
            layout.rows,
            layout.width,
            layout.source,
            layout.columns,
            layout.segment_rows,
            layout.segment_columns,
            layout.segment_starts,
            layout.chunk_segments,
            x,
            y,
            out,
            accumulate,
        ),
        threads,
    )


def _check(dtype: Any, *arrays: tuple[str, Vector, tuple[int, ...]]) -> None:
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


def _start(kernel: Any, arguments: tuple[Any, ...], threads: int | None) -> None:
    """Hand a kernel numbers and the addresses of arrays, which live until it returns."""
    numbers = [
        argument.ctypes.data if isinstance(argument, np.ndarray) else argument
        for argument in arguments
    ]
    run(kernel, np.asarray([0, *numbers], dtype=np.int64), threads)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _integers(address: Any, count: Any) -> Any:
    return carray(as_pointer(address), count, np.int32)


@njit  # type: ignore[untyped-decorator]
def _multiply(address: Any, kind: Any) -> None:
    numbers = carray(as_pointer(address), 18, np.int64)
    items, chunks, registers = numbers[1], numbers[2], numbers[3]
    rows, width = numbers[4], numbers[5]
    values, sources, columns = numbers[6], numbers[7], numbers[8]
    x, out, stride, bias_at = numbers[14], numbers[15], numbers[16], numbers[17]
    zero = kind(0)
    chunk_rows = _integers(numbers[12], chunks + 1)
    chunk_segments = _integers(numbers[13], chunks + 1)
    segments = chunk_segments[chunks]
    segment_rows = _integers(numbers[9], segments)
    segment_columns = _integers(numbers[10], segments)
    starts = _integers(numbers[11], segments + 1)
    bias = carray(as_pointer(bias_at), rows, kind)
    result = carray(as_pointer(out), (rows, stride), kind)
    tile_bytes = registers * VECTOR_BYTES
    lanes = tile_bytes // result.itemsize
    stride_bytes = stride * result.itemsize
    while True:
        item = take_ticket(address)
        if item >= items:
            break
        place, chunk = item // chunks, item % chunks
        for row in range(chunk_rows[chunk], chunk_rows[chunk + 1]):
            first = bias[row] if bias_at else zero
            result[row, place * lanes : (place + 1) * lanes] = first
        tile_x = x + place * width * tile_bytes
        tile_out = out + place * tile_bytes
        for segment in range(chunk_segments[chunk], chunk_segments[chunk + 1]):
            start, stop = starts[segment], starts[segment + 1]
            tile = tile_x + segment_columns[segment] * tile_bytes
            target = tile_out + segment_rows[segment] * stride_bytes
            if registers == 8:
                row_product_8(zero, values, sources, columns, start, stop, tile, target)
            elif registers == 4:
                row_product_4(zero, values, sources, columns, start, stop, tile, target)
            elif registers == 2:
                row_product_2(zero, values, sources, columns, start, stop, tile, target)
            else:
                row_product_1(zero, values, sources, columns, start, stop, tile, target)


@njit  # type: ignore[untyped-decorator]
def _sample(address: Any, kind: Any) -> None:
    numbers = carray(as_pointer(address), 16, np.int64)
    chunks, tiles, registers = numbers[1], numbers[2], numbers[3]
    rows, width, columns = numbers[4], numbers[5], numbers[7]
    x, y, out_at = numbers[12], numbers[13], numbers[14]
    zero = kind(0)
    chunk_segments = _integers(numbers[11], chunks + 1)
    segments = chunk_segments[chunks]
    sources = _integers(numbers[6], segments)
    segment_rows = _integers(numbers[8], segments)
    segment_columns = _integers(numbers[9], segments)
    starts = _integers(numbers[10], segments + 1)
    out = carray(as_pointer(out_at), starts[segments], kind)
    tile_bytes = registers * VECTOR_BYTES
    while True:
        chunk = take_ticket(address)
        if chunk >= chunks:
            break
        first, last = chunk_segments[chunk], chunk_segments[chunk + 1]
        for segment in range(first, first if numbers[15] else last):
            start = sources[segment]
            out[start : start + starts[segment + 1] - starts[segment]] = zero
        for tile in range(tiles):
            tile_x = x + tile * width * tile_bytes
            tile_y = y + tile * rows * tile_bytes
            for segment in range(first, last):
                row = tile_y + segment_rows[segment] * tile_bytes
                source = tile_x + segment_columns[segment] * tile_bytes
                start, stop = starts[segment], starts[segment + 1]
                target = out_at + sources[segment] * out.itemsize
                if registers == 8:
                    dot_products_8(zero, columns, start, stop, source, row, target)
                elif registers == 4:
                    dot_products_4(zero, columns, start, stop, source, row, target)
                elif registers == 2:
                    dot_products_2(zero, columns, start, stop, source, row, target)
                else:
                    dot_products_1(zero, columns, start, stop, source, row, target)


_KERNEL = types.void(types.intp)


@cfunc(_KERNEL, cache=True)  # type: ignore[untyped-decorator]
def _multiply_single(address: Any) -> None:
    _multiply(address, np.float32)


@cfunc(_KERNEL, cache=True)  # type: ignore[untyped-decorator]
def _multiply_double(address: Any) -> None:
    _multiply(address, np.float64)


@cfunc(_KERNEL, cache=True)  # type: ignore[untyped-decorator]
def _sample_single(address: Any) -> None:
    _sample(address, np.float32)


@cfunc(_KERNEL, cache=True)  # type: ignore[untyped-decorator]
def _sample_double(address: Any) -> None:
    _sample(address, np.float64)
