"""Time of a whole training step, sparse against dense: forward, loss, backward and optimizer.

The networks are MLPs of three hidden layers, a residual convolutional network on images of 32×32,
and a transformer block, all float32 with fused Adam. Rival libraries, which keep one set (A = B),
are measured if they are installed (see benchmarks/_peers.py) and have the layers, and so is
PyTorch's own CSR product. The last layer of the MLPs is dense on all sides. Several steps between
refreshes are timed in a row, as in training. A refresh is the difference between a step with one
and a step without, each with the forward pass that follows; from it come the times with refreshes
counted. One batch is repeated at a low learning rate, so that little changes: benchmarks/refresh.py
counts refreshes on a real trajectory. Then the bytes of gradient and optimizer state are counted.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import _peers
import torch
from _harness import (
    Timing,
    describe_environment,
    interleave,
    make_parser,
    markdown_table,
    write_json,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

import topkast

PAIRS = [(0.8, 0.5), (0.9, 0.8), (0.95, 0.9), (0.98, 0.95), (0.9, 0.9), (0.95, 0.95), (0.98, 0.98)]
NEVER = 10**9
UNITS = [None, (4, 1)]  # single weights, and units of four rows
STEPS = 4  # timed together
INTERVALS = (1, 10, 100)  # steps between refreshes that are counted


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(784, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = torch.relu(images + self.body(images))
        return output


def residual() -> nn.Sequential:
    """Make a small ResNet: each stage halves the image and doubles the channels."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)]
    channels = 64
    for stage in range(3):
        if stage:
            layers.append(nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False))
            channels *= 2
        layers.append(Residual(channels))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class TransformerBlock(nn.Module):
    """A transformer block of width 768, with 3072 hidden features."""

    def __init__(self, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_in, self.feed_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, time, width = hidden.shape
        split = self.attention_in(self.attention_norm(hidden))
        split = split.view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(mixed.transpose(1, 2).reshape(batch, time, width))
        fed: Tensor = self.feed_out(gelu(self.feed_in(self.feed_norm(hidden))))
        return hidden + fed


def classify(model: nn.Module, inputs: Tensor) -> Tensor:
    return cross_entropy(model(inputs), torch.arange(len(inputs)) % 10)


def square(model: nn.Module, inputs: Tensor) -> Tensor:
    mean_square: Tensor = model(inputs).square().mean()
    return mean_square


class Training:
    """A network, its optimizer, and one batch."""

    def __init__(self, model: nn.Module, optimizer: Any, loss: Any, inputs: Tensor) -> None:
        self.model, self.optimizer, self.loss, self.inputs = model, optimizer, loss, inputs

    def run(self) -> None:
        """Take `STEPS` steps in a row, as in training."""
        for _ in range(STEPS):
            self()

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.model, self.inputs).backward()
        self.optimizer.step()

    def step_and_forward(self, *, refreshes: bool) -> None:
        """Take a step that ends with a refresh or without one, and the forward pass after it."""
        self.optimizer.param_groups[0]["refresh_every"] = 1 if refreshes else NEVER
        self()
        self.optimizer.param_groups[0]["refresh_every"] = NEVER
        self.loss(self.model, self.inputs)

    def time_refresh(self, rounds: int) -> float:
        """Milliseconds that a refresh adds to a step."""
        sides = {
            "without": lambda: self.step_and_forward(refreshes=False),
            "with": lambda: self.step_and_forward(refreshes=True),
        }
        timings = interleave(sides, rounds=rounds)
        return timings["with"].median - timings["without"].median

    def count_bytes(self) -> dict[str, int]:
        """Count bytes after a step."""
        self()
        params = list(self.model.parameters())
        entries = [
            entry
            for param in params
            for entry in self.optimizer.state[param].values()
            if isinstance(entry, Tensor)
        ]
        gradients = [param.grad for param in params if param.grad is not None]
        return {
            "gradient": sum(grad.nbytes for grad in gradients),
            "state": sum(entry.nbytes for entry in entries),
            "parameters": sum(param.nbytes for param in params),
        }


def adam(params: Any) -> torch.optim.Optimizer:
    # Overfitting one batch leads to subnormal gradients, which are slow: a low rate avoids that.
    return torch.optim.Adam(params, 1e-6, fused=True)


def sparse(
    make: Callable[[], nn.Module],
    pair: tuple[float, float],
    block: tuple[int, int] | None,
    dense: list[str],
    *loss_and_inputs: Any,
) -> Training:
    torch.manual_seed(0)
    model = make()
    fwd, bwd = pair
    optimizer = topkast.wrap_optimizer(
        adam(model.named_parameters()),
        fwd=fwd,
        bwd=bwd,
        refresh_every=NEVER,
        dense=dense,
        block=block,
    )
    topkast.sparsify(model, optimizer)
    return Training(model, optimizer, *loss_and_inputs)


def dense(make: Callable[[], nn.Module], *loss_and_inputs: Any) -> Training:
    torch.manual_seed(0)
    model = make()
    return Training(model, adam(model.parameters()), *loss_and_inputs)


