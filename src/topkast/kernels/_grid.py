"""Where a convolution finds its pixels, once images lie in planes (:mod:`._planes`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from topkast.kernels.runtime._arguments import Vector

Pair = tuple[int, int]

_MOST = 8  # places that a product takes at a time


class Bands(NamedTuple):
    """How many an image is cut into, from which row to the next, and of how many rows each."""

    number: int
    step: int
    rows: int


class Placement(NamedTuple):
    """How images are laid out as planes; made by :class:`Grid`.

    Attributes
    ----------
    width
        Of a row of a plane.
    bands
        Into which an image, with its margin, is cut; their number divides that of the lanes.
    stride
        The pixels at each remainder modulo it have a plane of their own.
    phases
        The number of that plane among those of a channel, for each remainder, row by row; −1 where
        the pixels are left out. int64, contiguous, (product of the stride,).
    margin
        Zeros above and to the left.
    lead
        Zeros before the first row.

    Examples
    --------
    >>> from topkast.kernels import Grid
    >>> Grid((4, 5), size=(3, 3), margins=((1, 1), (1, 1))).of_images.margin
    (1, 1)
    """

    width: int
    bands: Bands
    stride: Pair = (1, 1)
    phases: Vector = np.zeros(1, np.int64)
    margin: Pair = (0, 0)
    lead: int = 0


@dataclass(frozen=True)
class Grid:
    """Where on its planes a convolution finds what a place of its output sees.

    Places and pixels are counted row by row, with one width for both: a row of the output is
    followed by places that see the end of one row and the start of the next, and are dropped. Their
    gradient is zero in that of a weight; pixels that are not finite make it NaN all the same, of
    weights too that never saw them.

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
        these see. They fill the lanes of a vector where images are few; see :meth:`for_batch`.

    Raises
    ------
    ValueError
        If the window does not fit the image.

    Examples
    --------
    >>> from topkast.kernels import Grid
    >>> grid = Grid((4, 5), size=(3, 3), margins=((1, 1), (1, 1)))
    >>> grid.places, grid.width, grid.shifts[:4].tolist()
    ((4, 5), 7, [0, 1, 2, 7])
    """

    extent: Pair
    size: Pair
    dilation: Pair = (1, 1)
    stride: Pair = (1, 1)
    margins: tuple[Pair, Pair] = ((0, 0), (0, 0))
    bands: int = 1

    def for_batch(self, batch: int, lanes: int) -> Grid:
        """The same with the number of bands that needs the least work for a batch of images.

        >>> from topkast.kernels import Grid
        >>> Grid((32, 32), size=(3, 3)).for_batch(4, lanes=16).bands
        4
        """
        counts = [count for count in range(1, lanes + 1) if lanes % count == 0]
        fitting = [replace(self, bands=count) for count in counts if count <= self.places[0]]
        return min(
            fitting, key=lambda grid: -(-batch * grid.bands // lanes) * (grid.pixels + grid.count)
        )

    def __post_init__(self) -> None:
        if min(*self.size, *self.dilation, *self.stride, self.bands) < 1:
            raise ValueError(f"size, dilation, stride and bands must be positive: {self}")
        if min(*self.extent, *self.places) < 1:
            raise ValueError(f"a window of {self.size} does not fit images of {self.extent}")

    @property
    def places(self) -> Pair:
        """Height and width of the output."""
        height, width = (
            (length - dilation * (size - 1) - 1) // stride + 1
            for length, size, dilation, stride in zip(
                self._padded, self.size, self.dilation, self.stride, strict=True
            )
        )
        return height, width

    @property
    def of_images(self) -> Placement:
        """How images become planes."""
        (top, _), (left, _) = self.margins
        return Placement(self.width, self._input_bands, self.stride, self.phases, (top, left))

    @property
    def of_output(self) -> Placement:
        """How the output lies in planes."""
        return Placement(self.width, self._output_bands)

    @property
    def of_gradients(self) -> Placement:
        """How the gradient of the output becomes planes, with :attr:`reach` zeros before it."""
        return self.of_output._replace(lead=self.reach)

    @property
    def _input_bands(self) -> Bands:
        """What a band has of the image, with its margins."""
        rows = -(-self.places[0] // self.bands)
        if self.bands == 1:
            return Bands(1, 0, self._padded[0])
        seen = self.dilation[0] * (self.size[0] - 1) + 1
        return Bands(self.bands, rows * self.stride[0], (rows - 1) * self.stride[0] + seen)

    @property
    def _output_bands(self) -> Bands:
        """What a band has of the output."""
        rows = -(-self.places[0] // self.bands)
        return Bands(self.bands, rows, rows)

    @property
    def width(self) -> int:
        """Pixels of a row of a plane."""
        return -(-self._padded[1] // self.stride[1])

    @cached_property
    def phases(self) -> Vector:
        """The plane, among those of a channel, of each phase; −1 where none looks; int64."""
        found = np.full(math.prod(self.stride), -1)
        used = np.unique(self._phase)
        found[used] = np.arange(len(used))
        return found

    @cached_property
    def planes(self) -> int:
        """Planes of a channel."""
        return int(self.phases.max()) + 1

    @cached_property
    def plane(self) -> Vector:
        """The plane, among those of a channel, of each weight of the window; int64."""
        found: Vector = self.phases[self._phase]
        return found

    @cached_property
    def shifts(self) -> Vector:
        """How far from a place, in that plane, each weight of the window looks; int64."""
        down, across = self._window
        shifts: Vector = down // self.stride[0] * self.width + across // self.stride[1]
        return shifts.ravel()

    @cached_property
    def reach(self) -> int:
        """The largest shift."""
        return int(self.shifts[-1])

    def seen(self, channels: int) -> Vector:
        """From a place, how far it is to what each weight sees; int64 (channels · weights,)."""
        first = np.arange(channels)[:, None] * self.planes
        return ((first + self.plane) * self.length + self.shifts).ravel()

    def seeing(self, rows: int) -> Vector:
        """From a pixel, how far the gradient of the place is that sees it through each weight.

        int64 (rows · weights,), for planes of grad_outputs with :attr:`reach` zeros before them.
        """
        first = np.arange(rows)[:, None] * self.gradient_length
        return (first + self.reach - self.shifts).ravel()

    def transpose(self, rows: Vector, columns: Vector) -> tuple[Vector, Vector]:
        """Of entries of the matrix (rows, channels · weights), the places in that of the gradient.

        Its rows are the planes of the image, its columns (row, weight); int32 (entries,) each.
        """
        weights = len(self.plane)
        channels, weight = columns // weights, columns % weights
        planes = channels * self.planes + self.plane[weight]
        return planes.astype(np.int32), (rows * weights + weight).astype(np.int32)

    @property
    def count(self) -> int:
        """Places of the output, with those that are dropped, as many as whole tiles have."""
        return _whole((self._output_bands.rows - 1) * self.width + self.places[1])

    @property
    def pixels(self) -> int:
        """Pixels of a plane, as many as whole tiles have."""
        return _whole(-(-self._input_bands.rows // self.stride[0]) * self.width)

    @property
    def length(self) -> int:
        """Vectors of a plane of the input: its pixels, and what the last places see."""
        return _spread(max(self.pixels, self.count + self.reach))

    @property
    def gradient_length(self) -> int:
        """Vectors of a plane of the output's gradient, with :attr:`reach` zeros before it."""
        return _spread(self.reach + max(self.pixels, self.count))

    @property
    def _padded(self) -> Pair:
        height, width = (
            length + sum(margin) for length, margin in zip(self.extent, self.margins, strict=True)
        )
        return height, width

    @property
    def _phase(self) -> Vector:
        down, across = self._window
        phase: Vector = down % self.stride[0] * self.stride[1] + across % self.stride[1]
        return phase.ravel()

    @property
    def _window(self) -> tuple[Vector, Vector]:
        down, across = (
            np.arange(size) * dilation
            for size, dilation in zip(self.size, self.dilation, strict=True)
        )
        return down[:, None], across[None]


def _whole(count: int) -> int:
    """A number of places rounded up to what a kernel computes at a time."""
    return -(-count // _MOST) * _MOST if count > _MOST else 1 << (count - 1).bit_length()


def _spread(length: int) -> int:
    """A length rounded up so that equal places of many planes do not share a set of a cache."""
    return length if length <= _MOST else -(-(length - 8) // 16) * 16 + 8
