"""The products of a convolution: sums of shifted planes, and dot products with them on B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels._compile import kernel
from topkast.kernels._layout import Layout, Vector
from topkast.kernels._pool import default_threads
from topkast.kernels._products import check, integers, sample, start
from topkast.kernels._vector import (
    VECTOR_BYTES,
    as_pointer,
    copy_run,
    shifted_sum_1,
    shifted_sum_2,
    shifted_sum_4,
    shifted_sum_8,
    take_ticket,
)


@dataclass(frozen=True, eq=False)
class Shifted:
    """A layout whose columns are planes, seen from some distance.

    Attributes
    ----------
    layout
        The entries, in the order of the kernels.
    shifts
        Of each entry, vectors from the place of the output to what it is multiplied by; int32
        (entries,).
    farthest
        The largest.
    """

    layout: Layout
    shifts: Vector
    farthest: int


def shift(layout: Layout, table: Vector, /) -> Shifted:
    """Give each column of a layout its distance.

    Parameters
    ----------
    layout
        Its columns are planes, and weights that look at them.
    table
        Vectors, none negative; integers (layout.width,).

    Raises
    ------
    ValueError
        For a table of another length, or with distances that do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import arrange, shift
    >>> place = np.arange(2, dtype=np.int32)
    >>> diagonal = arrange(place, place, place, shape=(2, 2))
    >>> shift(diagonal, np.asarray([5, 7])).shifts
    array([5, 7], dtype=int32)
    """
    if table.shape != (layout.width,) or (
        table.size and not 0 <= table.min() <= table.max() < 1 << 31
    ):
        raise ValueError(f"expected {layout.width} distances of 31 bits, got {table}")
    lengths = np.diff(layout.segment_starts)
    shifts = table[np.repeat(layout.segment_columns, lengths) + layout.columns].astype(np.int32)
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
        Of each entry, in the order of the layout: ``compact[layout.order]``; float32 or float64.
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
    >>> from topkast.kernels import arrange, convolve, lanes_of, shift
    >>> place = np.arange(2, dtype=np.int32)
    >>> both = shift(arrange(0 * place, place, place, shape=(1, 2)), np.asarray([0, 2]))
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
    chunk = int(layout.chunk_rows[1]) if layout.rows else 0
    count = threads or default_threads()
    scratch = np.empty((count * chunk * at_a_time + 1, lanes), dtype=values.dtype)
    start(
        _convolve_single if values.dtype == np.float32 else _convolve_double,
        layout,
        (
            shifted.shifts,
            slabs,
            planes * length,
            places,
            at_a_time,
            values,
            x,
            out,
            0 if bias is None else bias,
            scratch,
            chunk,
            0,
        ),
        count,
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
    threads: int | None = None,
) -> None:
    """``out[k] = Σ y[row, lead + place] · x[shifts[k] + place]`` over all places, for each entry.

    Parameters
    ----------
    shifted
        The entries wanted; its layout's segments must be runs of `out`
        (``arrange(..., runs=True)``).
    y, x
        (slabs, layout.rows, slope_length, lanes) and (slabs, planes, length, lanes), contiguous.
    out
        Compact vector.
    places
        Their number, a power of two or a multiple of 8.
    lead
        Where the first one is in `y`.
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        As :func:`multiply`.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import arrange, lanes_of, sampled_correlation, shift
    >>> place = np.arange(2, dtype=np.int32)
    >>> layout = arrange(0 * place, place, place, shape=(1, 2), runs=True)
    >>> x = np.zeros((1, 1, 8, lanes_of("float32")), "float32")
    >>> x[0, 0, :, 0] = range(8)
    >>> out = np.empty(2, "float32")
    >>> sampled_correlation(shift(layout, np.asarray([0, 2])), x, x, out, places=2)
    >>> out  # 0 · 0 + 1 · 1, and 0 · 2 + 1 · 3
    array([1., 3.], dtype=float32)
    """
    layout = shifted.layout
    slabs, _, length, lanes = x.shape
    slope_length = y.shape[2]
    check(
        out.dtype,
        ("x", x, x.shape),
        ("y", y, (slabs, layout.rows, slope_length, lanes)),
        ("out", out, (max(out.size, layout.extent),)),
    )
    if len(layout.source) != len(layout.segment_rows):
        raise ValueError("sampled_correlation needs a layout of arrange(..., runs=True)")
    _check_reach(shifted, x, places)
    if lead < 0 or lead + places > slope_length:
        raise ValueError(f"{places} places from {lead} are not in planes of {slope_length}")
    lengths = x.shape[1] * length, slope_length
    at_a_time = _at_a_time(places)
    sample(layout, shifted.shifts, slabs, *lengths, lead, places, at_a_time, x, y, out, threads)


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
def _convolve(address: Any, kind: Any) -> None:
    numbers = carray(as_pointer(address), 23, np.int64)
    chunks, rows, shifts = numbers[1], numbers[2], numbers[11]
    slabs, slab_length, places, at_a_time = numbers[12], numbers[13], numbers[14], numbers[15]
    values, x, out = numbers[16], numbers[17], numbers[18]
    bias_at, scratch, chunk_size = numbers[19], numbers[20], numbers[21]
    zero = kind(0)
    chunk_rows = integers(numbers[9], chunks + 1)
    chunk_segments = integers(numbers[10], chunks + 1)
    segments = chunk_segments[chunks]
    segment_rows = integers(numbers[6], segments)
    starts = integers(numbers[8], segments + 1)
    bias = carray(as_pointer(bias_at), rows, kind)
    tile_bytes = at_a_time * VECTOR_BYTES
    width = tile_bytes // bias.itemsize
    slot = take_ticket(address + 22 * 8)
    own = -(-scratch // VECTOR_BYTES) * VECTOR_BYTES + slot * chunk_size * tile_bytes
    part = carray(as_pointer(own), (chunk_size, width), kind)
    tiles = places // at_a_time
    while True:
        item = take_ticket(address)
        if item >= slabs * tiles * chunks:
            break
        chunk, place = item % chunks, item // chunks
        slab, tile = place // tiles, place % tiles
        first, last = chunk_rows[chunk], chunk_rows[chunk + 1]
        for row in range(first, last):
            part[row - first] = bias[row] if bias_at else zero
        here = x + slab * slab_length * VECTOR_BYTES + tile * tile_bytes
        for segment in range(chunk_segments[chunk], chunk_segments[chunk + 1]):
            start, stop = starts[segment], starts[segment + 1]
            target = own + (segment_rows[segment] - first) * tile_bytes
            if at_a_time == 8:
                shifted_sum_8(zero, values, shifts, start, stop, here, target)
            elif at_a_time == 4:
                shifted_sum_4(zero, values, shifts, start, stop, here, target)
            elif at_a_time == 2:
                shifted_sum_2(zero, values, shifts, start, stop, here, target)
            else:
                shifted_sum_1(zero, values, shifts, start, stop, here, target)
        there = out + ((slab * rows + first) * places + tile * at_a_time) * VECTOR_BYTES
        for row in range(last - first):
            copy_run(zero, own + row * tile_bytes, there + row * places * VECTOR_BYTES, width)


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _convolve_single(address: Any) -> None:
    _convolve(address, np.float32)


@kernel(_KERNEL)
def _convolve_double(address: Any) -> None:
    _convolve(address, np.float64)
