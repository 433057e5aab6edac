"""Dot products of rows at the entries of one layout or of two, for all kinds of layers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels._layout import LAYOUT, RowLayout, Vector
from topkast.kernels.runtime._arguments import slots, start, vector
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import (
    VECTOR_BYTES,
    as_pointer,
    dot_products_1,
    dot_products_2,
    dot_products_4,
    dot_products_8,
    fetch_add,
    prefetch,
)

SEGMENTS_AHEAD = 4  # whose columns and values are asked for before they are used

_SAMPLE = slots(
    "layout",
    "other",
    "columns",
    "other_columns",
    "pitch",
    "stride",
    "x",
    "y",
    "out",
    "slabs",
    "slab_length",
    "plane_length",
    "lead",
    "places",
    "at_a_time",
)


def sample(
    layout: RowLayout, other: RowLayout | None, threads: int | None, out: Vector, **arguments: Any
) -> None:
    """Run the kernel: tiles of a linear layer are slabs of planes that are one tile long.

    Parameters
    ----------
    layout, other
        The entries wanted; both cut alike.
    out
        Compact vector.
    columns, other_columns
        Of each entry of the compact vector its number of rows of x, and ``row · pitch``.
    pitch, stride
        Of the columns; and bytes from one row of x to the next.
    x, y
        Slabs of rows and of planes.
    slabs, slab_length, plane_length
        Number of slabs; vectors of a slab of x, and of a plane of y.
    lead, places, at_a_time
        In vectors: where the first place of a plane is, how many there are, and how many are
        multiplied at a time: 1, 2, 4 or 8.

    Raises
    ------
    ValueError
        If the two are cut differently.
    """
    if other is not None and other.cut != layout.cut:
        raise ValueError("both layouts must be of one shape, cut into the same chunks and blocks")
    start(
        (_sample_single, _sample_double),
        out.dtype,
        threads,
        _SAMPLE,
        layout=layout._record,
        other=0 if other is None else other._record,
        out=out,
        **arguments,
    )


@njit  # type: ignore[untyped-decorator]
def _sample(address: Any, dtype: Any) -> None:
    arguments = carray(as_pointer(address), 1, _SAMPLE)[0]
    layout = carray(as_pointer(arguments.layout), 1, LAYOUT)[0]
    two = arguments.other != 0
    other = carray(as_pointer(arguments.other if two else arguments.layout), 1, LAYOUT)[0]
    at_a_time, slabs, lead = arguments.at_a_time, arguments.slabs, arguments.lead
    slab_bytes = arguments.slab_length * VECTOR_BYTES
    plane_bytes, tile_bytes = arguments.plane_length * VECTOR_BYTES, at_a_time * VECTOR_BYTES
    tiles, blocks = arguments.places // at_a_time, layout.blocks
    while True:
        chunk = fetch_add(address)
        if chunk >= layout.chunks:
            break
        if slabs == 0:
            _clear(layout, chunk, arguments.out, dtype)
            if two:
                _clear(other, chunk, arguments.out, dtype)
        for item in range(slabs * tiles):
            slab, tile = item // tiles, item % tiles
            x = arguments.x + slab * slab_bytes + tile * tile_bytes
            y = arguments.y + slab * layout.rows * plane_bytes
            y += lead * VECTOR_BYTES + tile * tile_bytes
            fresh = item == 0
            for block in range(blocks):
                at = chunk * blocks + block
                _add(arguments, layout, arguments.columns, chunk, at, x, y, fresh, dtype)
                if two:
                    _add(arguments, other, arguments.other_columns, chunk, at, x, y, fresh, dtype)


@njit  # type: ignore[untyped-decorator]
def _clear(layout: Any, chunk: Any, out: Any, dtype: Any) -> None:
    entries = vector(layout.chunk_entries, layout.chunks + 1, np.int32)
    vector(out, entries[chunk + 1], dtype)[entries[chunk] :] = dtype(0)


@njit  # type: ignore[untyped-decorator]
def _add(
    arguments: Any,
    layout: Any,
    columns: Any,
    chunk: Any,
    at: Any,
    x: Any,
    y: Any,
    fresh: Any,
    dtype: Any,
) -> None:
    """Add the dot products over one tile of the entries of one block; the first ones are set."""
    zero, at_a_time, out = dtype(0), arguments.at_a_time, arguments.out
    stride, plane_bytes = arguments.stride, arguments.plane_length * VECTOR_BYTES
    row_bytes = arguments.pitch * stride
    first = vector(layout.chunk_rows, layout.chunks + 1, np.int32)[chunk]
    edges = vector(layout.block_segments, layout.chunks * layout.blocks + 1, np.int32)
    begin, end = edges[at], edges[at + 1]
    segment_rows = vector(layout.segment_rows, end, np.uint16)
    lengths = vector(layout.segment_lengths, end, np.uint16)
    starts = vector(layout.segment_starts, end, np.int32)
    for segment in range(begin, end):
        later = min(segment + SEGMENTS_AHEAD, end - 1)
        prefetch(np.int32(0), columns, starts[later], starts[later] + lengths[later])
        prefetch(zero, out, starts[later], starts[later] + lengths[later])
        row, start = first + segment_rows[segment], starts[segment]
        stop = start + lengths[segment]
        source, target = x - row * row_bytes, y + row * plane_bytes
        if at_a_time == 8:
            dot_products_8(zero, columns, start, stop, source, stride, target, out, fresh)
        elif at_a_time == 4:
            dot_products_4(zero, columns, start, stop, source, stride, target, out, fresh)
        elif at_a_time == 2:
            dot_products_2(zero, columns, start, stop, source, stride, target, out, fresh)
        else:
            dot_products_1(zero, columns, start, stop, source, stride, target, out, fresh)


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _sample_single(address: Any) -> None:
    _sample(address, np.float32)


@kernel(_KERNEL)
def _sample_double(address: Any) -> None:
    _sample(address, np.float64)
