"""Gradual magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from topkast._errors import OptionError
from topkast._method import Method, View
from topkast.methods._schedules import (
    check_share,
    check_updates,
    cubic_count,
    updates_of,
)
from topkast.selection._replace import split_by_magnitude
from topkast.selection._support import Support


@dataclass(frozen=True, kw_only=True)
class GradualPruning(Method):
    """The sparsity rises from `initial` to `fwd`; pruned weights rest, and may return until `end`.

    Parameters
    ----------
    start, end
        Updates between which it rises, as 1 − (1 − progress)³.
    initial
        Sparsity up to `start`.

    Raises
    ------
    OptionError
        For values out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.methods import GradualPruning, View
    >>> weights = np.asarray([0.1, -0.9, 0.5, 0.2, 0.8, 0.3, 0.6, 0.7])
    >>> method = GradualPruning(start=0, end=10)
    >>> [
    ...     method.choose(View(weights, forward=1, backward=8, draw=update)).forward
    ...     for update in (0, 1, 2, 5, 10)
    ... ]
    [8, 7, 5, 2, 1]

    References
    ----------
    Zhu and Gupta, "To prune, or not to prune", 2017.
    """

    start: int
    end: int
    initial: float = 0.0

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "sets"})
    explores: ClassVar[bool] = False
    schedules: ClassVar[bool] = True
    backward: ClassVar[Literal["any", "equal", "none"]] = "none"
    default_penalty: ClassVar[float] = 0.0
    default_refresh_every: ClassVar[int] = 100

    def __post_init__(self) -> None:
        check_updates("start", self.start, least=0)
        check_updates("end", self.end)
        check_share("initial", self.initial)
        if self.start >= self.end:
            raise OptionError(f"start must lie before end, got {self.start} and {self.end}")

    def choose(self, view: View, /) -> Support:
        """Choose the largest magnitudes, as many as the schedule says; keep the last sets."""
        old, update = view.support, updates_of(view, self)
        if old is not None and old.forward == view.forward and update > self.end:
            return old
        count = cubic_count(view, update, self.start, self.end, self.initial)
        return split_by_magnitude(view, count)
