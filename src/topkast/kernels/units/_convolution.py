"""The three products of a sparse convolution whose weights come in units of r × 1."""

from __future__ import annotations

import math

import numpy as np

from topkast.kernels._convolution import PlaneShapes, Shape
from topkast.kernels._geometry import ConvGeometry, Pair
from topkast.kernels._planes import from_planes, lanes_of
from topkast.kernels.runtime._arguments import Vector, check_arrays, empty_aligned
from topkast.kernels.units._linear import check_units
from topkast.kernels.units._multiply import multiply_units
from topkast.kernels.units._panels import make_panels, panel_width_for
from topkast.kernels.units._sample import sample_units
from topkast.kernels.units._scatter import scatter_units
from topkast.kernels.units._sizes import Planes

_SIZES = 4  # image sizes whose offsets are cached


class UnitConvolutionProducts(PlaneShapes):
    r"""Products with a sparse weight (height, channels / groups, window) in units of r × 1.

    A unit is r output channels that share an input channel and a weight of the window. Images are
    laid out as planes, as for :class:`ConvolutionProducts`.

    Parameters
    ----------
    indices, forward, rows
        As for :class:`UnitLinearProducts`.
    shape
        Shape of the matrix, (height, channels · size of the window), with the channels of all
        groups.
    size, dilation, stride, margins, groups
        As for :class:`ConvolutionProducts`. `rows` divides the output channels of a group.

    Raises
    ------
    TypeError, ValueError
        As :class:`UnitLinearProducts`.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import UnitConvolutionProducts
    >>> units = np.asarray([0, 1], np.int32)
    >>> products = UnitConvolutionProducts(units, 2, shape=(2, 2), size=(1, 2), rows=2)
    >>> images = np.asarray([[[[1, 2, 3]]]], "float32")
    >>> packed = np.empty(products.packed_shape(images.shape, images.dtype), images.dtype)
    >>> products.pack(images, packed)
    >>> out = np.empty(products.output_shape(images.shape), images.dtype)
    >>> values = np.asarray([1, 0, 10, 100], "float32")
    >>> products.forward(values, packed, out, shape=images.shape)
    >>> out[0, :, 0]
    array([[ 21.,  32.],
           [200., 300.]], dtype=float32)
    """

    def __init__(
        self,
        indices: Vector,
        forward: int,
        /,
        *,
        shape: tuple[int, int],
        size: Pair,
        dilation: Pair = (1, 1),
        stride: Pair = (1, 1),
        margins: tuple[Pair, Pair] = ((0, 0), (0, 0)),
        groups: int = 1,
        rows: int,
    ) -> None:
        height, width = shape
        check_units(indices, height // groups, rows)
        super().__init__(shape, size, dilation, stride, margins)
        weights = math.prod(size)
        units = self._across_groups(indices, height // rows, width, groups)
        self._units_nbytes = units.nbytes if units is not indices else 0
        self._units, self._unit_rows = units, rows
        self._width = width
        panel_width = panel_width_for(forward, (height // rows, width), weights)
        self._active, self._exploring = (
            make_panels(units, entries, shape=(height // rows, width), panel_width=panel_width)
            for entries in (slice(forward), slice(forward, len(indices)))
        )
        self._offsets: dict[ConvGeometry, Vector] = {}

    @staticmethod
    def _across_groups(indices: Vector, rows: int, width: int, groups: int) -> Vector:
        """Number the units of groups, which have columns of their own, in the whole matrix."""
        if groups == 1:
            return indices
        group_width = max(width // groups, 1)
        row = indices // group_width
        if len(indices) and not 0 <= row.min() <= row.max() < rows:
            raise ValueError(f"indices must ascend in [0, {rows * group_width})")
        column = indices - row * group_width + row * groups // rows * group_width
        if rows * width >= 1 << 31:
            raise ValueError(
                f"{groups} groups make {rows * width} pairs of a row of units and a column: the "
                f"kernels need fewer than {1 << 31}"
            )
        return np.ascontiguousarray(row * width + column, dtype=np.int32)

    def forward(
        self,
        values: Vector,
        packed: Vector,
        out: Vector,
        *,
        shape: Shape,
        bias: Vector | None = None,
    ) -> None:
        """Write the output with the weight on A into `out`; `shape` is the shape of the images."""
        geometry, sizes, offsets = self._sizes_of(shape, packed)
        planes = empty_aligned(
            (len(packed), self._rows, sizes.positions, packed.shape[3]), packed.dtype
        )
        check_arrays(
            values.dtype,
            ("values", values, self._values_shape),
            ("packed", packed, self._packed_shape(sizes, packed)),
            *([] if bias is None else [("bias", bias, (self._rows,))]),
        )
        multiply_units(self._active, self._unit_rows, offsets, sizes, values, packed, planes, bias)
        from_planes(planes, out, geometry.output_layout)

    def input_gradient(
        self, values: Vector, gradient: Vector, out: Vector, *, shape: Shape
    ) -> None:
        """Write the gradient of the images, of shape `shape`, with the weight on A into `out`."""
        geometry, sizes, offsets = self._sizes_of(shape, gradient)
        check_arrays(
            values.dtype,
            ("values", values, self._values_shape),
            ("gradient", gradient, self._gradient_shape(sizes, gradient)),
        )
        planes = empty_aligned(self._packed_shape(sizes, gradient), gradient.dtype)
        scatter_units(self._active, self._unit_rows, offsets, sizes, values, gradient, planes)
        from_planes(planes, out, geometry.image_layout)

    def weight_gradient(
        self, gradient: Vector, packed: Vector, out: Vector, *, shape: Shape
    ) -> None:
        r"""Write the weight gradient on B, (\|B\| · r,), into `out`; `shape` as for `forward`."""
        _, sizes, offsets = self._sizes_of(shape, gradient)
        check_arrays(
            out.dtype,
            ("out", out, self._values_shape),
            ("packed", packed, self._packed_shape(sizes, packed)),
            ("gradient", gradient, self._gradient_shape(sizes, gradient)),
        )
        sample_units(
            self._active, self._exploring, self._unit_rows, offsets, sizes, gradient, packed, out
        )

    @property
    def nbytes(self) -> int:
        """Bytes held in addition to `indices`."""
        offsets = sum(cached.nbytes for cached in self._offsets.values())
        return self._units_nbytes + self._active.nbytes + self._exploring.nbytes + offsets

    @property
    def _values_shape(self) -> tuple[int]:
        return (len(self._units) * self._unit_rows,)

    def _sizes_of(self, shape: Shape, packed: Vector) -> tuple[ConvGeometry, Planes, Vector]:
        geometry = self._geometry_of(shape, packed.dtype)
        groups = -(-shape[0] * geometry.bands // lanes_of(packed.dtype))
        sizes = Planes(
            groups,
            self._planes,
            geometry.length,
            geometry.positions,
            geometry.gradient_length,
            geometry.max_offset,
        )
        offsets = self._offsets.get(geometry)
        if offsets is None:
            table = geometry.input_offsets(self._channels)
            if table.size and int(table.max()) >= 1 << 31:
                raise ValueError(
                    f"images of {tuple(shape)} have offsets that do not fit in 31 bits"
                )
            offsets = table.astype(np.int32)[self._units % max(self._width, 1)]
            for oldest in list(self._offsets)[: 1 - _SIZES]:
                self._offsets.pop(oldest, None)
            self._offsets[geometry] = offsets
        return geometry, sizes, offsets

    @staticmethod
    def _packed_shape(sizes: Planes, packed: Vector) -> tuple[int, ...]:
        return sizes.groups, sizes.planes, sizes.length, lanes_of(packed.dtype)

    def _gradient_shape(self, sizes: Planes, gradient: Vector) -> tuple[int, ...]:
        return sizes.groups, self._rows, sizes.gradient_length, lanes_of(gradient.dtype)
