"""The method of the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from topkast._method import Method, View
from topkast.selection._select import choose_by_magnitude
from topkast.selection._support import Support


@dataclass(frozen=True)
class TopKAST(Method):
    """A and B are the largest magnitudes: the default, ``explore="magnitude"``.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> from topkast.methods import TopKAST, View
    >>> view = View(np.asarray([0.1, -0.9, 0.5, 0.3]), forward=1, backward=2)
    >>> TopKAST().choose(view).indices
    array([1, 2], dtype=int32)

    References
    ----------
    Top-KAST, sections 2.1 and 2.2.
    """

    takes_largest: ClassVar[bool] = True
    by_group: ClassVar[bool] = True

    def choose(self, view: View, /) -> Support:
        """Choose the largest magnitudes; ties are broken by hash."""
        return choose_by_magnitude(view, view.backward)
