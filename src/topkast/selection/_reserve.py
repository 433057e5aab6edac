"""The next sets from few candidates: the entries of B, and a reserve of the largest ones outside.

Weights outside B do not change between refreshes. The next B therefore consists of entries of the
present B and of entries outside that are large enough. The reserve holds all of these down to a
bound: every other entry is smaller. If the smallest magnitude of the next B reaches the bound, the
next B is exact, and only candidates were read. Otherwise the reserve is filled again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from topkast._errors import NonFiniteError
from topkast._progress import CHUNK, chunks
from topkast.backends import _candidates
from topkast.backends._compiled import functions
from topkast.reservoirs._reservoir import Reservoir
from topkast.selection._random import Ranks, make_key
from topkast.selection._support import Migration, Support

Vector = np.ndarray[Any, Any]

_SAMPLE = 1 << 15  # entries
_SPREAD = 4.0  # standard deviations of a sampled quantile, by which the bound is lowered
_MIN_RESERVE = 1 << 10  # entries
_FIRST_SHARE, _MAX_SHARE = 1 / 8, 1 / 2  # of |B|
_LIFETIME = 8  # refreshes that a reserve should last
_BRACKET = 1.0  # times the last change of a threshold, by which the next one may differ from it
_MIN_BRACKET = 1 / 4096  # of the threshold
_WIDE = 1 << 31  # number of weights from which indices have 64 bits


class Reserve(NamedTuple):
    """The largest entries outside B.

    Attributes
    ----------
    indices
        Ascending flat indices (r,).
    values
        Their weights (r,).
    bound
        Every other entry outside B has a smaller magnitude; 0 if there are no others.
    """

    indices: Vector
    values: Vector
    bound: float

    @property
    def nbytes(self) -> int:
        """Bytes of indices and values."""
        return self.indices.nbytes + self.values.nbytes


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
    """

    support: Support
    migration: Migration
    values: Vector
    reserve: Reserve
    left: tuple[Vector, Vector]
    smallest: tuple[float, float]


@dataclass(frozen=True)
class IncrementalSelection:
    r"""The choice of the largest magnitudes of one tensor, refresh after refresh.

    A full reserve holds an eighth of \|B\| entries, or at least 1,024. Whenever one lasts for fewer
    than eight refreshes, the next one is twice as large, up to half of \|B\|.

    Attributes
    ----------
    reserve
        The reserve of the present sets; None before the first refresh.
    share
        Size of a full reserve, as a share of \|B\|.
    age
        Refreshes since the reserve was filled.
    smallest
        The smallest magnitudes in A and B, at the last refresh and at the one before.
    """

    reserve: Reserve | None = None
    share: float = _FIRST_SHARE
    age: int = 0
    smallest: tuple[tuple[float, float], ...] = ()

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
        counts = (support.forward, support.backward) if counts is None else counts
        reach = math.inf
        if self.reserve is not None:
            brackets = self._expect_smallest()
            outcome = exchange(
                support, values, self.reserve, reservoir.size, ranks, counts, brackets
            )
            if not isinstance(outcome, Exchange):
                reach = outcome
            else:
                smallest = *self.smallest[-1:], outcome.smallest
                following = replace(
                    self, reserve=outcome.reserve, age=self.age + 1, smallest=smallest
                )
                return outcome, following
        grows = self.reserve is not None and self.age < _LIFETIME
        share = min(2 * self.share, _MAX_SHARE) if grows else self.share
        count = max(_MIN_RESERVE, int(share * counts[1])) + counts[1] - support.backward
        while True:
            reserve = fill_reserve(reservoir, support, count, reach=reach, name=name)
            if reserve is None:
                return None
            outcome = exchange(support, values, reserve, reservoir.size, ranks, counts)
            if isinstance(outcome, Exchange):
                smallest = *self.smallest[-1:], outcome.smallest
                return outcome, IncrementalSelection(outcome.reserve, share, smallest=smallest)
            count, reach = 2 * count, outcome

    def _expect_smallest(self) -> list[tuple[float, float]] | None:
        """Bounds of the next smallest magnitudes, if they move about as they did before."""
        if len(self.smallest) < 2:
            return None
        brackets = []
        for before, now in zip(*self.smallest, strict=True):
            width = _BRACKET * abs(now - before) + _MIN_BRACKET * now
            center = 2 * now - before
            brackets.append((max(center - width, 0.0), max(center + width, 0.0)))
        return brackets


def choose_first(
    reservoir: Reservoir, counts: tuple[int, int], *, seed: int = 0, name: str = ""
) -> tuple[Exchange, IncrementalSelection] | None:
    r"""Choose the first sets, of \|A\| and \|B\| `counts`, from a reservoir that holds all weights.

    They are those of :func:`topkast.select` with this `seed` and `name`. Returns None if too few
    weights are nonzero.
    """
    ranks = Ranks(make_key(seed, name, "ties"))
    indices = np.zeros(0, dtype=np.int32 if reservoir.size < _WIDE else np.int64)
    nothing, values = Support(indices, 0), reservoir.read(0, 0)
    selection, name = IncrementalSelection(), name or "a layer"
    return selection.choose(nothing, values, reservoir, ranks, counts=counts, name=name)


