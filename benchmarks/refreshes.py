"""What does the interval between two refreshes cost, with and without age?

Trains an MLP on MNIST's test images at a constant learning rate, and a small transformer on
characters with a warm-up and a falling learning rate. Prints the test accuracies just before and
just after a refresh, and the validation losses. It asserts nothing.

With age, the displacement of an entry that entered B late is scaled so that it moves as Adam moves
a new parameter. The rows without age switch this off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _harness import describe_environment, make_parser, markdown_table, write_json

from topkast_demo.data import load_images, load_text
from topkast_demo.settings import OPTIMIZERS, Settings
from topkast_demo.tasks import DigitsTask, Task, TextTask
from topkast_demo.train import train

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared/data/t10k-images-idx3-ubyte.gz"


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting; all other options are the defaults of the demo."""

    fwd: float
    bwd: float
    refresh_every: int | None  # None: never
    age: bool = True
    method: str = "topkast"

    @property
    def cells(self) -> tuple[str, str, str]:
        if self.method == "dense":
            return "dense", "never", "–"
        if self.method == "static":
            return f"static random {self.fwd:g}", "never", "–"
        age = "with" if self.age else "without"
        return f"{self.fwd:g}/{self.bwd:g}", str(self.refresh_every), age


@dataclasses.dataclass(frozen=True)
class Study:
    """One task, trained with every row and evaluated after the steps `evaluate_at`."""

    name: str
    task: Task
    batch: int
    steps: int
    lr: float
    decay: bool
    evaluate_at: tuple[int, ...]
    rows: tuple[Row, ...]

    def train_once(self, row: Row, seed: int) -> list[float]:
        """Train once, and return the metric after each of the steps `evaluate_at`."""
        settings = Settings(
            task=self.name,
            fwd=row.fwd,
            bwd=row.bwd,
            refresh_every=row.refresh_every or self.steps + 1,
            steps=self.steps,
            lr=self.lr,
            decay=self.decay,
            seed=seed,
        )
        with contextlib.nullcontext() if row.age else without_age():
            run = train(self.task, row.method, settings, evaluate_at=self.evaluate_at, quiet=True)
        return run.metric_values

    def settings(self, seeds: int) -> dict[str, Any]:
        """Return the settings that the results depend on."""
        names = ("batch", "steps", "lr", "decay", "evaluate_at")
        values = {name: getattr(self, name) for name in names}
        return {"description": self.description, "seeds": seeds} | values

    @property
    def description(self) -> str:
        schedule = "a warm-up and a linear decay to zero" if self.decay else "constant"
        return (
            f"{self.task.description}; {self.steps:,} steps of {self.batch}, AdamW at {self.lr:g}, "
            f"{schedule}"
        )


def make_rows(*settings: tuple[float, float, int]) -> tuple[Row, ...]:
    """Make rows: dense, a random mask, and each (fwd, bwd, refresh_every) without and with age."""
    sparse = (Row(*setting, age=age) for setting in settings for age in (False, True))
    dense = Row(0.0, 0.0, None, method="dense")
    static = Row(0.9, 0.9, None, method="static")
    return dense, static, *sparse


@contextlib.contextmanager
def without_age() -> Iterator[None]:
    """Scale no displacement: no entry counts as young."""
    with mock.patch("topkast_torch.inner._young.young_limit", return_value=0):
        yield


def mnist(path: Path, steps: int) -> Study:
    return Study(
        name="digits",
        task=DigitsTask(load_images(path), hidden=(300, 300), batch=100),
        batch=100,
        steps=steps,
        lr=1e-3,
        decay=False,
        evaluate_at=(steps - 1, steps),  # the last step ends with a refresh
        rows=make_rows((0.9, 0.8, 1), (0.9, 0.8, 10), (0.9, 0.8, 100), (0.9, 0.5, 100)),
    )


