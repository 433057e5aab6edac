"""How the masks move while training: figure 3 of the paper."""

from __future__ import annotations

from dataclasses import dataclass, field

import topkast


@dataclass
class Spread:
    """A share per tensor, over time: the mean over all weights, the least and the most."""

    step: list[int] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    least: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)

    def add(self, step: int, counts: list[int], sizes: list[int]) -> None:
        if not sizes:
            return
        shares = [count / size for count, size in zip(counts, sizes, strict=True)]
        self.step.append(step)
        self.mean.append(sum(counts) / sum(sizes))
        self.least.append(min(shares))
        self.most.append(max(shares))


class MaskDynamics:
    """Follows the forward sets from refresh to refresh, by masks that are NumPy arrays.

    Attributes
    ----------
    change
        Share of A that a refresh brought in, by tensor (figure 3a).
    awakened
        Share of the initial reservoir, the units in neither A nor B, that was ever in A (3b).
    """

    def __init__(self, masks: dict[str, topkast.Masks]) -> None:
        self._forward = {name: mask.forward for name, mask in masks.items()}
        asleep = {name: ~mask.backward for name, mask in masks.items()}
        # Where bwd is 0 there is no reservoir.
        self._asleep = {name: units for name, units in asleep.items() if units.any()}
        self._reservoirs = [int(units.sum()) for units in self._asleep.values()]
        self.change = Spread()
        self.awakened = Spread()

    def record(self, step: int, masks: dict[str, topkast.Masks]) -> None:
        """Compare the sets with those of the last call."""
        forward = {name: mask.forward for name, mask in masks.items()}
        changes = [int((forward[name] & ~old).sum()) for name, old in self._forward.items()]
        self.change.add(step, changes, [int(mask.sum()) for mask in forward.values()])
        self._forward = forward
        for name, units in self._asleep.items():
            self._asleep[name] = units & ~forward[name]
        still = [int(units.sum()) for units in self._asleep.values()]
        woken = [before - now for before, now in zip(self._reservoirs, still, strict=True)]
        self.awakened.add(step, woken, self._reservoirs)
