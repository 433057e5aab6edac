"""Images as planes of vectors, on which a convolution is a sum of shifted planes.

A vector holds one pixel of as many images as it has lanes. With a stride, the pixels of each phase
(even rows and odd columns, say) have a plane of their own. So what a weight of the window is
multiplied by lies at a fixed distance from the place of the output, and every load is aligned.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels._grid import Placement
from topkast.kernels._packing import transpose
from topkast.kernels.runtime._arguments import THREAD, Vector, empty, slots, transform, vector
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._pool import default_threads
from topkast.kernels.runtime._vector import VECTOR_BYTES, as_pointer, copy_run, fetch_add

_PIXELS = 2048  # that are transposed at a time: what the second cache holds

_EXCHANGE = slots(
    "source",
    "target",
    "slabs",
    "planes",
    "length",
    "lanes",
    "batch",
    "channels",
    "height",
    "width",
    "down",
    "across",
    "top",
    "left",
    "pitch",
    "lead",
    "bands",
    "band_step",
    "band_rows",
    "phases",
    "max_rows",
    "scratch",
)


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
    images: Vector, planes: Vector, placement: Placement, /, *, threads: int | None = None
) -> None:
    """Lay images out as planes, with zeros wherever there is none.

    Parameters
    ----------
    images
        (images, channels, height, width), contiguous, float32 or float64.
    planes
        (slabs, channels · planes of each, length, lanes), contiguous, with as many slabs of lanes
        as the images, or their bands, need.
    placement
        ``grid.of_images`` of a :class:`Grid`, or ``grid.of_gradients``.
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        For other dtypes and shapes, and for arrays that are not contiguous.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import Grid, lanes_of, to_planes
    >>> grid = Grid((2, 2), size=(1, 2), margins=((0, 0), (1, 0)))
    >>> planes = np.empty((1, 1, grid.length, lanes_of("float32")), "float32")
    >>> to_planes(np.asarray([[[[1, 2], [3, 4]]]], "float32"), planes, grid.of_images)
    >>> planes[0, 0, :6, 0]
    array([0., 1., 2., 0., 3., 4.], dtype=float32)
    """
    _move((_spread_single, _spread_double), images, planes, images, planes, placement, threads)


def from_planes(
    planes: Vector, images: Vector, placement: Placement, /, *, threads: int | None = None
) -> None:
    """The transpose of :func:`to_planes`: what bands share is added up.

    Parameters
    ----------
    planes, images, threads
        As for :func:`to_planes`; `images` is written.
    placement
        ``grid.of_images`` of a :class:`Grid`, or ``grid.of_output``.

    Raises
    ------
    TypeError, ValueError
        As :func:`to_planes`.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import Grid, from_planes, lanes_of
    >>> grid = Grid((2, 2), size=(1, 2), margins=((0, 0), (1, 0)))
    >>> planes = np.zeros((1, 1, grid.length, lanes_of("float32")), "float32")
    >>> planes[0, 0, :6, 0] = [0, 1, 2, 0, 3, 4]
    >>> images = np.empty((1, 1, 2, 2), "float32")
    >>> from_planes(planes, images, grid.of_images)
    >>> images
    array([[[[1., 2.],
             [3., 4.]]]], dtype=float32)
    """
    _move((_gather_single, _gather_double), planes, images, images, planes, placement, threads)


def _move(
    kernels: tuple[Any, Any],
    source: Vector,
    target: Vector,
    images: Vector,
    planes: Vector,
    placement: Placement,
    threads: int | None,
) -> None:
    batch, channels, height, width = images.shape
    slabs, count, length, lanes = planes.shape
    pitch, bands, stride, phases, margin, lead = placement
    each = int(phases.max(initial=-1)) + 1
    wanted = (
        -(-batch * bands.number // max(lanes, 1)),
        channels * each,
        lanes_of(planes.dtype),
    )
    fits = (
        min(*stride, height, width, *bands[::2]) > 0
        and min(*margin, lead, bands.step) >= 0
        and phases.shape == (math.prod(stride),)
        and phases.dtype == np.int64
        and phases.flags.c_contiguous
        and (slabs, count, lanes) == wanted
        and lanes % bands.number == 0
        and (bands.number > 1 or bands.rows >= height + margin[0])
    )
    if fits:
        last = (width - 1 + margin[1]) // stride[1]
        fits = last < pitch and lead + (bands.rows - 1) // stride[0] * pitch + last < length
    if not fits:
        raise ValueError(
            f"images of shape {images.shape} do not fit planes of shape {planes.shape} and "
            f"{placement}"
        )
    rows = max(1, min(height, _PIXELS // width))
    used = threads or default_threads()
    transform(
        kernels,
        source,
        target,
        used,
        _EXCHANGE,
        slabs=slabs,
        planes=count,
        length=length,
        lanes=lanes,
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        down=stride[0],
        across=stride[1],
        top=margin[0],
        left=margin[1],
        pitch=pitch,
        lead=lead,
        bands=bands.number,
        band_step=bands.step,
        band_rows=bands.rows,
        phases=phases,
        max_rows=rows,
        scratch=empty((used * rows * width, lanes), images.dtype),
    )


@njit  # type: ignore[untyped-decorator]
def _exchange(address: Any, dtype: Any, spread: bool) -> None:
    arguments = carray(as_pointer(address), 1, _EXCHANGE)[0]
    images_at = arguments.source if spread else arguments.target
    planes_at = arguments.target if spread else arguments.source
    slabs, count, length = arguments.slabs, arguments.planes, arguments.length
    lanes, batch, channels = arguments.lanes, arguments.batch, arguments.channels
    height, width, bands = arguments.height, arguments.width, arguments.bands
    most = arguments.max_rows
    thread = fetch_add(address + THREAD)
    own = arguments.scratch + thread * most * width * VECTOR_BYTES
    pixels = carray(as_pointer(own), (most * width, lanes), dtype)
    images = carray(as_pointer(images_at), (batch, channels * height * width), dtype)
    planes = carray(as_pointer(planes_at), (slabs * count, length * lanes), dtype)
    each = count // max(channels, 1)
    while True:
        item = fetch_add(address)
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
            for row in range(arguments.band_rows):
                if spread:
                    _exchange_bands(arguments, images, pixels, first, last, begin, row, True)
                    _exchange_rows(arguments, there, own, row, 1, dtype, True)
                else:
                    _exchange_rows(arguments, there, own, row, 1, dtype, False)
                    _exchange_bands(arguments, images, pixels, first, last, begin, row, False)
            continue
        for row in range(0, height, most):
            rows = min(most, height - row)
            part = images[first:last, begin + row * width : begin + (row + rows) * width]
            some = pixels[: rows * width, : last - first]
            if spread:
                transpose(part, some)
                _exchange_rows(arguments, there, own, arguments.top + row, rows, dtype, True)
            else:
                _exchange_rows(arguments, there, own, arguments.top + row, rows, dtype, False)
                transpose(some, part)


@njit  # type: ignore[untyped-decorator]
def _exchange_rows(
    arguments: Any, planes: Any, pixels: Any, first: Any, rows: Any, dtype: Any, spread: bool
) -> None:
    """Move rows, from the one that is the `first` with margins, between pixels and planes."""
    length, lanes, width = arguments.length, arguments.lanes, arguments.width
    down, across, left = arguments.down, arguments.across, arguments.left
    pitch, lead = arguments.pitch, arguments.lead
    phases = vector(arguments.phases, down * across, np.int64)
    zero, run = dtype(0), width if across == 1 else 1
    for row in range(first, first + rows):
        line = planes + (lead + row // down * pitch) * VECTOR_BYTES
        for column in range(left, left + width, run):
            plane = phases[row % down * across + column % across]
            here = pixels + ((row - first) * width + column - left) * VECTOR_BYTES
            there = line + (plane * length + column // across) * VECTOR_BYTES
            if not spread and plane < 0:
                vector(here, run * lanes, dtype)[:] = 0
            elif not spread:
                copy_run(zero, there, here, run * lanes)
            elif plane >= 0:
                copy_run(zero, here, there, run * lanes)


@njit  # type: ignore[untyped-decorator]
def _exchange_bands(
    arguments: Any,
    images: Any,
    pixels: Any,
    first: Any,
    last: Any,
    begin: Any,
    row: Any,
    spread: bool,
) -> None:
    """Move a row of each band between images and pixels: copied there, added here."""
    height, width, top = arguments.height, arguments.width, arguments.top
    bands, step = arguments.bands, arguments.band_step
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


@kernel(_KERNEL)
def _spread_single(address: Any) -> None:
    _exchange(address, np.float32, True)


@kernel(_KERNEL)
def _spread_double(address: Any) -> None:
    _exchange(address, np.float64, True)


@kernel(_KERNEL)
def _gather_single(address: Any) -> None:
    _exchange(address, np.float32, False)


@kernel(_KERNEL)
def _gather_double(address: Any) -> None:
    _exchange(address, np.float64, False)
