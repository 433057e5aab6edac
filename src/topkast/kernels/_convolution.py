"""The three products of a sparse convolution on NumPy buffers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from topkast.backends._threads import default_threads
from topkast.kernels._columns import find_columns, find_row_starts, rows_and_columns
from topkast.kernels._gather import gather_unchecked
from topkast.kernels._geometry import ConvGeometry, Pair
from topkast.kernels._layout import Layout, make_layout, make_row_layout
from topkast.kernels._plane_products import OffsetLayout, convolve, sampled_correlation, shift
from topkast.kernels._planes import from_planes, lanes_of, to_planes
from topkast.kernels.runtime._arguments import Vector, empty_aligned
from topkast.kernels.runtime._deferred import Deferred

_SIZES = 4  # image sizes whose layouts are cached

Shape = Sequence[int]  # shape of images: (images, channels, height, width)


class _Layouts(NamedTuple):
    """The layouts of the three products for images of one size."""

    forward: OffsetLayout
    transposed: Deferred[OffsetLayout]
    active: OffsetLayout
    exploring: OffsetLayout

    @property
    def nbytes(self) -> int:
        return self.forward.offsets.nbytes + self.transposed.nbytes


class PlaneShapes:
    """Shapes of images, of their output, and of both as planes, for one window."""

    def __init__(
        self,
        shape: tuple[int, int],
        size: Pair,
        dilation: Pair,
        stride: Pair,
        margins: tuple[Pair, Pair],
    ) -> None:
        self._window = size, dilation, stride, margins
        self._rows, self._channels = shape[0], shape[1] // math.prod(size)
        self._geometry = self._span_geometry()
        self._planes = self._channels * self._geometry.planes_per_channel

    def output_shape(self, shape: Shape) -> tuple[int, int, int, int]:
        """Shape of the output for images of a given shape."""
        extent = ConvGeometry((shape[2], shape[3]), *self._window).output_extent
        return shape[0], self._rows, *extent

    def packed_shape(self, shape: Shape, dtype: Any) -> tuple[int, int, int, int]:
        """Shape of packed images: (image groups, planes, length, lanes)."""
        geometry = self._geometry_of(shape, dtype)
        return _planes_shape(shape[0], self._planes, geometry.length, geometry, dtype)

    def packed_gradient_shape(self, shape: Shape, dtype: Any) -> tuple[int, int, int, int]:
        """Shape of a packed gradient of the output for images of a given shape."""
        geometry = self._geometry_of(shape, dtype)
        return _planes_shape(shape[0], self._rows, geometry.gradient_length, geometry, dtype)

    def pack(self, images: Vector, out: Vector) -> None:
        """Pack images for the products."""
        to_planes(images, out, self._geometry_of(images.shape, images.dtype).image_layout)

    def pack_gradient(self, gradient: Vector, out: Vector, *, shape: Shape) -> None:
        """Pack a gradient of the output for the products; `shape` is the shape of the images."""
        to_planes(gradient, out, self._geometry_of(shape, gradient.dtype).gradient_layout)

    def _geometry_of(self, shape: Shape, dtype: Any) -> ConvGeometry:
        return _batch_geometry((shape[2], shape[3]), self._window, shape[0], lanes_of(dtype))

    def _span_geometry(self) -> ConvGeometry:
        """The geometry of the smallest images: it tells which planes the weights read."""
        size, dilation, stride, _ = self._window
        span = tuple(step * (count - 1) + 1 for count, step in zip(size, dilation, strict=True))
        return ConvGeometry((span[0], span[1]), size, dilation, stride)


class ConvolutionProducts(PlaneShapes):
    r"""Products with a sparse weight of shape (rows, channels / groups, height, width).

    Images are laid out as planes, on which each weight reads at a fixed offset from the output
    position, so nothing is unfolded.

    Parameters
    ----------
    indices, forward
        Flat indices of B in the weight, and \|A\|, as for :class:`LinearProducts`.
    shape
        Shape of the matrix, (rows, channels · size of the window), with the channels of all groups.
    size, dilation, stride
        Of the window.
    margins
        Zeros above and below, left and right of an image.
    groups
        Number of groups of rows and channels.

    Raises
    ------
    ValueError
        If the indices of A or of B∖A do not ascend, or lie outside of the weight.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import ConvolutionProducts
    >>> products = ConvolutionProducts(np.asarray([0, 1], np.int32), 2, shape=(1, 2), size=(1, 2))
    >>> images = np.asarray([[[[1, 2, 3]]]], "float32")
    >>> packed = np.empty(products.packed_shape(images.shape, images.dtype), images.dtype)
    >>> products.pack(images, packed)
    >>> out = np.empty(products.output_shape(images.shape), images.dtype)
    >>> products.forward(np.asarray([1, 10], "float32"), packed, out, shape=images.shape)
    >>> out
    array([[[[21., 32.]]]], dtype=float32)
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
    ) -> None:
        super().__init__(shape, size, dilation, stride, margins)
        weights, geometry = math.prod(size), self._geometry
        columns, pitch = find_columns(indices, shape=shape, groups=groups)
        self._columns_nbytes = columns.nbytes if columns is not indices else 0
        slices = slice(forward), slice(forward, len(indices))
        active, exploring = (
            find_row_starts(indices, entries, shape=shape, groups=groups) for entries in slices
        )
        make = functools.partial(make_row_layout, columns, shape=shape, pitch=pitch)
        # In the products with A, threads share the output positions, so one chunk may hold all
        # rows; in the weight gradient they share the rows.
        max_rows = max(1, min(32, self._rows // default_threads()))
        self._forward = make(active, max_rows=256)
        panel_width = self._forward.panel_width
        self._active = make(active, max_rows=max_rows, panel_width=panel_width)
        self._exploring = make(exploring, max_rows=max_rows, panel_width=panel_width)
        # Inference computes no input gradient.
        size_of_transpose = self._planes, self._rows * weights
        self._of_transpose = Deferred(
            functools.partial(
                _make_transpose, geometry, columns, pitch, active, forward, size_of_transpose
            ),
            active.nbytes,
        )
        self._layouts: dict[ConvGeometry, _Layouts] = {}

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
        geometry = self._geometry_of(shape, packed.dtype)
        planes = empty_aligned(
            (len(packed), self._rows, geometry.positions, packed.shape[3]), packed.dtype
        )
        convolve(self._layouts_of(geometry).forward, values, packed, planes, bias=bias)
        from_planes(planes, out, geometry.output_layout)

    def input_gradient(
        self, values: Vector, gradient: Vector, out: Vector, *, shape: Shape
    ) -> None:
        """Write the gradient of the images, of shape `shape`, with the weight on A into `out`."""
        layout = self._of_transpose.get()
        length = layout.required_length
        if values.ndim != 1 or len(values) < length or not values.flags.c_contiguous:
            raise ValueError(
                f"values must be contiguous and have at least {length} entries, got shape "
                f"{values.shape} with strides {values.strides}"
            )
        if values.dtype != gradient.dtype or values.dtype not in (np.float32, np.float64):
            raise TypeError(
                "values and gradient must have the same dtype, float32 or float64, got "
                f"{values.dtype} and {gradient.dtype}"
            )
        ordered = empty_aligned(layout.order.shape, values.dtype)
        gather_unchecked(values, layout.order, ordered)
        geometry = self._geometry_of(shape, gradient.dtype)
        planes = empty_aligned(
            (len(gradient), self._planes, geometry.pixels, gradient.shape[3]), gradient.dtype
        )
        convolve(self._layouts_of(geometry).transposed.get(), ordered, gradient, planes)
        from_planes(planes, out, geometry.image_layout)

    def weight_gradient(
        self, gradient: Vector, packed: Vector, out: Vector, *, shape: Shape
    ) -> None:
        r"""Write the weight gradient on B, (\|B\|,), into `out`, for images of shape `shape`."""
        geometry = self._geometry_of(shape, gradient.dtype)
        layouts = self._layouts_of(geometry)
        sampled_correlation(
            layouts.active,
            gradient,
            packed,
            out,
            positions=geometry.positions,
            leading_zeros=geometry.max_offset,
            other=layouts.exploring,
        )

    @property
    def nbytes(self) -> int:
        """Bytes held in addition to `indices`."""
        layouts = self._forward, self._active, self._exploring, self._of_transpose
        offsets = sum(cached.nbytes for cached in self._layouts.values())
        return self._columns_nbytes + sum(layout.nbytes for layout in layouts) + offsets

    def _layouts_of(self, geometry: ConvGeometry) -> _Layouts:
        """The layouts for images of one size; those of the last few sizes are cached."""
        layouts = self._layouts.get(geometry)
        if layouts is None:
            input_offsets = geometry.input_offsets(self._channels)
            output_offsets = geometry.output_offsets(self._rows)
            forward = shift(self._forward, input_offsets)
            layouts = _Layouts(
                forward,
                Deferred(
                    functools.partial(_shift_transpose, self._of_transpose, output_offsets),
                    output_offsets.nbytes,
                ),
                shift(self._active, input_offsets, shifts=forward.offsets),
                shift(self._exploring, input_offsets, shifts=forward.offsets),
            )
            for oldest in list(self._layouts)[: 1 - _SIZES]:
                self._layouts.pop(oldest, None)
            self._layouts[geometry] = layouts
        return layouts


def _make_transpose(
    geometry: ConvGeometry,
    columns: Vector,
    pitch: int,
    row_starts: Vector,
    entries: int,
    shape: tuple[int, int],
) -> Layout:
    """The layout of the input gradient; its values are those of A in their order."""
    transposed = geometry.transpose(*rows_and_columns(columns, pitch, row_starts))
    return make_layout(*transposed, np.arange(entries, dtype=np.int32), shape=shape, max_rows=256)


def _shift_transpose(layout: Deferred[Layout], table: Vector) -> OffsetLayout:
    return shift(layout.get(), table)


@functools.lru_cache(maxsize=256)
def _batch_geometry(extent: Pair, window: Any, batch: int, lanes: int) -> ConvGeometry:
    return ConvGeometry(extent, *window).for_batch(batch, lanes)


def _planes_shape(
    images: int, planes: int, length: int, geometry: ConvGeometry, dtype: Any
) -> tuple[int, int, int, int]:
    lanes = lanes_of(dtype)
    return -(-images * geometry.bands // lanes), planes, length, lanes
