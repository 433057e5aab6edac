"""The output: units of A times activations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.backends._threads import default_threads
from topkast.kernels._packing import clear_negative
from topkast.kernels.runtime._arguments import THREAD_COUNTER, Vector, array_at
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import VECTOR_BYTES, as_pointer, fetch_add
from topkast.kernels.units._panels import Panels
from topkast.kernels.units._sizes import (
    ARGUMENTS,
    ITEMS_PER_THREAD,
    Planes,
    describe,
    run_units,
    write_transpose,
)
from topkast.kernels.units._vector import unit_product

_RUN_TILES = 4  # tiles of a plane that a thread takes at a time, one row of units after the other
_CHUNK_WEIGHT_ROWS = 512  # maximum rows of a chunk of the output, which stays in the L2 cache


def multiply_units(
    panels: Panels,
    unit_rows: int,
    columns: Vector,
    planes: Planes,
    values: Vector,
    x: Vector,
    out: Vector,
    bias: Vector | None,
    threads: int | None = None,
) -> None:
    """Output of a linear layer, (batch, rows), or planes of the output of a convolution."""
    threads = threads or default_threads()
    arguments = describe_multiply(panels, unit_rows, columns, planes, threads)
    if bias is None:
        bias = np.zeros(panels.rows * unit_rows, out.dtype)
    kernels = _multiply_single, _multiply_double
    run_units(kernels, threads, arguments, values=values, x=x, out=out, bias=bias)


def describe_multiply(
    panels: Panels, unit_rows: int, columns: Vector, planes: Planes, threads: int
) -> dict[str, int]:
    """The arguments of :func:`multiply_tiles_of_units`, but addresses of activations and values."""
    arguments = describe(panels, unit_rows, columns, planes)
    most = min(_CHUNK_WEIGHT_ROWS // unit_rows, panels.rows // (ITEMS_PER_THREAD * threads))
    arguments["chunk_rows"] = chunk_rows = max(1, most)
    arguments["out_plane_bytes"] = planes.positions * VECTOR_BYTES
    if planes.batch:
        tile_bytes = arguments["registers"] * VECTOR_BYTES
        arguments["scratch_bytes"] = chunk_rows * unit_rows * tile_bytes
    return arguments


@njit  # type: ignore[untyped-decorator]
def multiply_tiles_of_units(address: Any, dtype: Any) -> None:
    """Multiply; `out` is (batch, rows), or planes if `batch` is 0.

    If `rectifies`, negative outputs become 0: with planes, these are one tile long.
    """
    arguments = carray(as_pointer(address), 1, ARGUMENTS)[0]
    unit_rows, registers = arguments.unit_rows, arguments.registers
    rows, tiles, batch = arguments.rows, arguments.tiles, arguments.batch
    height, tile_bytes = rows * unit_rows, registers * VECTOR_BYTES
    bias_bytes = array_at(arguments.bias, unit_rows, dtype).nbytes
    lanes = tile_bytes * unit_rows // bias_bytes
    values, columns = arguments.values, arguments.columns
    stride, row_bytes = arguments.stride, arguments.pitch * arguments.stride
    starts = array_at(arguments.starts, rows, np.int32)
    stops = array_at(arguments.starts + arguments.panels * starts.nbytes, rows, np.int32)
    chunks = (rows + arguments.chunk_rows - 1) // arguments.chunk_rows
    runs = (tiles + _RUN_TILES - 1) // _RUN_TILES
    thread = fetch_add(address + THREAD_COUNTER)
    scratch = arguments.scratch + thread * arguments.scratch_bytes
    while True:
        item = fetch_add(address)
        if item >= arguments.groups * runs * chunks:
            break
        chunk, group_run = item % chunks, item // chunks
        group, tile = group_run // runs, group_run % runs * _RUN_TILES
        last_tile = min(tile + _RUN_TILES, tiles)
        first, last = chunk * arguments.chunk_rows, min((chunk + 1) * arguments.chunk_rows, rows)
        first_row, count = first * unit_rows, (last - first) * unit_rows
        x = arguments.x + group * arguments.x_bytes + tile * tile_bytes
        if batch:
            out, out_stride = scratch, tile_bytes
        else:
            out_stride = arguments.out_plane_bytes
            out = arguments.out + (group * height + first_row) * out_stride + tile * tile_bytes
        for row in range(first, last):
            for shift in range(0, (last_tile - tile) * tile_bytes, tile_bytes):
                unit_product(
                    dtype(0),
                    unit_rows,
                    registers,
                    values,
                    columns,
                    starts[row],
                    stops[row],
                    x + shift - row * row_bytes,
                    stride,
                    arguments.bias + row * bias_bytes,
                    out + shift + (row - first) * unit_rows * out_stride,
                    out_stride,
                )
        if arguments.rectifies:
            clear_negative(array_at(out, count * lanes, dtype))
        if batch:
            output = carray(as_pointer(arguments.out), (batch, height), dtype)
            transposed = carray(as_pointer(scratch), (count, lanes), dtype)
            write_transpose(transposed, output, group * lanes, first_row)


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _multiply_single(address: Any) -> None:
    multiply_tiles_of_units(address, np.float32)


@kernel(_KERNEL)
def _multiply_double(address: Any) -> None:
    multiply_tiles_of_units(address, np.float64)
