"""Images as planes of vectors, on which a convolution is a sum of shifted planes.

A vector holds the same pixel of several images, one image in each lane. With a stride, the pixels
of each phase (even rows and odd columns, say) have a plane of their own. So each weight of the
window reads at a fixed offset from the output position, and every load is aligned.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.backends._threads import default_threads
from topkast.kernels._geometry import PlaneLayout
from topkast.kernels._packing import transpose
from topkast.kernels.runtime._arguments import (
    THREAD_COUNTER,
    Vector,
    array_at,
    define_arguments,
    empty_aligned,
    run_transform,
)
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import VECTOR_BYTES, as_pointer, copy_vectors, fetch_add

_PIXELS = 2048  # pixels transposed at a time: they fit in the L2 cache

_EXCHANGE = define_arguments(
    "source",
    "target",
    "image_groups",
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
    "leading_zeros",
    "bands",
    "band_step",
    "band_rows",
    "phases",
    "max_rows",
    "scratch",
)


def lanes_of(dtype: Any) -> int:
    """Number of images in a plane.

    Examples
    --------
    >>> from topkast.kernels import lanes_of
    >>> lanes_of("float32") == 2 * lanes_of("float64")
    True
    """
    return VECTOR_BYTES // int(np.dtype(dtype).itemsize)


def to_planes(
    images: Vector, planes: Vector, layout: PlaneLayout, /, *, threads: int | None = None
) -> None:
    """Lay images out as planes, with zeros wherever there is no pixel.

    Parameters
    ----------
    images
        (images, channels, height, width), contiguous, float32 or float64.
    planes
        (image groups, channels · planes per channel, length, lanes), contiguous. A group holds one
        image, or one band of an image, in each lane.
    layout
        ``image_layout`` or ``gradient_layout`` of a :class:`ConvGeometry`.
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        For other dtypes and shapes, and for arrays that are not contiguous.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import ConvGeometry, lanes_of, to_planes
    >>> geometry = ConvGeometry((2, 2), size=(1, 2), margins=((0, 0), (1, 0)))
    >>> planes = np.empty((1, 1, geometry.length, lanes_of("float32")), "float32")
    >>> to_planes(np.asarray([[[[1, 2], [3, 4]]]], "float32"), planes, geometry.image_layout)
    >>> planes[0, 0, :6, 0]
    array([0., 1., 2., 0., 3., 4.], dtype=float32)
    """
    kernels = _to_planes_single, _to_planes_double
    _run_exchange(kernels, images, planes, images, planes, layout, threads)


def from_planes(
    planes: Vector, images: Vector, layout: PlaneLayout, /, *, threads: int | None = None
) -> None:
    """The transpose of :func:`to_planes`: pixels shared by several bands are summed.

    Parameters
    ----------
    planes, images, threads
        As for :func:`to_planes`; `images` is written.
    layout
        ``image_layout`` or ``output_layout`` of a :class:`ConvGeometry`.

    Raises
    ------
    TypeError, ValueError
        As :func:`to_planes`.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import ConvGeometry, from_planes, lanes_of
    >>> geometry = ConvGeometry((2, 2), size=(1, 2), margins=((0, 0), (1, 0)))
    >>> planes = np.zeros((1, 1, geometry.length, lanes_of("float32")), "float32")
    >>> planes[0, 0, :6, 0] = [0, 1, 2, 0, 3, 4]
    >>> images = np.empty((1, 1, 2, 2), "float32")
    >>> from_planes(planes, images, geometry.image_layout)
    >>> images
    array([[[[1., 2.],
             [3., 4.]]]], dtype=float32)
    """
    kernels = _from_planes_single, _from_planes_double
    _run_exchange(kernels, planes, images, images, planes, layout, threads)


def _run_exchange(
    kernels: tuple[Any, Any],
    source: Vector,
    target: Vector,
    images: Vector,
    planes: Vector,
    layout: PlaneLayout,
    threads: int | None,
) -> None:
    batch, channels, height, width = images.shape
    image_groups, count, length, lanes = planes.shape
    pitch, bands, stride, phases, margin, leading_zeros = layout
    planes_per_channel = int(phases.max(initial=-1)) + 1
    expected = (
        -(-batch * bands.number // max(lanes, 1)),
        channels * planes_per_channel,
        lanes_of(planes.dtype),
    )
    fits = (
        min(*stride, height, width, *bands[::2]) > 0
        and min(*margin, leading_zeros, bands.step) >= 0
        and phases.shape == (math.prod(stride),)
        and phases.dtype == np.int64
        and phases.flags.c_contiguous
        and (image_groups, count, lanes) == expected
        and lanes % bands.number == 0
        and (bands.number > 1 or bands.rows >= height + margin[0])
    )
    if fits:
        last = (width - 1 + margin[1]) // stride[1]
        end = leading_zeros + (bands.rows - 1) // stride[0] * pitch + last
        fits = last < pitch and end < length
    if not fits:
        raise ValueError(
            f"images of shape {images.shape} do not fit planes of shape {planes.shape} in the "
            f"layout {layout}"
        )
    rows = max(1, min(height, _PIXELS // width))
    threads = threads or default_threads()
    run_transform(
        kernels,
        source,
        target,
        threads,
        _EXCHANGE,
        image_groups=image_groups,
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
        leading_zeros=leading_zeros,
        bands=bands.number,
        band_step=bands.step,
        band_rows=bands.rows,
        phases=phases,
        max_rows=rows,
        scratch=empty_aligned((threads * rows * width, lanes), images.dtype),
    )


@njit  # type: ignore[untyped-decorator]
def _exchange(address: Any, dtype: Any, is_to_planes: bool) -> None:
    arguments = carray(as_pointer(address), 1, _EXCHANGE)[0]
    images_address = arguments.source if is_to_planes else arguments.target
    planes_address = arguments.target if is_to_planes else arguments.source
    image_groups, count, length = arguments.image_groups, arguments.planes, arguments.length
    lanes, batch, channels = arguments.lanes, arguments.batch, arguments.channels
    height, width, bands = arguments.height, arguments.width, arguments.bands
    max_rows = arguments.max_rows
    thread = fetch_add(address + THREAD_COUNTER)
    scratch = arguments.scratch + thread * max_rows * width * VECTOR_BYTES
    pixels = carray(as_pointer(scratch), (max_rows * width, lanes), dtype)
    images = carray(as_pointer(images_address), (batch, channels * height * width), dtype)
    planes = carray(as_pointer(planes_address), (image_groups * count, length * lanes), dtype)
    planes_per_channel = count // max(channels, 1)
    while True:
        item = fetch_add(address)
        if item >= image_groups * channels:
            break
        image_group, channel = item // channels, item % channels
        first = image_group * lanes
        last = min(first + lanes, batch * bands)
        plane = (image_group * channels + channel) * planes_per_channel
        begin = channel * height * width
        if is_to_planes:
            planes[plane : plane + planes_per_channel] = 0
            pixels[:] = 0
        plane_address = planes_address + plane * length * VECTOR_BYTES
        if bands > 1:
            if not is_to_planes:
                images[first // bands : last // bands, begin : begin + height * width] = 0
            for row in range(arguments.band_rows):
                if is_to_planes:
                    _exchange_bands(arguments, images, pixels, first, last, begin, row, True)
                    _exchange_rows(arguments, plane_address, scratch, row, 1, dtype, True)
                else:
                    _exchange_rows(arguments, plane_address, scratch, row, 1, dtype, False)
                    _exchange_bands(arguments, images, pixels, first, last, begin, row, False)
            continue
        for row in range(0, height, max_rows):
            rows = min(max_rows, height - row)
            image_rows = images[first:last, begin + row * width : begin + (row + rows) * width]
            pixel_rows = pixels[: rows * width, : last - first]
            padded_row = arguments.top + row
            if is_to_planes:
                transpose(image_rows, pixel_rows)
                _exchange_rows(arguments, plane_address, scratch, padded_row, rows, dtype, True)
            else:
                _exchange_rows(arguments, plane_address, scratch, padded_row, rows, dtype, False)
                transpose(pixel_rows, image_rows)


@njit  # type: ignore[untyped-decorator]
def _exchange_rows(
    arguments: Any, planes: Any, pixels: Any, first: Any, rows: Any, dtype: Any, is_to_planes: bool
) -> None:
    """Copy rows between pixels and planes, from row `first` of the padded image."""
    length, lanes, width = arguments.length, arguments.lanes, arguments.width
    down, across, left = arguments.down, arguments.across, arguments.left
    pitch, leading_zeros = arguments.pitch, arguments.leading_zeros
    phases = array_at(arguments.phases, down * across, np.int64)
    zero, contiguous_pixels = dtype(0), width if across == 1 else 1
    for row in range(first, first + rows):
        plane_row = planes + (leading_zeros + row // down * pitch) * VECTOR_BYTES
        for column in range(left, left + width, contiguous_pixels):
            plane = phases[row % down * across + column % across]
            pixel = pixels + ((row - first) * width + column - left) * VECTOR_BYTES
            plane_pixel = plane_row + (plane * length + column // across) * VECTOR_BYTES
            if not is_to_planes and plane < 0:
                array_at(pixel, contiguous_pixels * lanes, dtype)[:] = 0
            elif not is_to_planes:
                copy_vectors(zero, plane_pixel, pixel, contiguous_pixels * lanes)
            elif plane >= 0:
                copy_vectors(zero, pixel, plane_pixel, contiguous_pixels * lanes)


@njit  # type: ignore[untyped-decorator]
def _exchange_bands(
    arguments: Any,
    images: Any,
    pixels: Any,
    first: Any,
    last: Any,
    begin: Any,
    row: Any,
    is_to_planes: bool,
) -> None:
    """Copy a row of each band from images to pixels, or add it from pixels to images."""
    height, width, top = arguments.height, arguments.width, arguments.top
    bands, step = arguments.bands, arguments.band_step
    for lane in range(last - first):
        image = (first + lane) // bands
        image_row = (first + lane) % bands * step + row - top
        is_outside = image_row < 0 or image_row >= height
        for column in range(width):
            pixel = begin + image_row * width + column
            if not is_to_planes and not is_outside:
                images[image, pixel] += pixels[column, lane]
            elif is_to_planes:
                pixels[column, lane] = 0 if is_outside else images[image, pixel]


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _to_planes_single(address: Any) -> None:
    _exchange(address, np.float32, True)


@kernel(_KERNEL)
def _to_planes_double(address: Any) -> None:
    _exchange(address, np.float64, True)


@kernel(_KERNEL)
def _from_planes_single(address: Any) -> None:
    _exchange(address, np.float32, False)


@kernel(_KERNEL)
def _from_planes_double(address: Any) -> None:
    _exchange(address, np.float64, False)
