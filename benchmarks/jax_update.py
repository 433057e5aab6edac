"""Time of a jitted optax update and its application, plain and wrapped, and of selection under jit.

`refresh_every` updates are timed together, so that the mean per update includes one refresh. The
rivals in selection end, like topkast, with the ascending indices of A and of B∖A (0.9/0.8).
`approx_max_k` is not exact: its row gives the share of B that it finds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from _harness import (
    Timing,
    describe_environment,
    interleave,
    make_parser,
    markdown_table,
    write_json,
)

import topkast

FWD, BWD = 0.9, 0.8
SPARSITIES = [(0.9, 0.8), (0.95, 0.9)]
REFRESH_EVERY = 100


class Training:
    """Updates of one weight matrix with a constant gradient."""

    def __init__(self, side: int, tx: Any, *, fused: bool = False, donate: bool = False) -> None:
        self.grads = jax.random.normal(jax.random.key(1), (side, side))
        self.params = jax.random.normal(jax.random.key(0), (side, side))
        self.state = tx.init(self.params)

        def update(grads: Any, state: Any, params: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.update = jax.jit(tx.step if fused else update, donate_argnums=(1, 2) if donate else ())

    def __call__(self) -> None:
        for _ in range(REFRESH_EVERY):
            self.params, self.state = self.update(self.grads, self.state, self.params)
        jax.block_until_ready((self.params, self.state))


def trainings(side: int) -> dict[str, Callable[[], Any]]:
    adamw = optax.adamw(1e-3)
    sides: dict[str, Callable[[], Any]] = {
        "optax.adamw, donated": Training(side, adamw, donate=True),
        "optax.adamw": Training(side, adamw),
    }
    for fwd, bwd in SPARSITIES:
        tx = topkast.wrap_optimizer(adamw, fwd=fwd, bwd=bwd, refresh_every=REFRESH_EVERY)
        for fused, name in ((False, "update + apply_updates"), (True, "step")):
            for donate in (True, False):
                label = f"{fwd}/{bwd} {name}{', donated' if donate else ''}"
                sides[label] = Training(side, tx, fused=fused, donate=donate)
    return sides


def by_topkast(theta: jax.Array) -> tuple[Any, Any]:
    support = topkast.select(theta, fwd=FWD, bwd=BWD)
    return support.active, support.exploring


def split_ranked(ranked: jax.Array, size: int) -> tuple[Any, Any]:
    """Split the indices of B, largest weight first, into sorted indices of A and of B∖A."""
    forward = size - int(FWD * size)
    return jnp.sort(ranked[:forward]), jnp.sort(ranked[forward:])


def by_top_k(theta: jax.Array) -> tuple[Any, Any]:
    size = theta.size
    return split_ranked(jax.lax.top_k(jnp.abs(theta), size - int(BWD * size))[1], size)


def by_argsort(theta: jax.Array) -> tuple[Any, Any]:
    size = theta.size
    order = jnp.argsort(jnp.abs(theta), descending=True)
    return split_ranked(order[: size - int(BWD * size)], size)


def by_approx_max_k(theta: jax.Array) -> tuple[Any, Any]:
    size = theta.size
    return split_ranked(jax.lax.approx_max_k(jnp.abs(theta), size - int(BWD * size))[1], size)


def top_k_alone(theta: jax.Array) -> Any:
    return jax.lax.top_k(jnp.abs(theta), theta.size - int(BWD * theta.size))


def share_of_b(selected: tuple[Any, Any], expected: tuple[Any, Any], size: int) -> float:
    """Return the share of the expected B that was selected, in percent."""
    mask = jnp.zeros(size, bool).at[jnp.concat(selected)].set(True)
    return 100 * float(jnp.mean(mask[jnp.concat(expected)]))


def print_rows(title: str, timings: dict[str, Timing], shares: dict[str, str], head: str) -> None:
    print(f"\n{title}\n")
    rows = [
        [
            name,
            f"{timing.median:.2f}",
            f"{timing.min:.2f}-{timing.max:.2f}",
            f"{timing.ratio:.2f} ({timing.min_ratio:.2f}-{timing.max_ratio:.2f})",
            shares.get(name, ""),
        ]
        for name, timing in timings.items()
    ]
    print(markdown_table(["", "ms", "min-max", "of the first", head], rows), flush=True)


def time_compilation(tensors: int, tx: Any) -> float:
    params = {str(index): jnp.ones((64, 64)) + index for index in range(tensors)}
    lowered = jax.jit(tx.update).lower(params, tx.init(params), params)
    start = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - start


def measure_compilation(counts: list[int]) -> list[dict[str, Any]]:
    adamw = optax.adamw(1e-3)
    sides = {
        "optax.adamw": adamw,
        "wrapped": topkast.wrap_optimizer(adamw, fwd=FWD, bwd=BWD, refresh_every=REFRESH_EVERY),
    }
    time_compilation(2, adamw)  # the first compilation of a process also starts the compiler
    records = [
        {"tensors": count, "side": name, "seconds": time_compilation(count, tx)}
        for count in counts
        for name, tx in sides.items()
    ]
    print("\nSeconds to compile an update of tensors of 64 × 64\n")
    rows = [[f"{row['side']}, {row['tensors']}", f"{row['seconds']:.2f}"] for row in records]
    print(markdown_table(["", "s"], rows), flush=True)
    return records


def measure_updates(size: int, rounds: int) -> list[dict[str, Any]]:
    side = int(size**0.5)
    timings = {
        name: replace(
            timing,
            median=timing.median / REFRESH_EVERY,
            min=timing.min / REFRESH_EVERY,
            max=timing.max / REFRESH_EVERY,
        )
        for name, timing in interleave(trainings(side), rounds=rounds, warm_up=1).items()
    }
    title = f"{side**2 / 1e6:.1f} M weights, one update of {REFRESH_EVERY} with one refresh"
    print_rows(title, timings, {}, "")
    return [{"weights": side**2, "side": name, **vars(timing)} for name, timing in timings.items()]


def measure_selection(size: int, rounds: int) -> list[dict[str, Any]]:
    theta = jax.random.normal(jax.random.key(0), (size,))
    methods: dict[str, Callable[[jax.Array], Any]] = {
        "topkast.select": jax.jit(by_topkast),
        "lax.top_k": jax.jit(by_top_k),
        "argsort": jax.jit(by_argsort),
        "lax.approx_max_k": jax.jit(by_approx_max_k),
    }
    expected = methods["topkast.select"](theta)
    shares = {
        name: f"{share_of_b(select(theta), expected, size):.2f} %"
        for name, select in methods.items()
    }
    methods["lax.top_k of B alone"] = jax.jit(top_k_alone)
    runs: dict[str, Callable[[], Any]] = {
        name: partial(lambda select, theta: jax.block_until_ready(select(theta)), select, theta)
        for name, select in methods.items()
    }
    timings = interleave(runs, rounds=rounds, warm_up=1)
    title = f"Selection under jit, {size / 1e6:.1f} M weights, {FWD}/{BWD}"
    print_rows(title, timings, shares, "share of B found")
    return [
        {"weights": size, "side": name, "found": shares.get(name), **vars(timing)}
        for name, timing in timings.items()
    ]


def main() -> None:
    parser = make_parser(__doc__, "jax_update")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2**22, 2**24])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = [row for size in options.sizes for row in measure_updates(size, options.rounds)]
    rows += [row for size in options.sizes for row in measure_selection(size, options.rounds)]
    compiling = measure_compilation([6, 48])
    packages = ("numpy", "jax", "optax")
    write_json(
        options.output,
        {
            "environment": describe_environment(options.threads, packages),
            "allocator": {key: value for key, value in os.environ.items() if "MALLOC" in key},
            "rows": rows,
            "compiling": compiling,
        },
    )


if __name__ == "__main__":
    main()
