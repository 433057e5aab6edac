"""Time of training steps with layers that read the same activations, one by one and together.

The networks are a transformer block with separate query, key and value and a gated feed-forward
network, as in many language models, and its two groups of layers alone. "One by one" are sparse
layers that are called in a row, "together" the same layers in a ``topkast_torch.SparseParallel``.
A step is forward, loss, backward and fused Adam, in float32, between refreshes.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from _harness import (
    describe_environment,
    interleave,
    make_parser,
    markdown_table,
    write_json,
)
from topkast_torch import SparseParallel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from training_step import STEPS, UNITS, Training, label, sparse, square

PAIRS = [(0.9, 0.8), (0.98, 0.95)]
TIME = 128  # tokens of a sequence


class OneByOne(SparseParallel):
    """The same layers, called in a row."""

    def forward(self, input: Any) -> tuple[Any, ...]:  # noqa: A002 - as in the base class
        return tuple(layer(input) for layer in self)


class GatedBlock(nn.Module):
    """A transformer block whose feed-forward network has a gate."""

    def __init__(self, group: type[SparseParallel], width: int, heads: int = 8) -> None:
        super().__init__()
        self.heads, hidden = heads, 8 * width // 3 // 8 * 8
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in = group(
            query=nn.Linear(width, width),
            key=nn.Linear(width, width),
            value=nn.Linear(width, width),
        )
        self.attention_out = nn.Linear(width, width)
        self.feed_in = group(gate=nn.Linear(width, hidden), up=nn.Linear(width, hidden))
        self.feed_out = nn.Linear(hidden, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, time, width = hidden.shape
        query, key, value = (
            projected.view(batch, time, self.heads, -1).transpose(1, 2)
            for projected in self.attention_in(self.attention_norm(hidden))
        )
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(mixed.transpose(1, 2).reshape(batch, time, width))
        gate, up = self.feed_in(self.feed_norm(hidden))
        fed: Tensor = self.feed_out(silu(gate) * up)
        return hidden + fed


class Projections(nn.Module):
    """Query, key and value alone."""

    def __init__(self, group: type[SparseParallel], width: int) -> None:
        super().__init__()
        self.layers = group(*(nn.Linear(width, width) for _ in range(3)))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat(self.layers(hidden), dim=-1)


NETWORKS = {"block": GatedBlock, "query, key and value": Projections}


def measure(
    network: str,
    width: int,
    tokens: int,
    pair: tuple[float, float],
    block: tuple[int, int] | None,
    rounds: int,
) -> list[dict[str, Any]]:
    inputs = torch.randn(-(-tokens // TIME), min(TIME, tokens), width, requires_grad=True)
    sides: dict[str, Training] = {}
    for name, group in (("one by one", OneByOne), ("together", SparseParallel)):
        make = partial(NETWORKS[network], group, width)
        sides[name] = sparse(make, pair, block, [], square, inputs)
    timings = interleave({name: side.run for name, side in sides.items()}, rounds=rounds)
    case = {"network": network, "width": width, "tokens": tokens, "sets": label(pair, block)}
    return [
        {**case, "side": name, **vars(timing.divided(STEPS))} for name, timing in timings.items()
    ]


def main() -> None:
    parser = make_parser(__doc__, "parallel_layers")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 768])
    parser.add_argument("--tokens", type=int, nargs="*", default=[16, 256, 2048])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records, lines = [], []
    cases = itertools.product(NETWORKS, options.widths, options.tokens, PAIRS, UNITS)
    for network, width, tokens, pair, block in cases:
        alone, together = measure(network, width, tokens, pair, block, options.rounds)
        records += [alone, together]
        ratio, slowest, fastest = (
            1 / together[name] for name in ("ratio", "max_ratio", "min_ratio")
        )
        lines.append(
            [
                network,
                str(width),
                str(tokens),
                together["sets"],
                f"{alone['median']:.2f}",
                f"{together['median']:.2f}",
                f"{ratio:.2f} ({slowest:.2f}-{fastest:.2f})",
            ]
        )
    head = ["network", "width", "tokens", "fwd/bwd", "ms one by one", "ms together"]
    print(markdown_table([*head, "times faster (min-max)"], lines), flush=True)
    environment = describe_environment(options.threads, ("numpy", "torch", "numba"))
    write_json(options.output, {"environment": environment, "rows": records})


if __name__ == "__main__":
    main()
