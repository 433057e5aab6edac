"""What all experiments have in common: method, sparsities, length, batch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from topkast.methods import Method
from topkast_paper import PaperError

# Settings that change where and how often something happens, but not the result.
_NEUTRAL = ("checkpoint_every", "device", "workers")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run of an experiment; its subclasses have the defaults of the paper.

    Attributes
    ----------
    method
        How A and B are chosen: one of :mod:`topkast.methods`. None: dense training.
    fwd, bwd, refresh_every, penalty, explore_until, distribution
        As for :func:`topkast.wrap_optimizer`.
    dense
        Names or globs of weights that stay dense.
    steps
        Updates of a run of ordinary length.
    multiplier
        Multiple of that length. The schedule of the learning rate is stretched with it.
    batch
        Samples of an update.
    micro_batch
        Samples that are in memory at once; their gradients are accumulated. None: the whole batch.
    evaluations
        Number of evaluations in training, evenly spaced; the last one follows the last update.
    checkpoint_every
        Updates between two checkpoints.
    device
        Name of a PyTorch device. None: a GPU, if there is one.
    precision
        ``"bfloat16"``: products are computed in it, under ``torch.autocast``.

    Raises
    ------
    PaperError
        If a value is out of range.
    """

    method: Method | None = None
    fwd: float = 0.0
    bwd: float = 0.0
    refresh_every: int | None = None
    penalty: float | None = None
    explore_until: int | None = None
    distribution: Literal["uniform", "erk"] = "uniform"
    dense: tuple[str, ...] = ()
    steps: int
    multiplier: float = 1.0
    batch: int
    micro_batch: int | None = None
    evaluations: int = 10
    checkpoint_every: int = 500
    device: str | None = None
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluations", "checkpoint_every"):
            self._check_positive(name)
        if self.micro_batch is not None:
            self._check_positive("micro_batch")
        if not (math.isfinite(self.multiplier) and self.multiplier > 0):
            raise PaperError(f"multiplier must be a positive number, got {self.multiplier!r}")
        if self.method is None and (self.fwd or self.bwd):
            raise PaperError(
                f"method=None is dense training, but fwd={self.fwd!r} and bwd={self.bwd!r}: leave "
                "them out, or pass a method"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise PaperError(f"precision must be float32 or bfloat16, got {self.precision!r}")

    @property
    def total_steps(self) -> int:
        """Updates of the run: `steps` times `multiplier`."""
        return max(1, round(self.steps * self.multiplier))

    @property
    def micro_batch_size(self) -> int:
        """Samples that are in memory at once."""
        return min(self.batch, self.micro_batch or self.batch)

    @property
    def torch_device(self) -> torch.device:
        """The device of the run."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def describe(self) -> dict[str, str]:
        """The settings that the result depends on, as text."""
        fields: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        return {name: repr(value) for name, value in fields.items() if name not in _NEUTRAL}

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or value < 1:
            raise PaperError(f"{name} must be a positive integer, got {value!r}")
