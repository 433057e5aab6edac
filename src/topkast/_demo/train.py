"""One training run, and everything about it that the report shows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import topkast
from topkast._demo import DemoError
from topkast._demo.dynamics import MaskDynamics
from topkast._demo.measure import Memory, Size, measure_memory, measure_sizes
from topkast._demo.methods import LABELS, build_optimizer
from topkast._demo.settings import Settings
from topkast._demo.tasks import Batch, Task, loss

EVALUATIONS = 10
WARM_UP = 0.05  # share of the steps


@dataclass(frozen=True)
class Run:
    """What was measured while training in one way."""

    method: str
    losses: list[float]  # nats, by step
    metric_steps: list[int]
    metric_values: list[float]
    dynamics: MaskDynamics | None  # of Top-KAST alone: the others have one mask
    sizes: dict[str, Size]  # of the tensors that the sparse runs make sparse
    memory: Memory
    step_seconds: float  # the median
    refresh_seconds: float | None  # the median of the steps that choose A and B anew

    @property
    def label(self) -> str:
        return LABELS[self.method]


def train(
    task: Task,
    method: str,
    settings: Settings,
    *,
    evaluate_at: Collection[int] | None = None,
    quiet: bool = False,
) -> Run:
    """Train a network for the task densely, on a static random mask, or with Top-KAST.

    The network is evaluated after the steps `evaluate_at`; if there are none given, after ten
    steps that lie evenly, the last one among them.
    """
    if evaluate_at is None:
        every = math.ceil(settings.steps / EVALUATIONS)
        evaluate_at = {*range(every, settings.steps, every), settings.steps}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = task.model()
    optimizer = build_optimizer(method, model, settings, task.dense)
    scheduler = LambdaLR(optimizer, lambda step: _rate(step, settings))
    dynamics = MaskDynamics(optimizer) if method == "topkast" else None
    losses: list[float] = []
    metric_steps: list[int] = []
    metric_values: list[float] = []
    seconds: list[float] = []
    batches = task.batches(settings.seed)
    with tqdm(
        total=settings.steps, desc=LABELS[method].ljust(13), unit="step", disable=quiet
    ) as bar:
        for step in range(1, settings.steps + 1):
            value, elapsed = _timed_step(model, optimizer, next(batches), step, settings)
            scheduler.step()
            losses.append(value)
            seconds.append(elapsed)
            if dynamics and step % settings.refresh_every == 0:
                dynamics.record(step)
            if step in evaluate_at:
                metric_steps.append(step)
                metric_values.append(task.evaluate(model))
            bar.set_postfix_str(_progress(value, dynamics), refresh=False)
            bar.update()
    refreshes = seconds[settings.refresh_every - 1 :: settings.refresh_every] if dynamics else []
    return Run(
        method,
        losses,
        metric_steps,
        metric_values,
        dynamics,
        measure_sizes(model, optimizer, task.dense),
        measure_memory(model, optimizer),
        statistics.median(seconds),
        statistics.median(refreshes) if refreshes else None,
    )


def _timed_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    step: int,
    settings: Settings,
) -> tuple[float, float]:
    """Loss before the step, and the seconds that all of it took."""
    start = time.perf_counter()
    optimizer.zero_grad()
    found = loss(model, batch)
    found.backward()
    try:
        optimizer.step()
    except topkast.NonFiniteError as error:
        raise _diverged(step, settings, str(error)) from None
    elapsed = time.perf_counter() - start
    value = found.item()
    if not math.isfinite(value):
        raise _diverged(step, settings, f"the loss is {value}")
    return value, elapsed


def _diverged(step: int, settings: Settings, what: str) -> DemoError:
    return DemoError(
        f"training diverged at step {step} with {settings.optimizer} at lr={settings.lr:g} "
        f"({what}): try a smaller --lr"
    )


def _rate(step: int, settings: Settings) -> float:
    """What the learning rate is multiplied with: a warm-up, then a straight line to zero."""
    if not settings.decay:
        return 1.0
    warm_up = max(1, round(WARM_UP * settings.steps))
    return min((step + 1) / warm_up, 1 - step / settings.steps)


def _progress(value: float, dynamics: MaskDynamics | None) -> str:
    text = f"loss {value:.3f}"
    if dynamics and dynamics.change.mean:
        text += f", mask change {dynamics.change.mean[-1]:.3%}"
    return text
