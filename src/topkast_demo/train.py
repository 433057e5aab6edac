"""One training run, and the measurements that the report shows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Collection
from dataclasses import dataclass

from tqdm import tqdm

import topkast
from topkast_demo import DemoError
from topkast_demo.dynamics import MaskDynamics
from topkast_demo.measure import Memory, Size, measure_memory, measure_sizes
from topkast_demo.methods import LABELS
from topkast_demo.settings import Settings
from topkast_demo.tasks import Task
from topkast_demo.trainer import Batch, Trainer
from topkast_demo.trainers import find_trainer

EVALUATIONS = 10


@dataclass(frozen=True)
class Run:
    """The measurements of training by one method."""

    method: str
    losses: list[float]  # nats, by step
    metric_steps: list[int]
    metric_values: list[float]
    dynamics: MaskDynamics | None  # only for Top-KAST: the masks of other methods are fixed
    sizes: dict[str, Size]  # of the tensors that sparse runs make sparse
    memory: Memory
    step_seconds: float  # median over all steps
    refresh_seconds: float | None  # median over steps with a refresh

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

    The network is evaluated after the steps `evaluate_at`, by default after ten evenly spaced steps
    that include the last one.
    """
    if evaluate_at is None:
        every = math.ceil(settings.steps / EVALUATIONS)
        evaluate_at = {*range(every, settings.steps, every), settings.steps}
    make_trainer = find_trainer(settings.framework)
    trainer = make_trainer(task.network, method, settings, dense=task.dense)
    dynamics = MaskDynamics(trainer.masks()) if method == "topkast" else None
    losses: list[float] = []
    metric_steps: list[int] = []
    metric_values: list[float] = []
    seconds: list[float] = []
    batches = task.batches(settings.seed)
    with tqdm(
        total=settings.steps, desc=LABELS[method].ljust(13), unit="step", disable=quiet
    ) as bar:
        for step in range(1, settings.steps + 1):
            batch = next(batches)
            loss, elapsed = _timed_step(trainer, batch, step, settings)
            losses.append(loss)
            seconds.append(elapsed)
            if dynamics and step % settings.refresh_every == 0:
                dynamics.record(step, trainer.masks())
            if step in evaluate_at:
                metric_steps.append(step)
                metric_values.append(task.evaluate(trainer))
            bar.set_postfix_str(_format_progress(loss, dynamics), refresh=False)
            bar.update()
    # No later step reveals whether the last one diverged.
    _check_finite(trainer.loss(batch), settings.steps, settings)
    refreshes = seconds[settings.refresh_every - 1 :: settings.refresh_every] if dynamics else []
    return Run(
        method,
        losses,
        metric_steps,
        metric_values,
        dynamics,
        measure_sizes(trainer, task.dense),
        measure_memory(trainer),
        statistics.median(seconds),
        statistics.median(refreshes) if refreshes else None,
    )


def _timed_step(
    trainer: Trainer, batch: Batch, step: int, settings: Settings
) -> tuple[float, float]:
    """Take a step; return the loss before it and the seconds that it took."""
    start = time.perf_counter()
    try:
        loss = trainer.step(batch)
    except topkast.NonFiniteError as error:
        raise _diverged(step, settings, str(error)) from None
    elapsed = time.perf_counter() - start
    _check_finite(loss, step, settings)
    return loss, elapsed


def _check_finite(loss: float, step: int, settings: Settings) -> None:
    if not math.isfinite(loss):
        raise _diverged(step, settings, f"the loss is {loss}")


def _diverged(step: int, settings: Settings, reason: str) -> DemoError:
    return DemoError(
        f"training diverged at step {step} with {settings.optimizer} at lr={settings.lr:g} "
        f"({reason}): try a smaller --lr"
    )


def _format_progress(loss: float, dynamics: MaskDynamics | None) -> str:
    text = f"loss {loss:.3f}"
    if dynamics and dynamics.change.mean:
        text += f", mask change {dynamics.change.mean[-1]:.3%}"
    return text
