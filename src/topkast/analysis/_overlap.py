"""The overlap of the sets of two networks, and what chance alone would give."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from topkast.analysis._sets import (
    ByTensor,
    Sets,
    check_not_empty,
    check_same_tensors,
    count,
    read_sets,
    shapes_of,
    share,
)


class Overlap(NamedTuple):
    r"""The overlap of two sets A and A' of a tensor, as shares from 0 to 1.

    Attributes
    ----------
    iou
        Intersection over union, \|A∩A'\| / \|A∪A'\|.
    common
        Share of A that is in A' too, \|A∩A'\| / \|A\|.
    chance_iou
        The intersection over union where the intersection has its expected size.
    chance_common
        Expected share in common if A' were drawn uniformly: the density of A'.
    """

    iou: float
    common: float
    chance_iou: float
    chance_common: float


class OverlapCounts(NamedTuple):
    """What an overlap is computed from."""

    first: int
    second: int
    common: int
    expected: float  # size of the intersection of independent sets

    def to_overlap(self) -> Overlap:
        both = self.first + self.second
        return Overlap(
            share(self.common, both - self.common),
            share(self.common, self.first),
            share(self.expected, both - self.expected),
            share(self.expected, self.first),
        )


def overlap(first: Any, second: Any, /, params: Any = None) -> ByTensor[Overlap]:
    r"""Compare the A of two networks of one architecture, such as runs with different seeds.

    Hidden units have no order, so two networks can use the same weights at different places:
    :func:`match_units` compares them after matching their units.

    Parameters
    ----------
    first, second
        Sets of the same tensors; see :mod:`topkast.analysis`.
    params
        The weights, needed with functional states and with supports.

    Returns
    -------
    ByTensor of Overlap
        By tensor and in all, with the values that chance gives at these densities: two independent
        uniform sets have :math:`|A| |A'| / n` weights in common on average. The total takes the
        sizes of A in each tensor as they are. A share of an empty set is NaN.

    Raises
    ------
    MismatchError
        If tensors or shapes differ, if the masks are not boolean, or if an A is empty everywhere.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.analysis import overlap
    >>> first = np.asarray([[True, True, False, False], [False, False, False, False]])
    >>> second = np.asarray([[False, True, True, False], [False, False, False, False]])
    >>> result = overlap(first, second).total
    >>> result.common, result.chance_common  # half of A in common; by chance a quarter
    (0.5, 0.25)
    >>> round(result.iou, 3), round(result.chance_iou, 3)
    (0.333, 0.143)
    """
    one, other = read_pair(first, second, params)
    return overlap_of(one, other)


def read_pair(first: Any, second: Any, params: Any) -> tuple[Sets, Sets]:
    """Read the sets of two networks of one architecture."""
    one = read_sets(first, params, what="the first sets")
    other = read_sets(second, params, what="the second sets")
    check_same_tensors(shapes_of(one), other, names=("the first sets", "the second sets"))
    check_not_empty(one, "the first sets")
    check_not_empty(other, "the second sets")
    return one, other


def overlap_of(first: Sets, second: Sets) -> ByTensor[Overlap]:
    """Compare sets of the same tensors."""
    counts = {}
    for name, one in first.items():
        other = second[name]
        sizes = count(one.forward), count(other.forward)
        counts[name] = OverlapCounts(
            *sizes,
            count(one.forward & other.forward),
            math.prod(sizes) / one.size if one.size else 0.0,
        )
    return ByTensor(
        {name: counts.to_overlap() for name, counts in counts.items()},
        _sum(counts.values()).to_overlap(),
    )


def _sum(counts: Iterable[OverlapCounts]) -> OverlapCounts:
    return OverlapCounts(*map(sum, zip(*counts, strict=True)))
