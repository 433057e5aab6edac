"""Sums over the batch of packed activations: the gradient of a bias."""

from __future__ import annotations

from typing import Any

from numba import carray, njit

from topkast.kernels.runtime._arguments import array_at, define_arguments
from topkast.kernels.runtime._vector import as_pointer, fetch_add

_ROWS = 64  # rows that a thread takes at a time

SUM = define_arguments("source", "out", "tiles", "rows", "width")


@njit  # type: ignore[untyped-decorator]
def sum_rows(address: Any, dtype: Any) -> None:
    """Write the sum of each row of `source` (tiles, rows, width) over all tiles to `out`."""
    arguments = carray(as_pointer(address), 1, SUM)[0]
    tiles, rows, width = arguments.tiles, arguments.rows, arguments.width
    source = carray(as_pointer(arguments.source), (tiles, rows, width), dtype)
    out = array_at(arguments.out, rows, dtype)
    while True:
        first = fetch_add(address) * _ROWS
        if first >= rows:
            break
        for row in range(first, min(rows, first + _ROWS)):
            total = dtype(0)
            for tile in range(tiles):
                total += _sum_lanes(source[tile, row], dtype(0))
            out[row] = total


@njit(fastmath={"reassoc", "contract"})  # type: ignore[untyped-decorator]
def _sum_lanes(row: Any, total: Any) -> Any:
    """The sum of a row, in an order that vectors can follow."""
    for lane in range(row.shape[0]):
        total += row[lane]
    return total
