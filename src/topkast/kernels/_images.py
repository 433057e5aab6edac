"""Images unfolded into tiles, so that a convolution is a product, and the transpose of that."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from topkast.kernels._layout import Vector
from topkast.kernels._pool import transform
from topkast.kernels._vector import add_run, as_pointer, copy_run, take_ticket

Pair = tuple[int, int]


def unfold(
    images: Vector,
    tiles: Vector,
    /,
    *,
    size: Pair,
    dilation: Pair = (1, 1),
    stride: Pair = (1, 1),
    threads: int | None = None,
) -> None:
    """What each place of a convolution's output sees, packed for :func:`multiply`.

    Parameters
    ----------
    images
        (images, channels, height, width), contiguous, float32 or float64.
    tiles
        (tiles, channels · size[0] · size[1], width), contiguous; its columns are the places of the
        output, image by image and row by row, with zeros behind them.
    size, dilation, stride
        Of the window.
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        For other dtypes and shapes, and for arrays that are not contiguous.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import unfold
    >>> tiles = np.empty((1, 2, 4))
    >>> unfold(np.asarray([[[[1.0, 2.0, 3.0]]]]), tiles, size=(1, 2))
    >>> tiles
    array([[[1., 2., 0., 0.],
            [2., 3., 0., 0.]]])
    """
    height, width = _places(images.shape, size, dilation, stride)
    count, features, columns = tiles.shape
    places = len(images) * height * width
    if features != images.shape[1] * size[0] * size[1] or count != -(-places // columns):
        raise ValueError(f"cannot unfold {images.shape} into {tiles.shape}")
    numbers = (*images.shape, height, width, *size, *dilation, *stride, columns)
    transform(_unfold_single, _unfold_double, images, tiles, (count, *numbers), threads)


def fold(
    unfolded: Vector,
    images: Vector,
    /,
    *,
    size: Pair,
    dilation: Pair = (1, 1),
    stride: Pair = (1, 1),
    threads: int | None = None,
) -> None:
    """The transpose of :func:`unfold`: each pixel is the sum of what it was copied to.

    Parameters
    ----------
    unfolded
        (channels · size[0] · size[1], columns), as from :func:`multiply`.
    images
        Where the sums go.
    size, dilation, stride, threads
        As for :func:`unfold`.

    Raises
    ------
    TypeError, ValueError
        As :func:`unfold`.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import fold
    >>> image = np.empty((1, 1, 1, 3))
    >>> fold(np.asarray([[1.0, 2.0], [10.0, 20.0]]), image, size=(1, 2))
    >>> image
    array([[[[ 1., 12., 20.]]]])
    """
    height, width = _places(images.shape, size, dilation, stride)
    features, columns = unfolded.shape
    if features != images.shape[1] * size[0] * size[1] or columns < len(images) * height * width:
        raise ValueError(f"cannot fold {unfolded.shape} into {images.shape}")
    numbers = (*images.shape, height, width, *size, *dilation, *stride, columns)
    items = images.shape[0] * images.shape[1]
    transform(_fold_single, _fold_double, unfolded, images, (items, *numbers), threads)


def _places(images: tuple[int, ...], size: Pair, dilation: Pair, stride: Pair) -> Pair:
    if min(*size, *dilation, *stride) < 1:
        raise ValueError(f"size, dilation and stride must be positive: {size} {dilation} {stride}")
    height, width = (
        (length - step * (extent - 1) - 1) // jump + 1
        for length, extent, step, jump in zip(images[2:], size, dilation, stride, strict=True)
    )
    if height < 1 or width < 1:
        raise ValueError(f"a window of {size} does not fit images of {images[2:]}")
    return height, width


@njit  # type: ignore[untyped-decorator]
def _unfold(address: Any, kind: Any) -> None:
    numbers = carray(as_pointer(address), 17, np.int64)
    count, columns = numbers[3], numbers[16]
    batch, channels, rows, width = numbers[4], numbers[5], numbers[6], numbers[7]
    out_rows, out_width, size, across = numbers[8], numbers[9], numbers[10], numbers[11]
    step, step_across, jump, jump_across = numbers[12], numbers[13], numbers[14], numbers[15]
    images = carray(as_pointer(numbers[1]), (batch, channels, rows, width), kind)
    features = channels * size * across
    tiles = carray(as_pointer(numbers[2]), (count, features, columns), kind)
    zero, size_of = kind(0), images.itemsize
    places = batch * out_rows * out_width
    while True:
        tile = take_ticket(address)
        if tile >= count:
            break
        first, last = tile * columns, min(places, (tile + 1) * columns)
        tiles[tile][:, last - first :] = 0
        place = first
        while place < last:  # a run of places in one row of the output
            column, out_row = place % out_width, place // out_width
            image, row = out_row // out_rows, out_row % out_rows
            length = min(out_width - column, last - place)
            feature = 0
            for channel in range(channels):
                for down in range(size):
                    pixels = (image * channels + channel) * rows + row * jump + down * step
                    for right in range(across):
                        start = column * jump_across + right * step_across
                        if jump_across == 1:
                            here = numbers[1] + (pixels * width + start) * size_of
                            line = tile * features + feature
                            there = numbers[2] + (line * columns + place - first) * size_of
                            copy_run(zero, here, there, length)
                        else:
                            source = images[image, channel, row * jump + down * step]
                            target = tiles[tile, feature]
                            for lane in range(length):
                                target[place - first + lane] = source[start + lane * jump_across]
                        feature += 1
            place += length


@njit  # type: ignore[untyped-decorator]
def _fold(address: Any, kind: Any) -> None:
    numbers = carray(as_pointer(address), 17, np.int64)
    items, columns = numbers[3], numbers[16]
    batch, channels, rows, width = numbers[4], numbers[5], numbers[6], numbers[7]
    out_rows, out_width, size, across = numbers[8], numbers[9], numbers[10], numbers[11]
    step, step_across, jump, jump_across = numbers[12], numbers[13], numbers[14], numbers[15]
    unfolded = carray(as_pointer(numbers[1]), (channels * size * across, columns), kind)
    images = carray(as_pointer(numbers[2]), (batch, channels, rows, width), kind)
    zero, size_of = kind(0), images.itemsize
    while True:
        item = take_ticket(address)
        if item >= items:
            break
        image, channel = item // channels, item % channels
        images[image, channel] = 0
        for row in range(out_rows):
            place = (image * out_rows + row) * out_width
            for down in range(size):
                pixels = (image * channels + channel) * rows + row * jump + down * step
                for right in range(across):
                    feature = (channel * size + down) * across + right
                    start = right * step_across
                    if jump_across == 1:
                        here = numbers[1] + (feature * columns + place) * size_of
                        there = numbers[2] + (pixels * width + start) * size_of
                        add_run(zero, here, there, out_width)
                    else:
                        source = unfolded[feature]
                        target = images[image, channel, row * jump + down * step]
                        for lane in range(out_width):
                            target[start + lane * jump_across] += source[place + lane]


_KERNEL = types.void(types.intp)


@cfunc(_KERNEL, cache=True)  # type: ignore[untyped-decorator]
def _unfold_single(address: Any) -> None:
    _unfold(address, np.float32)


@cfunc(_KERNEL, cache=True)  # type: ignore[untyped-decorator]
def _unfold_double(address: Any) -> None:
    _unfold(address, np.float64)


@cfunc(_KERNEL, cache=True)  # type: ignore[untyped-decorator]
def _fold_single(address: Any) -> None:
    _fold(address, np.float32)


@cfunc(_KERNEL, cache=True)  # type: ignore[untyped-decorator]
def _fold_double(address: Any) -> None:
    _fold(address, np.float64)
