"""A weight by the indices and values of A, in the units that the kernels multiply."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from topkast._errors import MismatchError

Array = NDArray[Any]

_UNIT_ROWS = 8, 4, 2  # rows of a column of weights that have kernels of their own
_SAMPLE = 64  # weights whose neighbours tell that there are no units


class Weight(NamedTuple):
    """Values of A, unit by unit.

    Attributes
    ----------
    shape
        Shape of the tensor.
    indices
        Flat indices, ascending; numbers of units of `rows` × 1 if `rows` is above 1.
    values
        (|A|,), float32 or float64.
    rows
        Rows of a unit.
    """

    shape: tuple[int, ...]
    indices: Array
    values: Array
    rows: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of indices and values."""
        return self.indices.nbytes + self.values.nbytes


def make_weight(
    name: str, shape: tuple[int, ...], indices: Array, values: Array, *, groups: int = 1
) -> Weight:
    """Make a weight from ascending flat indices: in units if all weights come in such columns."""
    if values.dtype not in (np.float32, np.float64):
        raise MismatchError(
            f"{name} has dtype {values.dtype}, but the kernels need float32 or float64: save "
            "model.float()"
        )
    width = math.prod(shape[1:])
    for rows in _UNIT_ROWS:
        if shape[0] // groups % rows == 0 and math.prod(shape) < 1 << 31:
            units = _find_units(indices, values, width, rows)
            if units is not None:
                return Weight(shape, *units, rows)
    return Weight(shape, indices, values)


def _find_units(indices: Array, values: Array, width: int, rows: int) -> tuple[Array, Array] | None:
    """Numbers of units of `rows` × 1, and the values unit by unit; None if some are incomplete."""
    if not len(indices) or len(indices) % rows:
        return None
    sample = _unit_keys(indices[:: max(1, len(indices) // _SAMPLE)], width, rows) // rows
    row_blocks, columns = np.divmod(sample, width)
    neighbours = (row_blocks[:, None] * rows + np.arange(rows)) * width + columns[:, None]
    found = np.searchsorted(indices, neighbours).clip(max=len(indices) - 1)
    if not np.array_equal(indices[found], neighbours):
        return None
    keys = _unit_keys(indices, width, rows)
    order = np.argsort(keys)
    units = (keys[order] // rows).reshape(-1, rows)
    if not (units == units[:, :1]).all():
        return None
    return units[:, 0].astype(np.int32), values[order]


def _unit_keys(indices: Array, width: int, rows: int) -> Array:
    """A number for each weight: that of its unit, times `rows`, plus its row in the unit."""
    row, column = np.divmod(indices.astype(np.int64), width)
    keys: Array = (row // rows * width + column) * rows + row % rows
    return keys
