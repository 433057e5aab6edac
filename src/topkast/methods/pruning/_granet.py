"""GraNet: gradual pruning with regrowth by gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from array_api_compat import array_namespace

from topkast._method import View
from topkast._primitives import Array
from topkast.methods._schedules import (
    check_share,
    check_updates,
    cubic_count,
    drop_count,
    updates_of,
)
from topkast.methods.pruning._gradual import GradualPruning
from topkast.selection._replace import (
    choose_on_host,
    grow_by_gradient,
    keep_largest,
    magnitudes,
    split_all,
    split_by_magnitude,
)
from topkast.selection._support import Support


@dataclass(frozen=True, kw_only=True)
class GraNet(GradualPruning):
    """Gradual pruning; each refresh also replaces a share of A, as :class:`RigL` does.

    Weights outside A are zero and rest. With ``distribution="global"``, all tensors are pruned as
    one, and a share is replaced in each, as in the paper.

    Parameters
    ----------
    start, end, initial
        As for :class:`GradualPruning`. The first set is the largest magnitudes, and does not change
        before `start`.
    fraction
        Share of A that a refresh replaces, rounded down; it falls to 0 at `until` along half a
        cosine.
    until
        Update from which nothing is replaced: the end of the training in the paper. None:
        `fraction` is constant.

    Raises
    ------
    OptionError
        For values out of range.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> from topkast.methods import GraNet, View
    >>> weights, gradient = np.asarray([[0.9, 0.3, -0.1, 0.5], [0.0, 0.0, 2.0, 1.0]])
    >>> support = topkast.Support(np.arange(4), 4)
    >>> view = View(weights, 2, 4, draw=9, support=support, values=weights, gradient=gradient)
    >>> GraNet(start=0, end=9, fraction=0.5).choose(view).active  # of 0 and 3, 3 is replaced
    array([0, 2], dtype=int32)

    References
    ----------
    Liu et al., "Sparse training via boosting pruning plasticity with neuroregeneration", 2021. Its
    code draws the first set at random, if that is not all weights. A weight that is pruned and
    grown at the same refresh starts at zero there; here, it keeps its value.
    """

    initial: float = 0.5
    fraction: float = 0.5
    until: int | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "sets", "gradient"})
    forgets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("fraction", self.fraction)
        check_updates("until", self.until, optional=True)

    def choose(self, view: View, /) -> Support:
        """Prune to the present count, then replace a share."""
        update = updates_of(view, self)
        if view.support is not None and update < self.start:
            return view.support
        count = cubic_count(view, update, self.start, self.end, self.initial)
        if view.support is None:
            return split_by_magnitude(view, count)
        return choose_on_host(lambda view: self._replace(view, count), view)

    def _replace(self, view: View, count: int) -> Support:
        support = view.support
        assert support is not None
        count = min(count, support.forward)
        values = view.values[: support.forward]
        kept = keep_largest(view, magnitudes(values), count)
        active, values = support.active[kept], values[kept]
        if view.gradient is not None:
            bounds = view.members.values() or [(0, view.weights.shape[0])]
            parts = [self._regrow(view, active, values, *bound) for bound in bounds]
            active = array_namespace(active).concat(parts)
        return split_all(view, active)

    def _regrow(self, view: View, active: Array, values: Array, start: int, stop: int) -> Array:
        """Replace a share of the units of A in a range of indices; return their new indices."""
        inside = (active >= start) & (active < stop)
        active, values = active[inside] - start, values[inside]
        count = active.shape[0]
        if not count:
            return active
        gradient = view.gradient
        if (start, stop) != (0, view.weights.shape[0]):
            gradient = gradient[start:stop]
        own = replace(
            view,
            weights=view.weights[start:stop],
            forward=count,
            first=view.first + start,
            support=Support(active, count),
            values=values,
            gradient=gradient,
        )
        dropped = drop_count(own, count, self.fraction, self.until)
        kept = keep_largest(own, magnitudes(values), count - dropped)
        return grow_by_gradient(own, kept, regrow=True).indices + start
