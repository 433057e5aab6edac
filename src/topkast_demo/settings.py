"""The settings of the demo; by default it takes about a minute on two cores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from topkast._options import Options
from topkast_demo import DemoError

FRAMEWORKS = {"torch": "PyTorch", "jax": "JAX"}
EXECUTIONS = ("masked", "sparse")

# Learning rates by optimizer and task.
OPTIMIZERS = {
    "adamw": {"digits": 2e-3, "text": 4e-3},
    "adam": {"digits": 2e-3, "text": 4e-3},
    "nadam": {"digits": 2e-3, "text": 4e-3},
    "adagrad": {"digits": 2e-2, "text": 2e-2},
    "rmsprop": {"digits": 1e-3, "text": 2e-3},
    "sgd": {"digits": 0.1, "text": 0.1},
}

STEPS = {"digits": 2000, "text": 800}
WARM_UP = 0.05  # share of the steps in which the learning rate rises


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one comparison, shared by all methods."""

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
    decay: bool = True  # whether the learning rate warms up and decays to zero
    seed: int = 0

    def __post_init__(self) -> None:
        Options(  # raises OptionError before the dense run
            fwd=self.fwd,
            bwd=self.bwd,
            refresh_every=self.refresh_every,
            penalty=self.penalty,
            seed=self.seed,
        )
        if self.execution == "sparse" and self.framework != "torch":
            raise DemoError(
                "--execution sparse needs --framework torch, the only one with sparse layers"
            )
        if self.steps < 1:
            raise DemoError(f"steps must be at least 1, got {self.steps}")
        if not 0 < self.lr < math.inf:
            raise DemoError(f"lr must be a positive number, got {self.lr}")
        if self.seed >= 2**63:
            raise DemoError(f"seed must be less than 2**63, got {self.seed}")

    def schedule(self, step: int) -> float:
        """Factor of the learning rate: a warm-up, then a linear decay to zero."""
        if not self.decay:
            return 1.0
        warm_up = max(1, round(WARM_UP * self.steps))
        return min((step + 1) / warm_up, 1 - step / self.steps)


def find_rates(name: str) -> dict[str, float]:
    """Find the learning rates of an optimizer; its name is not case-sensitive."""
    try:
        return OPTIMIZERS[name.lower()]
    except KeyError:
        raise DemoError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}") from None
