"""The training of one run."""

from __future__ import annotations

import contextlib
import functools
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

import topkast
from topkast.methods import Method
from topkast_demo.data import load_images, load_text
from topkast_demo.settings import WARM_UP
from topkast_demo.tasks import DigitsTask, Task, TextTask
from topkast_demo.torch_models import build
from topkast_demo.torch_trainer import TorchTrainer
from topkast_demo.trainer import Batch
from topkast_study import StudyError
from topkast_study.cost import Flops, gradient_count
from topkast_study.dynamics import Dynamics
from topkast_study.methods import METHODS
from topkast_study.runs import Result, Run

EVALUATIONS = 10


class StudyTrainer(TorchTrainer):
    """The demo's trainer with Adam and any method."""

    def __init__(self, task: Task, run: Run, method: Method | None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self._model = build(task.network)
        self._run = run
        self._optimizer = torch.optim.Adam(self._model.named_parameters(), lr=run.lr)
        if method is not None:
            self._optimizer = topkast.wrap_optimizer(
                self._optimizer,
                fwd=run.fwd,
                bwd=run.bwd,
                refresh_every=run.refresh_every,
                penalty=0.0 if run.ratio is not None else run.penalty,
                penalty_kind=run.penalty_kind,
                explore_until=run.explore_until,
                block=run.block,
                method=method,
                dense=task.dense,
                seed=run.seed,
            )
        self._is_wrapped = method is not None
        warm_up = max(1, round(WARM_UP * run.steps))
        self._scheduler = LambdaLR(
            self._optimizer, lambda step: min((step + 1) / warm_up, 1 - step / run.steps)
        )

    def step(self, batch: Batch) -> float:
        if self._run.ratio is None:
            return super().step(batch)
        self._optimizer.zero_grad()
        loss = self._loss(batch)
        loss.backward()
        self._add_penalty(self._run.penalty or 0.0, self._run.ratio)
        self._optimizer.step()
        self._scheduler.step()
        return loss.item()

    def counts(self) -> dict[str, list[int]]:
        """Numbers of weights, |A| and |B| of each sparse tensor, also while A has all weights."""
        return {
            row.name: [math.prod(row.shape), row.forward, row.backward]
            for row in self._sparse_rows()
        }

    def mask_change(self) -> float:
        """The share of A, over all tensors, that entered at the last refresh."""
        rows = self._sparse_rows()
        active = sum(row.forward for row in rows)
        return sum(row.mask_change * row.forward for row in rows) / max(active, 1)

    def _sparse_rows(self) -> list[topkast.TensorSummary]:
        if not self._is_wrapped:
            return []
        return [row for row in topkast.summary(self._optimizer).tensors if row.has_sets]

    def _add_penalty(self, penalty: float, ratio: float) -> None:
        """Add the gradient of an exploration penalty whose weight on B∖A is `ratio`."""
        theta = self.params()
        for name, (forward, backward) in topkast.masks(self._optimizer).items():
            grad = self._model.get_parameter(name).grad
            assert grad is not None
            values = theta[name] if self._run.penalty_kind == "l2" else torch.sgn(theta[name])
            grad += penalty * values * (forward + ratio * (backward & ~forward))


@functools.lru_cache(maxsize=4)
def load_task(run: Run, path: Path | None) -> Task:
    """Load the data and the network of a run; `run` counts with its data and sizes only."""
    if run.task == "text":
        (width,) = run.widths
        text = load_text(min_valid_size=TextTask.context + 1)
        return TextTask(text, width=width, batch=run.batch)
    return DigitsTask(load_images(path), hidden=run.widths, batch=run.batch)


def task_of(run: Run, path: Path | None) -> Task:
    """The task of a run, loaded once for all runs with the same one."""
    key = Run(
        task=run.task,
        data=run.data,
        widths=run.widths,
        batch=run.batch,
        steps=1,
        lr=1,
        method="dense",
    )
    return load_task(key, path)


def train(run: Run, path: Path | None = None) -> Result:
    """Train as `run` says; images come from the file `path`, or from scikit-learn."""
    task = task_of(run, path)
    method = METHODS[run.method].build(run)
    with _age(run.age):
        return _train(task, run, method, StudyTrainer(task, run, method))


def _train(task: Task, run: Run, method: Method | None, trainer: StudyTrainer) -> Result:
    counts = trainer.counts()
    total = sum(
        param.numel()
        for name, param in trainer.params().items()
        if param.ndim > 1 and not name.startswith(("embedding", "positions"))
    )
    weights = sum(size for size, _, _ in counts.values()) if counts else total
    flops = Flops(weights, total - weights)
    forward, backward = _sums(counts, weights)
    dynamics = Dynamics(trainer.masks(), run.steps) if run.dynamics else None
    schedules = method is not None and method.schedules
    until = getattr(method, "until", None)
    every = max(1, run.steps // EVALUATIONS)
    skipped = run.steps // 10  # the first steps hold checks that are done once
    seconds, loss = 0.0, math.nan
    steps: list[int] = []
    values: list[float] = []
    changes: list[float] = []
    batches = task.batches(run.seed)
    for step in range(1, run.steps + 1):
        refreshes = step % run.refresh_every == 0
        explores = run.explore_until is None or step <= run.explore_until
        reads_all = refreshes and (until is None or step < until)
        gradients = gradient_count(
            method, forward, backward, weights, refreshes=reads_all, explores=explores
        )
        flops.add(forward, gradients)
        batch = next(batches)
        start = time.process_time()
        try:
            loss = trainer.step(batch)
        except topkast.NonFiniteError:
            loss = math.nan
        if step > skipped:
            seconds += time.process_time() - start
        if not math.isfinite(loss):
            raise StudyError(f"{METHODS[run.method].label} diverged at step {step}: {run}")
        if schedules and refreshes:
            forward, backward = _sums(trainer.counts(), weights)
        if dynamics is not None and refreshes:
            dynamics.record(step, trainer.masks())
        if step % every == 0 or step == run.steps:
            steps.append(step)
            values.append(task.evaluate(trainer))
            changes.append(trainer.mask_change())
    return Result(
        curve_steps=steps,
        curve=values,
        loss=loss,
        tensors=trainer.counts(),
        flops=flops.per_step(run.steps // run.multiple),
        mask_change=sum(changes) / len(changes),
        dynamics=None if dynamics is None else dynamics.to_dict(),
        seconds=seconds * run.steps / (run.steps - skipped),
        environment=_describe_environment(),
    )


def versions() -> dict[str, str]:
    """Versions of what trains, by name."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "topkast": topkast.__version__,
    }


def _describe_environment() -> str:
    threads = torch.get_num_threads()
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{threads} thread{'s' * (threads != 1)}; {packages}"


def _sums(counts: dict[str, list[int]], weights: int) -> tuple[int, int]:
    if not counts:
        return weights, weights
    return sum(row[1] for row in counts.values()), sum(row[2] for row in counts.values())


@contextlib.contextmanager
def _age(is_on: bool) -> Iterator[None]:
    """Without age, no entry of B counts as young, and no displacement is scaled."""
    if is_on:
        yield
    else:
        with mock.patch("topkast_torch.inner._young.young_limit", return_value=0):
            yield
