"""Sampled products, on the entries of one or two layouts, for linear layers and convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels._layout import LAYOUT, RowLayout, Vector
from topkast.kernels.runtime._arguments import array_at, define_arguments, run_kernel
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

PREFETCH_SEGMENTS = 4  # segments: columns and values are prefetched this far ahead

SAMPLE = define_arguments(
    "layout",
    "other",
    "columns",
    "other_columns",
    "pitch",
    "stride",
    "x",
    "y",
    "out",
    "image_groups",
    "image_group_length",
    "plane_length",
    "leading_zeros",
    "positions",
    "registers",
)


def run_sampled(
    layout: RowLayout, other: RowLayout | None, threads: int | None, out: Vector, **arguments: Any
) -> None:
    """Run the kernel. A tile of a linear layer is an image group whose planes are one tile long.

    Parameters
    ----------
    layout, other
        The entries to compute; both with the same chunks and panels.
    out
        Output array: the compact vector.
    columns, other_columns
        ``row · pitch + row of x`` of each entry of the compact vector, by layout.
    pitch, stride
        Pitch of the columns; bytes from one row of x to the next.
    x, y
        Image groups of rows, and of planes.
    image_groups, image_group_length, plane_length
        Number of groups; vectors in a group of x, and in a plane of y.
    leading_zeros, positions, registers
        In vectors: zeros before the first position of a plane of y, number of positions, and
        number of positions multiplied at a time (1, 2, 4 or 8).

    Raises
    ------
    ValueError
        If the layouts differ in their chunks or panels.
    """
    if other is not None and other.partition != layout.partition:
        raise ValueError(
            "both layouts must have the same shape, pitch, chunks and panels: make both with the "
            "same panel_width and max_rows"
        )
    run_kernel(
        (_sample_single, _sample_double),
        out.dtype,
        threads,
        SAMPLE,
        layout=layout._record,
        other=0 if other is None else other._record,
        out=out,
        **arguments,
    )


@njit  # type: ignore[untyped-decorator]
def sample_entries(address: Any, dtype: Any) -> None:
    """Compute the dot products of all chunks."""
    arguments = carray(as_pointer(address), 1, SAMPLE)[0]
    layout = carray(as_pointer(arguments.layout), 1, LAYOUT)[0]
    has_other = arguments.other != 0
    other = carray(as_pointer(arguments.other if has_other else arguments.layout), 1, LAYOUT)[0]
    registers, image_groups = arguments.registers, arguments.image_groups
    columns, other_columns = arguments.columns, arguments.other_columns
    image_group_bytes = arguments.image_group_length * VECTOR_BYTES
    plane_bytes, tile_bytes = arguments.plane_length * VECTOR_BYTES, registers * VECTOR_BYTES
    tiles, panels = arguments.positions // registers, layout.panels
    while True:
        chunk = fetch_add(address)
        if chunk >= layout.chunks:
            break
        if image_groups == 0:
            _zero_chunk(layout, chunk, arguments.out, dtype)
            if has_other:
                _zero_chunk(other, chunk, arguments.out, dtype)
        for item in range(image_groups * tiles):
            image_group, tile = item // tiles, item % tiles
            x = arguments.x + image_group * image_group_bytes + tile * tile_bytes
            y = arguments.y + image_group * layout.rows * plane_bytes
            y += arguments.leading_zeros * VECTOR_BYTES + tile * tile_bytes
            is_first = item == 0
            for panel in range(panels):
                chunk_panel = chunk * panels + panel
                _add(arguments, layout, columns, chunk, chunk_panel, x, y, is_first, dtype)
                if has_other:
                    _add(arguments, other, other_columns, chunk, chunk_panel, x, y, is_first, dtype)


@njit  # type: ignore[untyped-decorator]
def _zero_chunk(layout: Any, chunk: Any, out: Any, dtype: Any) -> None:
    entries = array_at(layout.chunk_entries, layout.chunks + 1, np.int32)
    array_at(out, entries[chunk + 1], dtype)[entries[chunk] :] = dtype(0)


@njit  # type: ignore[untyped-decorator]
def _add(
    arguments: Any,
    layout: Any,
    columns: Any,
    chunk: Any,
    chunk_panel: Any,
    x: Any,
    y: Any,
    is_first: Any,
    dtype: Any,
) -> None:
    """Add the dot products of one tile for the entries of one panel; the first tile overwrites."""
    zero, registers, out = dtype(0), arguments.registers, arguments.out
    stride, plane_bytes = arguments.stride, arguments.plane_length * VECTOR_BYTES
    row_bytes = arguments.pitch * stride
    first = array_at(layout.chunk_rows, layout.chunks + 1, np.int32)[chunk]
    panel_starts = array_at(layout.panel_segments, layout.chunks * layout.panels + 1, np.int32)
    begin, end = panel_starts[chunk_panel], panel_starts[chunk_panel + 1]
    segment_rows = array_at(layout.segment_rows, end, np.uint16)
    lengths = array_at(layout.segment_lengths, end, np.uint16)
    starts = array_at(layout.segment_starts, end, np.int32)
    for segment in range(begin, end):
        ahead = min(segment + PREFETCH_SEGMENTS, end - 1)
        prefetch(np.int32(0), columns, starts[ahead], starts[ahead] + lengths[ahead])
        prefetch(zero, out, starts[ahead], starts[ahead] + lengths[ahead])
        row, start = first + segment_rows[segment], starts[segment]
        stop = start + lengths[segment]
        x_rows, y_row = x - row * row_bytes, y + row * plane_bytes
        if registers == 8:
            dot_products_8(zero, columns, start, stop, x_rows, stride, y_row, out, is_first)
        elif registers == 4:
            dot_products_4(zero, columns, start, stop, x_rows, stride, y_row, out, is_first)
        elif registers == 2:
            dot_products_2(zero, columns, start, stop, x_rows, stride, y_row, out, is_first)
        else:
            dot_products_1(zero, columns, start, stop, x_rows, stride, y_row, out, is_first)


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _sample_single(address: Any) -> None:
    sample_entries(address, np.float32)


@kernel(_KERNEL)
def _sample_double(address: Any) -> None:
    sample_entries(address, np.float64)
