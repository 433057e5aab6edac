"""What does a refresh cost? Training steps with refreshes counted, on a real trajectory.

An MLP of three hidden layers (784-h-h-h-10, the last layer dense) trains on MNIST's test images
with fused Adam, batch 256, after a warm-up. The sides run in turn in one process: dense; sparse
layers between refreshes; a refresh from all weights at every step; and a refresh from B and a
reserve at every step, or at every tenth. The time with a refresh at every hundredth step is
computed from these. Then one large tensor is refreshed, whose entries on B make small random
steps. The benchmark asserts nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from _harness import (
    Timing,
    describe_environment,
    interleave,
    make_parser,
    markdown_table,
    write_json,
)
from torch import Tensor
from torch.nn.functional import cross_entropy
from training_step import NEVER, mlp

import topkast
from topkast.adapter import IncrementalSelection, Options, RankedTensors
from topkast.methods import TopKAST
from topkast.reservoirs import ArrayReservoir
from topkast_demo.data import load_images

DATA = Path(__file__).resolve().parents[2] / "shared/data/t10k-images-idx3-ubyte.gz"
PAIRS = [(0.9, 0.8), (0.95, 0.9), (0.98, 0.95)]
BETWEEN, EVERY = "between refreshes", "candidates, every step"
STEPS = 10  # timed together, with one refresh at every tenth
WARM_UP = 50
BATCH = 256


class ReadsAll(TopKAST):
    """The default method, but each refresh reads all weights."""

    takes_largest: ClassVar[bool] = False


class Training:
    """A network trained on random batches."""

    def __init__(self, width: int, pair: tuple[float, float] | None, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = mlp(width)
        self.optimizer: Any = torch.optim.Adam(self.model.named_parameters(), lr=1e-3, fused=True)
        if pair is not None:
            self.optimizer = topkast.wrap_optimizer(
                self.optimizer, fwd=pair[0], bwd=pair[1], dense=["6.*"], **options
            )
            topkast.sparsify(self.model, self.optimizer)
        self._generator = torch.Generator().manual_seed(1)

    def run(self, pixels: Tensor, labels: Tensor, steps: int = STEPS) -> None:
        for _ in range(steps):
            batch = torch.randint(0, len(labels), (BATCH,), generator=self._generator)
            self.optimizer.zero_grad()
            cross_entropy(self.model(pixels[batch]), labels[batch]).backward()
            self.optimizer.step()


def time_steps(width: int, pair: tuple[float, float], rounds: int) -> dict[str, Timing]:
    images = load_images(DATA if DATA.exists() else None)
    pixels, labels = torch.from_numpy(images.train_pixels), torch.from_numpy(images.train_labels)
    if pixels.shape[1] != 784:
        pixels = torch.nn.functional.pad(pixels, (0, 784 - pixels.shape[1]))
    sides = {
        "dense": Training(width, None),
        BETWEEN: Training(width, pair, refresh_every=NEVER),
        "all weights, every step": Training(width, pair, refresh_every=1, method=ReadsAll()),
        EVERY: Training(width, pair, refresh_every=1),
        "candidates, every 10": Training(width, pair, refresh_every=STEPS),
    }
    for side in sides.values():
        side.run(pixels, labels, WARM_UP)
    calls = {name: (lambda side=side: side.run(pixels, labels)) for name, side in sides.items()}
    timings = interleave(calls, rounds=rounds)
    return {name: timing.divided(STEPS) for name, timing in timings.items()}


def time_selection(size: int, pair: tuple[float, float], rounds: int) -> dict[str, Timing]:
    """Time a refresh of one tensor: its sets, its values on B, and the migration of one moment."""
    rng = np.random.default_rng(0)
    initial = rng.uniform(-1, 1, size).astype(np.float32) * np.float32(0.02)
    options = Options(fwd=pair[0], bwd=pair[1])
    counts = [round(size * (1 - sparsity)) for sparsity in pair]
    ranked = RankedTensors({"weight": (size,)}, counts[0], counts[1], density=1 - pair[0])

    class Side:
        def __init__(self) -> None:
            self.theta = initial.copy()
            self.reservoir = ArrayReservoir(self.theta)
            self.support = ranked.select(self.theta, options)
            self.values = self.theta[self.support.indices]
            self.moment = np.zeros_like(self.values)
            self.selection = IncrementalSelection()
            self.rng = np.random.default_rng(1)

        def move(self) -> None:
            noise = self.rng.standard_normal(len(self.values), dtype=np.float32)
            self.values += np.float32(2e-5) * noise

        def from_all(self) -> None:
            self.theta[self.support.indices] = self.values
            refresh = ranked.refresh(self.theta, self.support, options, 0)
            self.support = refresh.support
            self.values = self.theta[self.support.indices]
            self.moment = refresh.migration.apply(self.moment)

        def from_candidates(self) -> None:
            prepared = ranked.prepare_refresh(
                self.values, self.reservoir, self.support, options, self.selection
            )
            assert prepared is not None
            refresh = prepared()
            self.support, self.selection = refresh.support, refresh.selection
            self.reservoir.write(*refresh.left)
            self.values = refresh.values
            self.moment = refresh.migration.apply(self.moment)

    full, incremental = Side(), Side()
    times: dict[str, Timing] = {}
    sides = {"all weights": full.from_all, "candidates": incremental.from_candidates}
    results: dict[str, list[Timing]] = {name: [] for name in sides}
    for _ in range(rounds):
        full.move()
        incremental.move()
        for name, timing in interleave(sides, rounds=1, warm_up=0).items():
            results[name].append(timing)
    for name, timings in results.items():
        # The first refresh fills the reserve.
        medians = sorted(timing.median for timing in timings[1:])
        ratios = sorted(
            timing.median / baseline.median
            for timing, baseline in zip(timings[1:], results["all weights"][1:], strict=True)
        )
        middle = len(medians) // 2
        times[name] = Timing(
            medians[middle], medians[0], medians[-1], ratios[middle], ratios[0], ratios[-1]
        )
    return times


def main() -> None:
    parser = make_parser(__doc__, "refresh")
    parser.add_argument("--widths", type=int, nargs="+", default=[2048])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1 << 22, 1 << 27])
    parser.add_argument("--rounds", type=int, default=7)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    steps: dict[str, Any] = {}
    rows = []
    for width in settings.widths:
        for pair in PAIRS:
            timings = time_steps(width, pair, settings.rounds)
            steps[f"{width} {pair[0]}/{pair[1]}"] = {
                name: vars(timing) for name, timing in timings.items()
            }
            dense, never, full, every, tenth = (timing.median for timing in timings.values())
            hundredth = (99 * never + every) / 100
            # Of medians of ratios to dense, which change less than times where a machine is shared.
            step, with_refresh = (timings[name].ratio for name in (BETWEEN, EVERY))
            rows.append(
                [
                    f"{width}, {pair[0]}/{pair[1]}",
                    f"{dense:.0f}",
                    *(
                        f"{time:.0f} ({dense / time:.2f}×)"
                        for time in (never, full, every, tenth, hundredth)
                    ),
                    f"{(with_refresh - step) / step:.2f}",
                ]
            )
    head = [
        "h, sparsities",
        "dense",
        "between refreshes",
        "every step, all weights",
        "every step",
        "every 10",
        "every 100",
        "refresh / step",
    ]
    print("Milliseconds a step, refreshes counted (times dense):\n")
    print(markdown_table(head, rows))
    selections: dict[str, Any] = {}
    rows = []
    for size in settings.sizes:
        for pair in PAIRS:
            times = time_selection(size, pair, settings.rounds)
            selections[f"{size} {pair[0]}/{pair[1]}"] = {
                name: vars(timing) for name, timing in times.items()
            }
            full, incremental = times["all weights"].median, times["candidates"].median
            label = f"{size / 1e6:.0f} M, {pair[0]}/{pair[1]}"
            rows.append([label, f"{full:.0f}", f"{incremental:.0f}", f"{full / incremental:.1f}"])
    print("\nOne refresh of one tensor, milliseconds:\n")
    print(markdown_table(["weights, sparsities", "all weights", "candidates", "ratio"], rows))
    write_json(
        settings.output,
        {
            "environment": describe_environment(settings.threads),
            "steps": steps,
            "selections": selections,
        },
    )


if __name__ == "__main__":
    main()
