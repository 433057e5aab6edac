"""A linear layer larger than memory: built and trained without its dense weights.

The layer has `rows` × `rows` weights, of which fwd and bwd leave a few in A and in B. Its weights
outside B are generated from a seed. Prints the time to build it (one pass over all weights), the
time of a step and of a refresh, and the peak of the process.
"""

from __future__ import annotations

import statistics
import time

import topkast_torch
import torch
from _harness import describe_environment, make_parser, markdown_table, peak_memory, write_json

import topkast
from topkast.reservoirs import Init

BATCH = 16
LATENT = 8  # independent inputs, so that few weights of a row can predict its target


def main() -> None:
    parser = make_parser(__doc__, "larger_than_memory")
    parser.add_argument("--rows", type=int, default=32_000, help="141422 for 20 billion weights")
    parser.add_argument("--fwd", type=float, default=0.999)
    parser.add_argument("--bwd", type=float, default=0.998)
    parser.add_argument("--init", default="xavier_normal")
    parser.add_argument("--lr", type=float, default=1e-3, help="times the scale of the weights")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--refresh-every", type=int, default=10)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    rows, size = settings.rows, settings.rows**2
    start = time.perf_counter()
    layer = topkast_torch.SparseLinear(
        rows,
        rows,
        bias=False,
        fwd=settings.fwd,
        bwd=settings.bwd,
        reservoir="seeded",
        init=settings.init,
        seed=0,
    )
    built = time.perf_counter() - start
    inner = torch.optim.Adam(
        layer.named_parameters(),
        settings.lr * Init.of(settings.init, (rows, rows)).scale,
        fused=True,
    )
    optimizer = topkast.wrap_optimizer(
        inner, fwd=settings.fwd, bwd=settings.bwd, refresh_every=settings.refresh_every
    )
    inputs_of, targets_of = (torch.randn(LATENT, rows) / LATENT**0.5 for _ in range(2))
    losses: list[float] = []
    steps: list[float] = []
    refreshes: list[float] = []
    training = time.perf_counter()
    for update in range(1, settings.updates + 1):
        latent = torch.randn(BATCH, LATENT)
        inputs, target = latent @ inputs_of, latent @ targets_of
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = (layer(inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
        elapsed = time.perf_counter() - begin
        (steps if update % settings.refresh_every else refreshes).append(elapsed)
        losses.append(float(loss.detach()))
        if update % 20 == 0:
            print(f"update {update}: loss {losses[-1]:.4f}, {elapsed:.2f} s", flush=True)
    total = time.perf_counter() - training
    summary = topkast.summary(optimizer)
    measured = {
        "weights": size,
        "|A|": summary.tensors[0].forward,
        "|B|": summary.tensors[0].backward,
        "building, s": built,
        "step, median, s": statistics.median(steps),
        "step with a refresh, median, s": statistics.median(refreshes),
        "step with a refresh, max, s": max(refreshes),
        "all updates, s": total,
        "first loss": losses[0],
        "last loss": losses[-1],
        "bytes held": summary.total_bytes,
        "peak of the process, bytes": peak_memory(),
        "dense Adam would hold, bytes": 16 * size,
    }
    table = [
        [name, f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"]
        for name, value in measured.items()
    ]
    print(markdown_table(["", f"{settings.fwd}/{settings.bwd}"], table))
    print(summary)
    environment = describe_environment(settings.threads)
    options = {name: getattr(settings, name) for name in ("rows", "fwd", "bwd", "init", "updates")}
    options["refresh_every"] = settings.refresh_every
    result = {"environment": environment, "options": options, "measured": measured}
    write_json(settings.output, result | {"held_parts": summary.held_parts})


if __name__ == "__main__":
    main()
