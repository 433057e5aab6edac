"""What the three products of units share: sizes of the activations, arguments, division of work.

A tile of a linear layer is an image group whose planes, one for each feature, are one tile long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numba import njit

from topkast.kernels._packing import transpose
from topkast.kernels.runtime._arguments import (
    Vector,
    define_arguments,
    empty_aligned,
    run_kernel,
)
from topkast.kernels.runtime._vector import VECTOR_BYTES
from topkast.kernels.units._panels import Panels
from topkast.kernels.units._vector import REGISTERS

ITEMS_PER_THREAD = 4  # minimum, since items differ in work
CACHE_BYTES = 1 << 17  # of activations that a row of units reads or writes in some panels
_WORTH_UNITS = 24  # of a row in merged panels, for the loop over them to pay off
_COLUMNS = 16  # columns transposed at a time: each writes to a memory page of its own

ARGUMENTS = define_arguments(
    "starts",
    "panels",
    "panel_width",
    "other_starts",
    "columns",
    "pitch",
    "stride",
    "values",
    "x",
    "y",
    "out",
    "bias",
    "scratch",
    "scratch_bytes",
    "unit_rows",
    "rows",
    "width",
    "registers",
    "groups",
    "x_bytes",
    "y_bytes",
    "y_plane_bytes",
    "out_plane_bytes",
    "tiles",
    "chunk_rows",
    "merged",
    "planes",
    "batch",
)


@dataclass(frozen=True)
class Planes:
    """Sizes of the activations, in vectors where not said otherwise.

    Attributes
    ----------
    groups
        Number of image groups, or of tiles of a linear layer.
    planes
        Number of planes of an image group, or of features of a linear layer.
    length
        Of a plane of the input.
    positions
        Output positions that are computed.
    gradient_length
        Of a plane of the output's gradient.
    leading_zeros
        Before the first position of a plane of the gradient.
    batch
        Number of rows of a linear layer's activations; None for a convolution.
    """

    groups: int
    planes: int
    length: int
    positions: int
    gradient_length: int
    leading_zeros: int = 0
    batch: int | None = None


def registers_for(unit_rows: int, vectors: int) -> int:
    """Vectors of a tile, for activations of a number of vectors: few are left unused."""
    counts = REGISTERS[unit_rows]
    return min(counts, key=lambda count: -(-vectors // count) * (count + 1))


def tile_registers(unit_rows: int, planes: Planes) -> int:
    """Vectors of a tile; a convolution has 1, 2, 4 or a multiple of 8 positions."""
    return min(planes.positions, REGISTERS[unit_rows][0])


def merge_panels(panels: Panels, columns: int, items: int) -> int:
    """Panels to process together: at most `columns` wide where that leaves rows some units."""
    units = int(panels.starts[-1, -1] - panels.starts[0, 0]) if panels.rows else 0
    worth = _WORTH_UNITS * panels.rows * panels.width // max(units, 1)
    merged = max(1, max(columns, worth) // panels.panel_width)
    return max(1, min(merged, panels.panels // items))


def run_units(
    kernels: tuple[Any, Any],
    panels: Panels,
    unit_rows: int,
    columns: Vector,
    planes: Planes,
    registers: int,
    threads: int,
    **values: Any,
) -> None:
    dtype = values["out"].dtype
    is_linear = planes.batch is not None
    scratch_bytes = values.get("scratch_bytes", 0)
    scratch = empty_aligned((threads * scratch_bytes // dtype.itemsize,), dtype)
    known = {
        "starts": panels.starts,
        "panels": panels.panels,
        "panel_width": panels.panel_width,
        "columns": columns,
        "pitch": panels.width if is_linear else 0,
        "stride": registers * VECTOR_BYTES if is_linear else VECTOR_BYTES,
        "scratch": scratch,
        "unit_rows": unit_rows,
        "rows": panels.rows,
        "width": panels.width,
        "registers": registers,
        "groups": planes.groups,
        "x_bytes": planes.planes * planes.length * VECTOR_BYTES,
        "y_bytes": panels.rows * unit_rows * planes.gradient_length * VECTOR_BYTES,
        "y_plane_bytes": planes.gradient_length * VECTOR_BYTES,
        "tiles": planes.positions // registers,
        "planes": planes.planes,
        "batch": planes.batch or 0,
    }
    absent = dict.fromkeys(ARGUMENTS.names or (), 0)
    arguments = absent | known | values
    if "y" in values:  # read from the first position on
        arguments["y"] = values["y"].ctypes.data + planes.leading_zeros * VECTOR_BYTES
    del arguments["next_item"], arguments["next_thread"]
    run_kernel(kernels, dtype, threads, ARGUMENTS, **arguments)


@njit  # type: ignore[untyped-decorator]
def write_transpose(transposed: Any, output: Any, first: Any, first_column: Any) -> None:
    """Write a tile of results, (columns of `output`, lanes), into the rows from `first` on."""
    count, lanes = transposed.shape
    used = min(lanes, output.shape[0] - first)
    for column in range(0, used, _COLUMNS):
        stop = min(used, column + _COLUMNS)
        target = output[first + column : first + stop, first_column : first_column + count]
        transpose(transposed[:, column:stop], target)
