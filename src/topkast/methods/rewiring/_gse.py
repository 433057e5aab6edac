"""Guided stochastic exploration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from topkast._errors import OptionError
from topkast._method import View
from topkast.methods.rewiring._rigl import RigL
from topkast.selection._distribution import exact_fraction
from topkast.selection._replace import grow_by_gradient, sample_outside
from topkast.selection._support import Support


@dataclass(frozen=True)
class GSE(RigL):
    r"""The largest gradients of a random sample are grown, in time of order \|A\|: B is A.

    Parameters
    ----------
    until, fraction
        As for :class:`RigL`: `until` is about 0.6 of the training in the paper. Weights that are
        dropped are not in the sample, and no more are dropped than there are weights outside A.
    samples
        Size of the sample, as a multiple of \|A\|.

    Raises
    ------
    OptionError
        For values out of range.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> from topkast.methods import GSE, View
    >>> weights, gradient = np.asarray([[0.0, 0.3, -0.1, 0.5, 0.0], [2.0, 0.0, 1.0, 0.0, -3.0]])
    >>> support = topkast.Support(np.asarray([1, 2, 3]), 3)
    >>> view = View(
    ...     weights, 3, 3, support=support, values=weights[1:4], gradient=gradient)
    >>> GSE(fraction=0.34).choose(view).indices  # of the sample {0, 4}, 4 enters
    array([1, 3, 4], dtype=int32)

    References
    ----------
    Heddes et al., "Always-sparse training by growing connections with guided stochastic
    exploration", 2024: its uniform sample. There, tensors begin at densities by Erdős and Rényi and
    are then ranked as one, every 1,000 steps; the sample is drawn in each tensor with replacement
    and includes weights of A, which do not count; and the gradient is that of ten samples of each
    class.
    """

    fraction: float = 0.2
    regrow: bool = False
    samples: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        samples: Any = self.samples
        if (
            isinstance(samples, bool)
            or not isinstance(samples, Real)
            or not 0 < float(samples) < math.inf
        ):
            raise OptionError(f"samples is a multiple of |A| and must be positive, got {samples!r}")
        if self.regrow:
            raise OptionError(
                "GSE samples from the weights outside A alone: leave regrow out, or choose RigL"
            )
        if samples < self.fraction:
            raise OptionError(
                f"weights are grown out of the sample: samples must be at least fraction="
                f"{self.fraction}, got {samples!r}"
            )

    def _grow(self, view: View, kept: object) -> Support:
        count = math.ceil(exact_fraction(self.samples) * view.forward)
        return grow_by_gradient(view, kept, regrow=False, among=sample_outside(view, count))