def text(steps: int) -> Study:
    batch = 8
    return Study(
        name="text",
        task=TextTask(load_text(), batch=batch),
        batch=batch,
        steps=steps,
        lr=OPTIMIZERS["adamw"]["text"],
        decay=True,
        evaluate_at=(steps // 2 - 1, steps // 2, steps),
        rows=make_rows((0.9, 0.8, 1), (0.9, 0.8, 10), (0.9, 0.8, 100)),
    )


def main() -> None:
    parser = make_parser(__doc__, "refreshes")
    parser.add_argument("--data", type=Path, default=DATA, help="images of MNIST in IDX format")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=("mnist", "text"))
    parser.add_argument("--mnist-steps", type=int, default=1200)
    parser.add_argument("--text-steps", type=int, default=1200)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    if options.only != "text":
        if options.data.exists():
            study = mnist(options.data, options.mnist_steps)
            results["mnist"] = compare_accuracies(study, options.seeds)
        else:
            print(
                f"MNIST is skipped, because {options.data} does not exist: pass its images with "
                "--data"
            )
    if options.only != "mnist":
        results["text"] = compare_losses(text(options.text_steps), options.seeds)
    write_json(
        options.output, {"environment": describe_environment(options.threads), "studies": results}
    )


def compare_accuracies(study: Study, seeds: int) -> dict[str, Any]:
    """Train every row with every seed, and print test accuracies around the last refresh."""
    cells, results = [], []
    for row, runs in train_all(study, seeds):
        before, after = zip(*runs, strict=True)
        change = [new - old for old, new in runs]
        results.append(
            dataclasses.asdict(row)
            | {"before": summarize(before), "after": summarize(after), "change": summarize(change)}
        )
        cells.append((*row.cells, *(format_cell(values, 2) for values in (before, after, change))))
    print(f"\n{study.description}, seeds: {seeds}\n\ntest accuracy in %, mean (min to max)\n")
    print(markdown_table((*HEAD, "before the last refresh", "after it", "change"), cells))
    return study.settings(seeds) | {"rows": results}


def compare_losses(study: Study, seeds: int) -> dict[str, Any]:
    """Train every row with every seed, and print validation losses in nats per character."""
    cells, results = [], []
    for row, runs in train_all(study, seeds):
        before, after, end = (
            [math.log(2) * bits for bits in values] for values in zip(*runs, strict=True)
        )
        change = [new - old for old, new in zip(before, after, strict=True)]
        results.append(
            dataclasses.asdict(row)
            | {"before": summarize(before), "after": summarize(after), "change": summarize(change)}
            | {"end": summarize(end)}
        )
        cells.append(
            (*row.cells, *(format_cell(values, 3) for values in (before, after, change, end)))
        )
    half = f"step {study.evaluate_at[1]:,}"
    print(f"\n{study.description}, seeds: {seeds}")
    print("\nvalidation loss in nats per character, mean (min to max)\n")
    head = (f"before the refresh at {half}", "after it", "change", f"step {study.steps:,}")
    print(markdown_table((*HEAD, *head), cells))
    return study.settings(seeds) | {"rows": results}


HEAD = ("fwd/bwd", "refresh every", "age")


def train_all(study: Study, seeds: int) -> Iterator[tuple[Row, list[list[float]]]]:
    """Train every row with every seed, and yield the row and the metrics of each seed."""
    for row in study.rows:
        start = time.perf_counter()
        yield row, [study.train_once(row, seed) for seed in range(seeds)]
        elapsed = time.perf_counter() - start
        print(f"{study.name}: {', '.join(row.cells)}: {elapsed:.0f} s", file=sys.stderr)


def format_cell(values: Sequence[float], digits: int) -> str:
    mean, low, high = (
        f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values))
    )
    return f"{mean} ({low} to {high})"


def summarize(values: Sequence[float]) -> dict[str, Any]:
    return {
        "values": list(values),
        "mean": statistics.mean(values),
        "min": min(values),
        "max": max(values),
    }


if __name__ == "__main__":
    main()
