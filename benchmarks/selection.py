"""Time of the exact selection of A and B, against PyTorch's functions for the largest entries.

All sides give the same result: the ascending indices of A and of B∖A (0.9/0.8). The rivals are
`torch.topk` of B, sorted, so that it starts with A; `torch.kthvalue` for both thresholds; and
`torch.sort` of all weights. `torch.kthvalue` for the threshold of B alone, which is only part of
the selection, is timed too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from _harness import describe_environment, interleave, make_parser, markdown_table, write_json
from torch import Tensor

import topkast

FWD, BWD = 0.9, 0.8


def by_topkast(theta: Tensor) -> tuple[Tensor, Tensor]:
    support = topkast.select(theta, fwd=FWD, bwd=BWD)
    return support.active, support.exploring


def by_topk(theta: Tensor) -> tuple[Tensor, Tensor]:
    forward, backward = counts(theta)
    largest = torch.topk(theta.abs(), backward, sorted=True).indices
    return largest[:forward].sort().values, largest[forward:].sort().values


def by_kthvalue(theta: Tensor) -> tuple[Tensor, Tensor]:
    size, (forward, backward) = theta.numel(), counts(theta)
    magnitudes = theta.abs()
    threshold_a = torch.kthvalue(magnitudes, size - forward + 1).values
    threshold_b = torch.kthvalue(magnitudes, size - backward + 1).values
    indices = torch.nonzero(magnitudes >= threshold_b).view(-1)
    is_active = magnitudes[indices] >= threshold_a
    return indices[is_active], indices[~is_active]


def by_sort(theta: Tensor) -> tuple[Tensor, Tensor]:
    forward, backward = counts(theta)
    order = torch.sort(theta.abs(), descending=True).indices
    return order[:forward].sort().values, order[forward:backward].sort().values


def is_same(indices: Tensor, expected: Tensor) -> bool:
    return torch.equal(indices, expected.long())


def threshold_alone(theta: Tensor) -> Tensor:
    return torch.kthvalue(theta.abs(), theta.numel() - counts(theta)[1] + 1).values


def counts(theta: Tensor) -> tuple[int, int]:
    size = theta.numel()
    return size - int(FWD * size), size - int(BWD * size)


def main() -> None:
    parser = make_parser(__doc__, "selection")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2**20, 2**24])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    for size in options.sizes:
        theta = torch.randn(size, generator=torch.Generator().manual_seed(0))
        sides = {
            "topkast.select": by_topkast,
            "torch.topk": by_topk,
            "torch.kthvalue, twice": by_kthvalue,
            "torch.sort": by_sort,
        }
        expected = by_topkast(theta)
        agrees = {name: all(map(is_same, run(theta), expected)) for name, run in sides.items()}
        runs: dict[str, Callable[[], object]] = {
            name: partial(run, theta) for name, run in sides.items()
        }
        runs["torch.kthvalue, B's threshold alone"] = partial(threshold_alone, theta)
        timings = interleave(runs, rounds=options.rounds, warm_up=1)
        print(f"\n{size / 1e6:.1f} M weights, float32, {FWD}/{BWD}\n")
        rows = [
            [
                name,
                f"{timing.median:.2f}",
                f"{timing.min:.2f}-{timing.max:.2f}",
                f"{timing.ratio:.1f} ({timing.min_ratio:.1f}-{timing.max_ratio:.1f})",
                {True: "yes", False: "except for ties", None: "only a threshold"}[agrees.get(name)],
            ]
            for name, timing in timings.items()
        ]
        print(markdown_table(["", "ms", "min-max", "of topkast", "same sets"], rows))
        records += [
            {"weights": size, "side": name, **vars(timing)} for name, timing in timings.items()
        ]
    write_json(
        options.output, {"environment": describe_environment(options.threads), "rows": records}
    )


if __name__ == "__main__":
    main()
