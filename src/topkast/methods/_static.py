"""Sets that never change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from topkast._method import Method, View
from topkast.selection._select import choose_at_random
from topkast.selection._support import Support


@dataclass(frozen=True)
class Static(Method):
    """A and B are drawn uniformly once, at the start: the baseline for every other method.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> from topkast.methods import Static
    >>> tx = topkast.wrap_optimizer(
    ...     topkast.SGD(0.1), fwd=0.9, bwd=0.9, refresh_every=1, method=Static())
    >>> params = {"w": np.linspace(-1, 1, 40).reshape(8, 5)}
    >>> start = state = tx.init(params)
    >>> for _ in range(3):
    ...     params, state = tx.step({"w": np.ones((8, 5))}, state, params)
    >>> np.array_equal(start.supports["w"].indices, state.supports["w"].indices)
    True
    """

    needs: ClassVar[frozenset[str]] = frozenset({"random"})
    by_group: ClassVar[bool] = True
    refreshes: ClassVar[bool] = False
    forgets: ClassVar[bool] = True

    def choose(self, view: View, /) -> Support:
        """Draw both sets uniformly."""
        return choose_at_random(view)
