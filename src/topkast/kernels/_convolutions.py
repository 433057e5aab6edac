"""The products of a convolution: sums of shifted planes, and dot products with them on B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels._layout import LAYOUT, Layout, RowLayout, Vector
from topkast.kernels._sampling import sample
from topkast.kernels.runtime._arguments import THREAD, check, empty, slots, start, vector
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._pool import default_threads
from topkast.kernels.runtime._vector import (
    VECTOR_BYTES,
    as_pointer,
    copy_run,
    fetch_add,
    row_product_1,
    row_product_2,
    row_product_4,
    row_product_8,
)

_CONVOLVE = slots(
    "layout",
    "shifts",
    "values",
    "x",
    "out",
    "bias",
    "scratch",
    "chunk",
    "slabs",
    "slab_length",
    "places",
    "at_a_time",
)


@dataclass(frozen=True, eq=False)
class Shifted:
    """A layout whose columns are planes, seen from some distance.

    Attributes
    ----------
    layout
        The entries.
    shifts
        Vectors from the place of the output to what an entry is multiplied by; int32. Of a
        :class:`RowLayout` those of each entry of the compact vector, of a :class:`Layout` in the
        order of that (entries,).
    farthest
        The largest.
    """

    layout: RowLayout | Layout
    shifts: Vector
    farthest: int


def shift(layout: RowLayout | Layout, table: Vector, /, *, shifts: Vector | None = None) -> Shifted:
    """Give each column of a layout its distance.

    Parameters
    ----------
    layout
        Its columns are planes, and weights that look at them.
    table
        Vectors, none negative; integers (layout.width,).
    shifts
        Those of another :class:`RowLayout` of the same columns, to be shared.

    Raises
    ------
    ValueError
        For a table of another length, or with distances that do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import make_row_layout, shift
    >>> diagonal = make_row_layout(np.arange(2, dtype=np.int32), np.arange(3), shape=(2, 2))
    >>> shift(diagonal, np.asarray([5, 7])).shifts
    array([5, 7], dtype=int32)
    """
    if table.shape != (layout.width,) or (
        table.size and not 0 <= table.min() <= table.max() < 1 << 31
    ):
        raise ValueError(f"expected {layout.width} distances of 31 bits, got {table}")
    narrow = table.astype(np.int32)
    if isinstance(layout, RowLayout):
        if shifts is None:
            columns = layout.columns % layout.pitch if layout.pitch else layout.columns
            shifts = narrow[columns]
        elif shifts.shape != layout.columns.shape or shifts.dtype != np.int32:
            raise ValueError(f"expected {len(layout.columns)} distances, int32, got {shifts}")
        return Shifted(layout, shifts, int(shifts[layout.start : layout.stop].max(initial=0)))
    firsts = np.diff(layout.block_segments).reshape(-1, layout.blocks)
    blocks = np.repeat(np.tile(np.arange(layout.blocks), len(firsts)), firsts.ravel())
    columns = np.repeat(blocks * layout.block, layout.segment_lengths) + layout.columns
    shifts = narrow[columns]
    return Shifted(layout, shifts, int(shifts.max(initial=0)))


def convolve(
    shifted: Shifted,
    values: Vector,
    x: Vector,
    out: Vector,
    /,
    *,
    bias: Vector | None = None,
    threads: int | None = None,
) -> None:
    """``out[row, place] = bias[row] + Σ values[k] · x[shifts[k] + place]`` over a row's entries.

    Parameters
    ----------
    shifted
        The entries of the matrix.
    values
        Of each entry of its ``shifts``: the compact vector for a :class:`RowLayout`, and
        ``compact[layout.order]`` for a :class:`Layout`; float32 or float64.
    x
        (slabs, planes, length, lanes), contiguous; see :func:`to_planes`.
    out
        (slabs, layout.rows, places, lanes), contiguous; places a power of two or a multiple of 8.
    bias
        (layout.rows,)
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
    >>> both = shift(layout, np.asarray([0, 2]))
    >>> x = np.zeros((1, 1, 8, lanes_of("float32")), "float32")
    >>> x[0, 0, :, 0] = range(8)
    >>> out = np.empty((1, 1, 4, x.shape[3]), "float32")
    >>> convolve(both, np.asarray([1, 10], "float32"), x, out)
    >>> out[0, 0, :, 0]
    array([20., 31., 42., 53.], dtype=float32)
    """
    layout = shifted.layout
    slabs, planes, length, lanes = x.shape
    places = out.shape[2]
    check(
        values.dtype,
        ("values", values, shifted.shifts.shape),
        ("x", x, (slabs, planes, length, lanes)),
        ("out", out, (slabs, layout.rows, places, lanes)),
        *([] if bias is None else [("bias", bias, (layout.rows,))]),
    )
    _check_reach(shifted, x, places)
    at_a_time = _at_a_time(places)
    threads = threads or default_threads()
    start(
        (_convolve_single, _convolve_double),
        values.dtype,
        threads,
        _CONVOLVE,
        layout=layout._record,
        shifts=shifted.shifts,
        values=values,
        x=x,
        out=out,
        bias=0 if bias is None else bias,
        scratch=empty((threads * layout.chunk * at_a_time, lanes), values.dtype),
        chunk=layout.chunk,
        slabs=slabs,
        slab_length=planes * length,
        places=places,
        at_a_time=at_a_time,
    )


def sampled_correlation(
    shifted: Shifted,
    y: Vector,
    x: Vector,
    out: Vector,
    /,
    *,
    places: int,
    lead: int = 0,
    other: Shifted | None = None,
    threads: int | None = None,
) -> None:
    """``out[k] = Σ y[row, lead + place] · x[shifts[k] + place]`` over all places, for each entry.

    Parameters
    ----------
    shifted
        The entries wanted, in a :class:`RowLayout`.
    y, x
        (slabs, layout.rows, gradient_length, lanes) and (slabs, planes, length, lanes), contiguous.
    out
        Compact vector.
    places
        Their number, a power of two or a multiple of 8.
    lead
        Where the first one is in `y`.
    other
        More entries wanted, as in :func:`sampled_product`.
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
    >>> sampled_correlation(shift(layout, np.asarray([0, 2])), x, x, out, places=2)
    >>> out  # 0 · 0 + 1 · 1, and 0 · 2 + 1 · 3
    array([1., 3.], dtype=float32)
    """
    slabs, planes, length, _ = x.shape
    gradient_length, layouts = y.shape[2], []
    for one in (shifted,) if other is None else (shifted, other):
        if not isinstance(one.layout, RowLayout):
            raise TypeError("sampled_correlation needs layouts of make_row_layout")
        layouts.append(one.layout)
    check(
        out.dtype,
        ("x", x, x.shape),
        ("y", y, (slabs, layouts[0].rows, gradient_length, x.shape[3])),
        ("out", out, (max(out.size, *(layout.stop for layout in layouts)),)),
    )
    for one in (shifted,) if other is None else (shifted, other):
        _check_reach(one, x, places)
    if lead < 0 or lead + places > gradient_length:
        raise ValueError(f"{places} places from {lead} are not in planes of {gradient_length}")
    sample(
        layouts[0],
        None if other is None else layouts[1],
        threads,
        out,
        columns=shifted.shifts,
        other_columns=0 if other is None else other.shifts,
        pitch=0,
        stride=VECTOR_BYTES,
        x=x,
        y=y,
        slabs=slabs,
        slab_length=planes * length,
        plane_length=gradient_length,
        lead=lead,
        places=places,
        at_a_time=_at_a_time(places),
    )


def _check_reach(shifted: Shifted, x: Vector, places: int) -> None:
    _, planes, length, lanes = x.shape
    if lanes * x.itemsize != VECTOR_BYTES:
        raise ValueError(f"planes are of vectors of {VECTOR_BYTES} bytes, got {lanes} lanes")
    if shifted.farthest + places > planes * length and len(shifted.shifts):
        raise ValueError(
            f"the last of {places} places sees beyond {planes} planes of {length} vectors"
        )


def _at_a_time(places: int) -> int:
    for count in (8, 4, 2, 1):
        if places % count == 0 and (count == 8 or places == count):
            return count
    raise ValueError(f"the number of places must be 1, 2, 4 or a multiple of 8, got {places}")


@njit  # type: ignore[untyped-decorator]
def _convolve(address: Any, dtype: Any) -> None:
    arguments = carray(as_pointer(address), 1, _CONVOLVE)[0]
    layout = carray(as_pointer(arguments.layout), 1, LAYOUT)[0]
    slabs, places, at_a_time = arguments.slabs, arguments.places, arguments.at_a_time
    chunks, rows = layout.chunks, layout.rows
    chunk_rows = vector(layout.chunk_rows, chunks + 1, np.int32)
    bias = vector(arguments.bias, rows, dtype)
    tile_bytes = at_a_time * VECTOR_BYTES
    width = tile_bytes // bias.itemsize
    thread = fetch_add(address + THREAD)
    own = arguments.scratch + thread * arguments.chunk * tile_bytes
    part = carray(as_pointer(own), (arguments.chunk, width), dtype)
    tiles = places // at_a_time
    while True:
        item = fetch_add(address)
        if item >= slabs * tiles * chunks:
            break
        chunk, place = item % chunks, item // chunks
        slab, tile = place // tiles, place % tiles
        first, last = chunk_rows[chunk], chunk_rows[chunk + 1]
        for row in range(first, last):
            part[row - first] = bias[row] if arguments.bias else dtype(0)
        x = arguments.x + slab * arguments.slab_length * VECTOR_BYTES + tile * tile_bytes
        _add(arguments, layout, chunk, x, own, dtype)
        target = arguments.out + ((slab * rows + first) * places + tile * at_a_time) * VECTOR_BYTES
        for row in range(last - first):
            source = own + row * tile_bytes
            copy_run(dtype(0), source, target + row * places * VECTOR_BYTES, width)


@njit  # type: ignore[untyped-decorator]
def _add(arguments: Any, layout: Any, chunk: Any, x: Any, out: Any, dtype: Any) -> None:
    """Add the products of a chunk."""
    zero, stride, at_a_time = dtype(0), VECTOR_BYTES, arguments.at_a_time
    values, shifts = arguments.values, arguments.shifts
    edges = vector(layout.block_segments, layout.chunks * layout.blocks + 1, np.int32)
    begin, end = edges[chunk * layout.blocks], edges[(chunk + 1) * layout.blocks]
    segment_rows = vector(layout.segment_rows, end, np.uint16)
    lengths = vector(layout.segment_lengths, end, np.uint16)
    starts = vector(layout.segment_starts, end, np.int32)
    in_order = layout.segment_starts == 0
    stop = np.int64(vector(layout.chunk_entries, layout.chunks + 1, np.int32)[chunk])
    for segment in range(begin, end):
        start = stop if in_order else np.int64(starts[segment])
        stop = start + lengths[segment]
        target = out + segment_rows[segment] * at_a_time * VECTOR_BYTES
        if at_a_time == 8:
            row_product_8(zero, values, shifts, start, stop, x, stride, target)
        elif at_a_time == 4:
            row_product_4(zero, values, shifts, start, stop, x, stride, target)
        elif at_a_time == 2:
            row_product_2(zero, values, shifts, start, stop, x, stride, target)
        else:
            row_product_1(zero, values, shifts, start, stop, x, stride, target)


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _convolve_single(address: Any) -> None:
    _convolve(address, np.float32)


@kernel(_KERNEL)
def _convolve_double(address: Any) -> None:
    _convolve(address, np.float64)
