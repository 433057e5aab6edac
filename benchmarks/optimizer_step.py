"""Time of `step()`: AdamW wrapped by Top-KAST against AdamW on the dense tensor.

One matrix of 4.2 or 16.8 million float32 weights; dense AdamW in its three implementations, and
the same three inside the wrapper. Between refreshes a wrapped step gathers the gradient on B,
adds the exploration gradient, steps on the compact vector, and writes A back. Two costs lie
outside `step()` or are shared by many steps: zeroing the gradient outside B during backward, and
the refresh, once in `refresh_every` updates. The benchmark times them too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _harness import (
    Timing,
    describe_environment,
    interleave,
    make_parser,
    markdown_table,
    write_json,
)
from torch.nn import Parameter

import topkast

IMPLEMENTATIONS: dict[str, Any] = {
    "default": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
SPARSITIES = [(0.9, 0.8), (0.95, 0.9)]


def make(side: int, options: dict[str, Any], pair: tuple[float, float] | None) -> Any:
    generator = torch.Generator().manual_seed(0)
    param = Parameter(torch.randn(side, side, generator=generator))
    optimizer: Any = torch.optim.AdamW([param], 1e-3, **options)
    if pair:
        optimizer = topkast.wrap_optimizer(optimizer, fwd=pair[0], bwd=pair[1], refresh_every=10**9)
    param.grad = torch.randn(side, side, generator=generator)
    return optimizer


def step_with_refresh(optimizer: Any) -> Callable[[], None]:
    """Make a step that ends with a refresh."""

    def run() -> None:
        optimizer.param_groups[0]["refresh_every"] = 1
        optimizer.step()
        optimizer.param_groups[0]["refresh_every"] = 10**9

    return run


def zeroing(optimizer: Any) -> Callable[[], None]:
    """Make the work that the wrapper adds to backward: zero the gradient outside B."""
    param = optimizer.param_groups[0]["params"][0]
    (hook,) = param._post_accumulate_grad_hooks.values()

    def run() -> None:
        assert optimizer is not None  # the hook refers to it weakly
        param.grad.view(-1)[:1].add_(0)  # the hook skips a gradient that has not changed
        hook(param)

    return run


def step_with_zeroing(optimizer: Any) -> Callable[[], None]:
    """Make a step after zeroing the gradient outside B."""
    zero_outside_b = zeroing(optimizer)

    def run() -> None:
        zero_outside_b()
        optimizer.step()

    return run


def main() -> None:
    parser = make_parser(__doc__, "optimizer_step")
    parser.add_argument("--sides", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--rounds", type=int, default=51)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    for side in options.sides:
        plain = {name: make(side, flags, None) for name, flags in IMPLEMENTATIONS.items()}
        sides = {f"dense, {name}": optimizer.step for name, optimizer in plain.items()}
        for pair in SPARSITIES:
            label = f"{pair[0]}/{pair[1]}"
            for name, flags in IMPLEMENTATIONS.items():
                optimizer = make(side, flags, pair)
                sides[f"{label}, {name}"] = optimizer.step
            sides[f"{label}, fused, with a refresh"] = step_with_refresh(make(side, flags, pair))
            sides[f"{label}, zeroing of the gradient"] = zeroing(make(side, flags, pair))
            sides[f"{label}, fused, and the zeroing"] = step_with_zeroing(make(side, flags, pair))
        timings = interleave(sides, rounds=options.rounds)
        print_timings(side, timings, timings["dense, foreach"], timings["dense, fused"])
        records += [
            {"weights": side**2, "side": name, **vars(timing)} for name, timing in timings.items()
        ]
    write_json(
        options.output, {"environment": describe_environment(options.threads), "rows": records}
    )


def print_timings(side: int, timings: dict[str, Timing], foreach: Timing, fused: Timing) -> None:
    print(f"\n{side**2 / 1e6:.1f} M weights, float32\n")
    rows = [
        [
            name,
            f"{timing.median:.2f}",
            f"{timing.min:.2f}-{timing.max:.2f}",
            f"{timing.ratio:.2f} ({timing.min_ratio:.2f}-{timing.max_ratio:.2f})",
            f"{timing.median / foreach.median:.2f}",
            f"{timing.median / fused.median:.2f}",
        ]
        for name, timing in timings.items()
    ]
    head = ["step", "ms", "min-max", "of dense default", "of dense foreach", "of dense fused"]
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()
