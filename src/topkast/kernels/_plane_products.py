"""Products of a convolution on planes: sums of shifted planes, and dot products with them on B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.backends._threads import default_threads
from topkast.kernels._layout import LAYOUT, Layout, RowLayout, Vector
from topkast.kernels._sampling import run_sampled
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
    copy_vectors,
    fetch_add,
    row_product_1,
    row_product_2,
    row_product_4,
    row_product_8,
)

_CONVOLVE = define_arguments(
    "layout",
    "offsets",
    "values",
    "x",
    "out",
    "bias",
    "scratch",
    "max_chunk_rows",
    "image_groups",
    "image_group_length",
    "positions",
    "registers",
)


@dataclass(frozen=True, eq=False)
class OffsetLayout:
    """A layout with the offset at which each entry reads from the planes.

    Attributes
    ----------
    layout
        Layout of the entries.
    offsets
        Number of vectors from the output position to the pixel that an entry multiplies; int32. For
        a :class:`RowLayout` one for each entry of the compact vector, for a :class:`Layout` one for
        each entry in the order of the layout.
    max_offset
        The largest offset of the entries.
    """

    layout: RowLayout | Layout
    offsets: Vector
    max_offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the offsets."""
        return self.offsets.nbytes


def shift(
    layout: RowLayout | Layout, table: Vector, /, *, shifts: Vector | None = None
) -> OffsetLayout:
    """Attach offsets into the planes to the entries of a layout.

    Parameters
    ----------
    layout
        Its columns are pairs of a plane and a weight of the window.
    table
        Offset of each column, in vectors, not negative; integers (layout.width,).
    shifts
        Offsets of another :class:`RowLayout` with the same columns, to share the array.

    Raises
    ------
    ValueError
        If the table has another length, or an offset does not fit in 31 bits.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import make_row_layout, shift
    >>> diagonal = make_row_layout(np.arange(2, dtype=np.int32), np.arange(3), shape=(2, 2))
    >>> shift(diagonal, np.asarray([5, 7])).offsets
    array([5, 7], dtype=int32)
    """
    if table.shape != (layout.width,) or (
        table.size and not 0 <= table.min() <= table.max() < 1 << 31
    ):
        raise ValueError(f"table must have {layout.width} offsets in [0, 2**31), got {table}")
    table = table.astype(np.int32)
    if isinstance(layout, RowLayout):
        if shifts is None:
            columns = layout.columns % layout.pitch if layout.pitch else layout.columns
            shifts = table[columns]
        elif shifts.shape != layout.columns.shape or shifts.dtype != np.int32:
            raise ValueError(
                f"shifts must be int32 of shape {layout.columns.shape}, got {shifts.dtype} of "
                f"shape {shifts.shape}"
            )
        return OffsetLayout(layout, shifts, int(shifts[layout.start : layout.stop].max(initial=0)))
    counts = np.diff(layout.panel_segments).reshape(-1, layout.panels)
    panels = np.repeat(np.tile(np.arange(layout.panels), len(counts)), counts.ravel())
    columns = np.repeat(panels * layout.panel_width, layout.segment_lengths) + layout.columns
    offsets = table[columns]
    return OffsetLayout(layout, offsets, int(offsets.max(initial=0)))