def exchange(
    support: Support,
    values: Vector,
    reserve: Reserve,
    size: int,
    ranks: Ranks,
    counts: tuple[int, int],
    brackets: Sequence[tuple[float, float]] | None = None,
) -> Exchange | float:
    """Choose the next sets among the entries of B and the reserve.

    If an entry outside both could belong to the next B, returns the magnitude that a reserve has to
    reach instead: the smallest one in the next B is at least as large. Parameters and errors are
    those of :meth:`IncrementalSelection.choose`; `size` is the number of entries of the tensor, and
    `brackets` are bounds of the smallest magnitudes in A and B, within which they are expected.
    """
    if counts[1] > support.backward + len(reserve.indices):
        return 0.0
    use = functions(values.size + reserve.values.size)
    split = support.forward
    lists = [
        (support.indices[:split], values[:split]),
        (support.indices[split:], values[split:]),
        (reserve.indices, reserve.values),
    ]
    vectors = [vector for _, vector in lists]
    (forward, backward), not_finite = use.find_thresholds(vectors, counts, brackets=brackets)
    if not_finite:
        raise NonFiniteError(f"{not_finite} of {size} entries are NaN or infinite")
    if backward.magnitude < reserve.bound:
        reach: float = backward.magnitude
        return reach
    ties = None
    if forward.surplus or backward.surplus:
        ties = _find_ties(lists, forward, ranks), _find_ties(lists, backward, ranks)
    division = use.divide(
        *lists,
        size=size,
        forward=forward.magnitude,
        backward=backward.magnitude,
        bound=reserve.bound,
        ties=ties,
    )
    inside, outside, reserved = division.inside, division.outside, division.sizes[2]
    survives, left = inside.source >= 0, outside.source >= 0
    return Exchange(
        Support(inside.indices, counts[0]),
        Migration(np.maximum(inside.source, 0, out=inside.source), survives),
        inside.values,
        Reserve(outside.indices[:reserved], outside.values[:reserved], reserve.bound),
        (outside.indices[left], outside.values[left]),
        (forward.magnitude, backward.magnitude),
    )


def fill_reserve(
    reservoir: Reservoir, support: Support, count: int, *, reach: float = math.inf, name: str = ""
) -> Reserve | None:
    """Collect about the `count` largest entries outside B, and all that are as large.

    They are up to four times as many if that is needed to `reach` a smaller magnitude. Returns None
    if entries of magnitude zero would be among them, unless all entries outside B are.
    """
    takes_all = count >= reservoir.size - support.backward
    bound = 0.0 if takes_all else _estimate_bound(reservoir, support, count, reach)
    if not takes_all and not bound:
        return None
    dtype = support.indices.dtype
    starts = np.append(np.arange(0, reservoir.size, CHUNK), reservoir.size).astype(dtype)
    runs = support.active, support.exploring
    edges = [np.searchsorted(run, starts) for run in runs]
    parts = [(np.zeros(0, dtype), reservoir.read(0, 0))]
    for number, (start, stop) in enumerate(chunks(reservoir.size, f"{name}: reading all weights")):
        weights = reservoir.read(start, stop)
        inside = [
            (run[edge[number] : edge[number + 1]] - dtype.type(start)).astype(np.int32, copy=False)
            for run, edge in zip(runs, edges, strict=True)
        ]
        if takes_all:
            outside = np.ones(weights.size, dtype=np.bool_)
            for positions in inside:
                outside[positions] = False
            found = np.flatnonzero(outside)
            kept = weights[found]
        else:
            use = functions(weights.size)
            for positions in inside:
                use.put(weights, positions, np.zeros(positions.size, weights.dtype))
            found, kept = use.collect(weights, bound)
        parts.append((found.astype(dtype, copy=False) + dtype.type(start), kept))
    indices, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Reserve(indices, values, bound)


def _estimate_bound(reservoir: Reservoir, support: Support, count: int, reach: float) -> float:
    """A magnitude that most likely more than `count` entries outside B reach, from a sample.

    It is as small as `reach`, if about four times as many entries are that large, or fewer.
    """
    dtype = support.indices.dtype
    indices = np.arange(0, reservoir.size, max(1, reservoir.size // _SAMPLE), dtype=dtype)
    sample = np.abs(reservoir.take(indices))
    for run in (support.active, support.exploring):
        if len(run):
            positions = np.minimum(np.searchsorted(run, indices), len(run) - 1)
            sample[run[positions] == indices] = 0
    share = count / reservoir.size
    margin = _SPREAD * math.sqrt(sample.size * share * (1 - share)) + 1
    rank = min(sample.size - 1, int(sample.size * share + margin))
    places = [sample.size - 1 - rank, max(sample.size - 1 - 4 * (rank + 1), 0)]
    sample.partition(places)
    bound, smaller = map(float, sample[places])
    return min(bound, max(smaller, reach))


def _find_ties(
    lists: list[tuple[Vector, Vector]], threshold: _candidates.Threshold, ranks: Ranks
) -> Vector:
    """Ascending indices of the entries at a threshold that rank too low to be chosen; int64."""
    if not threshold.surplus:
        return np.zeros(0, dtype=np.int64)
    equal = np.concatenate(
        [
            indices[np.abs(values) == values.dtype.type(threshold.magnitude)]
            for indices, values in lists
        ]
    )
    lowest = np.argpartition(ranks(equal), threshold.surplus - 1)[: threshold.surplus]
    return np.sort(equal[lowest]).astype(np.int64)