def measure(
    title: str,
    make: Callable[[], nn.Module],
    pairs: list[tuple[float, float]],
    kept_dense: list[str],
    loss: Any,
    inputs: Tensor,
    rounds: int,
) -> list[dict[str, Any]]:
    sides: dict[str, Any] = {"dense": dense(make, loss, inputs)}
    limits: dict[str, float] = {}
    for block in UNITS:
        for pair in pairs:
            name = label(pair, block)
            sides[name] = sparse(make, pair, block, kept_dense, loss, inputs)
            limits[name] = flop_limit(pair)
    for name, convert in _peers.available().items():
        for sparsity in (0.9, 0.95, 0.98):
            torch.manual_seed(0)
            try:
                model: Any = convert(make(), sparsity, kept_dense, inputs)
            except TypeError as error:
                print(f"without {name}: {error}")
                break
            side = Training(model, adam(model.parameters()), loss, inputs)
            sides[f"{name}, {sparsity} (A = B)"] = side
    runs = {name: side.run for name, side in sides.items()}
    timings = {
        name: timing.divided(STEPS) for name, timing in interleave(runs, rounds=rounds).items()
    }
    refreshes = {
        name: side.time_refresh(max(rounds // 2, 3))
        for name, side in sides.items()
        if name != "dense" and "(A = B)" not in name
    }
    print_timings(title, timings, refreshes, limits)
    return [
        {"network": title, "side": name, "refresh_ms": refreshes.get(name), **vars(timing)}
        for name, timing in timings.items()
    ]


def label(pair: tuple[float, float], block: tuple[int, int] | None) -> str:
    return f"{pair[0]}/{pair[1]}" + ("" if block is None else f", {block[0]} × {block[1]}")


def flop_limit(pair: tuple[float, float]) -> float:
    """Times faster than dense by the count of multiplications: two products on A, one on B."""
    forward, backward = (1 - sparsity for sparsity in pair)
    return 3 / (2 * forward + backward)


def print_timings(
    title: str,
    timings: dict[str, Timing],
    refreshes: dict[str, float],
    limits: dict[str, float],
) -> None:
    print(f"\n{title}\n")
    rows, dense_ms = [], timings["dense"].median
    for name, timing in timings.items():
        refresh = refreshes.get(name)
        counted = [
            "" if refresh is None else f"{dense_ms / (timing.median + refresh / interval):.2f}"
            for interval in INTERVALS
        ]
        rows.append(
            [
                name,
                f"{timing.median:.1f}",
                f"{timing.min:.1f}-{timing.max:.1f}",
                f"{1 / timing.ratio:.2f} ({1 / timing.max_ratio:.2f}-{1 / timing.min_ratio:.2f})",
                f"{1 / timing.ratio / limits[name]:.0%}" if name in limits else "",
                "" if refresh is None else f"{refresh:.0f}",
                *counted,
            ]
        )
    head = ["fwd/bwd", "ms a step", "min-max", "times faster than dense", "of the FLOP limit"]
    head += ["ms a refresh"]
    head += [f"× dense, refresh {interval}" for interval in INTERVALS]
    print(markdown_table(head, rows), flush=True)


def measure_bytes(width: int) -> list[dict[str, Any]]:
    inputs = torch.randn(64, 784)
    rows: list[dict[str, Any]] = []
    for pair in [None, (0.8, 0.5), (0.9, 0.8), (0.95, 0.9), (0.98, 0.95)]:
        side = (
            dense(lambda: mlp(width), classify, inputs)
            if pair is None
            else sparse(lambda: mlp(width), pair, None, ["6.*"], classify, inputs)
        )
        nbytes = side.count_bytes()
        if pair is not None:
            nbytes["with the optimizer"] = sum(
                row.held_bytes for row in topkast.summary(side.optimizer).tensors
            )
        rows.append({"side": "dense" if pair is None else f"{pair[0]}/{pair[1]}", **nbytes})
    print(f"\nBytes of an MLP of three hidden layers of {width}, after a step\n")
    first = rows[0]
    first["with the optimizer"] = first["gradient"] + first["state"] + first["parameters"]
    columns = ["gradient", "state", "parameters", "with the optimizer"]
    print(
        markdown_table(
            ["fwd/bwd", "gradient", "optimizer state", "Parameters", "all, with θ and indices"],
            [
                [
                    row["side"],
                    *(f"{row[column]:,} ({row[column] / first[column]:.3f})" for column in columns),
                ]
                for row in rows
            ],
        ),
        flush=True,
    )
    return rows


def main() -> None:
    parser = make_parser(__doc__, "training_step")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", choices=["mlp", "convolution", "transformer", "bytes"])
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--batches", type=int, nargs="*", default=[16, 256])
    options = parser.parse_args()
    _peers.set_num_threads(options.threads)
    for name, error in _peers.missing().items():
        print(f"without {name}: {error}")
    records: list[dict[str, Any]] = []
    if options.only in (None, "mlp"):
        for width, batch in itertools.product(options.widths, options.batches):
            title = f"MLP 784-{width}-{width}-{width}-10, batch {batch}"
            make = lambda width=width: mlp(width)  # noqa: E731
            inputs = torch.randn(batch, 784)
            records += measure(title, make, PAIRS, ["6.*"], classify, inputs, options.rounds)
            gc.collect()
    if options.only in (None, "convolution"):
        inputs = torch.randn(32, 3, 32, 32)
        title = "Residual network of 64 to 256 channels, 32 images of 32×32"
        kept_dense = ["0.*", f"{len(residual()) - 1}.*"]
        records += measure(
            title, residual, PAIRS, kept_dense, classify, inputs, options.rounds // 2
        )
    if options.only in (None, "transformer"):
        inputs = torch.randn(8, 256, 768, requires_grad=True)
        title = "Transformer block, width 768, 2,048 tokens"
        records += measure(title, TransformerBlock, PAIRS, [], square, inputs, options.rounds // 2)
    byte_rows = measure_bytes(2048) if options.only in (None, "bytes") else []
    packages = ("numpy", "torch", "numba", "sparseprop", "sparselab")
    result = {"environment": describe_environment(options.threads, packages), "rows": records}
    write_json(options.output, {**result, "bytes": byte_rows})


if __name__ == "__main__":
    main()
