"""What one update does to one tensor: decided here, executed by every loop alike.

The functional loop, masked and sparse execution in PyTorch and the kernels for CuPy differ in where
weights and gradients are. What is added to a gradient, what of B moves, how young entries move
and when sets are chosen anew is the same in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from topkast._age import Betas
from topkast._exploration import exploration_gradient
from topkast._options import PenaltyKind
from topkast._primitives import Array, is_traced
from topkast.selection._support import Support, restrict_to_active

_MOST = (1 << 31) - 1  # updates that can be counted: counts are int32


@dataclass(frozen=True)
class Step:
    r"""One update of one tensor.

    Attributes
    ----------
    penalty
        The coefficient λ of the exploration penalty; negative for a rule that ascends, which what
        is added would drive away from zero.
    penalty_kind
        ``"l2"`` or ``"l1"``.
    density
        The forward density D: on B∖A the coefficient is λ / D.
    exploring
        Whether B∖A moves; in a traced computation a 0-d flag.
    betas
        Of a rule of the Adam family: by them the displacement of young entries is scaled.
    """

    penalty: float
    penalty_kind: PenaltyKind
    density: float
    exploring: Any
    betas: Betas | None = None

    @property
    def on_active(self) -> float:
        """The penalty's coefficient on A."""
        return float(self.penalty)

    @property
    def on_exploring(self) -> float:
        """The penalty's coefficient on B∖A."""
        return float(self.penalty) / self.density

    def add_penalty(self, gradient: Array, values: Array, support: Support) -> Array:
        r"""What the inner rule sees: a gradient (1, …, \|B\|) with that of the penalty."""
        if self.penalty:  # where there is none, a gradient keeps its dtype and its bits
            gradient = gradient + exploration_gradient(
                values,
                support,
                penalty=self.penalty,
                density=self.density,
                penalty_kind=self.penalty_kind,
            )
        return restrict_to_active(gradient, support, self.exploring, 0.0)

    def restrict(self, displacement: Array, support: Support) -> Array:
        r"""A displacement (1, …, \|B\|), -0.0 on B∖A where that rests: it changes no bit."""
        return restrict_to_active(displacement, support, self.exploring, -0.0)


def decide(
    *,
    penalty: float,
    penalty_kind: PenaltyKind,
    density: float,
    ascends: bool,
    explore_until: int | None,
    updates: Any,
    betas: Betas | None = None,
) -> Step:
    """The step after some number of updates, under the options of a tensor.

    Parameters
    ----------
    penalty, penalty_kind, explore_until
        The options ``penalty``, ``penalty_kind`` and ``explore_until`` of
        :func:`topkast.wrap_optimizer`.
    density
        The forward density D.
    ascends
        Whether the inner rule follows the gradient uphill.
    updates
        Number of updates so far: an int, or a 0-d integer array.
    betas
        Of a rule of the Adam family.

    Examples
    --------
    >>> from topkast.adapter import decide
    >>> step = decide(
    ...     penalty=0.1, penalty_kind="l2", density=0.25, ascends=False, explore_until=5, updates=5)
    >>> step.on_active, step.on_exploring, step.exploring
    (0.1, 0.4, False)

    References
    ----------
    Top-KAST, section 2.3 for the penalty, table 1 for exploration that stops.
    """
    signed = -penalty if ascends else penalty
    return Step(signed, penalty_kind, density, explores(explore_until, updates), betas)


def explores(until: int | None, updates: Any) -> Any:
    """Whether the next update, after some number of them, still moves B∖A."""
    if until is None:
        return True
    exploring = updates < min(until, _MOST)
    return exploring if is_traced(exploring) else bool(exploring)


def is_due(refresh_every: int, updates: Any) -> Any:
    """Whether sets are chosen anew after a number of updates; where traced, a 0-d flag."""
    return updates % min(refresh_every, _MOST) == 0
