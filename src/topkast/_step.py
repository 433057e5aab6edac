"""The decisions of one update of one tensor, shared by every training loop.

The functional loop, masked and sparse execution in PyTorch and the kernels for CuPy store weights
and gradients differently. They share these rules: the penalty's gradient, whether B∖A moves, the
scaling of young entries, and when sets are refreshed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

from topkast._age import Betas
from topkast._exploration import exploration_gradient
from topkast._options import Options, PenaltyKind
from topkast._primitives import Array, is_traced
from topkast.selection._random import Key, make_key, random_normals
from topkast.selection._support import Support, restrict_to_active

_MAX_COUNT = (1 << 31) - 1  # updates: they are counted in int32


@dataclass(frozen=True)
class Step:
    r"""One update of one tensor.

    Attributes
    ----------
    penalty
        The coefficient λ of the exploration penalty, negated for a rule that ascends, so that it
        shrinks weights in both cases.
    penalty_kind
        ``"l2"`` or ``"l1"``.
    density
        The forward density D: on B∖A the coefficient is λ / D.
    exploring
        Whether B∖A moves; a 0-d flag in a traced computation.
    betas
        The factors of a rule of the Adam family, which scale the displacement of young entries.
    power
        The exponent α of Powerpropagation: the inner rule updates φ, and the weight is
        φ · \|φ\|^(α − 1).
    noise
        Standard deviation of the noise that is added to the gradient on B.
    key, draw
        They decide the noise: the key of the tensor, and the number of updates so far.
    """

    penalty: float
    penalty_kind: PenaltyKind
    density: float
    exploring: Any
    betas: Betas | None = None
    power: float = 1.0
    noise: float = 0.0
    key: Key = (0, 0, 0, 0)
    draw: Any = 0

    @property
    def on_active(self) -> float:
        """The penalty's coefficient on A."""
        return float(self.penalty)

    @property
    def on_exploring(self) -> float:
        """The penalty's coefficient on B∖A."""
        return float(self.penalty) / self.density

    def add_penalty(self, gradient: Array, values: Array, support: Support) -> Array:
        r"""Add the penalty's gradient to a gradient (1, …, \|B\|), and zero it on a resting B∖A."""
        if self.penalty:  # without a penalty, the gradient keeps its dtype and its bits
            gradient = gradient + exploration_gradient(
                values,
                support,
                penalty=self.penalty,
                density=self.density,
                penalty_kind=self.penalty_kind,
            )
        if self.noise:
            noise = self.noise_on(support.entries, gradient.dtype)
            gradient = gradient + array_namespace(noise).reshape(noise, gradient.shape)
        return restrict_to_active(gradient, support, self.exploring, 0.0)

    def noise_on(self, entries: Array, dtype: Any) -> Array:
        """The noise (k,) of this step at flat indices (k,)."""
        xp = array_namespace(entries)
        precise = dtype if xp.finfo(dtype).bits >= 32 else xp.float32
        normals = random_normals(entries, self.key, self.draw, precise)
        return xp.astype(self.noise * normals, dtype)

    def to_base(self, weights: Array) -> Array:
        """φ of weights of any shape."""
        xp = array_namespace(weights)
        return xp.sign(weights) * xp.abs(weights) ** (1 / self.power)

    def to_weights(self, base: Array, old_base: Array, old_weights: Array) -> Array:
        """The weights of φ; where φ did not change, they keep their bits."""
        xp = array_namespace(base)
        weights = xp.sign(base) * xp.abs(base) ** self.power
        return xp.where(base == old_base, old_weights, weights)

    def chain(self, gradient: Array, base: Array) -> Array:
        """The gradient of φ, from that of the weights."""
        xp = array_namespace(base)
        return gradient * (self.power * xp.abs(base) ** (self.power - 1))

    def restrict(self, displacement: Array, support: Support) -> Array:
        r"""Set a displacement (1, …, \|B\|) to -0.0, which changes no bit, on a resting B∖A."""
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
    power: float = 1.0,
    noise: float = 0.0,
    key: Key = (0, 0, 0, 0),
) -> Step:
    """Decide the next update of a tensor from its options and the number of updates so far.

    Parameters
    ----------
    penalty, penalty_kind, explore_until
        The options ``penalty``, ``penalty_kind`` and ``explore_until`` of
        :func:`topkast.wrap_optimizer`.
    density
        The forward density D.
    ascends
        Whether the inner rule moves along the gradient instead of against it.
    updates
        Number of updates so far: an int, or a 0-d integer array.
    betas
        The factors of a rule of the Adam family.
    power
        The option ``power``.
    noise, key
        Standard deviation and key of the noise that is added to the gradient.

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
    signed_penalty = -penalty if ascends else penalty
    exploring = is_exploring(explore_until, updates)
    return Step(signed_penalty, penalty_kind, density, exploring, betas, power, noise, key, updates)


def noise_key(options: Options, name: str) -> Key:
    """The key of the noise on a tensor."""
    return make_key(options.seed, name, "noise")


def is_exploring(until: int | None, updates: Any) -> Any:
    """Whether the update that follows `updates` others still moves B∖A."""
    if until is None:
        return True
    exploring = updates < min(until, _MAX_COUNT)
    return exploring if is_traced(exploring) else bool(exploring)


def is_due(refresh_every: int, updates: Any) -> Any:
    """Whether a refresh follows after `updates` updates; a 0-d flag if that is traced."""
    return updates % min(refresh_every, _MAX_COUNT) == 0
