"""The three products of a sparse linear layer whose weights come in units of r × 1."""

from __future__ import annotations

from typing import Any

from topkast.kernels._packing import pack
from topkast.kernels._planes import lanes_of
from topkast.kernels.runtime._arguments import Vector, check_arrays
from topkast.kernels.runtime._vector import VECTOR_BYTES
from topkast.kernels.units._multiply import multiply_units
from topkast.kernels.units._panels import make_panels, panel_width_for
from topkast.kernels.units._sample import sample_units
from topkast.kernels.units._scatter import scatter_units
from topkast.kernels.units._sizes import Planes, registers_for
from topkast.kernels.units._vector import REGISTERS, ROWS


class UnitLinearProducts:
    r"""Products with a sparse weight W (height × width), whose units on B are one vector.

    A unit is r weights below each other. In the vector of values, and in `indices`, the units of A
    come first. The products read columns from `indices`: do not write to that array.

    Parameters
    ----------
    indices
        Unit numbers, ``row of units · width + column``, (\|B\|,): those of A in ascending order,
        then those of B∖A in ascending order; int32.
    forward
        \|A\|, in units.
    shape
        Shape of W, (height, width).
    rows
        Rows of a unit: 2, 4 or 8. They divide the height.

    Raises
    ------
    TypeError
        If `indices` is not int32.
    ValueError
        If the indices of A or of B∖A do not ascend, or lie outside of the weight, or if `rows` is
        another number.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import UnitLinearProducts
    >>> products = UnitLinearProducts(np.asarray([2, 0], np.int32), 1, shape=(2, 3), rows=2)
    >>> values, x = np.asarray([2, 3, 9, 9], "float32"), np.asarray([[7, 0, 10]], "float32")
    >>> packed = np.empty(products.packed_shape(x.shape, x.dtype), x.dtype)
    >>> products.pack(x, packed)
    >>> out = np.empty((1, 2), x.dtype)
    >>> products.forward(values, packed, out)
    >>> out
    array([[20., 30.]], dtype=float32)
    """

    def __init__(
        self, indices: Vector, forward: int, /, *, shape: tuple[int, int], rows: int
    ) -> None:
        height, width = shape
        check_units(indices, height, rows)
        self._indices, self.rows, self.shape = indices, rows, shape
        units = height // rows, width
        panel_width = panel_width_for(forward, units)
        self._active, self._exploring = (
            make_panels(indices, entries, shape=units, panel_width=panel_width)
            for entries in (slice(forward), slice(forward, len(indices)))
        )

    def packed_shape(self, shape: tuple[int, int], dtype: Any) -> tuple[int, int, int]:
        """Shape of packed activations (batch, features): (tiles, features, width)."""
        batch, features = shape
        lanes = lanes_of(dtype)
        width = lanes * registers_for(self.rows, -(-batch // lanes))
        return -(-batch // width), features, width

    @staticmethod
    def pack(activations: Vector, out: Vector) -> None:
        """Pack activations or a gradient of the output for the products."""
        pack(activations, out)

    def forward(
        self, values: Vector, x: Vector, out: Vector, *, bias: Vector | None = None
    ) -> None:
        """Write the output ``x · Wᵀ + bias`` with W on A, (batch, height), into `out`."""
        height, width = self.shape
        planes = self._planes(x, len(out))
        check_arrays(
            values.dtype,
            ("values", values, (len(self._indices) * self.rows,)),
            ("x", x, (len(x), width, x.shape[2])),
            ("out", out, (len(out), height)),
            *([] if bias is None else [("bias", bias, (height,))]),
        )
        multiply_units(self._active, self.rows, self._indices, planes, values, x, out, bias)

    def input_gradient(self, values: Vector, gradient: Vector, out: Vector) -> None:
        """Write the input gradient ``gradient · W`` with W on A, (batch, width), into `out`."""
        height, width = self.shape
        planes = self._planes(gradient, len(out))
        check_arrays(
            values.dtype,
            ("values", values, (len(self._indices) * self.rows,)),
            ("gradient", gradient, (len(gradient), height, gradient.shape[2])),
            ("out", out, (len(out), width)),
        )
        scatter_units(self._active, self.rows, self._indices, planes, values, gradient, out)

    def weight_gradient(self, gradient: Vector, x: Vector, out: Vector) -> None:
        r"""Write the weight gradient ``gradientᵀ · x`` on B, (\|B\| · r,), into `out`."""
        height, width = self.shape
        planes = self._planes(x, 0)
        check_arrays(
            out.dtype,
            ("x", x, (len(x), width, x.shape[2])),
            ("gradient", gradient, (len(x), height, x.shape[2])),
            ("out", out, (len(self._indices) * self.rows,)),
        )
        units = self._active, self._exploring, self.rows, self._indices
        sample_units(*units, planes, gradient, x, out)

    def check(self) -> None:
        """Raise ValueError if `indices` was overwritten with units out of range."""
        self._active.check()
        self._exploring.check()

    @property
    def nbytes(self) -> int:
        """Bytes held in addition to `indices`."""
        return self._active.nbytes + self._exploring.nbytes

    def _planes(self, packed: Vector, batch: int) -> Planes:
        """Sizes of packed activations, and of a result of `batch` rows, 0 for no rows."""
        tiles, _, lanes = packed.shape
        if batch > tiles * lanes:
            raise ValueError(f"{batch} rows of out do not fit {tiles} tiles of width {lanes}")
        registers, remainder = divmod(lanes * packed.itemsize, VECTOR_BYTES)
        if remainder or registers not in REGISTERS[self.rows]:
            raise ValueError(
                f"a tile cannot have {lanes} columns of {packed.dtype}: allocate it with the shape "
                "of packed_shape"
            )
        sizes = tiles, self.shape[1], registers, registers, registers
        return Planes(*sizes, is_linear=True, batch=batch)


def check_units(indices: Vector, height: int, rows: int) -> None:
    """Check unit numbers, and the rows of a unit of a matrix of a height."""
    if rows not in ROWS:
        raise ValueError(f"units have {' or '.join(map(str, ROWS))} rows, got {rows}")
    if height % rows:
        raise ValueError(f"units of {rows} rows do not divide a height of {height}")
    if getattr(indices, "dtype", None) != "int32":
        raise TypeError(f"indices must be int32, got {indices.dtype}")
    if indices.ndim != 1 or not indices.flags.c_contiguous:
        raise ValueError(f"indices must be a contiguous vector, got shape {indices.shape}")
