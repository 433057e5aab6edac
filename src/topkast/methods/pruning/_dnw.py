"""Discovering neural wirings, and iterative hard thresholding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from topkast._method import View
from topkast.methods._schedules import (
    check_share,
    check_updates,
    linear_count,
    updates_of,
)
from topkast.methods._topkast import TopKAST
from topkast.selection._replace import split_by_magnitude
from topkast.selection._support import Support


@dataclass(frozen=True)
class DNW(TopKAST):
    """A is the largest magnitudes after each step, and all weights get the gradient.

    It is :class:`TopKAST` with ``bwd=0``, without a penalty.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.methods import DNW, View
    >>> DNW().choose(View(np.asarray([0.1, -0.9, 0.5]), forward=1, backward=3)).active
    array([1], dtype=int32)

    References
    ----------
    Wortsman et al., "Discovering neural wirings", 2019.
    """

    takes_largest: ClassVar[bool] = True
    backward: ClassVar[Literal["any", "equal", "none"]] = "none"
    default_penalty: ClassVar[float] = 0.0


@dataclass(frozen=True)
class IHT(DNW):
    """After each step, all but the largest magnitudes are set to zero; all weights get a gradient.

    Parameters
    ----------
    end
        Update at which the sparsity, annealed from `initial`, has reached `fwd`: half of the
        training in the paper. 0: from the start.
    initial
        Sparsity at the start.

    Raises
    ------
    OptionError
        For values out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.methods import IHT, View
    >>> view = View(np.asarray([0.1, -0.9, 0.5, 0.2]), forward=1, backward=4, draw=1)
    >>> IHT(end=2).choose(view).active  # halfway from four weights to one
    array([1, 2], dtype=int32)

    References
    ----------
    Gao et al., "Weight-sparse transformers have interpretable circuits", 2025: the number of
    weights falls linearly. There, it begins to fall after 1 % of the training, and four weights of
    each neuron always stay: here, none is guarded. Biases are sparse there too: ``dense=False``.
    """

    end: int = 0
    initial: float = 0.0

    takes_largest: ClassVar[bool] = False
    forgets: ClassVar[bool] = True
    schedules: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_updates("end", self.end, least=0)
        check_share("initial", self.initial)

    def choose(self, view: View, /) -> Support:
        """Choose the largest magnitudes, as many as the schedule says."""
        count = linear_count(view, updates_of(view, self), self.end, self.initial)
        return split_by_magnitude(view, count)
