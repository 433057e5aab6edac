"""Units, which are ranked: single weights, or blocks of weights of the tensor as a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from array_api_compat import array_namespace

from topkast._errors import OptionError
from topkast._primitives import Array, asarray_like, cond, device, possibly_true
from topkast.backends import backend_of

BlockScore: TypeAlias = Literal["sum", "max"]


@dataclass(frozen=True)
class Blocks:
    """The division of a tensor into blocks, numbered from left to right, then from top to bottom.

    The tensor is seen as a matrix: its first axis × all others. For a stacked tensor, the matrices
    of its layers are placed below each other.

    Attributes
    ----------
    rows, columns
        Size of a block.
    height, width
        Size of the matrix: multiples of `rows` and `columns`.

    Raises
    ------
    OptionError
        If a block is empty, or blocks do not divide the matrix.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> blocks = topkast.Blocks(rows=2, columns=2, height=4, width=6)
    >>> blocks.count, blocks.size
    (6, 4)
    >>> blocks.entries(np.asarray([4], np.int32))  # the middle block of the lower row of blocks
    array([14, 15, 20, 21], dtype=int32)
    """

    rows: int
    columns: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1 or (
            self.height % self.rows or self.width % self.columns
        ):
            raise OptionError(
                f"blocks of {self.rows} × {self.columns} do not divide a matrix of {self.height} × "
                f"{self.width}: expected positive divisors of its sides"
            )

    @property
    def size(self) -> int:
        """Number of weights in a block."""
        return self.rows * self.columns

    @property
    def count(self) -> int:
        """Number of blocks in the tensor."""
        return self.height * self.width // self.size

    def entries(self, units: Array) -> Array:
        """Flat (C-order) indices of the weights in blocks (k,): block by block, row by row.

        int32 (k · rows · columns,) if the tensor has fewer than 2³¹ entries, else int64.
        """
        xp = array_namespace(units)
        units = self._widen(units)
        blocks_per_row = self.width // self.columns
        block_rows = units // blocks_per_row
        block_columns = units - block_rows * blocks_per_row
        firsts = block_rows * (self.rows * self.width) + block_columns * self.columns
        rows, columns = (_arange(n, units) for n in (self.rows, self.columns))
        offsets = xp.reshape(rows[:, None] * self.width + columns[None, :], (1, -1))
        return xp.reshape(firsts[:, None] + offsets, (-1,))

    def positions(self, of_units: Array) -> Array:
        """Convert positions of units (k,) in B to positions of their weights in a vector over B."""
        xp = array_namespace(of_units)
        of_units = self._widen(of_units)
        offsets = _arange(self.size, of_units)
        return xp.reshape(of_units[:, None] * self.size + offsets[None, :], (-1,))

    def ranks(self, units: Array) -> Array:
        """Ranks by flat index of the weights in ascending blocks (k,): block by block, row by row.

        The position of each of ``entries(units)`` when these are sorted: int32 (k · rows ·
        columns,) if the tensor has fewer than 2³¹ entries, else int64.

        Examples
        --------
        >>> import numpy as np, topkast
        >>> blocks = topkast.Blocks(rows=2, columns=1, height=4, width=3)
        >>> units = np.asarray([0, 2, 4], np.int32)
        >>> blocks.entries(units)
        array([ 0,  3,  2,  5,  7, 10], dtype=int32)
        >>> blocks.ranks(units)
        array([0, 2, 1, 3, 4, 5], dtype=int32)
        """
        xp = array_namespace(units)
        units = self._widen(units)
        block_rows = units // (self.width // self.columns)
        # Blocks of one row of blocks have ranks in a row, sorted by row first.
        first, end = (
            xp.astype(xp.searchsorted(block_rows, block_rows, side=side), units.dtype)
            for side in ("left", "right")
        )
        starts = first * self.size + (_arange(units.shape[0], units) - first) * self.columns
        lengths = (end - first) * self.columns
        rows, columns = (_arange(n, units) for n in (self.rows, self.columns))
        ranks = starts[:, None, None] + lengths[:, None, None] * rows[None, :, None]
        return xp.reshape(ranks + columns[None, None, :], (-1,))

    def _widen(self, units: Array) -> Array:
        """Convert unit numbers to the dtype that indices of weights need."""
        xp = array_namespace(units)
        dtype = xp.int32 if self.height * self.width < 1 << 31 else xp.int64
        return xp.astype(units, dtype, copy=False)

    def repeat(self, of_units: Array) -> Array:
        """Repeat values of units (k,) for each weight of the unit."""
        xp = array_namespace(of_units)
        shape = (of_units.shape[0], self.size)
        return xp.reshape(xp.broadcast_to(of_units[:, None], shape), (-1,))


def _arange(n: int, like: Array) -> Array:
    xp = array_namespace(like)
    return xp.arange(n, dtype=like.dtype, device=device(like))


def blocks_of(
    name: str, shape: tuple[int, ...], block: tuple[int, int] | None, *, stacked: bool = False
) -> Blocks | None:
    """Divide a tensor into blocks; None if units are single weights.

    Raises :class:`topkast.OptionError` if `block` does not divide the matrix, or that of each layer
    of a `stacked` tensor.
    """
    if block is None or block == (1, 1):
        return None
    layers, matrix = (shape[0], shape[1:]) if stacked else (1, shape)
    height, width, (rows, columns) = matrix[0] if matrix else 1, math.prod(matrix[1:]), block
    if height % rows or width % columns:
        which = "the matrix of each of its layers" if stacked else "its matrix"
        raise OptionError(
            f"{name}: block={block} does not divide {which}, {height} × {width} (first axis × all "
            f"others). Choose another block, keep the tensor dense with dense={name!r}, or rank "
            f'its single weights with overrides={{{name!r}: {{"block": None}}}}'
        )
    return Blocks(rows, columns, height * layers, width)


def unit_scores(flat: Array, blocks: Blocks, score: BlockScore, *, scales: bool = True) -> Array:
    """Score (blocks.count,) the blocks of a tensor (n,) by the sum or maximum of magnitudes.

    Scores have the dtype of the magnitudes, or float32 for half precision. A block with NaN scores
    NaN. The order of additions is fixed, so that all libraries round alike: neighbouring rows are
    added, then neighbouring sums, until one row is left; then its columns in the same way. If a sum
    overflows, all weights are scaled down by a power of two, unless `scales` is false.
    """
    flat = backend_of(flat).constant(flat)
    host = backend_of(flat).host(flat)
    scores = _scores(flat if host is None else host, blocks, score, scales=scales)
    return scores if host is None else asarray_like(scores, flat)


def _scores(flat: Array, blocks: Blocks, score: BlockScore, *, scales: bool) -> Array:
    xp = array_namespace(flat)
    magnitudes = modulus(flat)
    if xp.finfo(magnitudes.dtype).bits < 32:
        magnitudes = xp.astype(magnitudes, xp.float32)
    if score == "max":
        return _reduce(magnitudes, blocks, xp.maximum)

    def add(first: Array, second: Array) -> Array:
        return first + second

    with np.errstate(over="ignore"):
        scores = _reduce(magnitudes, blocks, add)
    if not scales:
        return scores

    def scaled(_: Array, magnitudes: Array) -> Array:
        return _reduce(magnitudes * 0.5 ** math.ceil(math.log2(blocks.size)), blocks, add)

    overflow = xp.any(xp.isinf(scores))
    return cond(overflow, scaled, scores, magnitudes) if possibly_true(overflow) else scores


def _reduce(array: Array, blocks: Blocks, combine: Callable[[Array, Array], Array]) -> Array:
    """Combine the values (n,) of each block pair by pair: first its rows, then its columns."""
    xp = array_namespace(array)
    block_rows, block_columns = blocks.height // blocks.rows, blocks.width // blocks.columns
    rows = _fold(xp.reshape(array, (block_rows, blocks.rows, blocks.width)), 1, combine)
    columns = _fold(xp.reshape(rows, (block_rows, block_columns, blocks.columns)), 2, combine)
    return xp.reshape(columns, (-1,))


def _fold(array: Array, axis: int, combine: Callable[[Array, Array], Array]) -> Array:
    """Combine an array of three dimensions along an axis until its length is 1."""
    xp = array_namespace(array)
    while (length := array.shape[axis]) > 1:
        first, second, last = (
            array[(*(slice(None),) * axis, selected, ...)]
            for selected in (
                slice(0, length - 1, 2),
                slice(1, length, 2),
                slice(length - 1, length),
            )
        )
        array = combine(first, second)
        if length % 2:  # the last one has no partner and waits for the next round
            array = xp.concat([array, last], axis=axis)
    return array


def modulus(flat: Array) -> Array:
    """Magnitudes of numbers, all scaled by 1/4 if a finite complex number's would overflow."""
    xp = array_namespace(flat)
    moduli = xp.abs(flat)
    if not xp.isdtype(flat.dtype, "complex floating"):
        return moduli
    overflow = xp.any(xp.isinf(moduli) & xp.isfinite(xp.real(flat)) & xp.isfinite(xp.imag(flat)))
    if not possibly_true(overflow):
        return moduli
    return xp.where(overflow, xp.abs(flat * 0.25), moduli)
