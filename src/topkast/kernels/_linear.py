"""The three products of a sparse linear layer on NumPy buffers."""

from __future__ import annotations

import functools
from typing import Any

from topkast.kernels._columns import find_columns, find_row_starts
from topkast.kernels._layout import (
    Layout,
    find_row_layout,
    make_row_layout,
    make_transposed_layout,
)
from topkast.kernels._packing import pack
from topkast.kernels._products import multiply, sampled_product, tile_width
from topkast.kernels.runtime._arguments import Vector
from topkast.kernels.runtime._deferred import Deferred
from topkast.kernels.runtime._partition import row_panel_width


class LinearProducts:
    r"""Products with a sparse weight W (rows × width), whose values on B are one vector.

    In that vector and in `indices`, the entries of A come first. The layouts take about half a byte
    for each entry of B, and another 6 bytes for each of A from the first input gradient on. The
    products read columns from `indices`: do not write to that array.

    Parameters
    ----------
    indices
        Flat indices of B in W, (\|B\|,): those of A in ascending order, then those of B∖A in
        ascending order; int32, or int64, from which new int32 columns are made.
    forward
        \|A\|.
    shape
        Shape of W, (rows, width).

    Raises
    ------
    ValueError
        If the indices of A or of B∖A do not ascend, or lie outside of the weight.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import LinearProducts
    >>> products = LinearProducts(np.asarray([0, 3, 1], np.int32), 2, shape=(2, 2))
    >>> values, x = np.asarray([2, 3, 9], "float32"), np.asarray([[1, 10]], "float32")
    >>> packed = np.empty(products.packed_shape(x.shape, x.dtype), x.dtype)
    >>> products.pack(x, packed)
    >>> out = np.empty((1, 2), x.dtype)
    >>> products.forward(values, packed, out)
    >>> out
    array([[ 2., 30.]], dtype=float32)
    >>> gradient = np.empty_like(values)
    >>> products.weight_gradient(packed, packed, gradient)
    >>> gradient
    array([  1., 100.,  10.], dtype=float32)
    """

    def __init__(self, indices: Vector, forward: int, /, *, shape: tuple[int, int]) -> None:
        self.shape = shape
        columns, pitch = find_columns(indices, shape=shape)
        self._columns_nbytes = columns.nbytes if columns is not indices else 0
        panel_width = row_panel_width(forward, shape)
        slices, starts = (slice(forward), slice(forward, len(indices))), []
        layouts = []
        for entries in slices:
            if pitch:
                layout, first = find_row_layout(
                    columns, entries, shape=shape, panel_width=panel_width
                )
            else:
                first = find_row_starts(indices, entries, shape=shape)
                layout = make_row_layout(columns, first, shape=shape, panel_width=panel_width)
            layouts.append(layout)
            starts.append(first)
        self._active, self._exploring = layouts
        active = starts[0]
        # Neither inference nor the first layer of a network computes an input gradient.
        self._of_transpose = Deferred(
            functools.partial(make_transposed_layout, columns, active, shape=shape, pitch=pitch),
            active.nbytes,
        )

    @property
    def _transposed(self) -> Layout:
        return self._of_transpose.get()

    @staticmethod
    def packed_shape(shape: tuple[int, int], dtype: Any) -> tuple[int, int, int]:
        """Shape of packed activations (batch, features): (tiles, features, width)."""
        batch, features = shape
        width = tile_width(batch, dtype)
        return -(-batch // width), features, width

    @staticmethod
    def pack(activations: Vector, out: Vector) -> None:
        """Pack activations or a gradient of the output for the products."""
        pack(activations, out)

    def forward(
        self, values: Vector, x: Vector, out: Vector, *, bias: Vector | None = None
    ) -> None:
        """Write the output ``x · Wᵀ + bias`` with W on A, (batch, rows), into `out`."""
        multiply(self._active, values, x, out, bias=bias)

    def input_gradient(self, values: Vector, gradient: Vector, out: Vector) -> None:
        """Write the input gradient ``gradient · W`` with W on A, (batch, width), into `out`."""
        multiply(self._transposed, values, gradient, out)

    def weight_gradient(self, gradient: Vector, x: Vector, out: Vector) -> None:
        r"""Write the weight gradient ``gradientᵀ · x`` on B, (\|B\|,), into `out`."""
        other = self._exploring if self._exploring.stop > self._exploring.start else None
        sampled_product(self._active, gradient, x, out, other=other)

    def check(self) -> None:
        """Raise ValueError if `indices` were overwritten with columns out of range."""
        self._active.check()
        self._exploring.check()

    @property
    def nbytes(self) -> int:
        """Bytes held in addition to `indices`."""
        layouts = self._active, self._exploring, self._of_transpose
        return self._columns_nbytes + sum(layout.nbytes for layout in layouts)
