"""Geometry of a convolution on planes: sizes, and offsets between pixels and output positions.

:mod:`._planes` lays images out as planes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from topkast.kernels.runtime._arguments import Vector

Pair = tuple[int, int]

_MAX_REGISTERS = 8  # output positions that a product computes at a time


class Bands(NamedTuple):
    """Horizontal bands that an image is cut into.

    Attributes
    ----------
    number
        Bands per image.
    step
        Rows from the start of a band to the start of the next band.
    rows
        Rows of a band.
    """

    number: int
    step: int
    rows: int


class PlaneLayout(NamedTuple):
    """Layout of images as planes; made by :class:`ConvGeometry`.

    Attributes
    ----------
    width
        Pixels in a row of a plane.
    bands
        Horizontal bands of an image with its margin; their number divides the number of lanes.
    stride
        Pixels with equal remainders modulo the stride, one phase, share a plane.
    phases
        Plane of each phase within its channel, row by row; −1 for phases that are left out. int64,
        contiguous, (product of the stride,).
    margin
        Rows of zeros above and columns of zeros to the left.
    leading_zeros
        Number of zero pixels before the first row.

    Examples
    --------
    >>> from topkast.kernels import ConvGeometry
    >>> ConvGeometry((4, 5), size=(3, 3), margins=((1, 1), (1, 1))).image_layout.margin
    (1, 1)
    """

    width: int
    bands: Bands
    stride: Pair = (1, 1)
    phases: Vector = np.zeros(1, np.int64)
    margin: Pair = (0, 0)
    leading_zeros: int = 0


@dataclass(frozen=True)
class ConvGeometry:
    """Sizes and offsets of a convolution whose images and output lie in planes.

    Output positions and pixels are numbered row by row, with one row width for both. So each row of
    the output ends with positions whose window wraps around to the next row; they are dropped.
    They add zero gradients to the weight gradient. But zero times a pixel that is not finite is
    NaN, so such a pixel also spoils the gradient of weights that never read it.

    Parameters
    ----------
    extent
        Height and width of the images.
    size, dilation, stride
        Of the window.
    margins
        Zeros above and below, left and right of an image.
    bands
        Number of horizontal bands per image, each with some rows of the output and the pixels that
        these read. Bands fill the lanes of a vector when images are few; see :meth:`for_batch`.

    Raises
    ------
    ValueError
        If the window does not fit the image, or a size is not positive.

    Examples
    --------
    >>> from topkast.kernels import ConvGeometry
    >>> geometry = ConvGeometry((4, 5), size=(3, 3), margins=((1, 1), (1, 1)))
    >>> geometry.output_extent, geometry.width, geometry.offsets[:4].tolist()
    ((4, 5), 7, [0, 1, 2, 7])
    """

    extent: Pair
    size: Pair
    dilation: Pair = (1, 1)
    stride: Pair = (1, 1)
    margins: tuple[Pair, Pair] = ((0, 0), (0, 0))
    bands: int = 1

    def for_batch(self, batch: int, lanes: int) -> ConvGeometry:
        """The same geometry with the number of bands that minimizes the work for a batch.

        >>> from topkast.kernels import ConvGeometry
        >>> ConvGeometry((32, 32), size=(3, 3)).for_batch(4, lanes=16).bands
        4
        """
        counts = [count for count in range(1, lanes + 1) if lanes % count == 0]
        fitting = [replace(self, bands=count) for count in counts if count <= self.output_extent[0]]
        return min(
            fitting,
            key=lambda geometry: (
                -(-batch * geometry.bands // lanes) * (geometry.pixels + geometry.positions)
            ),
        )

    def __post_init__(self) -> None:
        if min(*self.size, *self.dilation, *self.stride, self.bands) < 1:
            raise ValueError(f"size, dilation, stride and bands must be positive, got {self}")
        if min(*self.extent, *self.output_extent) < 1:
            raise ValueError(f"a window of {self.size} does not fit images of {self.extent}")

    @property
    def output_extent(self) -> Pair:
        """Height and width of the output."""
        height, width = (
            (length - dilation * (size - 1) - 1) // stride + 1
            for length, size, dilation, stride in zip(
                self._padded_extent, self.size, self.dilation, self.stride, strict=True
            )
        )
        return height, width

    @property
    def image_layout(self) -> PlaneLayout:
        """Layout of the images."""
        (top, _), (left, _) = self.margins
        return PlaneLayout(self.width, self._input_bands, self.stride, self.phases, (top, left))

    @property
    def output_layout(self) -> PlaneLayout:
        """Layout of the output."""
        return PlaneLayout(self.width, self._output_bands)

    @property
    def gradient_layout(self) -> PlaneLayout:
        """Layout of the output's gradient, with :attr:`max_offset` leading zeros."""
        return self.output_layout._replace(leading_zeros=self.max_offset)

    @property
    def _input_bands(self) -> Bands:
        """Bands of the image, with its margins."""
        rows = -(-self.output_extent[0] // self.bands)
        if self.bands == 1:
            return Bands(1, 0, self._padded_extent[0])
        span = self.dilation[0] * (self.size[0] - 1) + 1
        return Bands(self.bands, rows * self.stride[0], (rows - 1) * self.stride[0] + span)

    @property
    def _output_bands(self) -> Bands:
        """Bands of the output."""
        rows = -(-self.output_extent[0] // self.bands)
        return Bands(self.bands, rows, rows)

    @property
    def width(self) -> int:
        """Pixels in a row of a plane."""
        return -(-self._padded_extent[1] // self.stride[1])

    @cached_property
    def phases(self) -> Vector:
        """Plane of each phase within its channel; −1 for a phase that no weight reads; int64."""
        planes = np.full(math.prod(self.stride), -1)
        used = np.unique(self._weight_phases)
        planes[used] = np.arange(len(used))
        return planes

    @cached_property
    def planes_per_channel(self) -> int:
        """Number of planes of a channel."""
        return int(self.phases.max()) + 1

    @cached_property
    def weight_planes(self) -> Vector:
        """Plane, within its channel, that each weight of the window reads; int64."""
        planes: Vector = self.phases[self._weight_phases]
        return planes

    @cached_property
    def offsets(self) -> Vector:
        """Offset of each weight of the window in its plane, from the output position; int64."""
        down, across = self._window_offsets
        offsets: Vector = down // self.stride[0] * self.width + across // self.stride[1]
        return offsets.ravel()

    @cached_property
    def max_offset(self) -> int:
        """The largest of :attr:`offsets`."""
        return int(self.offsets[-1])

    def input_offsets(self, channels: int) -> Vector:
        """Offset of each weight's pixel from the output position; int64 (channels · weights,)."""
        first_planes = np.arange(channels)[:, None] * self.planes_per_channel
        return ((first_planes + self.weight_planes) * self.length + self.offsets).ravel()

    def output_offsets(self, rows: int) -> Vector:
        """Offset, from a pixel, of the gradient of the position that reads it with each weight.

        int64 (rows · weights,), for planes of the output's gradient with :attr:`max_offset` leading
        zeros.
        """
        plane_starts = np.arange(rows)[:, None] * self.gradient_length
        return (plane_starts + self.max_offset - self.offsets).ravel()

    def transpose(self, rows: Vector, columns: Vector) -> tuple[Vector, Vector]:
        """Rows and columns in the transposed matrix of entries of (rows, channels · weights).

        Transposed rows are planes of the image, columns are (row, weight); int32 (entries,) each.
        """
        weights = len(self.weight_planes)
        channels, weight = columns // weights, columns % weights
        planes = channels * self.planes_per_channel + self.weight_planes[weight]
        return planes.astype(np.int32), (rows * weights + weight).astype(np.int32)

    @property
    def positions(self) -> int:
        """Positions in a plane of the output, dropped ones included, rounded up to whole tiles."""
        return _round_to_tiles((self._output_bands.rows - 1) * self.width + self.output_extent[1])

    @property
    def pixels(self) -> int:
        """Pixels in a plane of the input, rounded up to whole tiles."""
        return _round_to_tiles(-(-self._input_bands.rows // self.stride[0]) * self.width)

    @property
    def length(self) -> int:
        """Vectors in a plane of the input, including those that only the last positions read."""
        return _avoid_set_conflicts(max(self.pixels, self.positions + self.max_offset))

    @property
    def gradient_length(self) -> int:
        """Vectors in a plane of the output's gradient, with :attr:`max_offset` leading zeros."""
        return _avoid_set_conflicts(self.max_offset + max(self.pixels, self.positions))

    @property
    def _padded_extent(self) -> Pair:
        height, width = (
            length + sum(margin) for length, margin in zip(self.extent, self.margins, strict=True)
        )
        return height, width

    @property
    def _weight_phases(self) -> Vector:
        down, across = self._window_offsets
        phases: Vector = down % self.stride[0] * self.stride[1] + across % self.stride[1]
        return phases.ravel()

    @property
    def _window_offsets(self) -> tuple[Vector, Vector]:
        down, across = (
            np.arange(size) * dilation
            for size, dilation in zip(self.size, self.dilation, strict=True)
        )
        return down[:, None], across[None]


def _round_to_tiles(count: int) -> int:
    """Round up to a multiple of the largest tile, or a small number to a power of two."""
    if count > _MAX_REGISTERS:
        return -(-count // _MAX_REGISTERS) * _MAX_REGISTERS
    return 1 << (count - 1).bit_length()


def _avoid_set_conflicts(length: int) -> int:
    """Round up so that equal positions of many planes do not fall into one cache set."""
    return length if length <= _MAX_REGISTERS else -(-(length - 8) // 16) * 16 + 8
