"""The next sets of a tensor from few candidates, which are single weights or blocks.

Between refreshes, neither the weights outside B change nor the scores of blocks outside B. Blocks
are therefore chosen as single weights are, by their scores. The weights of blocks that enter or
leave B are moved block by block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from topkast._errors import NonFiniteError
from topkast._progress import CHUNK
from topkast.reservoirs._reservoir import Reservoir
from topkast.selection._random import Ranks, make_key
from topkast.selection._ranking import Exchange, IncrementalSelection, Vector
from topkast.selection._support import Migration, Support, index_dtype_for
from topkast.selection._units import Blocks, BlockScore, unit_scores


def choose_next(
    selection: IncrementalSelection,
    support: Support,
    values: Vector,
    reservoir: Reservoir,
    ranks: Ranks,
    *,
    counts: tuple[int, int] | None = None,
    block_score: BlockScore = "sum",
    name: str = "",
) -> tuple[Exchange, IncrementalSelection] | None:
    r"""Choose the next sets, and return the selection that follows.

    For blocks, this is :meth:`IncrementalSelection.choose` among scores. Its outcome has scores in
    the reserve, and weights everywhere else: `values` on the next B in the order of
    :class:`Support`, a `migration` of weights, and the flat indices and weights that `left` B.

    Parameters
    ----------
    selection
        What is known from the last refresh.
    support, values, reservoir, ranks, counts, name
        As for :meth:`IncrementalSelection.choose`; units are those of `support`.
    block_score
        The score of a block. If it is another one than at the last refresh, the reserve is filled
        again.

    Returns
    -------
    tuple or None
        None if all units have to be ranked: too few outside B have a score above zero, or a sum of
        magnitudes overflows.

    Raises
    ------
    NonFiniteError
        If a weight on B is NaN or infinite.

    Examples
    --------
    Of the blocks 0 to 3 of two weights, B is {0, 2}. Then the weights of 2 shrink, and 1 takes its
    place:

    >>> import numpy as np, topkast
    >>> from topkast.adapter import IncrementalSelection, choose_next
    >>> from topkast.reservoirs import ArrayReservoir
    >>> theta = np.asarray([[0.9, -0.3], [0.8, 0.2], [0.5, 0.1], [0.6, 0.0]])
    >>> support = topkast.select(theta, fwd=0.75, bwd=0.5, block=(2, 1))
    >>> support.indices, topkast.gather(theta, support)
    (array([0, 2], dtype=int32), array([0.9, 0.8, 0.5, 0.6]))
    >>> values, by_position = np.asarray([0.9, 0.8, 0.1, 0.2]), lambda units: units
    >>> reservoir = ArrayReservoir(theta.ravel())
    >>> chosen, following = choose_next(
    ...     IncrementalSelection(), support, values, reservoir, by_position)
    >>> chosen.support.indices, chosen.values
    (array([0, 1], dtype=int32), array([ 0.9,  0.8, -0.3,  0.2]))
    >>> chosen.left
    (array([4, 6], dtype=int32), array([0.1, 0.2]))
    """
    finish = prepare_next(
        selection,
        support,
        values,
        reservoir,
        ranks,
        counts=counts,
        block_score=block_score,
        name=name,
    )
    return None if finish is None else finish()


def prepare_next(
    selection: IncrementalSelection,
    support: Support,
    values: Vector,
    reservoir: Reservoir,
    ranks: Ranks,
    *,
    counts: tuple[int, int] | None = None,
    block_score: BlockScore = "sum",
    name: str = "",
) -> Callable[[], tuple[Exchange, IncrementalSelection]] | None:
    """Do what :func:`choose_next` does, but leave what cannot fail to the result.

    `values` must not change before the result is called. Until then, it holds little more memory
    than the reserve, where the sets are of single weights.
    """
    blocks = support.blocks
    if blocks is None:
        return selection.prepare(support, values, reservoir, ranks, counts=counts, name=name)
    if selection.block_score != block_score:
        selection = IncrementalSelection(loss=selection.loss)
    by_block = values.reshape(-1, blocks.size)
    scores = BlockScores(reservoir, blocks, block_score)
    try:
        on_b = scores.of(by_block)
        outcome = selection.choose(
            support.in_blocks(None), on_b, scores, ranks, counts=counts, name=name
        )
    except _OverflowingScoreError:
        return None
    if outcome is None:
        return None
    exchange, following = outcome
    weights = _exchange_weights(exchange, support, by_block, reservoir)  # reads the reservoir
    following = replace(following, block_score=block_score)
    return lambda: (weights, following)


def choose_first(
    reservoir: Reservoir,
    counts: tuple[int, int],
    *,
    blocks: Blocks | None = None,
    seed: int = 0,
    name: str = "",
) -> tuple[Exchange, IncrementalSelection] | None:
    r"""Choose the first sets, of \|A\| and \|B\| `counts`, from a reservoir that holds all weights.

    They are those of :func:`topkast.select` with this `seed` and `name`, and with these `blocks` as
    units. Returns None if all units have to be ranked: see :func:`choose_next`.
    """
    ranks = Ranks(make_key(seed, name, "ties"))
    size = reservoir.size if blocks is None else blocks.count
    nothing = Support(np.zeros(0, dtype=index_dtype_for(np, size)), 0, blocks)
    values, name = reservoir.read(0, 0), name or "a layer"
    return choose_next(
        IncrementalSelection(), nothing, values, reservoir, ranks, counts=counts, name=name
    )


class BlockScores(Reservoir):
    """The scores of blocks, whose weights are in a reservoir: another reservoir, to be read only.

    Parameters
    ----------
    weights
        The weights outside B.
    blocks
        The division of their tensor.
    score
        The score of a block: those of :func:`unit_scores`, bit for bit.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> from topkast.reservoirs import ArrayReservoir
    >>> from topkast.selection._incremental import BlockScores
    >>> weights = ArrayReservoir(np.asarray([1.0, 2.0, 3.0, -4.0, 5.0, 6.0]))
    >>> blocks = topkast.Blocks(rows=2, columns=1, height=2, width=3)
    >>> scores = BlockScores(weights, blocks, "sum")
    >>> scores.read(1, 3), scores.take(np.asarray([0], np.int32))
    (array([7., 9.]), array([5.]))
    """

    kind = "none"

    def __init__(self, weights: Reservoir, blocks: Blocks, score: BlockScore) -> None:
        self._weights, self._blocks, self._score = weights, blocks, score
        self.size = blocks.count

    def of(self, by_block: Vector) -> Vector:
        """The scores (k,) of blocks of weights (k, size)."""
        rows, columns = self._blocks.rows, self._blocks.columns
        column = Blocks(rows, columns, len(by_block) * rows, columns)  # one below the other
        flat = by_block.reshape(-1)
        return self._check(unit_scores(flat, column, self._score, scales=False), flat)

    def read(self, start: int, stop: int) -> Vector:
        parts = [self._read_row(row, first, last) for row, first, last in self._split(start, stop)]
        return np.concatenate([self._weights.read(0, 0), *parts])

    def take(self, indices: Vector) -> Vector:
        entries = self._blocks.entries(indices)
        return self.of(self._weights.take(entries).reshape(-1, self._blocks.size))

    def write(self, indices: Vector, weights: Vector, inside: object = ()) -> None:
        raise TypeError("scores of blocks follow from their weights: write these")

    def copy(self) -> BlockScores:
        return BlockScores(self._weights.copy(), self._blocks, self._score)

    @property
    def nbytes(self) -> int:
        return self._weights.nbytes

    def _split(self, start: int, stop: int) -> Iterator[tuple[slice, int, int]]:
        """Split a range of blocks into ranges of block rows, with first and last block of each.

        Several rows are read at a time if all their blocks are wanted and they are short.
        """
        per_row = self._blocks.width // self._blocks.columns
        step = max(1, CHUNK // (self._blocks.rows * self._blocks.width))
        while start < stop:
            row, first = divmod(start, per_row)
            if first or stop - start < per_row:
                last = min(per_row, first + stop - start)
                yield slice(row, row + 1), first, last
                start += last - first
            else:
                rows = min(step, (stop - start) // per_row)
                yield slice(row, row + rows), 0, per_row
                start += rows * per_row

    def _read_row(self, rows: slice, first: int, last: int) -> Vector:
        """The scores of the blocks from `first` to `last` in some rows of blocks."""
        blocks = self._blocks
        top, bottom = rows.start * blocks.rows, rows.stop * blocks.rows
        left, right = first * blocks.columns, last * blocks.columns
        if right - left == blocks.width:
            flat = self._weights.read(top * blocks.width, bottom * blocks.width)
        else:
            starts = range(top * blocks.width, bottom * blocks.width, blocks.width)
            lines = [self._weights.read(start + left, start + right) for start in starts]
            flat = np.concatenate(lines)
        part = Blocks(blocks.rows, blocks.columns, bottom - top, right - left)
        return self._check(unit_scores(flat, part, self._score, scales=False), flat)

    def _check(self, scores: Vector, weights: Vector) -> Vector:
        """Raise unless all scores are finite."""
        if scores.size and not scores.max() < math.inf:
            count = int(np.count_nonzero(~np.isfinite(weights)))
            if not count:
                raise _OverflowingScoreError
            raise NonFiniteError(f"{count} of {self._weights.size} entries are NaN or infinite")
        return scores


class _OverflowingScoreError(Exception):
    """The sum of the magnitudes of a block is infinite: all have to be scaled down."""


def _exchange_weights(
    exchange: Exchange, old: Support, by_block: Vector, reservoir: Reservoir
) -> Exchange:
    """The exchange of weights that follows from one of blocks, whose old ones are `by_block`."""
    blocks = old.blocks
    assert blocks is not None
    new, (source, survives) = exchange.support.in_blocks(blocks), exchange.migration
    leaves = np.ones(old.backward, dtype=np.bool_)
    leaves[source[survives]] = False
    left = blocks.entries(old.indices[leaves]), by_block[leaves].ravel()
    values = np.empty((new.backward, blocks.size), dtype=by_block.dtype)
    if old.backward:
        by_block.take(source, axis=0, out=values, mode="clip")
    enters = np.flatnonzero(~survives)
    entering = blocks.entries(new.indices[enters])
    values[enters] = reservoir.take(entering).reshape(-1, blocks.size)
    migration = Migration(blocks.positions(source), np.repeat(survives, blocks.size))
    return exchange._replace(support=new, migration=migration, values=values.ravel(), left=left)
