"""RigL, and its preset for in-time over-parameterisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from topkast._method import Method, View
from topkast.methods._schedules import check_share, check_updates, drop_count
from topkast.selection._replace import choose_on_host, grow_by_gradient, keep_largest, magnitudes
from topkast.selection._select import choose_at_random
from topkast.selection._support import Support


@dataclass(frozen=True)
class RigL(Method):
    """The smallest weights are dropped, and those with the largest gradients grown: B is A.

    Parameters
    ----------
    until
        Update at which `fraction`, falling along half a cosine, reaches 0: three quarters of the
        training in the paper. None: it is constant.
    fraction
        Share of A that a refresh replaces, rounded down.
    regrow
        Whether weights that are dropped may be grown at once, as in the paper; they keep their
        values then. If not, no more are dropped than there are weights outside A.

    Raises
    ------
    OptionError
        For values out of range.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> from topkast.methods import RigL, View
    >>> weights, gradient = np.asarray([[0.0, 0.3, -0.1, 0.5, 0.0], [2.0, 0.0, 1.0, 0.0, -3.0]])
    >>> support = topkast.Support(np.asarray([1, 2, 3]), 3)
    >>> view = View(
    ...     weights, 3, 3, support=support, values=weights[1:4], gradient=gradient)
    >>> RigL(fraction=0.34).choose(view).indices  # 2 leaves, 4 enters
    array([1, 3, 4], dtype=int32)

    References
    ----------
    Evci et al., "Rigging the lottery: making all tickets winners", 2020. There, the first update of
    the sets comes before the first step, and the optimizer does not step at an update of the sets;
    here it does, so that weights are dropped by their values after the step, and grown by the
    gradient before it.
    """

    until: int | None = None
    fraction: float = 0.3
    regrow: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"sets", "gradient", "random"})
    forgets: ClassVar[bool] = True
    backward: ClassVar[Literal["any", "equal", "none"]] = "equal"
    default_penalty: ClassVar[float] = 0.0
    default_refresh_every: ClassVar[int] = 100

    def __post_init__(self) -> None:
        check_share("fraction", self.fraction)
        check_updates("until", self.until, optional=True)

    def choose(self, view: View, /) -> Support:
        """Draw the first set; then replace a share of it."""
        if view.support is None or view.gradient is None:
            return choose_at_random(view) if view.support is None else view.support
        return choose_on_host(self._replace, view)

    def _replace(self, view: View) -> Support:
        dropped = drop_count(view, view.forward, self.fraction, self.until, regrow=self.regrow)
        if view.support is not None and isinstance(dropped, int) and not dropped:
            return view.support
        kept = keep_largest(view, magnitudes(view.values), view.forward - dropped)
        return self._grow(view, kept)

    def _grow(self, view: View, kept: object) -> Support:
        return grow_by_gradient(view, kept, regrow=self.regrow)


@dataclass(frozen=True)
class ITOP(RigL):
    """:class:`RigL` with few large changes, so that in time every weight has been trained.

    Parameters
    ----------
    until, fraction, regrow
        As for :class:`RigL`. In the paper, `until` is the end of the training, and 0.005 of A are
        replaced then.

    Examples
    --------
    >>> from topkast.methods import ITOP
    >>> ITOP().fraction, ITOP.default_refresh_every
    (0.5, 4000)

    References
    ----------
    Liu et al., "Do we actually need dense over-parameterization? In-time over-parameterization in
    sparse training", 2021.
    """

    fraction: float = 0.5

    default_refresh_every: ClassVar[int] = 4000
