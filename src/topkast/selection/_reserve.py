"""The next sets from few candidates: the entries of B, and a reserve of the largest ones outside.

Weights outside B do not change between refreshes. The next B therefore consists of entries of the
present B and of entries outside that are large enough. The reserve holds all of these down to a
bound: every other entry is smaller. If the smallest magnitude of the next B reaches the bound, the
next B is exact, and only candidates were read. Otherwise the reserve is filled again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from topkast._errors import NonFiniteError
from topkast.backends import _candidates
from topkast.backends._compiled import functions
from topkast.selection._random import Ranks
from topkast.selection._support import Migration, Support

Vector = np.ndarray[Any, Any]

_SAMPLE = 1 << 15  # entries
_SPREAD = 4.0  # standard deviations of a sampled quantile, by which the bound is lowered
_MIN_RESERVE = 1 << 10  # entries
_FIRST_SHARE, _MAX_SHARE = 1 / 8, 1 / 2  # of |B|
_LIFETIME = 8  # refreshes that a reserve should last


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
    """

    support: Support
    migration: Migration
    values: Vector
    reserve: Reserve
    left: tuple[Vector, Vector]


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
    """

    reserve: Reserve | None = None
    share: float = _FIRST_SHARE
    age: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the reserve."""
        return 0 if self.reserve is None else self.reserve.nbytes

    def choose(
        self, support: Support, values: Vector, theta: Vector, ranks: Ranks
    ) -> tuple[Exchange, IncrementalSelection] | None:
        r"""Choose the next sets, of the same sizes; also return the selection that follows.

        Parameters
        ----------
        support
            The present sets, of single weights, whose indices are a NumPy array of int32.
        values
            Weights on B (\|B\|,), contiguous, float32 or float64.
        theta
            All weights (n,), contiguous; entries on B may be overwritten.
        ranks
            Ranks of equal magnitudes.

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
        >>> theta = np.asarray([0.1, 0.9, 0.5, 0.3, 0.0, 0.4])
        >>> support = topkast.select(theta, fwd=0.8, bwd=0.5)
        >>> values = np.asarray([0.9, 0.5, 0.2])
        >>> by_position = lambda indices: indices  # ranks equal magnitudes
        >>> chosen, following = IncrementalSelection().choose(support, values, theta, by_position)
        >>> chosen.support.indices, chosen.left
        (array([1, 2, 3], dtype=int32), (array([5], dtype=int32), array([0.2])))
        """
        if self.reserve is not None:
            outcome = exchange(support, values, self.reserve, theta.size, ranks)
            if outcome is not None:
                return outcome, replace(self, reserve=outcome.reserve, age=self.age + 1)
        grows = self.reserve is not None and self.age < _LIFETIME
        share = min(2 * self.share, _MAX_SHARE) if grows else self.share
        count = max(_MIN_RESERVE, int(share * support.backward))
        while True:
            reserve = fill_reserve(theta, support, count)
            if reserve is None:
                return None
            outcome = exchange(support, values, reserve, theta.size, ranks)
            if outcome is not None:
                return outcome, IncrementalSelection(outcome.reserve, share)
            count *= 2


def exchange(
    support: Support, values: Vector, reserve: Reserve, size: int, ranks: Ranks
) -> Exchange | None:
    """Choose the next sets, of the same sizes, among the entries of B and the reserve.

    Returns None if an entry outside both could belong to the next B. Parameters and errors are
    those of :meth:`IncrementalSelection.choose`; `size` is the number of entries of the tensor.
    """
    use = functions(values.size + reserve.values.size)
    split = support.forward
    lists = [
        (support.indices[:split], values[:split]),
        (support.indices[split:], values[split:]),
        (reserve.indices, reserve.values),
    ]
    vectors = [vector for _, vector in lists]
    counts = support.forward, support.backward
    (forward, backward), not_finite = use.find_thresholds(vectors, counts)
    if not_finite:
        raise NonFiniteError(f"{not_finite} of {size} entries are NaN or infinite")
    if backward.magnitude < reserve.bound:
        return None
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
    inside, outside = sum(division.sizes[:2]), sum(division.sizes[:3])
    source = division.source[:inside]
    survives = source >= 0
    left = np.flatnonzero(division.source[inside:] >= 0) + inside
    return Exchange(
        Support(division.indices[:inside], support.forward),
        Migration(np.maximum(source, 0, out=source), survives),
        division.values[:inside],
        Reserve(
            division.indices[inside:outside].copy(),
            division.values[inside:outside].copy(),
            reserve.bound,
        ),
        (division.indices[left], division.values[left]),
    )


def fill_reserve(theta: Vector, support: Support, count: int) -> Reserve | None:
    """Collect about the `count` largest entries outside B, and all that are as large.

    Entries of `theta` (n,) on B are overwritten with zeros. Returns None if entries of magnitude
    zero would be among them, unless all entries outside B are.
    """
    use = functions(theta.size)
    if count >= theta.size - support.backward:
        outside = np.ones(theta.size, dtype=np.bool_)
        outside[support.indices] = False
        indices = np.flatnonzero(outside).astype(support.indices.dtype)
        return Reserve(indices, theta[indices], 0.0)
    for indices in (support.active, support.exploring):
        use.put(theta, indices, np.zeros(indices.size, theta.dtype))
    sample = np.abs(theta[:: max(1, theta.size // _SAMPLE)])
    share = count / theta.size
    margin = _SPREAD * math.sqrt(sample.size * share * (1 - share)) + 1
    rank = min(sample.size - 1, int(sample.size * share + margin))
    position = sample.size - 1 - rank
    bound = float(np.partition(sample, position)[position])
    if not bound:
        return None
    indices, values = use.collect(theta, bound)
    return Reserve(indices, values, bound)


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
