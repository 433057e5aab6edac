"""What a run of the demo can be told, and the defaults that fit about a minute on two cores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from topkast._options import Options
from topkast_demo import DemoError

FRAMEWORKS = {"torch": "PyTorch", "jax": "JAX"}
EXECUTIONS = ("masked", "sparse")

# Learning rates for each task.
OPTIMIZERS = {
    "adamw": {"digits": 2e-3, "text": 4e-3},
    "adam": {"digits": 2e-3, "text": 4e-3},
    "nadam": {"digits": 2e-3, "text": 4e-3},
    "adagrad": {"digits": 2e-2, "text": 2e-2},
    "rmsprop": {"digits": 1e-3, "text": 2e-3},
    "sgd": {"digits": 0.1, "text": 0.1},
}

STEPS = {"digits": 2000, "text": 800}
WARM_UP = 0.05  # share of the steps


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One comparison: the same for all methods, which differ in what they keep of the weights."""

    framework: str = "torch"
    execution: str = "masked"
    task: str
    data: Path | None = None
    fwd: float = 0.9
    bwd: float = 0.8
    refresh_every: int = Options.refresh_every
    penalty: float = 1e-4
    steps: int
    optimizer: str = "adamw"
    lr: float
    decay: bool = True  # of the learning rate, to zero; after a warm-up
    seed: int = 0

    def __post_init__(self) -> None:
        Options(  # raises OptionError now and not after the dense run
            fwd=self.fwd,
            bwd=self.bwd,
            refresh_every=self.refresh_every,
            penalty=self.penalty,
            seed=self.seed,
        )
        if self.execution == "sparse" and self.framework != "torch":
            raise DemoError("--execution sparse needs --framework torch: the sparse layers are its")
        if self.steps < 1:
            raise DemoError(f"steps must be at least 1, got {self.steps}")
        if not 0 < self.lr < math.inf:
            raise DemoError(f"lr must be a positive number, got {self.lr}")
        if self.seed >= 2**63:
            raise DemoError(f"seed must be less than 2**63, got {self.seed}")

    def schedule(self, step: int) -> float:
        """What the learning rate is multiplied with: a warm-up, then a straight line to zero."""
        if not self.decay:
            return 1.0
        warm_up = max(1, round(WARM_UP * self.steps))
        return min((step + 1) / warm_up, 1 - step / self.steps)


def find_rates(name: str) -> dict[str, float]:
    """The learning rates of the optimizer of that name, in whatever case."""
    try:
        return OPTIMIZERS[name.lower()]
    except KeyError:
        raise DemoError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}") from None
