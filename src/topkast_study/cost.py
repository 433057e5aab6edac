"""Floating-point operations of training, by RigL's convention."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from topkast.methods import GSE, Method


@dataclass
class Flops:
    r"""Adds up the operations of training steps, as a multiple of those of dense training.

    A product with a layer's weights takes two operations for each weight. The forward pass and the
    gradient of the activations take as many for each weight in A, the gradient of the weights
    for each weight whose gradient the method reads: B, A if B∖A is not trained, or all at a refresh
    by gradients. The last layer is dense in all. Biases, activations, attention's
    products of activations, the optimizer and the choice of the sets are not counted.

    Parameters
    ----------
    weights, dense
        Numbers of weights in sparse layers and in dense ones.
    """

    weights: int
    dense: int
    _total: float = field(default=0.0, init=False)

    def add(self, forward: int, gradient: int) -> None:
        """Add a step, by the number of weights in A and of gradients, in sparse layers."""
        self._total += 2 * (forward + self.dense) + gradient + self.dense

    def per_step(self, steps: int) -> float:
        """The sum, as a multiple of that of `steps` dense steps."""
        return self._total / (3 * (self.weights + self.dense) * steps)


def gradient_count(
    method: Method | None,
    forward: int,
    backward: int,
    weights: int,
    *,
    refreshes: bool,
    explores: bool,
) -> int:
    """The number of weights whose gradient a step needs: of a step before a refresh, or another."""
    if method is None:
        return weights
    if refreshes and "gradient" in method.needs:
        if isinstance(method, GSE):
            return min(weights, forward + math.ceil(method.samples * forward))
        return weights
    return backward if method.explores and explores else forward
