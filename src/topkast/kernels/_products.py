"""Products of a sparse matrix with packed activations: ``A · X``, and ``dY · Xᵀ`` on B."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.backends._threads import default_threads
from topkast.kernels._layout import LAYOUT, Layout, RowLayout, Vector
from topkast.kernels._packing import (
    add_entries,
    clear_negative,
    clear_where_not_positive,
    transpose,
)
from topkast.kernels._sampling import PREFETCH_SEGMENTS, run_sampled
from topkast.kernels.runtime._arguments import (
    THREAD_COUNTER,
    array_at,
    check_arrays,
    define_arguments,
    empty_aligned,
    run_kernel,
)
from topkast.kernels.runtime._compile import kernel
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

_COLUMNS = 16  # columns transposed at a time: each writes to a memory page of its own
_ENTRY_COST = 3  # fixed cost of an entry in a tile, in units of the cost of a vector

MULTIPLY = define_arguments(
    "layout",
    "values",
    "x",
    "out",
    "bias",
    "scratch",
    "max_chunk_rows",
    "tiles",
    "registers",
    "batch",
    "is_packed",
    "rectifies",
    "positive",
    "addend",
)


@functools.lru_cache(maxsize=256)
def tile_width(columns: int, dtype: Any) -> int:
    """Best width of the tiles for a number of columns of activations.

    A wide tile shares the cost of an entry among many columns; a narrow tile leaves fewer unused.

    Parameters
    ----------
    columns
        Number of columns: the batch size, times the sizes of the other axes without features.
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
        lanes * registers: -(-columns // (lanes * registers)) * (registers + _ENTRY_COST)
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
        Layout of W.
    values
        Compact vector of the entries of W, float32 or float64.
    x
        Packed activations, (tiles, layout.width, width), contiguous.
    out
        Output array, (batch, layout.rows), contiguous, with ``batch <= tiles · width``.
    bias
        Contiguous, (layout.rows,).
    threads
        Number of threads; by default as many as PyTorch uses, or one for each core if PyTorch is
        not loaded. The result does not depend on it.

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
        raise ValueError(f"{batch} rows of out do not fit {tiles} tiles of width {width}")
    check_arrays(
        dtype,
        ("values", values, (max(values.size, _required_length(layout)),)),
        ("x", x, (tiles, layout.width, width)),
        ("out", out, (batch, layout.rows)),
        *([] if bias is None else [("bias", bias, (layout.rows,))]),
    )
    if isinstance(layout, RowLayout):
        layout.check()
    threads = threads or default_threads()
    run_kernel(
        (_multiply_single, _multiply_double),
        dtype,
        threads,
        MULTIPLY,
        layout=layout._record,
        values=values,
        x=x,
        out=out,
        bias=0 if bias is None else bias,
        scratch=empty_aligned((threads * layout.max_chunk_rows, width), dtype),
        max_chunk_rows=layout.max_chunk_rows,
        tiles=tiles,
        registers=registers_of(width, dtype),
        batch=batch,
        is_packed=0,
        rectifies=0,
        positive=0,
        addend=0,
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
    """``out = (y · xᵀ)[row, column]`` at the entries of one or two layouts only.

    Parameters
    ----------
    layout
        The entries to compute.
    y, x
        Packed, (tiles, layout.rows, width) and (tiles, layout.width, width), contiguous.
    out
        Output array: the compact vector.
    other
        More entries of the same compact vector, for example those of B∖A. This layout must have
        the same chunks and panels, so that both reuse the activations in the caches.
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
    length = max(_required_length(layout), 0 if other is None else _required_length(other))
    check_arrays(
        out.dtype,
        ("x", x, (tiles, layout.width, width)),
        ("y", y, (tiles, layout.rows, width)),
        ("out", out, (max(out.size, length),)),
    )
    registers = registers_of(width, out.dtype)
    for used in (layout,) if other is None else (layout, other):
        if not isinstance(used, RowLayout):
            raise TypeError(
                f"sampled_product needs a RowLayout of make_row_layout, got {type(used).__name__}"
            )
        used.check()
    run_sampled(
        layout,
        other,
        threads,
        out,
        columns=layout.columns,
        other_columns=0 if other is None else other.columns,
        pitch=layout.pitch,
        stride=registers * VECTOR_BYTES,
        x=x,
        y=y,
        image_groups=tiles,
        image_group_length=layout.width * registers,
        plane_length=registers,
        leading_zeros=0,
        positions=registers,
        registers=registers,
    )


def _required_length(layout: RowLayout | Layout) -> int:
    """Minimum length of the compact vector."""
    return layout.stop if isinstance(layout, RowLayout) else layout.required_length


def registers_of(width: int, dtype: Any) -> int:
    registers, remainder = divmod(width * int(dtype.itemsize), VECTOR_BYTES)
    if remainder or registers not in (1, 2, 4, 8):
        raise ValueError(
            f"a tile cannot have {width} columns of {dtype}: choose the width with tile_width"
        )
    return registers


@njit  # type: ignore[untyped-decorator]
def multiply_tiles(address: Any, dtype: Any) -> None:
    """Multiply; `out` is (batch, rows), or packed if `is_packed`.

    If `rectifies`, negative outputs become 0. Where `positive`, which is packed, is given and not
    positive, outputs become 0. `addend`, also packed, is added to outputs if it is given.
    """
    arguments = carray(as_pointer(address), 1, MULTIPLY)[0]
    layout = carray(as_pointer(arguments.layout), 1, LAYOUT)[0]
    registers, batch, tiles = arguments.registers, arguments.batch, arguments.tiles
    chunks, rows = layout.chunks, layout.rows
    chunk_rows = array_at(layout.chunk_rows, chunks + 1, np.int32)
    bias = array_at(arguments.bias, rows, dtype)
    tile_bytes = registers * VECTOR_BYTES
    lanes = tile_bytes // bias.itemsize
    output = carray(as_pointer(arguments.out), (batch, rows), dtype)
    # A thread computes a chunk of the output in its own scratch memory, then transposes it.
    thread = fetch_add(address + THREAD_COUNTER)
    scratch = arguments.scratch + thread * arguments.max_chunk_rows * tile_bytes
    while True:
        item = fetch_add(address)
        if item >= tiles * chunks:
            break
        tile, chunk = item // chunks, item % chunks
        first, last = chunk_rows[chunk], chunk_rows[chunk + 1]
        offset = (tile * rows + first) * tile_bytes  # of the chunk in packed activations
        target = arguments.out + offset if arguments.is_packed else scratch
        transposed = carray(as_pointer(target), (last - first, lanes), dtype)
        for row in range(first, last):
            transposed[row - first] = bias[row] if arguments.bias else dtype(0)
        tile_x = arguments.x + tile * layout.width * tile_bytes
        if layout.value_index:
            _add_indexed(layout, chunk, arguments.values, tile_x, registers, target, dtype)
        else:
            _add_rows(layout, chunk, first, arguments.values, tile_x, registers, target, dtype)
        count = (last - first) * lanes
        if arguments.rectifies:
            clear_negative(array_at(target, count, dtype))
        if arguments.positive:
            positive = array_at(arguments.positive + offset, count, dtype)
            clear_where_not_positive(array_at(target, count, dtype), positive)
        if arguments.addend:
            addend = array_at(arguments.addend + offset, count, dtype)
            add_entries(array_at(target, count, dtype), addend)
        if arguments.is_packed:
            continue
        used = min(lanes, batch - tile * lanes)
        for column in range(0, used, _COLUMNS):
            stop = min(used, column + _COLUMNS)
            out = output[tile * lanes + column : tile * lanes + stop, first:last]
            transpose(transposed[:, column:stop], out)


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
    panel_starts = array_at(layout.panel_segments, layout.chunks * layout.panels + 1, np.int32)
    begin, end = panel_starts[chunk * layout.panels], panel_starts[(chunk + 1) * layout.panels]
    segment_rows = array_at(layout.segment_rows, end, np.uint16)
    lengths = array_at(layout.segment_lengths, end, np.uint16)
    starts = array_at(layout.segment_starts, end, np.int32)
    for segment in range(begin, end):
        ahead = min(segment + PREFETCH_SEGMENTS, end - 1)
        prefetch(np.int32(0), columns, starts[ahead], starts[ahead] + lengths[ahead])
        prefetch(zero, values, starts[ahead], starts[ahead] + lengths[ahead])
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
    panel_starts = array_at(layout.panel_segments, layout.chunks * layout.panels + 1, np.int32)
    segments = panel_starts[(chunk + 1) * layout.panels]
    segment_rows = array_at(layout.segment_rows, segments, np.uint16)
    lengths = array_at(layout.segment_lengths, segments, np.uint16)
    start = np.int64(array_at(layout.chunk_entries, layout.chunks + 1, np.int32)[chunk])
    for panel in range(layout.panels):
        chunk_panel = chunk * layout.panels + panel
        x = tile_x + panel * layout.panel_width * stride
        for segment in range(panel_starts[chunk_panel], panel_starts[chunk_panel + 1]):
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
    multiply_tiles(address, np.float32)


@kernel(_KERNEL)
def _multiply_double(address: Any) -> None:
    multiply_tiles(address, np.float64)
