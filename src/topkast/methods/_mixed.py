"""A mixture of Top-KAST and its random variant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from topkast._method import Method, View
from topkast.methods._schedules import check_share
from topkast.selection._distribution import exact_fraction
from topkast.selection._select import choose_by_magnitude
from topkast.selection._support import Support


@dataclass(frozen=True)
class Mixed(Method):
    """A and a share of B∖A are chosen by magnitude; the rest of B∖A is drawn uniformly.

    The share is `by_magnitude`, and its number of entries is rounded down. 1 is
    :class:`TopKAST`, 0 is :class:`Random`.

    Raises :class:`topkast.OptionError` for a share outside [0, 1].

    Examples
    --------
    >>> import numpy as np, topkast
    >>> from topkast.methods import Mixed, View
    >>> weights = np.asarray([0.1, -0.9, 0.5, 0.3, 0.2, 0.4])
    >>> support = Mixed(by_magnitude=0.5).choose(View(weights, forward=1, backward=3))
    >>> {1, 2} < set(support.indices.tolist())  # the third is drawn
    True
    """

    by_magnitude: float = 0.5

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "random"})
    by_group: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("by_magnitude", self.by_magnitude)

    def choose(self, view: View, /) -> Support:
        """Choose A and the share of B∖A by magnitude."""
        share = exact_fraction(self.by_magnitude)
        exploring = math.floor(share * (view.backward - view.forward))
        return choose_by_magnitude(view, view.forward + exploring)
