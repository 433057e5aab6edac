"""Top-KAST with random exploration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from topkast._method import Method, View
from topkast.selection._select import choose_by_magnitude
from topkast.selection._support import Support


@dataclass(frozen=True)
class Random(Method):
    """A is chosen by magnitude, B∖A is drawn uniformly from the rest: ``explore="random"``.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> from topkast.methods import Random, View
    >>> support = Random().choose(View(np.asarray([0.1, -0.9, 0.5, 0.3]), forward=1, backward=3))
    >>> support.active
    array([1], dtype=int32)

    References
    ----------
    Top-KAST, table 1: better than by magnitude at 0.9/0.8, worse at 0.95/0.9.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "random"})
    by_group: ClassVar[bool] = True

    def choose(self, view: View, /) -> Support:
        """Choose A by magnitude and draw B∖A."""
        return choose_by_magnitude(view, view.forward)
