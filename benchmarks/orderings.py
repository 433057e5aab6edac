"""Is Top-KAST better than a random mask, and a denser backward pass better than a sparse one?

Trains an MLP of two hidden layers of 300 on scikit-learn's digits and on MNIST's test images,
with several seeds per setting, and prints the test accuracies. It asserts nothing.

Accuracies are measured one step before the last refresh and after it. Weights that enter A were
updated while the forward pass did not use them. With a constant learning rate and a hundred updates
between refreshes, the network needs some steps to adapt to them.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _harness import describe_environment, make_parser, markdown_table, write_json

from topkast_demo.data import Images, load_images
from topkast_demo.settings import Settings
from topkast_demo.tasks import DigitsTask
from topkast_demo.train import train

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared/data/t10k-images-idx3-ubyte.gz"
BATCH = 100
STEPS = 1200  # 15 epochs of 8,000 images; the last step ends with a refresh


@dataclasses.dataclass(frozen=True)
class Row:
    label: str
    method: str
    fwd: float = 0.0
    bwd: float = 0.0
    refresh_every: int = 0  # 0: never


ROWS = (
    Row("dense", "dense"),
    Row("Top-KAST 0.9/0.8", "topkast", 0.9, 0.8, refresh_every=10),
    Row("Top-KAST 0.9/0.8", "topkast", 0.9, 0.8, refresh_every=100),
    Row("static random 0.9", "static", 0.9, 0.9),
    Row("Top-KAST 0.98/0.95", "topkast", 0.98, 0.95, refresh_every=10),
    Row("Top-KAST 0.98/0.95", "topkast", 0.98, 0.95, refresh_every=100),
    Row("Top-KAST 0.98/0", "topkast", 0.98, 0.0, refresh_every=10),
    Row("Top-KAST 0.98/0", "topkast", 0.98, 0.0, refresh_every=100),
    Row("static random 0.98", "static", 0.98, 0.98),
)


def main() -> None:
    parser = make_parser(__doc__, "orderings")
    parser.add_argument("--data", type=Path, default=DATA, help="images of MNIST in IDX format")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {"digits": compare(load_images(), options.seeds)}
    if options.data.exists():
        results["mnist"] = compare(load_images(options.data), options.seeds)
    else:
        print(
            f"MNIST is skipped, because {options.data} does not exist: pass its images with --data"
        )
    write_json(
        options.output, {"environment": describe_environment(options.threads), "datasets": results}
    )


def compare(images: Images, seeds: int) -> dict[str, Any]:
    """Train every row with every seed, and print the table."""
    task = DigitsTask(images, hidden=(300, 300), batch=BATCH)
    rows, cells = [], []
    for row in ROWS:
        start = time.perf_counter()
        before, after = zip(*(train_once(task, row, seed) for seed in range(seeds)), strict=True)
        refresh = str(row.refresh_every or "never")
        rows.append(
            dataclasses.asdict(row) | {"before": _summarize(before), "after": _summarize(after)}
        )
        cells.append((row.label, refresh, _cell(before), _cell(after)))
        print(f"{row.label}, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(f"\n{task.description}; {STEPS:,} steps of {BATCH}, AdamW at 1e-3, {seeds} seeds\n")
    head = ("test accuracy, mean (min–max)", "refresh", "before the last refresh", "after it")
    print(markdown_table(head, cells))
    return {"description": task.description, "steps": STEPS, "batch": BATCH, "rows": rows}


def _cell(accuracies: tuple[float, ...]) -> str:
    mean, lowest, highest = statistics.mean(accuracies), min(accuracies), max(accuracies)
    return f"{mean:.2f} % ({lowest:.2f}–{highest:.2f})"


def _summarize(accuracies: tuple[float, ...]) -> dict[str, Any]:
    return {
        "accuracies": accuracies,
        "mean": statistics.mean(accuracies),
        "min": min(accuracies),
        "max": max(accuracies),
    }


def train_once(task: DigitsTask, row: Row, seed: int) -> tuple[float, float]:
    """Test accuracy in percent one step before the last refresh, and after it."""
    settings = Settings(
        task="digits",
        fwd=row.fwd,
        bwd=row.bwd,
        refresh_every=row.refresh_every or STEPS + 1,
        steps=STEPS,
        lr=1e-3,
        decay=False,
        seed=seed,
    )
    run = train(task, row.method, settings, evaluate_at=(STEPS - 1, STEPS), quiet=True)
    before, after = run.metric_values
    return before, after


if __name__ == "__main__":
    main()