def convolve(
    shifted: OffsetLayout,
    values: Vector,
    x: Vector,
    out: Vector,
    /,
    *,
    bias: Vector | None = None,
    threads: int | None = None,
) -> None:
    """``out[row, position] = bias[row] + Σ values[k] · x[offsets[k] + position]``.

    The sum is over the entries of a row.

    Parameters
    ----------
    shifted
        The entries of the matrix and their offsets.
    values
        One value for each offset: the compact vector for a :class:`RowLayout`,
        ``compact[layout.order]`` for a :class:`Layout`; float32 or float64.
    x
        (image groups, planes, length, lanes), contiguous; see :func:`to_planes`.
    out
        Output array, (image groups, layout.rows, positions, lanes), contiguous; 1, 2, 4 or a
        multiple of 8 positions.
    bias
        Contiguous, (layout.rows,).
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        As :func:`multiply`.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import convolve, lanes_of, make_row_layout, shift
    >>> layout = make_row_layout(np.arange(2, dtype=np.int32), np.asarray([0, 2]), shape=(1, 2))
    >>> shifted = shift(layout, np.asarray([0, 2]))
    >>> x = np.zeros((1, 1, 8, lanes_of("float32")), "float32")
    >>> x[0, 0, :, 0] = range(8)
    >>> out = np.empty((1, 1, 4, x.shape[3]), "float32")
    >>> convolve(shifted, np.asarray([1, 10], "float32"), x, out)
    >>> out[0, 0, :, 0]
    array([20., 31., 42., 53.], dtype=float32)
    """
    layout = shifted.layout
    image_groups, planes, length, lanes = x.shape
    positions = out.shape[2]
    check_arrays(
        values.dtype,
        ("values", values, shifted.offsets.shape),
        ("x", x, (image_groups, planes, length, lanes)),
        ("out", out, (image_groups, layout.rows, positions, lanes)),
        *([] if bias is None else [("bias", bias, (layout.rows,))]),
    )
    _check_offsets(shifted, x, positions)
    registers = _registers(positions)
    threads = threads or default_threads()
    run_kernel(
        (_convolve_single, _convolve_double),
        values.dtype,
        threads,
        _CONVOLVE,
        layout=layout._record,
        offsets=shifted.offsets,
        values=values,
        x=x,
        out=out,
        bias=0 if bias is None else bias,
        scratch=empty_aligned((threads * layout.max_chunk_rows * registers, lanes), values.dtype),
        max_chunk_rows=layout.max_chunk_rows,
        image_groups=image_groups,
        image_group_length=planes * length,
        positions=positions,
        registers=registers,
    )


def sampled_correlation(
    shifted: OffsetLayout,
    y: Vector,
    x: Vector,
    out: Vector,
    /,
    *,
    positions: int,
    leading_zeros: int = 0,
    other: OffsetLayout | None = None,
    threads: int | None = None,
) -> None:
    """``out[k] = Σ y[row, leading_zeros + position] · x[offsets[k] + position]`` for each entry.

    The sum is over all positions.

    Parameters
    ----------
    shifted
        The entries to compute, in a :class:`RowLayout`, and their offsets.
    y, x
        (image groups, layout.rows, gradient_length, lanes) and (image groups, planes, length,
        lanes), contiguous.
    out
        Output array: the compact vector.
    positions
        Number of output positions in a plane: 1, 2, 4 or a multiple of 8.
    leading_zeros
        Number of vectors before the first position in a plane of `y`.
    other
        More entries to compute, as in :func:`sampled_product`.
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        As :func:`multiply`.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import lanes_of, make_row_layout, sampled_correlation, shift
    >>> layout = make_row_layout(np.arange(2, dtype=np.int32), np.asarray([0, 2]), shape=(1, 2))
    >>> x = np.zeros((1, 1, 8, lanes_of("float32")), "float32")
    >>> x[0, 0, :, 0] = range(8)
    >>> out = np.empty(2, "float32")
    >>> sampled_correlation(shift(layout, np.asarray([0, 2])), x, x, out, positions=2)
    >>> out  # 0 · 0 + 1 · 1, and 0 · 2 + 1 · 3
    array([1., 3.], dtype=float32)
    """
    image_groups, planes, length, _ = x.shape
    gradient_length, layouts = y.shape[2], []
    for used in (shifted,) if other is None else (shifted, other):
        if not isinstance(used.layout, RowLayout):
            raise TypeError(
                "sampled_correlation needs a RowLayout of make_row_layout, got "
                f"{type(used.layout).__name__}"
            )
        layouts.append(used.layout)
    check_arrays(
        out.dtype,
        ("x", x, x.shape),
        ("y", y, (image_groups, layouts[0].rows, gradient_length, x.shape[3])),
        ("out", out, (max(out.size, *(layout.stop for layout in layouts)),)),
    )
    for used in (shifted,) if other is None else (shifted, other):
        _check_offsets(used, x, positions)
    if leading_zeros < 0 or leading_zeros + positions > gradient_length:
        raise ValueError(
            f"{positions} positions after {leading_zeros} leading zeros do not fit planes of "
            f"{gradient_length} vectors"
        )
    run_sampled(
        layouts[0],
        None if other is None else layouts[1],
        threads,
        out,
        columns=shifted.offsets,
        other_columns=0 if other is None else other.offsets,
        pitch=0,
        stride=VECTOR_BYTES,
        x=x,
        y=y,
        image_groups=image_groups,
        image_group_length=planes * length,
        plane_length=gradient_length,
        leading_zeros=leading_zeros,
        positions=positions,
        registers=_registers(positions),
    )


