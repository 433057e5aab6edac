"""Memory and time of a step of RigL that grows weights: the dense gradient, or blocks of it.

One linear layer without a bias trains with SGD. Each side takes a step before which the gradient
outside A is needed, in a process of its own, after a warm-up on a small layer. *Dense* is a dense
layer whose whole gradient is formed, as in other libraries; *masked* is the wrapper alone; *sparse*
is a sparse layer, which computes the gradient in blocks of rows. The peak is the growth of the
process from the building of the layer on. Times are of single steps and not comparable beyond
their order.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from typing import Any

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
from topkast.methods import RigL

SIDES = ("dense", "masked", "sparse")
BATCH = 64
WARM_UP_WIDTH = 1024
SPARSITIES = [0.9, 0.98]


def build(side: str, width: int, sparsity: float) -> tuple[Any, Any]:
    """The layer and its optimizer, which refreshes at every step."""
    if side == "sparse":
        from topkast_torch import SparseLinear

        layer: nn.Module = SparseLinear(
            width, width, bias=False, fwd=sparsity, bwd=sparsity, reservoir="seeded", init="default"
        )
    else:
        layer = nn.Linear(width, width, bias=False)
    inner = torch.optim.SGD(layer.named_parameters(), 1e-3)
    if side == "dense":
        return layer, inner
    return layer, topkast.wrap_optimizer(
        inner, fwd=sparsity, bwd=sparsity, method=RigL(), refresh_every=1
    )


def measure(side: str, width: int, sparsity: float) -> dict[str, float]:
    """Take two steps with one side; runs in a process of its own."""
    inputs = torch.randn(BATCH, width, requires_grad=True)
    targets = torch.randn(BATCH, width)

    def step(layer: Any, optimizer: Any, size: int) -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        (layer(inputs[:, :size]) - targets[:, :size]).square().mean().backward()
        optimizer.step()
        return 1e3 * (time.perf_counter() - start)

    layer, optimizer = build(side, WARM_UP_WIDTH, sparsity)
    for _ in range(3):  # compiles what it needs
        step(layer, optimizer, WARM_UP_WIDTH)
    del layer, optimizer
    gc.collect()
    start, size = restart_peak_memory(), width * width
    layer, optimizer = build(side, width, sparsity)
    built = peak_memory() - start
    times = [step(layer, optimizer, width) for _ in range(3)]
    return {
        "built": built / size,
        "peak": (peak_memory() - start) / size,
        "milliseconds": min(times),
    }


def main() -> None:
    parser = make_parser(__doc__, "largest_gradients")
    parser.add_argument("--width", type=int, default=10_000)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--sparsity", type=float, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    if settings.side is not None:
        result = measure(settings.side, settings.width, settings.sparsity)
        sys.stdout.write(json.dumps(result))
        return
    results: dict[str, dict[str, dict[str, float]]] = {}
    rows = []
    for sparsity in SPARSITIES:
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--sparsity", str(sparsity)]
            command += ["--width", str(settings.width), "--threads", str(settings.threads)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=1800)
            result = json.loads(output.stdout)
            results.setdefault(str(sparsity), {})[side] = result
            rows.append(
                [
                    f"{sparsity}",
                    side,
                    f"{result['built']:.2f}",
                    f"{result['peak']:.2f}",
                    f"{result['milliseconds']:.0f}",
                ]
            )
    print(f"{settings.width} × {settings.width} weights, float32, bytes a weight:\n")
    head = ["sparsity", "side", "peak when built", "peak", "a step that grows, ms"]
    print(markdown_table(head, rows))
    environment = describe_environment(settings.threads)
    write_json(
        settings.output,
        {"environment": environment, "width": settings.width, "sides": results},
    )


if __name__ == "__main__":
    main()
