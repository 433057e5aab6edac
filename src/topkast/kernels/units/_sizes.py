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
from topkast.kernels.runtime._pool import address_of
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
    "leading_bytes",
    "out_plane_bytes",
    "tiles",
    "chunk_rows",
    "merged",
    "planes",
    "batch",
    "rectifies",
    "positive",
    "addend",
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
    is_linear
        Whether these are the tiles of a linear layer.
    batch
        Number of rows of the result of a linear layer; 0 if the result has tiles or planes.
    """

    groups: int
    planes: int
    length: int
    positions: int
    gradient_length: int
    leading_zeros: int = 0
    is_linear: bool = False
    batch: int = 0


def registers_for(unit_rows: int, vectors: int) -> int:
    """Vectors of a tile, for activations of a number of vectors: few are left unused."""
    counts = REGISTERS[unit_rows]
    return min(counts, key=lambda count: -(-vectors // count) * (count + 1))


def tile_registers(unit_rows: int, planes: Planes) -> int:
    """Vectors of a tile; a convolution has 1, 2, 4 or a multiple of 8 positions."""
    return min(planes.positions, REGISTERS[unit_rows][0])


def merge_panels(panels: Panels, columns: int, items: int) -> int:
    """Panels to process together: at most `columns` wide where that leaves rows some units."""
    units = max(panels.stop - panels.start, 1)
    worth = _WORTH_UNITS * panels.rows * panels.width // units
    merged = max(1, max(columns, worth) // panels.panel_width)
    return max(1, min(merged, panels.panels // items))


def describe(panels: Panels, unit_rows: int, columns: Vector, planes: Planes) -> dict[str, int]:
    """The arguments that follow from the units and the sizes, by name; all others are 0."""
    registers = tile_registers(unit_rows, planes)
    known = {
        "starts": address_of(panels.starts),
        "panels": panels.panels,
        "panel_width": panels.panel_width,
        "columns": address_of(columns),
        "pitch": panels.width if planes.is_linear else 0,
        "stride": registers * VECTOR_BYTES if planes.is_linear else VECTOR_BYTES,
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
        "batch": planes.batch,
    }
    absent = dict.fromkeys(ARGUMENTS.names or (), 0)
    del absent["next_item"], absent["next_thread"]
    return absent | known


def run_units(
    kernels: tuple[Any, Any], threads: int, arguments: dict[str, int], **arrays: Vector
) -> None:
    """Run the float32 or float64 kernel with more arguments, the addresses of arrays."""
    dtype = arrays["out"].dtype
    scratch = empty_aligned((threads * arguments["scratch_bytes"] // dtype.itemsize,), dtype)
    run_kernel(kernels, dtype, threads, ARGUMENTS, **arguments | arrays | {"scratch": scratch})


@njit  # type: ignore[untyped-decorator]
def write_transpose(transposed: Any, output: Any, first: Any, first_column: Any) -> None:
    """Write a tile of results, (columns of `output`, lanes), into the rows from `first` on."""
    count, lanes = transposed.shape
    used = min(lanes, output.shape[0] - first)
    for column in range(0, used, _COLUMNS):
        stop = min(used, column + _COLUMNS)
        target = output[first + column : first + stop, first_column : first_column + count]
        transpose(transposed[:, column:stop], target)
