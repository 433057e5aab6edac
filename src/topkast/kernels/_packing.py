"""Activations by row, as most libraries keep them, to tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels.runtime._arguments import Vector, slots, transform
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import VECTOR_BYTES, as_pointer, fetch_add, transpose_block

_BAND = 128  # features that are packed at a time: what the first two caches hold

_PACK = slots("source", "target", "count", "batch", "features", "width")


def pack(rows: Vector, tiles: Vector, /, *, threads: int | None = None) -> None:
    """Activations (batch, features) into tiles (tiles, features, width), with zeros behind them.

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
        raise ValueError(f"cannot pack {rows.shape} into {tiles.shape}")
    transform(
        (_pack_single, _pack_double),
        rows,
        tiles,
        threads,
        _PACK,
        count=count,
        batch=batch,
        features=features,
        width=width,
    )


@njit  # type: ignore[untyped-decorator]
def transpose(source: Any, target: Any) -> None:
    """Write the transpose of `source` into `target`, for matrices whose rows are contiguous."""
    height, width = source.shape
    side = VECTOR_BYTES // source.itemsize
    zero = source.dtype.type(0)
    above, beside = height // side * side, width // side * side
    for row in range(0, above, side):
        for column in range(0, beside, side):
            transpose_block(
                zero,
                source.ctypes.data + row * source.strides[0] + column * source.itemsize,
                source.strides[0],
                target.ctypes.data + column * target.strides[0] + row * target.itemsize,
                target.strides[0],
            )
        for column in range(beside, width):
            target[column, row : row + side] = source[row : row + side, column]
    for row in range(above, height):
        target[:, row] = source[row]


@njit  # type: ignore[untyped-decorator]
def _pack(address: Any, dtype: Any) -> None:
    arguments = carray(as_pointer(address), 1, _PACK)[0]
    count, batch = arguments.count, arguments.batch
    features, width = arguments.features, arguments.width
    rows = carray(as_pointer(arguments.source), (batch, features), dtype)
    tiles = carray(as_pointer(arguments.target), (count, features, width), dtype)
    while True:
        tile = fetch_add(address)
        if tile >= count:
            break
        first = tile * width
        there = min(width, batch - first)
        for start in range(0, features, _BAND):
            stop = min(features, start + _BAND)
            part = rows[first : first + there, start:stop]
            transpose(part, tiles[tile][start:stop, :there])
        if there < width:
            tiles[tile][:, there:] = 0


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _pack_single(address: Any) -> None:
    _pack(address, np.float32)


@kernel(_KERNEL)
def _pack_double(address: Any) -> None:
    _pack(address, np.float64)
