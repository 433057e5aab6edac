"""A run: the training of one network, a pure function of its settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from topkast._options import PenaltyKind


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that the result of one training depends on, its times excepted."""

    task: str  # "images" or "text"
    data: str  # name of the data, and a digest if they come from a file
    widths: tuple[int, ...]  # of the hidden layers; of text, the transformer's width
    batch: int
    steps: int
    multiple: int = 1  # `steps` is this multiple of the study's usual number
    lr: float
    method: str  # a key of METHODS
    fwd: float = 0.0
    bwd: float = 0.0
    refresh_every: int = 1
    penalty: float | None = None  # None: the method's default
    penalty_kind: PenaltyKind = "l2"
    ratio: float | None = None  # weight of the penalty on B∖A, that on A being 1; None: 1 / D
    explore_until: int | None = None
    by_magnitude: float = 0.5  # for the method "mixed"
    block: tuple[int, int] | None = None
    age: bool = True
    dynamics: bool = False  # whether the sets are recorded
    seed: int = 0

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits that depend on all settings."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """The settings, as they are after a round trip through JSON."""
        settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return settings

    def with_seed(self, seed: int) -> Run:
        return dataclasses.replace(self, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The measurements of one run."""

    curve_steps: list[int]
    curve: list[float]  # the metric at these steps
    loss: float  # training loss of the last step, in nats
    tensors: dict[str, list[int]]  # weights, |A| and |B| at the end of each sparse tensor
    flops: float  # of training, as a multiple of those of dense training for the usual steps
    mask_change: float  # share of A that enters at a refresh: mean over the evaluations
    dynamics: dict[str, Any] | None
    # Processor time of all training steps, estimated from those after the first tenth: other
    # programs hardly change it. It differs between equal runs.
    seconds: float
    environment: str = "an unknown number of threads"  # threads and versions, in words

    @property
    def final(self) -> float:
        return self.curve[-1]

    def best(self, *, higher_is_better: bool) -> float:
        return max(self.curve) if higher_is_better else min(self.curve)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Result:
        return cls(**content)
