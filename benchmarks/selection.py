"""Time of choosing A and B exactly, against PyTorch's own ways of finding the largest entries.

Every side ends with the same result: the ascending indices of A and those of B∖A (0.9/0.8). The
rivals: `torch.topk` of B, sorted, so that its head is A; `torch.kthvalue` for both thresholds;
`torch.sort` of everything. `torch.kthvalue` for the threshold of B alone, which is less than is
asked for, is shown too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from _harness import arguments, environment, interleave, table, write
from torch import Tensor

import topkast

FWD, BWD = 0.9, 0.8


def by_topkast(theta: Tensor) -> tuple[Tensor, Tensor]:
    support = topkast.select(theta, fwd=FWD, bwd=BWD)
    return support.active, support.exploring


def by_topk(theta: Tensor) -> tuple[Tensor, Tensor]:
    forward, backward = counts(theta)
    found = torch.topk(theta.abs(), backward, sorted=True).indices
    return found[:forward].sort().values, found[forward:].sort().values


def by_kthvalue(theta: Tensor) -> tuple[Tensor, Tensor]:
    size, (forward, backward) = theta.numel(), counts(theta)
    magnitudes = theta.abs()
    first = torch.kthvalue(magnitudes, size - forward + 1).values
    second = torch.kthvalue(magnitudes, size - backward + 1).values
    indices = torch.nonzero(magnitudes >= second).view(-1)
    active = magnitudes[indices] >= first
    return indices[active], indices[~active]


def by_sort(theta: Tensor) -> tuple[Tensor, Tensor]:
    forward, backward = counts(theta)
    order = torch.sort(theta.abs(), descending=True).indices
    return order[:forward].sort().values, order[forward:backward].sort().values


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found, expected.long())


def threshold_alone(theta: Tensor) -> Tensor:
    return torch.kthvalue(theta.abs(), theta.numel() - counts(theta)[1] + 1).values


def counts(theta: Tensor) -> tuple[int, int]:
    size = theta.numel()
    return size - int(FWD * size), size - int(BWD * size)


def main() -> None:
    parser = arguments(__doc__, "selection")
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
        agree = {name: all(map(same, run(theta), expected)) for name, run in sides.items()}
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
                f"{timing.least:.2f}-{timing.most:.2f}",
                f"{timing.ratio:.1f} ({timing.least_ratio:.1f}-{timing.most_ratio:.1f})",
                {True: "yes", False: "but for ties", None: "less"}[agree.get(name)],
            ]
            for name, timing in timings.items()
        ]
        print(table(["", "ms", "least-most", "of topkast", "same sets"], rows))
        records += [{"weights": size, "side": name, **vars(t)} for name, t in timings.items()]
    write(options.output, {"environment": environment(options.threads), "rows": records})


if __name__ == "__main__":
    main()
