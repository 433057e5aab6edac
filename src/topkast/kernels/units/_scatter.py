"""The input gradient: units of A, transposed, times the gradient of the output."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.backends._threads import default_threads
from topkast.kernels._packing import add_entries, clear_where_not_positive
from topkast.kernels.runtime._arguments import THREAD_COUNTER, Vector, array_at
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import VECTOR_BYTES, as_pointer, fetch_add
from topkast.kernels.units._panels import Panels
from topkast.kernels.units._sizes import (
    ARGUMENTS,
    CACHE_BYTES,
    ITEMS_PER_THREAD,
    Planes,
    describe,
    merge_panels,
    run_units,
    write_transpose,
)
from topkast.kernels.units._vector import unit_scatter


def scatter_units(
    panels: Panels,
    unit_rows: int,
    columns: Vector,
    planes: Planes,
    values: Vector,
    y: Vector,
    out: Vector,
    threads: int | None = None,
) -> None:
    """Input gradient of a linear layer, (batch, width), or planes of that of a convolution.

    Threads share the panels of columns, so that no two write to one plane of the result.
    """
    if not panels.width:
        return
    threads = threads or default_threads()
    arguments = describe_scatter(panels, unit_rows, columns, planes, threads)
    run_units((_scatter_single, _scatter_double), threads, arguments, values=values, y=y, out=out)


def describe_scatter(
    panels: Panels, unit_rows: int, columns: Vector, planes: Planes, threads: int
) -> dict[str, int]:
    """The arguments of :func:`scatter_units_of_tiles`, but addresses of activations and values."""
    arguments = describe(panels, unit_rows, columns, planes)
    tile_bytes = arguments["registers"] * VECTOR_BYTES
    items = -(-ITEMS_PER_THREAD * threads // max(planes.groups, 1))
    merged = merge_panels(panels, CACHE_BYTES // tile_bytes, items)
    arguments["merged"] = merged
    arguments["out_plane_bytes"] = planes.length * VECTOR_BYTES
    arguments["leading_bytes"] = planes.leading_zeros * VECTOR_BYTES
    if planes.batch:
        columns_at_once = min(merged * panels.panel_width, panels.width)
        arguments["scratch_bytes"] = columns_at_once * tile_bytes
    return arguments


@njit  # type: ignore[untyped-decorator]
def scatter_units_of_tiles(address: Any, dtype: Any) -> None:
    """Scatter; `out` is (batch, width), or planes if `batch` is 0.

    Where `positive`, packed like `out`, is given and not positive, results become 0. `addend` of a
    linear layer, packed, is added to results if it is given.
    """
    arguments = carray(as_pointer(address), 1, ARGUMENTS)[0]
    rows, width, batch = arguments.rows, arguments.width, arguments.batch
    panels, merged, planes = arguments.panels, arguments.merged, arguments.planes
    tile_bytes = arguments.registers * VECTOR_BYTES
    starts = carray(as_pointer(arguments.starts), (panels + 1, rows), np.int32)
    items = (panels + merged - 1) // merged
    panel_width = arguments.panel_width
    thread = fetch_add(address + THREAD_COUNTER)
    scratch = arguments.scratch + thread * arguments.scratch_bytes
    while True:
        item = fetch_add(address)
        if item >= arguments.groups * items:
            break
        group, panel = item // items, item % items * merged
        end = min(panel + merged, panels)
        first, last = panel * panel_width, min(end * panel_width, width)
        y = arguments.y + arguments.leading_bytes + group * arguments.y_bytes
        first_plane, last_plane = first * planes // max(width, 1), last * planes // max(width, 1)
        group_out = arguments.out + group * arguments.x_bytes
        out = scratch - first * tile_bytes if batch else group_out
        plane_bytes = tile_bytes if batch else arguments.out_plane_bytes
        cleared = out + first_plane * plane_bytes
        cleared_bytes = (last_plane - first_plane) * plane_bytes
        array_at(cleared, cleared_bytes // 8, np.int64)[:] = 0
        for tile in range(arguments.tiles):
            shift = tile * tile_bytes
            _scatter_rows(arguments, starts[panel], starts[end], y + shift, out + shift, dtype)
        if arguments.positive:
            count = cleared_bytes // array_at(cleared, 1, dtype).nbytes
            positive = arguments.positive + (cleared - arguments.out)
            mask = array_at(positive, count, dtype)
            clear_where_not_positive(array_at(cleared, count, dtype), mask)
        if arguments.addend:
            count = cleared_bytes // array_at(cleared, 1, dtype).nbytes
            addend = arguments.addend + group * arguments.x_bytes + first * tile_bytes
            add_entries(array_at(cleared, count, dtype), array_at(addend, count, dtype))
        if batch:
            lanes = tile_bytes // array_at(scratch, 1, dtype).itemsize
            output = carray(as_pointer(arguments.out), (batch, width), dtype)
            transposed = carray(as_pointer(scratch), (last - first, lanes), dtype)
            write_transpose(transposed, output, group * lanes, first)


@njit  # type: ignore[untyped-decorator]
def _scatter_rows(arguments: Any, starts: Any, stops: Any, y: Any, out: Any, dtype: Any) -> None:
    """Add the products of all rows in some panels to one tile of the result."""
    zero, unit_rows, registers = dtype(0), arguments.unit_rows, arguments.registers
    values, columns, stride = arguments.values, arguments.columns, arguments.stride
    row_bytes, y_stride = arguments.pitch * stride, arguments.y_plane_bytes
    for row in range(arguments.rows):
        if starts[row] < stops[row]:
            unit_scatter(
                zero,
                unit_rows,
                registers,
                values,
                columns,
                starts[row],
                stops[row],
                y + row * unit_rows * y_stride,
                y_stride,
                out - row * row_bytes,
                stride,
            )


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _scatter_single(address: Any) -> None:
    scatter_units_of_tiles(address, np.float32)


@kernel(_KERNEL)
def _scatter_double(address: Any) -> None:
    scatter_units_of_tiles(address, np.float64)
