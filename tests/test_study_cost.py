"""The operations that studies report, compared with counts from the masks of each step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

pytest.importorskip("torch", reason="the studies train with PyTorch")
pytest.importorskip("sklearn", reason="the studies take their digits from scikit-learn")
pytest.importorskip("tqdm", reason="the studies show their progress with tqdm")

import torch

import topkast
from topkast.methods import DNW, GSE, SET, GradualPruning, RigL, TopKAST
from topkast_study import StudyError
from topkast_study.cost import Flops, gradient_count
from topkast_study.methods import METHODS
from topkast_study.report import _setup
from topkast_study.scales import SCALES
from topkast_study.study import Outcome, Row
from topkast_study.train import StudyTrainer, task_of, train

TINY = SCALES["tiny"]


def test_operations() -> None:
    """Top-KAST at 0.9/0.8 takes (2D + (D + M)) / 3 of dense training's, 0.4 / 3."""
    flops = Flops(weights=100, dense=0)
    flops.add(10, 20)
    assert flops.per_step(1) == pytest.approx(0.4 / 3)
    flops = Flops(weights=100, dense=50)  # the last layer adds 3 · 50 to both
    flops.add(10, 20)
    flops.add(100, 100)
    assert flops.per_step(2) == pytest.approx((40 + 150 + 300 + 150) / (2 * 450))


@pytest.mark.parametrize(
    ("method", "at_refresh", "between"),
    [
        (None, 100, 100),
        (TopKAST(), 20, 20),
        (SET(), 20, 20),  # its B is A
        (RigL(), 100, 20),
        (GSE(samples=0.5), 15, 20),
        (DNW(), 20, 20),  # its B is everything
        (GradualPruning(start=0, end=9), 10, 10),  # B∖A rests
    ],
)
def test_gradients_that_a_step_needs(method: Any, at_refresh: int, between: int) -> None:
    for refreshes, expected in ((True, at_refresh), (False, between)):
        count = gradient_count(method, 10, 20, 100, refreshes=refreshes, explores=True)
        assert count == expected
    if isinstance(method, TopKAST):
        assert gradient_count(method, 10, 20, 100, refreshes=False, explores=False) == 10


def test_operations_of_runs() -> None:
    """RigL reads all gradients at each refresh before 75 % of the steps, here 5 of 8."""
    sparse, head = 64 * 16 + 16 * 16, 16 * 10
    active = sum(n - math.floor(0.9 * n) for n in (64 * 16, 16 * 16))
    total = 3 * (sparse + head) * 8
    assert train(TINY.images("set", 0.9)).flops == pytest.approx(24 * (active + head) / total)
    rigl = 8 * (2 * active + 3 * head) + 5 * sparse + 3 * active
    assert train(TINY.images("rigl", 0.9)).flops == pytest.approx(rigl / total)
    twice = train(TINY.images("set", 0.9, multiple=2))
    assert twice.flops == pytest.approx(2 * 24 * (active + head) / total)


@pytest.mark.parametrize("method", ["pruning", "acdc", "iht", "dnw", "static"])
def test_operations_are_those_of_the_masks(method: str) -> None:
    """A method may begin with all weights in A, whose layers are no dense ones then."""
    run = TINY.images(method, 0.9)
    head, total = 16 * 10, 64 * 16 + 16 * 16 + 16 * 10
    task = task_of(run, None)
    trainer, batches = StudyTrainer(task, run, METHODS[method].build(run)), task.batches(run.seed)
    operations = 0
    for _ in range(run.steps):
        masks = trainer.masks().values()
        active = sum(int(mask.forward.sum()) for mask in masks)
        gradients = total - head if method in ("iht", "dnw") else active
        operations += 2 * (active + head) + gradients + head
        trainer.step(next(batches))
    result = train(run)
    assert result.flops == pytest.approx(operations / (3 * total * run.steps))
    assert result.tensors.keys() == trainer.masks().keys()


@pytest.mark.parametrize("method", ["pruning", "acdc", "iht", "topkast"])
def test_operations_are_those_that_cost_predicts(method: str) -> None:
    run = TINY.images(method, 0.9)
    shapes = {"hidden0": (16, 64), "hidden1": (16, 16), "head": (10, 16)}
    options: Any = {"fwd": 0.9, "dense": "head", "refresh_every": run.refresh_every}
    options |= {"bwd": run.bwd, "steps": run.steps}
    predicted = topkast.cost(shapes, method=METHODS[method].build(run) or "dense", **options)
    # Schedules count from the rounded number of weights of the last set.
    assert train(run).flops == pytest.approx(predicted.fraction, rel=2e-3)


def test_all_weights_in_a_count_as_sparse_tensors() -> None:
    run = TINY.images("acdc", 0.9)
    trainer = StudyTrainer(task_of(run, None), run, METHODS["acdc"].build(run))
    sizes = {"hidden0.weight": 64 * 16, "hidden1.weight": 16 * 16}
    assert trainer.counts() == {name: [size] * 3 for name, size in sizes.items()}


def test_the_report_names_all_environments_of_its_runs() -> None:
    """A study that goes on later may find another version, or another number of threads."""
    run = TINY.images("set", 0.9)
    first = train(run)
    assert first.environment.startswith(f"{torch.get_num_threads()} thread")
    assert f"topkast {topkast.__version__}" in first.environment
    other = dataclasses.replace(first, environment="8 threads; topkast 0.0.1")
    text = _setup(task_of(run, None), [Outcome(Row(("SET",), run), [first, other, first])])
    assert f"products on {first.environment}; or on 8 threads; topkast 0.0.1." in text


def test_a_run_without_finite_weights_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(trainer: StudyTrainer, batch: object) -> float:
        raise topkast.NonFiniteError("hidden0.weight: 3 entries are NaN")

    monkeypatch.setattr(StudyTrainer, "step", step)
    with pytest.raises(StudyError, match="Top-KAST diverged at step 1"):
        train(TINY.images("topkast", 0.9))
