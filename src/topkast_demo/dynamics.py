"""The change of masks in training: figure 3 of the paper."""

from __future__ import annotations

from dataclasses import dataclass, field

import topkast


@dataclass
class Shares:
    """Shares by tensor over time: the mean over all weights, the minimum and the maximum."""

    step: list[int] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    min: list[float] = field(default_factory=list)
    max: list[float] = field(default_factory=list)

    def add(self, step: int, counts: list[int], sizes: list[int]) -> None:
        """Add the shares ``counts / sizes`` of the tensors at a step."""
        if not sizes:
            return
        shares = [count / size for count, size in zip(counts, sizes, strict=True)]
        self.step.append(step)
        self.mean.append(sum(counts) / sum(sizes))
        self.min.append(min(shares))
        self.max.append(max(shares))


class MaskDynamics:
    """Tracks the forward sets from refresh to refresh, given masks as NumPy arrays.

    Attributes
    ----------
    change
        Share of A that entered at a refresh, by tensor. (Figure 3a has shares of all weights.)
    awakened
        Share of the initial reservoir, the units outside B, that was ever in A (figure 3b).
    """

    def __init__(self, masks: dict[str, topkast.Masks]) -> None:
        self._forward = {name: mask.forward for name, mask in masks.items()}
        asleep = {name: ~mask.backward for name, mask in masks.items()}
        # With bwd = 0 there is no reservoir.
        self._asleep = {name: units for name, units in asleep.items() if units.any()}
        self._reservoirs = [int(units.sum()) for units in self._asleep.values()]
        self.change = Shares()
        self.awakened = Shares()

    def record(self, step: int, masks: dict[str, topkast.Masks]) -> None:
        """Compare the masks with those of the last call."""
        forward = {name: mask.forward for name, mask in masks.items()}
        changes = [int((forward[name] & ~old).sum()) for name, old in self._forward.items()]
        self.change.add(step, changes, [int(mask.sum()) for mask in forward.values()])
        self._forward = forward
        for name, units in self._asleep.items():
            self._asleep[name] = units & ~forward[name]
        asleep = [int(units.sum()) for units in self._asleep.values()]
        awakened = [before - now for before, now in zip(self._reservoirs, asleep, strict=True)]
        self.awakened.add(step, awakened, self._reservoirs)
