"""On a GPU: choosing 20 % of many weights, a wrapped step against a dense one, and peak memory.

Each library that sees a GPU takes part; where none does, this says so and ends. Selection is exact
on all sides: A and B of `topkast.select`, or the indices of the largest alone. Steps are those of
AdamW between refreshes, on one square matrix.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

from _harness import RESULTS, Timing, arguments, environment, interleave, table, write

import topkast

FWD, BWD = 0.9, 0.8
NEVER = 10**9
Sides = dict[str, Callable[[], Any]]


def torch_sides(weights: int) -> tuple[str, dict[str, Sides], dict[str, int]]:
    import torch

    side = math.isqrt(weights)
    vector = torch.randn(weights, device="cuda")
    count = weights // 5

    def waiting(run: Callable[[], Any]) -> Callable[[], Any]:
        def wait() -> None:
            run()
            torch.cuda.synchronize()

        return wait

    selection = {
        "torch.topk": waiting(lambda: vector.abs().topk(count, sorted=False)),
        "topkast, PyTorch": waiting(lambda: topkast.select(vector, fwd=FWD, bwd=BWD)),
    }
    steps: Sides = {}
    peaks = {}
    for name in ("torch.optim.AdamW(fused=True)", "wrapped"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        param = torch.nn.Parameter(torch.randn(side, side, device="cuda"))
        optimizer: Any = torch.optim.AdamW([("w", param)], 1e-6, fused=True)
        if name == "wrapped":
            optimizer = topkast.wrap_optimizer(optimizer, fwd=FWD, bwd=BWD, refresh_every=NEVER)
        param.grad = torch.ones_like(param)
        optimizer.step()
        steps[f"{name}, PyTorch"] = waiting(optimizer.step)
        peaks[f"{name}, PyTorch"] = torch.cuda.max_memory_allocated() - before
    return torch.cuda.get_device_name(), {"selection": selection, "step": steps}, peaks


def cupy_sides(weights: int) -> tuple[str, dict[str, Sides], dict[str, int]]:
    import cupy

    side = math.isqrt(weights)
    vector = cupy.random.standard_normal(weights, dtype="f4")
    count = weights // 5

    def waiting(run: Callable[[], Any]) -> Callable[[], Any]:
        def wait() -> None:
            run()
            cupy.cuda.get_current_stream().synchronize()

        return wait

    selection = {
        "cupy.argpartition": waiting(lambda: cupy.argpartition(cupy.abs(vector), -count)[-count:]),
        "topkast, CuPy": waiting(lambda: topkast.select(vector, fwd=FWD, bwd=BWD)),
    }
    tx = topkast.wrap_optimizer(topkast.AdamW(1e-6), fwd=FWD, bwd=BWD, refresh_every=NEVER)
    params = {"w": vector[: side * side].reshape(side, side)}
    grads = {"w": cupy.ones_like(params["w"])}
    state = tx.init(params)
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes()
    tx.step(grads, state, params)
    steps = {"wrapped, CuPy (a copy of θ)": waiting(lambda: tx.step(grads, state, params))}
    peaks = {"wrapped, CuPy (a copy of θ)": pool.total_bytes() - before}
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    return name, {"selection": selection, "step": steps}, peaks


def jax_sides(weights: int) -> tuple[str, dict[str, Sides], dict[str, int]]:
    import jax
    import jax.numpy as jnp
    import optax

    if jax.default_backend() != "gpu":
        raise RuntimeError("JAX sees no GPU")
    side = math.isqrt(weights)
    vector = jax.random.normal(jax.random.key(0), (weights,))
    count = weights // 5
    select = jax.jit(lambda vector: topkast.select(vector, fwd=FWD, bwd=BWD))
    top_k = jax.jit(lambda vector: jax.lax.top_k(jnp.abs(vector), count))
    selection = {
        "jax.lax.top_k": lambda: jax.block_until_ready(top_k(vector)),
        "topkast, JAX": lambda: jax.block_until_ready(select(vector)),
    }
    steps: Sides = {}
    for name in ("optax.adamw", "wrapped"):
        tx: Any = optax.adamw(1e-6)
        if name == "wrapped":
            tx = topkast.wrap_optimizer(tx, fwd=FWD, bwd=BWD, refresh_every=NEVER)
        steps[f"{name}, JAX"] = _jax_step(tx, vector[: side * side].reshape(side, side))
    return jax.devices()[0].device_kind, {"selection": selection, "step": steps}, {}


def _jax_step(tx: Any, start: Any) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp
    import optax

    def dense(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(getattr(tx, "step", dense), donate_argnums=(1, 2))
    params = {"w": jnp.array(start)}
    grads = {"w": jnp.ones_like(start)}
    held = [params, tx.init(params)]

    def run() -> None:
        held[:] = step(grads, held[1], held[0])
        jax.block_until_ready(held)

    return run


def main() -> None:
    parser = arguments(__doc__, "gpu")
    parser.add_argument("--weights", type=int, default=10**8)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    device, timings, peaks = None, dict[str, dict[str, Timing]](), dict[str, int]()
    for make in (torch_sides, cupy_sides, jax_sides):
        try:
            device, kinds, held = make(options.weights)
        except Exception as error:
            print(f"without {make.__name__.partition('_')[0]}: {error}")
            continue
        peaks |= held
        for kind, sides in kinds.items():
            timings.setdefault(kind, {}).update(interleave(sides, rounds=options.rounds))
        del kinds
        gc.collect()
    if device is None:
        print("No library sees a GPU: nothing was measured.")
        return
    lines = []
    for kind, of_kind in timings.items():
        rows = [
            [name, f"{one.median:.3f}", f"{one.least:.3f}-{one.most:.3f}"]
            for name, one in of_kind.items()
        ]
        lines += [f"\n{kind}, {options.weights:,} weights, {device}\n"]
        lines += [table(["side", "ms", "least-most"], rows)]
    lines += ["\npeak memory of a step\n"]
    lines += [table(["side", "MB"], [[name, f"{held / 1e6:,.0f}"] for name, held in peaks.items()])]
    text = "\n".join(lines)
    print(text)
    stem = "-".join(device.lower().split())
    packages = ("numpy", "torch", "jax", "cupy")
    result = {
        "environment": environment(options.threads, packages) | {"device": device},
        "weights": options.weights,
        "timings": {
            kind: {name: vars(one) for name, one in sides.items()}
            for kind, sides in timings.items()
        },
        "peak_bytes": peaks,
    }
    write(RESULTS / f"{stem}.json", result)
    (RESULTS / f"{stem}.md").write_text(text.strip() + "\n")


if __name__ == "__main__":
    main()
