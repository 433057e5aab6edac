"""Sparse evolutionary training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

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
        Whether weights that are dropped may be drawn at once.
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
    connectivity", 2018. There, weights that are grown are drawn too; here, they start at zero.
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
            count = view.forward - drop_count(view, view.forward, self.fraction, self.until)
            return grow_at_random(view, keep_largest(view, scores, count), regrow=self.regrow)
        positive = ~(view.values < 0)
        kept = self._keep_of(view, scores, positive) | self._keep_of(view, scores, ~positive)
        return grow_at_random(view, kept, regrow=self.regrow)

    def _keep_of(self, view: View, scores: Array, flags: Array) -> Array:
        """Flags of the units that stay, of those with one sign."""
        xp = array_namespace(scores)
        size = xp.sum(xp.astype(flags, xp.int32), dtype=xp.int32)
        share = exact_fraction(self.fraction)
        if is_traced(size):
            counts = [n - math.floor(share * n) for n in range(view.forward + 1)]
            count = asarray_like(np.asarray(counts, dtype=np.int32), size)[size]
        else:
            count = int(size) - math.floor(share * int(size))
        # Units of the other sign rank behind: their score is 0, and that of no others.
        smallest = xp.finfo(scores.dtype).smallest_normal
        own = where(flags, xp.clip(scores, smallest, None), 0.0)
        return keep_largest(view, own, count)
