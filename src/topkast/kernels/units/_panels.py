"""Units of r × 1 of a matrix by row of units, cut into panels of columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from topkast.kernels.runtime._arguments import Vector
from topkast.kernels.runtime._compile import compiled

_SEGMENT_UNITS = 8  # average units of a row in a panel: the table takes an eighth of the units
_MIN_PANEL = 32  # columns


@dataclass(frozen=True, eq=False)
class Panels:
    """Where the units of each row of units lie in the compact vector, panel by panel.

    Attributes
    ----------
    units
        Unit numbers, ``row of units · width + column``; int32, not copied.
    starts
        Position in `units` of the first unit of each row from the start of each panel on; the last
        row of the table is where the rows end. int32 (panels + 1, rows).
    panel_width
        Columns of a panel.
    width
        Columns of the matrix.
    """

    units: Vector
    starts: Vector
    panel_width: int
    width: int

    @cached_property
    def start(self) -> int:
        """Position of the first unit."""
        return int(self.starts[0, 0]) if self.rows else 0

    @cached_property
    def stop(self) -> int:
        """Position after the last unit."""
        return int(self.starts[-1, -1]) if self.rows else 0

    def check(self) -> None:
        """Raise ValueError if `units` was overwritten with units out of range."""
        start, stop, end = self.start, self.stop, self.rows * self.width
        if stop > start and not (self.units[start] >= 0 and self.units[stop - 1] < end):
            raise ValueError(
                "the units of a layout were overwritten: make a new layout for new units"
            )

    @property
    def panels(self) -> int:
        """Number of panels."""
        return len(self.starts) - 1

    @property
    def rows(self) -> int:
        """Number of rows of units."""
        rows: int = self.starts.shape[1]
        return rows

    @property
    def nbytes(self) -> int:
        """Bytes held in addition to `units`."""
        return self.starts.nbytes


def make_panels(
    units: Vector, entries: slice, /, *, shape: tuple[int, int], panel_width: int
) -> Panels:
    """Cut the units in a slice of `units` into panels.

    Parameters
    ----------
    units
        Unit numbers, ``row of units · width + column``; int32, contiguous. The result refers to
        this array without a copy: do not write to it.
    entries
        Slice of `units`, for example A.
    shape
        Number of rows of units, and columns, of the matrix.
    panel_width
        Columns of a panel.

    Raises
    ------
    ValueError
        If the units in the slice do not ascend, or lie outside of the matrix.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels.units._panels import make_panels
    >>> units = np.asarray([1, 3, 4], np.int32)
    >>> make_panels(units, slice(0, 3), shape=(2, 4), panel_width=2).starts
    array([[0, 2],
           [1, 3],
           [2, 3]], dtype=int32)
    """
    height, width = shape
    start, stop, _ = entries.indices(len(units))
    panels = -(-max(width, 1) // panel_width)
    starts = np.empty((panels + 1, height), dtype=np.int32)
    if not _fill_starts(units, start, stop, width, panel_width, starts):
        raise ValueError(f"indices must ascend in [0, {height * width})")
    return Panels(units, starts, panel_width, width)


def panel_width_for(units: int, shape: tuple[int, int], multiple: int = 1) -> int:
    """Width of the panels of a matrix with `units` units, a multiple of a number of columns."""
    height, width = shape
    panel_width = _SEGMENT_UNITS * height * width // units if units else width
    return -(-min(max(panel_width, _MIN_PANEL), max(width, 1)) // multiple) * multiple


@compiled
def _fill_starts(
    units: Any, start: int, stop: int, width: int, panel_width: int, starts: Any
) -> bool:
    """Fill the table of a slice of units; whether they ascend inside the matrix."""
    panels, height = starts.shape[0] - 1, starts.shape[1]
    position, previous = start, -1
    for row in range(height):
        first = row * width
        for panel in range(panels):
            starts[panel, row] = position
            end = first + min((panel + 1) * panel_width, width)
            while position < stop and units[position] < end:
                if units[position] <= previous:
                    return False
                previous = units[position]
                position += 1
        starts[panels, row] = position
    return position == stop
