"""The training loop of all experiments."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import topkast
from topkast_paper import PaperError, checkpoint
from topkast_paper.settings import Settings

Curve = list[dict[str, float]]


class Experiment(ABC):
    """A model and its data.

    Attributes
    ----------
    max_norm
        Norm to which the gradient is clipped; None: it is not.
    has_test
        Whether the final metric is one of other data than the learning curve's.
    """

    model: nn.Module
    max_norm: float | None = None
    has_test: bool = False

    @abstractmethod
    def steps(self, start: int) -> Iterator[Iterable[Any]]:
        """The micro-batches of each update after the first `start`; each is read once."""

    @abstractmethod
    def loss(self, micro_batch: Any) -> Tensor:
        """The share of a micro-batch in the batch's mean loss, in nats."""

    @abstractmethod
    def lr(self, step: int) -> float:
        """The learning rate of the update after `step` updates."""

    @abstractmethod
    def evaluate(self, *, test: bool) -> float:
        """The metric, on the data for validation or, for the last time, for test."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides model and optimizer."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Continue from what :meth:`state` returned."""


def conduct(
    experiment: Experiment,
    optimizer: Any,
    settings: Settings,
    *,
    output: Path,
    identity: dict[str, str],
    seed: int,
) -> tuple[float, Curve]:
    """Train, from the checkpoint of `output` if it has one; return the final metric and the curve.

    The random numbers of an update depend on the seed and the number of the update alone.
    """
    training = _Training(experiment, optimizer, settings)
    training.resume(output, identity)
    checkpoint.prepare(output)
    device = settings.torch_device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        tqdm(total=settings.total_steps, initial=training.step, unit="step") as bar,
    ):
        for micro_batches in experiment.steps(training.step):
            _seed(seed, training.step)
            training.update(micro_batches)
            bar.set_postfix_str(training.describe(), refresh=False)
            bar.update()
            is_last = training.step == settings.total_steps
            if training.step % settings.checkpoint_every == 0 or is_last:
                checkpoint.save(output, identity, training.content())
                checkpoint.write_json(output / "curve.json", training.curve)
        if not experiment.has_test:
            return training.curve[-1]["value"], training.curve
        return evaluate(experiment, settings, test=True), training.curve


def evaluate(experiment: Experiment, settings: Settings, *, test: bool) -> float:
    """Evaluate the model, in evaluation mode."""
    experiment.model.eval()
    with torch.no_grad(), autocast(settings):
        value = experiment.evaluate(test=test)
    experiment.model.train()
    return value


def autocast(settings: Settings) -> contextlib.AbstractContextManager[None]:
    """The context of forward passes."""
    if settings.precision == "float32":
        return contextlib.nullcontext()
    context: Any = torch.autocast(settings.torch_device.type, torch.bfloat16)
    return context  # type: ignore[no-any-return]


def _seed(*numbers: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


class _Training:
    """A run between two updates."""

    def __init__(self, experiment: Experiment, optimizer: Any, settings: Settings) -> None:
        self.step = 0
        self.curve: Curve = []
        self._experiment = experiment
        self._optimizer = optimizer
        self._settings = settings
        self._losses = (0.0, 0)  # sum and number since the last evaluation
        self._last = math.nan
        total, count = settings.total_steps, settings.evaluations
        self._evaluate_at = {max(1, round(total * k / count)) for k in range(1, count + 1)}

    def update(self, micro_batches: Iterable[Any]) -> None:
        experiment, optimizer = self._experiment, self._optimizer
        for group in optimizer.param_groups:
            group["lr"] = experiment.lr(self.step)
        optimizer.zero_grad()
        self._last = 0.0
        for micro_batch in micro_batches:
            with autocast(self._settings):
                loss = experiment.loss(micro_batch)
            loss.backward()
            self._last += loss.item()
        self.step += 1
        if not math.isfinite(self._last):
            raise self._diverged(f"the loss is {self._last}")
        if experiment.max_norm is not None:
            nn.utils.clip_grad_norm_(experiment.model.parameters(), experiment.max_norm)
        try:
            optimizer.step()
        except topkast.NonFiniteError as error:
            raise self._diverged(str(error)) from None
        self._losses = self._losses[0] + self._last, self._losses[1] + 1
        if self.step in self._evaluate_at:
            value = evaluate(experiment, self._settings, test=False)
            loss_sum, count = self._losses
            self.curve.append({"step": self.step, "loss": loss_sum / count, "value": value})
            self._losses = 0.0, 0

    def describe(self) -> str:
        text = f"loss {self._last:.3f}"
        return text + (f", {self.curve[-1]['value']:.4g}" if self.curve else "")

    def content(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "curve": self.curve,
            "losses": list(self._losses),
            "model": self._experiment.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "experiment": self._experiment.state(),
        }

    def resume(self, output: Path, identity: dict[str, str]) -> None:
        content = checkpoint.load(output, identity)
        if content is None:
            return
        self._experiment.model.load_state_dict(content["model"])
        self._optimizer.load_state_dict(content["optimizer"])
        self._experiment.load_state(content["experiment"])
        self.step, self.curve = content["step"], content["curve"]
        loss_sum, count = content["losses"]
        self._losses = loss_sum, count

    def _diverged(self, reason: str) -> PaperError:
        return PaperError(
            f"training diverged at update {self.step} ({reason}): the learning rate was "
            f"{self._experiment.lr(self.step - 1):g}"
        )
