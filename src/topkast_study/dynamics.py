"""The change of the sets in training: figure 3 of the paper."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import topkast

SNAPSHOTS = 32
LAG = 5  # the paper compares points 5,000 of 32,000 steps apart


class Dynamics:
    """Records A after each step, given masks as NumPy arrays."""

    def __init__(self, masks: dict[str, topkast.Masks], steps: int) -> None:
        self._times = sorted({round(steps * k / SNAPSHOTS) for k in range(SNAPSHOTS + 1)})
        self._reservoir = {name: ~mask.backward for name, mask in masks.items()}
        self._ever = {name: np.zeros_like(mask.forward) for name, mask in masks.items()}
        self._snapshots: list[dict[str, NDArray[np.bool_]]] = []
        self._awakened: list[list[float]] = []
        self.record(0, masks)

    def record(self, step: int, masks: dict[str, topkast.Masks]) -> None:
        for name, mask in masks.items():
            self._ever[name] |= mask.forward
        if step in self._times:
            self._snapshots.append({name: mask.forward.copy() for name, mask in masks.items()})
            self._awakened.append(
                [
                    float((self._ever[name] & units).sum() / max(units.sum(), 1))
                    for name, units in self._reservoir.items()
                ]
            )

    def to_dict(self) -> dict[str, Any]:
        """Shares by tensor: of units that change within a lag, of the reservoir ever active."""
        changes = [
            [float(np.mean(old[name] ^ new[name])) for name in old]
            for old, new in zip(self._snapshots, self._snapshots[LAG:], strict=False)
        ]
        return {
            "change_steps": self._times[: len(changes)],
            "change": changes,
            "awakened_steps": self._times,
            "awakened": self._awakened,
        }
