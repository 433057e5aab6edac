"""The weight gradient: dot products of the gradient of the output and the activations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.backends._threads import default_threads
from topkast.kernels.runtime._arguments import Vector, array_at
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._pool import address_of
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
)
from topkast.kernels.units._vector import unit_dots

_DOT_VECTORS = 32  # vectors that dot products sum before they are added to the gradient


def sample_units(
    panels: Panels,
    other: Panels | None,
    unit_rows: int,
    columns: Vector,
    planes: Planes,
    y: Vector,
    x: Vector,
    out: Vector,
    threads: int | None = None,
) -> None:
    """Weight gradient on the units of A and, in `other`, of B∖A."""
    threads = threads or default_threads()
    arguments = describe_sample(panels, other, unit_rows, columns, planes, threads)
    run_units((_sample_single, _sample_double), threads, arguments, x=x, y=y, out=out)


def describe_sample(
    panels: Panels,
    other: Panels | None,
    unit_rows: int,
    columns: Vector,
    planes: Planes,
    threads: int,
) -> dict[str, int]:
    """The arguments of :func:`sample_units_of_tiles`, but addresses of activations and results."""
    arguments = describe(panels, unit_rows, columns, planes)
    vectors = min(planes.groups * planes.positions, _DOT_VECTORS) or 1
    arguments["chunk_rows"] = max(1, min(64, panels.rows // (ITEMS_PER_THREAD * threads)))
    arguments["merged"] = merge_panels(panels, CACHE_BYTES // (vectors * VECTOR_BYTES), 1)
    arguments["leading_bytes"] = planes.leading_zeros * VECTOR_BYTES
    if other is not None:
        arguments["other_starts"] = address_of(other.starts)
    return arguments


@njit  # type: ignore[untyped-decorator]
def sample_units_of_tiles(address: Any, dtype: Any) -> None:
    """Compute the dot products of all rows of units."""
    arguments = carray(as_pointer(address), 1, ARGUMENTS)[0]
    rows, panels, merged = arguments.rows, arguments.panels, arguments.merged
    starts = carray(as_pointer(arguments.starts), (panels + 1, rows), np.int32)
    has_other = arguments.other_starts != 0
    other_address = arguments.other_starts if has_other else arguments.starts
    other = carray(as_pointer(other_address), (panels + 1, rows), np.int32)
    positions, groups = arguments.tiles * arguments.registers, arguments.groups
    # Blocks of vectors: some groups whole, or some positions of one group.
    group_step = max(1, min(groups, _DOT_VECTORS // positions))
    step = positions if group_step > 1 else min(positions, _DOT_VECTORS)
    chunks = (rows + arguments.chunk_rows - 1) // arguments.chunk_rows
    while True:
        chunk = fetch_add(address)
        if chunk >= chunks:
            break
        first, last = chunk * arguments.chunk_rows, min((chunk + 1) * arguments.chunk_rows, rows)
        if groups == 0 or positions == 0:
            _clear(arguments, starts, first, last, dtype)
            if has_other:
                _clear(arguments, other, first, last, dtype)
        for group in range(0, groups, group_step):
            steps = min(group_step, groups - group)
            for position in range(0, positions, step):
                vectors, is_first = min(step, positions - position), group + position == 0
                shift = position * VECTOR_BYTES
                x = arguments.x + group * arguments.x_bytes + shift
                y = arguments.y + arguments.leading_bytes + group * arguments.y_bytes + shift
                sizes = steps, vectors, is_first
                for panel in range(0, panels, merged):
                    end = min(panel + merged, panels)
                    for row in range(first, last):
                        _dots(arguments, starts, panel, end, row, x, y, sizes, dtype)
                        if has_other:
                            _dots(arguments, other, panel, end, row, x, y, sizes, dtype)


@njit  # type: ignore[untyped-decorator]
def _clear(arguments: Any, starts: Any, first: Any, last: Any, dtype: Any) -> None:
    begin, end = starts[0, first], starts[arguments.panels, last - 1]
    unit_rows = arguments.unit_rows
    array_at(arguments.out, end * unit_rows, dtype)[begin * unit_rows :] = dtype(0)


@njit  # type: ignore[untyped-decorator]
def _dots(
    arguments: Any,
    starts: Any,
    panel: Any,
    end: Any,
    row: Any,
    x: Any,
    y: Any,
    sizes: Any,
    dtype: Any,
) -> None:
    """Dot products of the units of one row in the panels from `panel` to `end`."""
    steps, vectors, is_first = sizes
    unit_rows, stride = arguments.unit_rows, arguments.stride
    y_stride = arguments.y_plane_bytes
    unit_dots(
        dtype(0),
        unit_rows,
        arguments.columns,
        starts[panel, row],
        starts[end, row],
        x - row * arguments.pitch * stride,
        stride,
        arguments.x_bytes,
        y + row * unit_rows * y_stride,
        y_stride,
        arguments.y_bytes,
        steps,
        vectors,
        arguments.out,
        is_first,
    )


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _sample_single(address: Any) -> None:
    sample_units_of_tiles(address, np.float32)


@kernel(_KERNEL)
def _sample_double(address: Any) -> None:
    sample_units_of_tiles(address, np.float64)
