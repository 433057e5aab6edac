"""Images as planes of vectors, on which a convolution is a sum of shifted planes.

A vector holds one pixel of as many images as it has lanes. With a stride, the pixels of each phase
(even rows and odd columns, say) have a plane of their own. So what a weight of the window is
multiplied by lies at a fixed distance from the place of the output, and every load is aligned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from topkast.kernels._layout import Vector
from topkast.kernels._packing import transpose
from topkast.kernels._pool import default_threads, transform
from topkast.kernels._vector import VECTOR_BYTES, as_pointer, copy_run, take_ticket

Pair = tuple[int, int]

_MOST = 8  # places that a product takes at a time
_BAND = 2048  # pixels that are transposed at a time: what the second cache holds


@dataclass(frozen=True)
class Grid:
    """Where on its planes a convolution finds what a place of its output sees.

    Places and pixels are counted row by row, with one width for both: a row of the output is
    followed by places that see the end of one row and the start of the next, and are dropped.

    Parameters
    ----------
    extent
        Height and width of the images.
    size, dilation, stride
        Of the window.
    margins
        Zeros above and below, left and right of an image.

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

    def __post_init__(self) -> None:
        if min(*self.size, *self.dilation, *self.stride) < 1:
            raise ValueError(f"size, dilation and stride must be positive: {self}")
        if min(self.places) < 1:
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
    def width(self) -> int:
        """Pixels of a row of a plane."""
        return -(-self._padded[1] // self.stride[1])

    @property
    def phases(self) -> int:
        """Planes of a channel."""
        return math.prod(self.stride)

    @cached_property
    def phase(self) -> Vector:
        """The plane, among those of a channel, of each weight of the window; int64."""
        down, across = self._window
        phase: Vector = down % self.stride[0] * self.stride[1] + across % self.stride[1]
        return phase.ravel()

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

    @property
    def count(self) -> int:
        """Places of the output, with those that are dropped, as many as whole tiles have."""
        return _whole((self.places[0] - 1) * self.width + self.places[1])

    @property
    def pixels(self) -> int:
        """Pixels of a plane, as many as whole tiles have."""
        return _whole(-(-self._padded[0] // self.stride[0]) * self.width)

    @property
    def length(self) -> int:
        """Vectors of a plane of the input: its pixels, and what the last places see."""
        return _spread(max(self.pixels, self.count + self.reach))

    @property
    def slope_length(self) -> int:
        """Vectors of a plane of the output's gradient, with :attr:`reach` zeros before it."""
        return _spread(self.reach + max(self.pixels, self.count))

    @property
    def _padded(self) -> Pair:
        height, width = (
            length + sum(margin) for length, margin in zip(self.extent, self.margins, strict=True)
        )
        return height, width

    @property
    def _window(self) -> tuple[Vector, Vector]:
        down, across = (
            np.arange(size) * dilation
            for size, dilation in zip(self.size, self.dilation, strict=True)
        )
        return down[:, None], across[None]


def _whole(count: int) -> int:
    """At least so many places, that a kernel takes some at a time."""
    return -(-count // _MOST) * _MOST if count > _MOST else 1 << (count - 1).bit_length()


def _spread(length: int) -> int:
    """Such a length that what is at the same place of many planes does not share a cache's set."""
    return -(-(length - 8) // 16) * 16 + 8


def lanes_of(dtype: Any) -> int:
    """Images that a plane holds.

    Examples
    --------
    >>> from topkast.kernels import lanes_of
    >>> lanes_of("float32") == 2 * lanes_of("float64")
    True
    """
    return VECTOR_BYTES // int(np.dtype(dtype).itemsize)


def to_planes(
    images: Vector,
    planes: Vector,
    /,
    *,
    width: int,
    stride: Pair = (1, 1),
    margin: Pair = (0, 0),
    lead: int = 0,
    threads: int | None = None,
) -> None:
    """Lay images out as planes, with zeros wherever there is none.

    Parameters
    ----------
    images
        (images, channels, height, width), contiguous, float32 or float64.
    planes
        (slabs, channels · phases, length, lanes), contiguous, with as many slabs of lanes as the
        images need.
    width
        Of a row of a plane.
    stride
        The pixels at each remainder modulo it have a plane of their own.
    margin
        Zeros above and to the left.
    lead
        Zeros before the first row.
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        For other dtypes and shapes, and for arrays that are not contiguous.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import lanes_of, to_planes
    >>> planes = np.empty((1, 1, 8, lanes_of("float32")), "float32")
    >>> to_planes(np.asarray([[[[1, 2], [3, 4]]]], "float32"), planes, width=3, margin=(0, 1))
    >>> planes[0, 0, :, 0]
    array([0., 1., 2., 0., 3., 4., 0., 0.], dtype=float32)
    """
    _move(
        _spread_single, _spread_double, images, planes, planes, width, stride, margin, lead, threads
    )


def from_planes(
    planes: Vector,
    images: Vector,
    /,
    *,
    width: int,
    stride: Pair = (1, 1),
    margin: Pair = (0, 0),
    lead: int = 0,
    threads: int | None = None,
) -> None:
    """The inverse of :func:`to_planes`, with the same parameters.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import from_planes, lanes_of
    >>> planes = np.zeros((1, 1, 8, lanes_of("float32")), "float32")
    >>> planes[0, 0, :, 0] = [0, 1, 2, 0, 3, 4, 0, 0]
    >>> images = np.empty((1, 1, 2, 2), "float32")
    >>> from_planes(planes, images, width=3, margin=(0, 1))
    >>> images
    array([[[[1., 2.],
             [3., 4.]]]], dtype=float32)
    """
    _move(
        _gather_single, _gather_double, planes, images, planes, width, stride, margin, lead, threads
    )


def _move(
    single: Any,
    double: Any,
    source: Vector,
    target: Vector,
    planes: Vector,
    pitch: int,
    stride: Pair,
    margin: Pair,
    lead: int,
    threads: int | None,
) -> None:
    images = target if planes is source else source
    batch, channels, height, width = images.shape
    slabs, count, length, lanes = planes.shape
    wanted = -(-batch // lanes), channels * math.prod(stride), lanes_of(planes.dtype)
    fits = min(stride) > 0 and min(*margin, lead) >= 0 and (slabs, count, lanes) == wanted
    if fits and images.size:
        last_row, last = (
            (extent - 1 + zeros) // step
            for extent, zeros, step in zip((height, width), margin, stride, strict=True)
        )
        fits = last < pitch and lead + last_row * pitch + last < length
    if not fits:
        raise ValueError(
            f"images of shape {images.shape} do not fit planes of shape {planes.shape} with rows "
            f"of {pitch}, stride {stride}, margin {margin} and lead {lead}"
        )
    rows = max(1, min(height, _BAND // max(width, 1)))
    used = threads or default_threads()
    scratch = np.empty((used * rows * width + 1) * lanes, dtype=images.dtype)
    numbers = (
        *planes.shape,
        *images.shape,
        *stride,
        *margin,
        pitch,
        lead,
        rows,
        scratch.ctypes.data,
        0,
    )
    transform(single, double, source, target, numbers, used)


@njit  # type: ignore[untyped-decorator]
def _exchange(address: Any, kind: Any, spread: bool) -> None:
    numbers = carray(as_pointer(address), 20, np.int64)
    images_at, planes_at = (numbers[1], numbers[2]) if spread else (numbers[2], numbers[1])
    slabs, count, length, lanes = numbers[3], numbers[4], numbers[5], numbers[6]
    batch, channels, height, width = numbers[7], numbers[8], numbers[9], numbers[10]
    down, across, top, left = numbers[11], numbers[12], numbers[13], numbers[14]
    pitch, lead, band = numbers[15], numbers[16], numbers[17]
    slot = take_ticket(address + 19 * 8)
    own = -(-numbers[18] // VECTOR_BYTES) * VECTOR_BYTES + slot * band * width * VECTOR_BYTES
    pixels = carray(as_pointer(own), (band * width, lanes), kind)
    images = carray(as_pointer(images_at), (batch, channels * height * width), kind)
    planes = carray(as_pointer(planes_at), (slabs * count, length * lanes), kind)
    zero, plane_bytes = kind(0), length * VECTOR_BYTES
    while True:
        item = take_ticket(address)
        if item >= slabs * channels:
            break
        slab, channel = item // channels, item % channels
        first = slab * lanes
        last = min(first + lanes, batch)
        plane = (slab * channels + channel) * down * across
        if spread:
            planes[plane : plane + down * across] = zero
            pixels[:] = zero
        for start in range(0, height, band):
            rows = min(band, height - start)
            begin = (channel * height + start) * width
            part = images[first:last, begin : begin + rows * width]
            if spread:
                transpose(part, pixels[: rows * width, : last - first])
            for row in range(rows):
                place = start + row + top
                line = plane + place % down * across
                there = (
                    planes_at + line * plane_bytes + (lead + place // down * pitch) * VECTOR_BYTES
                )
                here = own + row * width * VECTOR_BYTES
                run = width if across == 1 else 1
                for column in range(0, width, run):
                    shifted = column + left
                    target = (
                        there + shifted % across * plane_bytes + shifted // across * VECTOR_BYTES
                    )
                    source = here + column * VECTOR_BYTES
                    if spread:
                        copy_run(zero, source, target, run * lanes)
                    else:
                        copy_run(zero, target, source, run * lanes)
            if not spread:
                transpose(pixels[: rows * width, : last - first], part)


_KERNEL = types.void(types.intp)


@cfunc(_KERNEL, cache=True)  # type: ignore[untyped-decorator]
def _spread_single(address: Any) -> None:
    _exchange(address, np.float32, True)


@cfunc(_KERNEL, cache=True)  # type: ignore[untyped-decorator]
def _spread_double(address: Any) -> None:
    _exchange(address, np.float64, True)


@cfunc(_KERNEL, cache=True)  # type: ignore[untyped-decorator]
def _gather_single(address: Any) -> None:
    _exchange(address, np.float32, False)


@cfunc(_KERNEL, cache=True)  # type: ignore[untyped-decorator]
def _gather_double(address: Any) -> None:
    _exchange(address, np.float64, False)
