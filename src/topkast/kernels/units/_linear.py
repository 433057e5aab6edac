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
from topkast.kernels.units._vector import ROWS


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
        self._check(values.dtype, values, (len(out), out, height), ("x", x, width))
        if bias is not None:
            check_arrays(values.dtype, ("bias", bias, (height,)))
        planes = self._planes(x, len(out))
        multiply_units(self._active, self.rows, self._indices, planes, values, x, out, bias)

    def input_gradient(self, values: Vector, gradient: Vector, out: Vector) -> None:
        """Write the input gradient ``gradient · W`` with W on A, (batch, width), into `out`."""
        height, width = self.shape
        self._check(values.dtype, values, (len(out), out, width), ("gradient", gradient, height))
        planes = self._planes(gradient, len(out))
        scatter_units(self._active, self.rows, self._indices, planes, values, gradient, out)

    def weight_gradient(self, gradient: Vector, x: Vector, out: Vector) -> None:
        r"""Write the weight gradient ``gradientᵀ · x`` on B, (\|B\| · r,), into `out`."""
        height, width = self.shape
        self._check(out.dtype, out, None, ("x", x, width), ("gradient", gradient, height))
        other = self._exploring if self._exploring.starts.size else None
        planes = self._planes(x, 0)
        sample_units(self._active, other, self.rows, self._indices, planes, gradient, x, out)

    def check(self) -> None:
        """Raise ValueError if `indices` was overwritten with units out of range."""
        self._active.check()
        self._exploring.check()

    @property
    def nbytes(self) -> int:
        """Bytes held in addition to `indices`."""
        return self._active.nbytes + self._exploring.nbytes

    def _check(
        self,
        dtype: Any,
        values: Vector,
        output: tuple[int, Vector, int] | None,
        *packed: tuple[str, Vector, int],
    ) -> None:
        tiles, _, lanes = packed[0][1].shape
        arrays: list[Any] = [("values", values, (len(self._indices) * self.rows,))]
        arrays += [(name, array, (tiles, features, lanes)) for name, array, features in packed]
        if output is None:
            arrays[0] = ("out", values, arrays[0][2])
        else:
            batch, out, features = output
            arrays.append(("out", out, (batch, features)))
            if batch > tiles * lanes:
                raise ValueError(f"{batch} rows of out do not fit {tiles} tiles of width {lanes}")
        check_arrays(dtype, *arrays)
        registers, remainder = divmod(lanes * int(values.dtype.itemsize), VECTOR_BYTES)
        if remainder or registers_for(self.rows, registers) != registers:
            raise ValueError(
                f"a tile cannot have {lanes} columns of {values.dtype}: allocate it with the shape "
                "of packed_shape"
            )

    def _planes(self, packed: Vector, batch: int) -> Planes:
        tiles, _, lanes = packed.shape
        registers = lanes * packed.itemsize // VECTOR_BYTES
        return Planes(
            tiles, self.shape[1], registers, registers, registers, is_linear=True, batch=batch
        )


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
