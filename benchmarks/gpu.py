"""Selection of 20 % of the weights, wrapped steps against a dense one, and peak memory, on a GPU.

Every library that sees a GPU is measured; without one, the benchmark ends with a message. Selection
is exact on all sides: A and B of `topkast.select`, or only the indices of the largest. Steps are
AdamW's on one square matrix, between refreshes and with a refresh in each step.
"""

from __future__ import annotations

import gc
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

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
NEVER = 10**9
# Steps by the key of their table, and the options of the wrapper.
WRAPPED: dict[str, dict[str, Any]] = {
    "step": {"fwd": FWD, "bwd": BWD, "refresh_every": NEVER},
    "step with a refresh": {"fwd": FWD, "bwd": BWD, "refresh_every": 1},
}
Sides = dict[str, Callable[[], Any]]


def synchronized(synchronize: Callable[[], None], run: Callable[[], Any]) -> Callable[[], None]:
    """Make a function that calls `run` and waits until the device has finished."""

    def wait() -> None:
        run()
        synchronize()

    return wait


def torch_sides(weights: int) -> tuple[str, dict[str, Sides], dict[str, int]]:
    import torch

    side = math.isqrt(weights)
    vector = torch.randn(weights, device="cuda")
    count = weights // 5

    synced = partial(synchronized, torch.cuda.synchronize)
    selection = {
        "torch.topk": synced(lambda: vector.abs().topk(count, sorted=False)),
        "topkast, PyTorch": synced(lambda: topkast.select(vector, fwd=FWD, bwd=BWD)),
    }
    peaks: dict[str, int] = {}

    def make_step(name: str, options: dict[str, Any] | None) -> Callable[[], None]:
        before = torch.cuda.memory_allocated()
        param = torch.nn.Parameter(torch.randn(side, side, device="cuda"))
        optimizer: Any = torch.optim.AdamW([("w", param)], 1e-6, fused=True)
        if options is not None:
            optimizer = topkast.wrap_optimizer(optimizer, **options)
        param.grad = torch.ones_like(param)
        optimizer.step()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        peaks[f"{name}, PyTorch"] = torch.cuda.max_memory_allocated() - before
        return synced(optimizer.step)

    dense = "torch.optim.AdamW(fused=True)"
    steps: dict[str, Sides] = {"step": {f"{dense}, PyTorch": make_step(dense, None)}}
    for task, options in WRAPPED.items():
        step = make_step("wrapped" + task.removeprefix("step"), options)
        steps.setdefault(task, {})["wrapped, PyTorch"] = step
    return torch.cuda.get_device_name(), {"selection": selection, **steps}, peaks


def cupy_sides(weights: int) -> tuple[str, dict[str, Sides], dict[str, int]]:
    import cupy

    side = math.isqrt(weights)
    vector = cupy.random.standard_normal(weights, dtype="f4")
    count = weights // 5

    synced = partial(synchronized, cupy.cuda.get_current_stream().synchronize)
    selection = {
        "cupy.argpartition": synced(lambda: cupy.argpartition(cupy.abs(vector), -count)[-count:]),
        "topkast, CuPy": synced(lambda: topkast.select(vector, fwd=FWD, bwd=BWD)),
    }
    pool = cupy.get_default_memory_pool()
    side_name = "wrapped, CuPy (a copy of θ)"
    steps: dict[str, Sides] = {}
    peaks: dict[str, int] = {}
    for task, options in WRAPPED.items():
        tx = topkast.wrap_optimizer(topkast.AdamW(1e-6), **options)
        pool.free_all_blocks()
        before = pool.used_bytes()
        params = {"w": vector[: side * side].reshape(side, side).copy()}
        grads = {"w": cupy.ones_like(params["w"])}
        state = tx.init(params)
        cupy.cuda.get_current_stream().synchronize()
        pool.free_all_blocks()
        tx.step(grads, state, params)
        peaks[f"wrapped{task.removeprefix('step')}, CuPy (a copy of θ)"] = (
            pool.total_bytes() - before
        )
        steps[task] = {side_name: synced(partial(tx.step, grads, state, params))}
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    return name, {"selection": selection, **steps}, peaks


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
    start = vector[: side * side].reshape(side, side)
    steps: dict[str, Sides] = {"step": {"optax.adamw, JAX": _jax_step(optax.adamw(1e-6), start)}}
    for task, options in WRAPPED.items():
        tx = topkast.wrap_optimizer(optax.adamw(1e-6), **options)
        steps.setdefault(task, {})["wrapped, JAX"] = _jax_step(tx, start)
    return jax.devices()[0].device_kind, {"selection": selection, **steps}, {}


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
    params_and_state = [params, tx.init(params)]

    def run() -> None:
        params_and_state[:] = step(grads, params_and_state[1], params_and_state[0])
        jax.block_until_ready(params_and_state)

    return run


def measure(
    make: Any, weights: int, rounds: int
) -> tuple[str, dict[str, int], dict[str, dict[str, Timing]]]:
    """Time the sides of one library, and release its memory."""
    try:
        device, sides_by_task, peaks = make(weights)
        timings = {task: interleave(sides, rounds=rounds) for task, sides in sides_by_task.items()}
        return device, peaks, timings
    finally:
        sides_by_task = None
        gc.collect()
        if torch := sys.modules.get("torch"):
            torch.cuda.empty_cache()
        if cupy := sys.modules.get("cupy"):
            cupy.get_default_memory_pool().free_all_blocks()


def main() -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = make_parser(__doc__, "<device>")
    parser.add_argument("--weights", type=int, default=10**8)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    device, timings, peaks = None, dict[str, dict[str, Timing]](), dict[str, int]()
    for make in (torch_sides, cupy_sides, jax_sides):
        library = make.__name__.partition("_")[0]
        try:
            device, library_peaks, measured = measure(make, options.weights, options.rounds)
        except Exception as error:  # a failing library must not discard the results of the others
            print(f"without {library}: {type(error).__name__}: {error}")
            continue
        peaks |= library_peaks
        for task, task_timings in measured.items():
            timings.setdefault(task, {}).update(task_timings)
    if device is None:
        print("No library sees a GPU: nothing was measured.")
        return
    lines = []
    for task, task_timings in timings.items():
        rows = [
            [name, f"{timing.median:.3f}", f"{timing.min:.3f}-{timing.max:.3f}"]
            for name, timing in task_timings.items()
        ]
        lines += [f"\n{task}, {options.weights:,} weights, {device}\n"]
        lines += [markdown_table(["side", "ms", "min-max"], rows)]
    lines += ["\npeak memory of a step: weights, gradient, state and temporary arrays\n"]
    lines += [
        markdown_table(
            ["side", "MB"], [[name, f"{peak / 1e6:,.0f}"] for name, peak in peaks.items()]
        )
    ]
    text = "\n".join(lines)
    print(text)
    stem = "-".join(device.lower().split())
    packages = ("numpy", "torch", "jax", "cupy")
    result = {
        "environment": describe_environment(options.threads, packages) | {"device": device},
        "weights": options.weights,
        "timings": {
            task: {name: vars(timing) for name, timing in task_timings.items()}
            for task, task_timings in timings.items()
        },
        "peak_bytes": peaks,
    }
    path = options.output.with_name(options.output.name.replace("<device>", stem))
    write_json(path, result)
    path.with_suffix(".md").write_text(text.strip() + "\n")


if __name__ == "__main__":
    main()
