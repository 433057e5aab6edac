"""Packing of row-major activations into tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels.runtime._arguments import (
    THREAD_COUNTER,
    Vector,
    array_at,
    define_arguments,
    run_transform,
)
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import VECTOR_BYTES, as_pointer, fetch_add, transpose_square

_FEATURES = 128  # features packed at a time: they fit in the L1 and L2 caches

PACK = define_arguments(
    "source", "target", "count", "batch", "features", "width", "positive", "scratch"
)


def pack(rows: Vector, tiles: Vector, /, *, threads: int | None = None) -> None:
    """Pack activations (batch, features) into tiles (tiles, features, width), padded with zeros.

    Parameters
    ----------
    rows, tiles
        Contiguous, float32 or float64; ``(tiles - 1) · width < batch <= tiles · width``.
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        For other dtypes and shapes, and for arrays that are not contiguous.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import pack
    >>> tiles = np.empty((1, 2, 4))
    >>> pack(np.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), tiles)
    >>> tiles
    array([[[1., 3., 5., 0.],
            [2., 4., 6., 0.]]])
    """
    batch, features = rows.shape
    count, height, width = tiles.shape
    if height != features or count != -(-batch // width):
        raise ValueError(
            f"cannot pack activations of shape {rows.shape} into tiles of shape {tiles.shape}"
        )
    run_transform(
        (_pack_single, _pack_double),
        rows,
        tiles,
        threads,
        PACK,
        count=count,
        batch=batch,
        features=features,
        width=width,
        positive=0,
        scratch=0,
    )


@njit  # type: ignore[untyped-decorator]
def transpose(source: Any, target: Any) -> None:
    """Write the transpose of `source` into `target`, for matrices whose rows are contiguous."""
    height, width = source.shape
    side = VECTOR_BYTES // source.itemsize
    zero = source.dtype.type(0)
    whole_height, whole_width = height // side * side, width // side * side
    for row in range(0, whole_height, side):
        for column in range(0, whole_width, side):
            transpose_square(
                zero,
                source.ctypes.data + row * source.strides[0] + column * source.itemsize,
                source.strides[0],
                target.ctypes.data + column * target.strides[0] + row * target.itemsize,
                target.strides[0],
            )
        for column in range(whole_width, width):
            target[column, row : row + side] = source[row : row + side, column]
    for row in range(whole_height, height):
        target[:, row] = source[row]


@njit  # type: ignore[untyped-decorator]
def pack_tiles(address: Any, dtype: Any) -> None:
    """Pack `source`, with zeros where `positive` (batch, features) is given and not positive."""
    arguments = carray(as_pointer(address), 1, PACK)[0]
    count, batch = arguments.count, arguments.batch
    features, width = arguments.features, arguments.width
    rows = carray(as_pointer(arguments.source), (batch, features), dtype)
    tiles = carray(as_pointer(arguments.target), (count, features, width), dtype)
    blocks = (features + _FEATURES - 1) // _FEATURES
    thread = fetch_add(address + THREAD_COUNTER) if arguments.positive else 0
    masked = carray(as_pointer(arguments.scratch), (thread + 1, width, _FEATURES), dtype)[thread]
    while True:
        item = fetch_add(address)
        if item >= count * blocks:
            break
        tile, start = item // blocks, item % blocks * _FEATURES
        first, stop = tile * width, min(features, start + _FEATURES)
        used = min(width, batch - first)
        source = rows[first : first + used, start:stop]
        if arguments.positive:
            for row in range(used):
                offset = ((first + row) * features + start) * rows.itemsize
                _copy_positive(
                    array_at(arguments.source + offset, stop - start, dtype),
                    array_at(arguments.positive + offset, stop - start, dtype),
                    masked[row],
                )
            source = masked[:used, : stop - start]
        transpose(source, tiles[tile][start:stop, :used])
        if used < width:
            tiles[tile][start:stop, used:] = 0


@njit  # type: ignore[untyped-decorator]
def clear_negative(array: Any) -> None:
    """Set negative entries to 0, in a loop of vectors; NaN stays."""
    zero = array.dtype.type(0)
    for index in range(len(array)):
        value = array[index]
        array[index] = zero if value <= 0 else value


@njit  # type: ignore[untyped-decorator]
def clear_where_not_positive(array: Any, positive: Any) -> None:
    """Set the entries to 0 where `positive`, which is another array, is 0 or less."""
    zero = array.dtype.type(0)
    for index in range(len(array)):
        array[index] = zero if positive[index] <= 0 else array[index]


@njit  # type: ignore[untyped-decorator]
def add_entries(array: Any, addend: Any) -> None:
    """Add `addend`, which is another array of the same length."""
    for index in range(len(array)):
        array[index] += addend[index]


@njit  # type: ignore[untyped-decorator]
def _copy_positive(source: Any, positive: Any, target: Any) -> None:
    """Copy `source` where `positive` is greater than 0 or NaN, and write zeros elsewhere."""
    zero = source.dtype.type(0)
    for index in range(len(source)):
        target[index] = zero if positive[index] <= 0 else source[index]


def pack_scratch_bytes(width: int, itemsize: int) -> int:
    """Bytes of `scratch` that each thread needs if `positive` is given."""
    return width * _FEATURES * itemsize


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _pack_single(address: Any) -> None:
    pack_tiles(address, np.float32)


@kernel(_KERNEL)
def _pack_double(address: Any) -> None:
    pack_tiles(address, np.float64)