def _check_offsets(shifted: OffsetLayout, x: Vector, positions: int) -> None:
    _, planes, length, lanes = x.shape
    if lanes * x.itemsize != VECTOR_BYTES:
        raise ValueError(
            f"x must be planes of vectors of {VECTOR_BYTES} bytes, got {lanes} lanes of {x.dtype}"
        )
    if shifted.max_offset + positions > planes * length and len(shifted.offsets):
        raise ValueError(
            f"{positions} positions with an offset of {shifted.max_offset} reach beyond {planes} "
            f"planes of {length} vectors"
        )


def _registers(positions: int) -> int:
    for count in (8, 4, 2, 1):
        if positions % count == 0 and (count == 8 or positions == count):
            return count
    raise ValueError(f"the number of positions must be 1, 2, 4 or a multiple of 8, got {positions}")


@njit  # type: ignore[untyped-decorator]
def _convolve(address: Any, dtype: Any) -> None:
    arguments = carray(as_pointer(address), 1, _CONVOLVE)[0]
    layout = carray(as_pointer(arguments.layout), 1, LAYOUT)[0]
    image_groups, positions = arguments.image_groups, arguments.positions
    registers = arguments.registers
    chunks, rows = layout.chunks, layout.rows
    chunk_rows = array_at(layout.chunk_rows, chunks + 1, np.int32)
    bias = array_at(arguments.bias, rows, dtype)
    tile_bytes = registers * VECTOR_BYTES
    width = tile_bytes // bias.itemsize
    thread = fetch_add(address + THREAD_COUNTER)
    scratch = arguments.scratch + thread * arguments.max_chunk_rows * tile_bytes
    output = carray(as_pointer(scratch), (arguments.max_chunk_rows, width), dtype)
    tiles = positions // registers
    while True:
        item = fetch_add(address)
        if item >= image_groups * tiles * chunks:
            break
        chunk, group_tile = item % chunks, item // chunks
        image_group, tile = group_tile // tiles, group_tile % tiles
        first, last = chunk_rows[chunk], chunk_rows[chunk + 1]
        for row in range(first, last):
            output[row - first] = bias[row] if arguments.bias else dtype(0)
        x = (
            arguments.x
            + image_group * arguments.image_group_length * VECTOR_BYTES
            + tile * tile_bytes
        )
        _add(arguments, layout, chunk, x, scratch, dtype)
        first_vector = (image_group * rows + first) * positions + tile * registers
        target = arguments.out + first_vector * VECTOR_BYTES
        for row in range(last - first):
            source = scratch + row * tile_bytes
            copy_vectors(dtype(0), source, target + row * positions * VECTOR_BYTES, width)


@njit  # type: ignore[untyped-decorator]
def _add(arguments: Any, layout: Any, chunk: Any, x: Any, out: Any, dtype: Any) -> None:
    """Add the products of the entries of a chunk."""
    zero, stride, registers = dtype(0), VECTOR_BYTES, arguments.registers
    values, offsets = arguments.values, arguments.offsets
    panel_starts = array_at(layout.panel_segments, layout.chunks * layout.panels + 1, np.int32)
    begin, end = panel_starts[chunk * layout.panels], panel_starts[(chunk + 1) * layout.panels]
    segment_rows = array_at(layout.segment_rows, end, np.uint16)
    lengths = array_at(layout.segment_lengths, end, np.uint16)
    starts = array_at(layout.segment_starts, end, np.int32)
    is_ordered = layout.segment_starts == 0  # a Layout, whose values follow its order
    stop = np.int64(array_at(layout.chunk_entries, layout.chunks + 1, np.int32)[chunk])
    for segment in range(begin, end):
        start = stop if is_ordered else np.int64(starts[segment])
        stop = start + lengths[segment]
        target = out + segment_rows[segment] * registers * VECTOR_BYTES
        if registers == 8:
            row_product_8(zero, values, offsets, start, stop, x, stride, target)
        elif registers == 4:
            row_product_4(zero, values, offsets, start, stop, x, stride, target)
        elif registers == 2:
            row_product_2(zero, values, offsets, start, stop, x, stride, target)
        else:
            row_product_1(zero, values, offsets, start, stop, x, stride, target)


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _convolve_single(address: Any) -> None:
    _convolve(address, np.float32)


@kernel(_KERNEL)
def _convolve_double(address: Any) -> None:
    _convolve(address, np.float64)
