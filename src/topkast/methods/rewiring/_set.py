"""Sparse evolutionary training."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import numpy as np
from array_api_compat import array_namespace

from topkast._errors import OptionError
from topkast._method import Method, View
from topkast._primitives import Array, asarray_like, is_traced, where
from topkast.methods._schedules import check_share, check_updates, drop_count
from topkast.selection._distribution import exact_fraction
from topkast.selection._replace import (
    choose_on_host,
    grow_at_random,
    keep_largest,
    magnitudes,
)
from topkast.selection._select import choose_at_random
from topkast.selection._support import Support


@dataclass(frozen=True)
class SET(Method):
    """The smallest weights are dropped, and as many are drawn uniformly: B is A.

    Parameters
    ----------
    fraction
        Share of A that a refresh replaces, rounded down.
    signed
        Whether the share is taken of the positive weights and of the negative ones separately, as
        in the paper; else of all by magnitude, as most implementations do. Zero counts as positive.
    regrow
        Whether weights that are dropped may be drawn at once; they keep their values then. If not,
        no more are dropped than there are weights outside A.
    until
        Update at which `fraction`, falling along half a cosine, reaches 0; None: it is constant.

    Raises
    ------
    OptionError
        For values out of range.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> from topkast.methods import SET, View
    >>> weights = np.asarray([0.0, 0.3, 0.0, -0.1, 0.5, -0.7, 0.0, 0.0])
    >>> support = topkast.Support(np.asarray([1, 3, 4, 5]), 4)
    >>> view = View(weights, 4, 4, support=support, values=weights[support.indices])
    >>> chosen = SET(fraction=0.5).choose(view)
    >>> {4, 5} < set(chosen.indices.tolist())  # the largest two of four stay
    True

    References
    ----------
    Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
    connectivity", 2018. There, the values of weights that are grown are drawn too, and the sets
    change at the end of each epoch but the last; here, weights that are grown start at zero.
    """

    fraction: float = 0.3
    signed: bool = False
    regrow: bool = True
    until: int | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"sets", "random"})
    forgets: ClassVar[bool] = True
    backward: ClassVar[Literal["any", "equal", "none"]] = "equal"
    default_penalty: ClassVar[float] = 0.0
    default_refresh_every: ClassVar[int] = 100

    def __post_init__(self) -> None:
        check_share("fraction", self.fraction)
        check_updates("until", self.until, optional=True)
        if self.signed and self.until is not None:
            raise OptionError(
                "SET(signed=True) drops a constant share, as the paper does: leave out until, or "
                "drop by magnitude with signed=False"
            )

    def choose(self, view: View, /) -> Support:
        """Draw the first set; then replace a share of it."""
        if view.support is None:
            return choose_at_random(view)
        return choose_on_host(self._replace, view)

    def _replace(self, view: View) -> Support:
        scores, xp = magnitudes(view.values), array_namespace(view.values)
        if self.signed and xp.isdtype(view.values.dtype, "complex floating"):
            raise OptionError(
                f"{view.name} has complex weights, which have no sign: pass signed=False"
            )
        if not self.signed:
            dropped = drop_count(view, view.forward, self.fraction, self.until, regrow=self.regrow)
            kept = keep_largest(view, scores, view.forward - dropped)
            return grow_at_random(view, kept, regrow=self.regrow)
        positive = ~(view.values < 0)
        counts = self._count_staying(view, positive)
        # Units of the other sign rank behind: their score is 0, and that of no others.
        scores = xp.clip(scores, xp.finfo(scores.dtype).smallest_normal, None)
        own = where(positive, scores, 0.0), where(~positive, scores, 0.0)
        kept = keep_largest(view, own[0], counts[0]) | keep_largest(view, own[1], counts[1])
        return grow_at_random(view, kept, regrow=self.regrow)

    def _count_staying(self, view: View, positive: Array) -> Any:
        """Numbers of units that stay: of those that are positive, and of the others."""
        xp = array_namespace(positive)
        number = xp.sum(xp.astype(positive, xp.int32), dtype=xp.int32)
        share, outside = exact_fraction(self.fraction), view.weights.shape[0] - view.forward
        limit = view.forward if self.regrow else outside
        if not is_traced(number):
            return _staying_counts(int(number), view.forward - int(number), share, limit)
        table = [
            _staying_counts(count, view.forward - count, share, limit)
            for count in range(view.forward + 1)
        ]
        return asarray_like(np.asarray(table, dtype=np.int32), number)[number]


def _staying_counts(positive: int, negative: int, share: Fraction, limit: int) -> tuple[int, int]:
    """Numbers of positive and of other units that stay, if at most `limit` are dropped in all."""
    first, second = (size * share.numerator // share.denominator for size in (positive, negative))
    if first + second > limit:
        first = first * limit // (first + second)
        second = limit - first
    return positive - first, negative - second
