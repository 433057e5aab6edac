"""Images as planes of vectors, on which a convolution is a sum of shifted planes.

A vector holds one pixel of as many images as it has lanes. With a stride, the pixels of each phase
(even rows and odd columns, say) have a plane of their own. So what a weight of the window is
multiplied by lies at a fixed distance from the place of the output, and every load is aligned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numba import carray, cfunc, njit, types

from topkast.kernels._layout import Vector
from topkast.kernels._packing import transpose
from topkast.kernels._pool import default_threads, transform
from topkast.kernels._vector import VECTOR_BYTES, as_pointer, copy_run, take_ticket

Pair = tuple[int, int]

_MOST = 8  # places that a product takes at a time
_PIXELS = 2048  # that are transposed at a time: what the second cache holds


class Bands(NamedTuple):
    """How many an image is cut into, from which row to the next, and of how many rows each."""

    number: int
    step: int
    rows: int


@dataclass(frozen=True)
class Grid:
    """Where on its planes a convolution finds what a place of its output sees.

    Places and pixels are counted row by row, with one width for both: a row of the output is
    followed by places that see the end of one row and the start of the next, and are dropped. In
    the gradient of a weight their slope is zero; pixels that are not finite make it NaN all the
    same, of weights too that never saw them.

    Parameters
    ----------
    extent
        Height and width of the images.
    size, dilation, stride
        Of the window.
    margins
        Zeros above and below, left and right of an image.
    bands
        Into so many an image is cut, each with some rows of the output and what they see, to fill
        the lanes of a vector with few images; see :meth:`for_batch`.

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
        """The same with as many bands as make the least work of so many images."""
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
    def input_bands(self) -> Bands:
        """What a band has of the image, with its margins."""
        rows = -(-self.places[0] // self.bands)
        if self.bands == 1:
            return Bands(1, 0, self._padded[0])
        seen = self.dilation[0] * (self.size[0] - 1) + 1
        return Bands(self.bands, rows * self.stride[0], (rows - 1) * self.stride[0] + seen)

    @property
    def output_bands(self) -> Bands:
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
        """From a pixel, how far it is to the slope at the place that sees it through each weight.

        int64 (rows · weights,), for planes of slopes with :attr:`reach` zeros before them.
        """
        first = np.arange(rows)[:, None] * self.slope_length
        return (first + self.reach - self.shifts).ravel()

    @property
    def count(self) -> int:
        """Places of the output, with those that are dropped, as many as whole tiles have."""
        return _whole((self.output_bands.rows - 1) * self.width + self.places[1])

    @property
    def pixels(self) -> int:
        """Pixels of a plane, as many as whole tiles have."""
        return _whole(-(-self.input_bands.rows // self.stride[0]) * self.width)

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
    """At least so many places, that a kernel takes some at a time."""
    return -(-count // _MOST) * _MOST if count > _MOST else 1 << (count - 1).bit_length()


def _spread(length: int) -> int:
    """Such a length that what is at the same place of many planes does not share a cache's set."""
    return length if length <= _MOST else -(-(length - 8) // 16) * 16 + 8


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
    phases: Vector | None = None,
    margin: Pair = (0, 0),
    lead: int = 0,
    bands: Bands | None = None,
    threads: int | None = None,
) -> None:
    """Lay images out as planes, with zeros wherever there is none.

    Parameters
    ----------
    images
        (images, channels, height, width), contiguous, float32 or float64.
    planes
        (slabs, channels · planes of each, length, lanes), contiguous, with as many slabs of lanes
        as the images, or their bands, need.
    width
        Of a row of a plane.
    stride
        The pixels at each remainder modulo it have a plane of their own.
    phases
        The number of that plane among those of a channel, for each remainder, row by row; −1 where
        the pixels are left out. By default one after the other. int64 (product of the stride,).
    margin
        Zeros above and to the left.
    lead
        Zeros before the first row.
    bands
        Cut each image, with its margin, into such bands; their number divides that of the lanes.
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
    kernels = _spread_single, _spread_double
    options = width, stride, phases, margin, lead, bands
    _move(kernels, images, planes, images, planes, *options, threads)


def from_planes(
    planes: Vector,
    images: Vector,
    /,
    *,
    width: int,
    stride: Pair = (1, 1),
    phases: Vector | None = None,
    margin: Pair = (0, 0),
    lead: int = 0,
    bands: Bands | None = None,
    threads: int | None = None,
) -> None:
    """The transpose of :func:`to_planes`, with the same parameters: what bands share is added up.

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
    kernels = _gather_single, _gather_double
    options = width, stride, phases, margin, lead, bands
    _move(kernels, planes, images, images, planes, *options, threads)


def _move(
    kernels: tuple[Any, Any],
    source: Vector,
    target: Vector,
    images: Vector,
    planes: Vector,
    pitch: int,
    stride: Pair,
    phases: Vector | None,
    margin: Pair,
    lead: int,
    bands: Bands | None,
    threads: int | None,
) -> None:
    batch, channels, height, width = images.shape
    slabs, count, length, lanes = planes.shape
    cut = bands or Bands(1, 0, height + margin[0])
    numbers = np.arange(math.prod(stride)) if phases is None else phases
    each = int(numbers.max(initial=-1)) + 1
    wanted = -(-batch * cut.number // max(lanes, 1)), channels * each, lanes_of(planes.dtype)
    fits = (
        min(*stride, height, width, cut.number, cut.rows) > 0
        and min(*margin, lead, cut.step) >= 0
        and numbers.shape == (math.prod(stride),)
        and numbers.dtype == np.int64
        and (slabs, count, lanes) == wanted
        and lanes % cut.number == 0
        and (cut.number > 1 or cut.rows >= height + margin[0])
    )
    if fits:
        last = (width - 1 + margin[1]) // stride[1]
        fits = last < pitch and lead + (cut.rows - 1) // stride[0] * pitch + last < length
    if not fits:
        raise ValueError(
            f"images of shape {images.shape} do not fit planes of shape {planes.shape} with rows "
            f"of {pitch}, stride {stride}, margin {margin}, lead {lead} and {cut}"
        )
    rows = max(1, min(height, _PIXELS // width))
    used = threads or default_threads()
    scratch = np.empty((used * rows * width + 1) * lanes, dtype=images.dtype)
    arguments = (
        *planes.shape,
        *images.shape,
        *stride,
        *margin,
        pitch,
        lead,
        *cut,
        numbers.ctypes.data,
        rows,
        scratch.ctypes.data,
        0,
    )
    transform(*kernels, source, target, arguments, used)


@njit  # type: ignore[untyped-decorator]
def _exchange(address: Any, kind: Any, spread: bool) -> None:
    numbers = carray(as_pointer(address), 24, np.int64)
    images_at, planes_at = (numbers[1], numbers[2]) if spread else (numbers[2], numbers[1])
    slabs, count, length, lanes = numbers[3], numbers[4], numbers[5], numbers[6]
    batch, channels, height, width = numbers[7], numbers[8], numbers[9], numbers[10]
    top, bands, band_rows = numbers[13], numbers[17], numbers[19]
    most = numbers[21]
    slot = take_ticket(address + 23 * 8)
    own = -(-numbers[22] // VECTOR_BYTES) * VECTOR_BYTES + slot * most * width * VECTOR_BYTES
    pixels = carray(as_pointer(own), (most * width, lanes), kind)
    images = carray(as_pointer(images_at), (batch, channels * height * width), kind)
    planes = carray(as_pointer(planes_at), (slabs * count, length * lanes), kind)
    each = count // channels
    while True:
        item = take_ticket(address)
        if item >= slabs * channels:
            break
        slab, channel = item // channels, item % channels
        first = slab * lanes
        last = min(first + lanes, batch * bands)
        plane = (slab * channels + channel) * each
        begin = channel * height * width
        if spread:
            planes[plane : plane + each] = 0
            pixels[:] = 0
        there = planes_at + plane * length * VECTOR_BYTES
        if bands > 1:
            if not spread:
                images[first // bands : last // bands, begin : begin + height * width] = 0
            for row in range(band_rows):
                if spread:
                    _exchange_bands(numbers, images, pixels, first, last, begin, row, True)
                    _exchange_rows(numbers, there, own, row, 1, kind, True)
                else:
                    _exchange_rows(numbers, there, own, row, 1, kind, False)
                    _exchange_bands(numbers, images, pixels, first, last, begin, row, False)
            continue
        for row in range(0, height, most):
            rows = min(most, height - row)
            part = images[first:last, begin + row * width : begin + (row + rows) * width]
            some = pixels[: rows * width, : last - first]
            if spread:
                transpose(part, some)
                _exchange_rows(numbers, there, own, top + row, rows, kind, True)
            else:
                _exchange_rows(numbers, there, own, top + row, rows, kind, False)
                transpose(some, part)


@njit  # type: ignore[untyped-decorator]
def _exchange_rows(
    numbers: Any, planes: Any, pixels: Any, first: Any, rows: Any, kind: Any, spread: bool
) -> None:
    """Move rows, from the one that is the `first` with margins, between pixels and planes."""
    length, lanes, width = numbers[5], numbers[6], numbers[10]
    down, across, left, pitch, lead = (
        numbers[11],
        numbers[12],
        numbers[14],
        numbers[15],
        numbers[16],
    )
    phases = carray(as_pointer(numbers[20]), down * across, np.int64)
    zero, run = kind(0), width if across == 1 else 1
    for row in range(first, first + rows):
        line = planes + (lead + row // down * pitch) * VECTOR_BYTES
        for column in range(left, left + width, run):
            plane = phases[row % down * across + column % across]
            here = pixels + ((row - first) * width + column - left) * VECTOR_BYTES
            there = line + (plane * length + column // across) * VECTOR_BYTES
            if not spread and plane < 0:
                carray(as_pointer(here), run * lanes, kind)[:] = 0
            elif not spread:
                copy_run(zero, there, here, run * lanes)
            elif plane >= 0:
                copy_run(zero, here, there, run * lanes)


@njit  # type: ignore[untyped-decorator]
def _exchange_bands(
    numbers: Any,
    images: Any,
    pixels: Any,
    first: Any,
    last: Any,
    begin: Any,
    row: Any,
    spread: bool,
) -> None:
    """Move a row of each band between images and pixels: copied there, added here."""
    height, width, top, bands, step = numbers[9], numbers[10], numbers[13], numbers[17], numbers[18]
    for lane in range(last - first):
        image, place = (first + lane) // bands, (first + lane) % bands * step + row - top
        outside = place < 0 or place >= height
        for column in range(width):
            at = begin + place * width + column
            if not spread and not outside:
                images[image, at] += pixels[column, lane]
            elif spread:
                pixels[column, lane] = 0 if outside else images[image, at]


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
