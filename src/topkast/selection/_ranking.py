"""The next sets, chosen among the entries of B and a reserve of the largest ones outside."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from topkast._errors import NonFiniteError
from topkast.backends import _candidates
from topkast.backends._compiled import function
from topkast.reservoirs._outside import largest_outside
from topkast.reservoirs._reservoir import Reservoir
from topkast.selection._random import Ranks
from topkast.selection._reserve import Reserve, reserve_size
from topkast.selection._support import Migration, Support
from topkast.selection._units import BlockScore

Vector = np.ndarray[Any, Any]

_HISTORY = 3  # refreshes whose thresholds predict the next ones
_BRACKET = 2.0  # times the error of the last prediction, by which the next one may be wrong
_MIN_BRACKET = 1 / 2048  # of the threshold


class Exchange(NamedTuple):
    r"""The next sets, chosen among candidates.

    Attributes
    ----------
    support, migration
        The next sets, and the position of each of their entries in the present B.
    values
        Weights on the next B (\|B\|,).
    reserve
        The largest entries outside the next B.
    left
        Indices and weights of the entries that left B.
    smallest
        The smallest magnitudes in the next A and B.
    entered
        Number of units of the next A that were not in the present one.
    """

    support: Support
    migration: Migration
    values: Vector
    reserve: Reserve
    left: tuple[Vector, Vector]
    smallest: tuple[float, float]
    entered: int


@dataclass(frozen=True)
class IncrementalSelection:
    r"""The choice of the largest magnitudes of one tensor, refresh after refresh.

    Each refresh reads the reserve, and each filling of the reserve reads all n weights. If the
    reserve loses d entries at a refresh, and reading a weight takes twice as long as a refresh
    spends on an entry of the reserve, then 2 · √(n · d) entries cost least altogether. These
    are collected, from 1,024 up to half of \|B\|; at first, an eighth of \|B\|.

    Attributes
    ----------
    reserve
        The reserve of the present sets; None before the first refresh.
    filled
        Number of its entries after the refresh at which it was filled.
    age
        Refreshes since then.
    loss
        Entries that the reserves lost at each refresh; None before the first one ran short.
    smallest
        The smallest magnitudes in A and B, at the last three refreshes.
    block_score
        The score by which blocks were ranked, if units are blocks.
    """

    reserve: Reserve | None = None
    filled: int = 0
    age: int = 0
    loss: float | None = None
    smallest: tuple[tuple[float, float], ...] = ()
    block_score: BlockScore = "sum"

    @property
    def nbytes(self) -> int:
        """Bytes of the reserve."""
        return 0 if self.reserve is None else self.reserve.nbytes

    def choose(
        self,
        support: Support,
        values: Vector,
        reservoir: Reservoir,
        ranks: Ranks,
        *,
        counts: tuple[int, int] | None = None,
        name: str = "",
    ) -> tuple[Exchange, IncrementalSelection] | None:
        r"""Choose the next sets; also return the selection that follows.

        Parameters
        ----------
        support
            The present sets, of single weights. Their indices are a NumPy array: int32 if the
            tensor has fewer than 2³¹ weights, else int64.
        values
            Weights on B (\|B\|,), contiguous, float32 or float64.
        reservoir
            The weights outside B.
        ranks
            Ranks of equal magnitudes.
        counts
            \|A\| and \|B\| of the next sets; None: those of the present ones.
        name
            The tensor's name, for messages about progress.

        Returns
        -------
        tuple or None
            None if too few entries outside B are nonzero: all weights have to be ranked.

        Raises
        ------
        NonFiniteError
            If a weight on B is NaN or infinite.

        Examples
        --------
        B is {1, 2, 5}. Then the weight of 5 shrinks, and 3 takes its place:

        >>> import numpy as np, topkast
        >>> from topkast.adapter import IncrementalSelection
        >>> from topkast.reservoirs import ArrayReservoir
        >>> theta = np.asarray([0.1, 0.9, 0.5, 0.3, 0.0, 0.4])
        >>> support, reservoir = topkast.select(theta, fwd=0.8, bwd=0.5), ArrayReservoir(theta)
        >>> values = np.asarray([0.9, 0.5, 0.2])
        >>> by_position = lambda indices: indices  # ranks equal magnitudes
        >>> selection = IncrementalSelection()
        >>> chosen, following = selection.choose(support, values, reservoir, by_position)
        >>> chosen.support.indices, chosen.left
        (array([1, 2, 3], dtype=int32), (array([5], dtype=int32), array([0.2])))
        """
        finish = self.prepare(support, values, reservoir, ranks, counts=counts, name=name)
        return None if finish is None else finish()

    def prepare(
        self,
        support: Support,
        values: Vector,
        reservoir: Reservoir,
        ranks: Ranks,
        *,
        counts: tuple[int, int] | None = None,
        name: str = "",
    ) -> Callable[[], tuple[Exchange, IncrementalSelection]] | None:
        """Do what :meth:`choose` does, but leave the division of the candidates to the result.

        Whatever can fail has been done then. `values` must not change before the result is called.
        """
        counts = (support.forward, support.backward) if counts is None else counts
        loss, known = self.loss, 0  # entries outside B above the present bound
        brackets = self._expect_smallest()
        missing = max(counts[1] - support.backward, 0)
        magnitude = math.inf if brackets is None else brackets[1][0]
        rank_with = functools.partial(
            _rank_levels, support, values, reservoir.size, ranks, counts, brackets
        )
        if self.reserve is not None:
            ranking, reserve = rank_with(self.reserve.reach(magnitude))
            if isinstance(ranking, Ranking):
                return functools.partial(self._follow, ranking, replace(self, age=self.age + 1))
            missing, known = ranking, reserve.size
            loss = (self.filled + missing) / (self.age + 1)
        count = known + missing + reserve_size(reservoir.size, counts[1], loss)
        while True:
            largest = largest_outside(reservoir, support, count, name=name)
            if largest is None:
                return None
            reserve = Reserve.fill(largest)
            del largest
            ranking, _ = rank_with(reserve.reach(magnitude))
            if isinstance(ranking, Ranking):
                return functools.partial(self._follow, ranking, IncrementalSelection(loss=loss))
            count += 2 * ranking

    def _follow(
        self, ranking: Ranking, following: IncrementalSelection
    ) -> tuple[Exchange, IncrementalSelection]:
        """Divide the candidates; complete the selection that follows."""
        exchange = ranking.exchange()
        reserve, smallest = exchange.reserve, (*self.smallest[1 - _HISTORY :], exchange.smallest)
        filled = following.filled if following.age else reserve.total
        return exchange, replace(following, reserve=reserve, filled=filled, smallest=smallest)

    def _expect_smallest(self) -> list[tuple[float, float]] | None:
        """Bounds of the next smallest magnitudes, if they move about as they did before."""
        if len(self.smallest) < _HISTORY:
            return None
        brackets = []
        for first, before, now in zip(*self.smallest, strict=True):
            error = abs(now - (2 * before - first))
            width = _BRACKET * error + _MIN_BRACKET * now
            center = 2 * now - before
            brackets.append((max(center - width, 0.0), max(center + width, 0.0)))
        return brackets


def rank(
    support: Support,
    values: Vector,
    reserve: Reserve,
    size: int,
    ranks: Ranks,
    counts: tuple[int, int],
    brackets: Sequence[tuple[float, float]] | None = None,
) -> Ranking | int:
    """Find the smallest magnitudes of the next sets among the entries of B and the reserve.

    If an entry outside both could belong to the next B, returns the number of missing entries
    instead: those in the next B that may be smaller than the reserve's bound. Parameters and errors
    are those of :meth:`IncrementalSelection.choose`; `size` is the number of entries of the tensor,
    and `brackets` are bounds of the smallest magnitudes in A and B, within which they are expected.
    """
    is_expected_below = brackets is not None and brackets[1][0] < reserve.bound
    if is_expected_below or counts[1] > support.backward + reserve.size:
        missing = counts[1] - _count_reaching(values, reserve.bound) - reserve.size
        if missing > 0:
            return missing
    find_thresholds = function("find_thresholds", values.size + reserve.size)
    lists = [values, reserve.values]
    (forward, backward), not_finite = find_thresholds(lists, counts, brackets=brackets)
    if not_finite:
        raise NonFiniteError(f"{not_finite} of {size} entries are NaN or infinite")
    if backward.magnitude < reserve.bound:
        return counts[1] - _count_reaching(values, reserve.bound) - reserve.size
    ties = None
    if forward.surplus or backward.surplus:
        indices = support.indices, reserve.indices
        ties = _find_ties(*indices, forward, ranks), _find_ties(*indices, backward, ranks)
    smallest = forward.magnitude, backward.magnitude
    return Ranking(support, values, reserve, size, counts, smallest, ties)


def _rank_levels(
    support: Support,
    values: Vector,
    size: int,
    ranks: Ranks,
    counts: tuple[int, int],
    brackets: Sequence[tuple[float, float]] | None,
    reserve: Reserve,
) -> tuple[Ranking | int, Reserve]:
    """:func:`rank` with as many levels of the reserve as it takes; also the reserve with these."""
    while True:
        ranking = rank(support, values, reserve, size, ranks, counts, brackets)
        if isinstance(ranking, Ranking) or reserve.rest is None:
            return ranking, reserve
        reserve = reserve.deepen()


class Ranking(NamedTuple):
    """The candidates for the next sets, and the smallest magnitudes in these.

    `ties` are indices of entries at these magnitudes that rank too low. For the others, see
    :func:`rank`.
    """

    support: Support
    values: Vector
    reserve: Reserve
    size: int
    counts: tuple[int, int]
    smallest: tuple[float, float]
    ties: tuple[Vector, Vector] | None

    def exchange(self) -> Exchange:
        """Divide the candidates into the next sets and the next reserve."""
        support, values, reserve, counts = self.support, self.values, self.reserve, self.counts
        # Of the reserve, only what reaches the next B has to be put in order.
        collect = function("collect", reserve.size)
        entering = _ascending(*collect(reserve.values, self.smallest[1], indices=reserve.indices))
        # At first, all of the next B enters.
        division = function("divide", values.size + entering[0].size)(
            (support.indices, values),
            entering,
            split=support.forward,
            size=self.size,
            forward=self.smallest[0],
            backward=self.smallest[1],
            bound=reserve.floor,
            ties=self.ties,
        )
        inside = slice(counts[1])
        outside = slice(counts[1], counts[1] + division.sizes[2])
        left: Any = slice(counts[1], None)
        was_inside = division.survives[counts[1] :]
        if not was_inside.all():  # entries of the reserve that rank too low among equal ones
            left = counts[1] + np.flatnonzero(was_inside)
        return Exchange(
            Support(division.indices[inside], counts[0]),
            Migration(division.source[inside], division.survives[inside]),
            division.values[inside],
            reserve.exchange(
                self.smallest[1], (division.indices[outside], division.values[outside])
            ),
            (division.indices[left], division.values[left]),
            self.smallest,
            division.entered,
        )


def _ascending(indices: Vector, values: Vector) -> tuple[Vector, Vector]:
    """Indices in ascending order, with their values; they differ."""
    order = np.argsort(indices, kind="stable")  # a merge sort: entries that joined ascend
    return indices.take(order), values.take(order)


def _count_reaching(values: Vector, bound: float) -> int:
    """Number of values of this magnitude or a larger one, NaN among them."""
    return values.size - int(np.count_nonzero(np.abs(values) < values.dtype.type(bound)))


def _find_ties(
    inside: Vector, reserve: Vector, threshold: _candidates.Threshold, ranks: Ranks
) -> Vector:
    """Ascending indices of the entries at a threshold that rank too low to be chosen; int64.

    `inside` and `reserve` are the indices of all entries, in the order of the positions.
    """
    if not threshold.surplus:
        return np.zeros(0, dtype=np.int64)
    is_inside = threshold.equal < inside.size
    equal = np.concatenate(
        [
            inside.take(threshold.equal[is_inside]),
            reserve.take(threshold.equal[~is_inside] - inside.size),
        ]
    )
    lowest = np.argpartition(ranks(equal), threshold.surplus - 1)[: threshold.surplus]
    return np.sort(equal[lowest]).astype(np.int64)
