"""Memory of one linear layer in training with Adam, by where the weights outside B are kept.

Each side trains in a process of its own, with a refresh at every step. Two figures for each side:
the bytes that it holds after the last step (weights, gradients, optimizer state, sets and their
layouts, the reservoir: ``topkast.summary``), and the growth of the process at its peak, from the
building of the layer to the last step, temporary arrays and activations included. Both are
bytes a weight. Files of the disk reservoir are counted apart; mapped pages of them that the
process reads count in its peak, though the system may drop them at any time.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from typing import Any

import topkast_torch
import torch
from _harness import (
    describe_environment,
    make_parser,
    markdown_table,
    peak_memory,
    restart_peak_memory,
    write_json,
)
from torch import nn

import topkast

PAIRS = [(0.9, 0.8), (0.95, 0.9), (0.99, 0.98)]
SIDES = ("dense", "masked", "device", "host", "disk", "seeded")
BATCH = 32
WARM_UP_WIDTH = 2048
LEARNING_RATE = 1e-4  # a hundredth of the largest weight


def build(side: str, width: int, pair: tuple[float, float], folder: str) -> tuple[Any, Any]:
    """The layer and its optimizer."""
    options: Any = {"fwd": pair[0], "bwd": pair[1], "refresh_every": 1}
    if side == "dense":
        layer: nn.Module = nn.Linear(width, width, bias=False)
        return layer, torch.optim.Adam(layer.parameters(), LEARNING_RATE, fused=True)
    if side == "masked":
        layer = nn.Linear(width, width, bias=False)
    else:
        kind: Any = "seeded" if side == "seeded" else "device"
        layer = topkast_torch.SparseLinear(
            width, width, bias=False, fwd=pair[0], bwd=pair[1], reservoir=kind, init="default"
        )
    inner = torch.optim.Adam(layer.named_parameters(), LEARNING_RATE, fused=True)
    if side in ("host", "disk"):
        options["reservoir"] = side
    if side == "disk":
        options["reservoir_path"] = folder
    return layer, topkast.wrap_optimizer(inner, **options)


def measure(side: str, width: int, pair: tuple[float, float], steps: int) -> dict[str, float]:
    """Train one side; runs in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = torch.randn(BATCH, width, requires_grad=True)
        layer, optimizer = build(side, WARM_UP_WIDTH, pair, folder)
        for _ in range(3):  # compiles what it needs
            optimizer.zero_grad()
            layer(inputs[:, :WARM_UP_WIDTH]).square().mean().backward()
            optimizer.step()
        del layer, optimizer
        gc.collect()
        start, size = restart_peak_memory(), width * width
        layer, optimizer = build(side, width, pair, folder)
        for _ in range(steps):
            optimizer.zero_grad()
            layer(inputs).square().mean().backward()
            optimizer.step()
        growth = peak_memory() - start
        if side == "dense":
            param = next(layer.parameters())
            held = param.nbytes * 2 + sum(entry.nbytes for entry in optimizer.state[param].values())
            return {"held": held / size, "peak": growth / size, "disk": 0.0}
        summary = topkast.summary(optimizer)
        parts = {name: count / size for name, count in summary.held_parts.items()}
        return {
            "held": summary.total_bytes / size,
            "peak": growth / size,
            "disk": summary.disk_bytes / size,
            **parts,
        }


def main() -> None:
    parser = make_parser(__doc__, "layer_memory")
    parser.add_argument("--width", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--pair", type=float, nargs=2, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    if settings.side is not None:
        result = measure(settings.side, settings.width, tuple(settings.pair), settings.steps)
        sys.stdout.write(json.dumps(result))
        return
    results: dict[str, dict[str, dict[str, float]]] = {}
    for pair in PAIRS:
        rows = []
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--pair", *map(str, pair)]
            command += ["--width", str(settings.width), "--steps", str(settings.steps)]
            command += ["--threads", str(settings.threads)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=1800)
            result = json.loads(output.stdout)
            results.setdefault(f"{pair[0]}/{pair[1]}", {})[side] = result
            rest = (f"{result.get(part, 0):.2f}" for part in ("reserve", "reservoir", "disk"))
            rows.append([side, f"{result['held']:.2f}", f"{result['peak']:.2f}", *rest])
        density = 1 - pair[1]
        print(
            f"\n{pair[0]}/{pair[1]}: {settings.width} × {settings.width} weights, bytes a weight "
            f"(26 · (D+M) = {26 * density:.2f})\n"
        )
        head = ["side", "held", "peak of the process", "reserve", "reservoir", "on a disk"]
        print(markdown_table(head, rows))
    environment = describe_environment(settings.threads)
    write_json(
        settings.output,
        {
            "environment": environment,
            "width": settings.width,
            "steps": settings.steps,
            "bytes a weight": results,
        },
    )


if __name__ == "__main__":
    main()
