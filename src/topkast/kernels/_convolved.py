"""The three products of a sparse convolution, on NumPy buffers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from topkast.kernels._columns import find_columns, find_row_starts, rows_and_columns
from topkast.kernels._convolutions import Shifted, convolve, sampled_correlation, shift
from topkast.kernels._gather import take
from topkast.kernels._grid import Grid, Pair
from topkast.kernels._layout import make_layout, make_row_layout
from topkast.kernels._planes import from_planes, lanes_of, to_planes
from topkast.kernels.runtime._arguments import Vector, empty
from topkast.kernels.runtime._pool import default_threads

_SIZES = 4  # of images for which distances are remembered

Shape = Sequence[int]  # of images: (images, channels, height, width)


class _Distances(NamedTuple):
    """The layouts of the three products, for images of one size."""

    forward: Shifted
    transposed: Shifted
    active: Shifted
    exploring: Shifted

    @property
    def nbytes(self) -> int:
        return self.forward.shifts.nbytes + self.transposed.shifts.nbytes


class ConvolutionProducts:
    r"""Products with a sparse weight of (rows, channels / groups, height, width).

    Each weight looks at a fixed distance from the place of the output, once images are laid out as
    planes: nothing is unfolded.

    Parameters
    ----------
    indices, forward
        Flat indices of B in the weight, and \|A\|, as for :class:`LinearProducts`.
    shape
        (rows, channels · window), with the channels of all groups.
    size, dilation, stride
        Of the window.
    margins
        Zeros above and below, left and right of an image.
    groups
        Of rows and channels.

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
        self._window = size, dilation, stride, margins
        weights = math.prod(size)
        self._rows, self._channels = shape[0], shape[1] // weights
        span = tuple(step * (count - 1) + 1 for count, step in zip(size, dilation, strict=True))
        grid = Grid((span[0], span[1]), size, dilation, stride)
        self._planes = self._channels * grid.planes
        columns, pitch = find_columns(indices, shape=shape, groups=groups)
        self._kept = columns.nbytes if columns is not indices else 0
        parts = slice(forward), slice(forward, len(indices))
        active, exploring = (
            find_row_starts(indices, part, shape=shape, groups=groups) for part in parts
        )
        make = functools.partial(make_row_layout, columns, shape=shape, pitch=pitch)
        # Of A, threads share the places, and all rows can be one chunk; of B they share the rows.
        fewer = max(1, min(32, self._rows // default_threads()))
        self._forward = make(active, max_rows=256)
        block = self._forward.block
        self._active = make(active, max_rows=fewer, block=block)
        self._exploring = make(exploring, max_rows=fewer, block=block)
        turned = grid.transpose(*rows_and_columns(columns, pitch, active))
        self._transposed = make_layout(
            *turned,
            np.arange(forward, dtype=np.int32),
            shape=(self._planes, self._rows * weights),
            max_rows=256,
        )
        self._distances: dict[Grid, _Distances] = {}

    def output_shape(self, shape: Shape) -> tuple[int, int, int, int]:
        """Shape of the output for images of some shape."""
        extent = Grid((shape[2], shape[3]), *self._window).places
        return shape[0], self._rows, *extent

    def packed_shape(self, shape: Shape, dtype: Any) -> tuple[int, int, int, int]:
        """Shape of packed images: (slabs, planes, length, lanes)."""
        grid = self._grid_of(shape, dtype)
        return _planes(shape[0], self._planes, grid.length, grid, dtype)

    def packed_gradient_shape(self, shape: Shape, dtype: Any) -> tuple[int, int, int, int]:
        """Shape of a packed gradient of the output for images of some shape."""
        grid = self._grid_of(shape, dtype)
        return _planes(shape[0], self._rows, grid.gradient_length, grid, dtype)

    def pack(self, images: Vector, out: Vector) -> None:
        """Write images as the products read them."""
        to_planes(images, out, self._grid_of(images.shape, images.dtype).of_images)

    def pack_gradient(self, gradient: Vector, out: Vector, *, shape: Shape) -> None:
        """Write a gradient of the output, for images of some shape, as the products read it."""
        to_planes(gradient, out, self._grid_of(shape, gradient.dtype).of_gradients)

    def forward(
        self,
        values: Vector,
        packed: Vector,
        out: Vector,
        *,
        shape: Shape,
        bias: Vector | None = None,
    ) -> None:
        """Write the output with the weight on A, for images of some shape."""
        grid = self._grid_of(shape, packed.dtype)
        planes = empty((len(packed), self._rows, grid.count, packed.shape[3]), packed.dtype)
        convolve(self._at(grid).forward, values, packed, planes, bias=bias)
        from_planes(planes, out, grid.of_output)

    def input_gradient(
        self, values: Vector, gradient: Vector, out: Vector, *, shape: Shape
    ) -> None:
        """Write the gradient of images of some shape, with the weight on A."""
        layout = self._transposed
        if values.ndim != 1 or len(values) < layout.extent or not values.flags.c_contiguous:
            raise ValueError(
                f"values must be contiguous and of at least {layout.extent} entries, got shape "
                f"{values.shape}"
            )
        if values.dtype != gradient.dtype or values.dtype not in (np.float32, np.float64):
            raise TypeError(
                f"expected float32 or float64, got values of {values.dtype} and a gradient of "
                f"{gradient.dtype}"
            )
        ordered = empty(layout.order.shape, values.dtype)
        take(values, layout.order, ordered)
        grid = self._grid_of(shape, gradient.dtype)
        planes = empty(
            (len(gradient), self._planes, grid.pixels, gradient.shape[3]), gradient.dtype
        )
        convolve(self._at(grid).transposed, ordered, gradient, planes)
        from_planes(planes, out, grid.of_images)

    def weight_gradient(
        self, gradient: Vector, packed: Vector, out: Vector, *, shape: Shape
    ) -> None:
        r"""Write the gradient of the weight on B, (\|B\|,), for images of some shape."""
        grid = self._grid_of(shape, gradient.dtype)
        distances = self._at(grid)
        sampled_correlation(
            distances.active,
            gradient,
            packed,
            out,
            places=grid.count,
            lead=grid.reach,
            other=distances.exploring,
        )

    @property
    def nbytes(self) -> int:
        """Bytes held beside the indices."""
        layouts = self._forward, self._active, self._exploring, self._transposed
        shifts = sum(one.nbytes for one in self._distances.values())
        return self._kept + sum(layout.nbytes for layout in layouts) + shifts

    def _grid_of(self, shape: Shape, dtype: Any) -> Grid:
        return _grid((shape[2], shape[3]), self._window, shape[0], lanes_of(dtype))

    def _at(self, grid: Grid) -> _Distances:
        """The distances in images of some size; those of the last few are remembered."""
        distances = self._distances.get(grid)
        if distances is None:
            seen, seeing = grid.seen(self._channels), grid.seeing(self._rows)
            forward = shift(self._forward, seen)
            distances = _Distances(
                forward,
                shift(self._transposed, seeing),
                shift(self._active, seen, shifts=forward.shifts),
                shift(self._exploring, seen, shifts=forward.shifts),
            )
            for oldest in list(self._distances)[: 1 - _SIZES]:
                self._distances.pop(oldest, None)
            self._distances[grid] = distances
        return distances


@functools.lru_cache(maxsize=256)
def _grid(extent: Pair, window: Any, batch: int, lanes: int) -> Grid:
    return Grid(extent, *window).for_batch(batch, lanes)


def _planes(
    images: int, planes: int, length: int, grid: Grid, dtype: Any
) -> tuple[int, int, int, int]:
    lanes = lanes_of(dtype)
    return -(-images * grid.bands // lanes), planes, length, lanes
