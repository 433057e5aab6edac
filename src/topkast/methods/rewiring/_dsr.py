"""Dynamic sparse reparameterization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from array_api_compat import array_namespace

from topkast._method import Method, View
from topkast._primitives import Array, where
from topkast.methods._schedules import check_share
from topkast.selection._distribution import exact_fraction
from topkast.selection._replace import choose_on_host, grow_at_random, keep_largest, magnitudes
from topkast.selection._select import choose_at_random
from topkast.selection._support import Support


@dataclass(frozen=True)
class DSR(Method):
    """The smallest weights of all tensors are dropped, and tensors that keep many grow many.

    This needs ``distribution="global"``: the number of weights is constant in all, and the share of
    a tensor in those that are grown is its share in those that stay. With another distribution,
    each tensor keeps its number. B is A.

    Parameters
    ----------
    fraction
        Share of A that a refresh replaces, rounded down, and no more than are outside A. In each
        tensor at least one weight stays.

    Raises
    ------
    OptionError
        For a share outside [0, 1].

    Examples
    --------
    >>> import numpy as np, topkast
    >>> from topkast.methods import DSR
    >>> tx = topkast.wrap_optimizer(
    ...     topkast.SGD(0.0), fwd=0.5, bwd=0.5, method=DSR(0.5), refresh_every=1,
    ...     distribution="global")
    >>> params = {"a": np.full((4, 5), 1e-3), "b": np.ones((4, 5))}
    >>> params, state = tx.step(params, tx.init(params), params)
    >>> forward = topkast.masks(state, params)
    >>> before = topkast.masks(tx.init(params), params)
    >>> int(forward["a"].forward.sum()) < int(before["a"].forward.sum())  # few of a are left
    True
    >>> int(forward["a"].forward.sum()) + int(forward["b"].forward.sum())
    20

    References
    ----------
    Mostafa and Wang, "Parameter efficient training of deep convolutional neural networks by dynamic
    sparse reparameterization", 2019. There, a threshold that adapts drops about as many weights as
    wanted, every 1,000 steps at first and less often later, and weights that are dropped may be
    drawn at once; here, it is exactly as many, and others are drawn.
    """

    fraction: float = 0.1

    needs: ClassVar[frozenset[str]] = frozenset({"sets", "random"})
    forgets: ClassVar[bool] = True
    schedules: ClassVar[bool] = True  # of each tensor, in sum constant
    backward: ClassVar[Literal["any", "equal", "none"]] = "equal"
    default_penalty: ClassVar[float] = 0.0
    default_refresh_every: ClassVar[int] = 100

    def __post_init__(self) -> None:
        check_share("fraction", self.fraction)

    def choose(self, view: View, /) -> Support:
        """Draw the first set; then replace a share of it."""
        if view.support is None:
            return choose_at_random(view)
        return choose_on_host(self._replace, view)

    def _replace(self, view: View) -> Support:
        assert view.support is not None
        active, scores = view.support.active, magnitudes(view.values)
        bounds = view.members or {view.name: (0, view.weights.shape[0])}
        outside = view.weights.shape[0] - view.forward
        dropped = min(math.floor(exact_fraction(self.fraction) * view.forward), outside)
        kept = keep_largest(view, scores, view.forward - dropped)
        inside = [(active >= start) & (active < stop) for start, stop in bounds.values()]
        kept = _keep_one_of_each(view, scores, kept, inside)
        xp = array_namespace(active)
        present, stay = (
            [int(xp.count_nonzero(flags & chosen)) for flags in inside]
            for chosen in (xp.ones_like(kept), kept)
        )
        sizes = [stop - start for start, stop in bounds.values()]
        free = [size - count for size, count in zip(sizes, present, strict=True)]
        counts = share_out(view.forward - sum(stay), stay, free)
        return grow_at_random(view, kept, counts=dict(zip(bounds.values(), counts, strict=True)))


def share_out(total: int, weights: list[int], limits: list[int]) -> list[int]:
    """Shares of `total` in proportion to `weights`, whole numbers up to `limits`.

    The largest remainders are rounded up, of equal ones the first. What exceeds a limit is shared
    out among the others, equally if these weigh nothing; what exceeds all limits is left out.

    >>> share_out(7, [3, 3, 1], [9, 1, 9])
    [5, 1, 1]
    """
    shares = [0] * len(weights)
    while True:
        rest = min(total - sum(shares), sum(limits) - sum(shares))
        open_ = [index for index, limit in enumerate(limits) if shares[index] < limit]
        if not rest or not open_:
            return shares
        sum_of_weights = sum(weights[index] for index in open_)
        if not sum_of_weights:  # equal shares, if nothing with a weight is left
            weights, sum_of_weights = [1] * len(weights), len(open_)
        own = {index: rest * weights[index] for index in open_}
        for index in open_:
            shares[index] += min(own[index] // sum_of_weights, limits[index] - shares[index])
        rest = min(total - sum(shares), sum(limits) - sum(shares))
        by_remainder = sorted(open_, key=lambda index: (-(own[index] % sum_of_weights), index))
        for index in by_remainder[:rest]:
            shares[index] += int(shares[index] < limits[index])


def _keep_one_of_each(view: View, scores: Array, kept: Array, inside: list[Array]) -> Array:
    """Also keep the largest unit of each tensor that would lose all."""
    xp = array_namespace(scores)
    # Units of other tensors rank behind: their score is 0, and that of no unit inside.
    scores = xp.clip(scores, xp.finfo(scores.dtype).smallest_normal, None)
    for flags in inside:
        if bool(xp.any(flags)) and not bool(xp.any(kept & flags)):
            kept = kept | keep_largest(view, where(flags, scores, 0.0), 1)
    return kept
