"""One process of a run on several hosts, in its own module so that a new process can import it."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import topkast_jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import topkast
from topkast.backends import backend_of

UPDATES = 20
AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
SPECS = {
    "rows": P("x", None),
    "columns": P(None, "x"),
    "replicated": P(),
    "both": P("x", "y"),
}
METHODS: dict[str, Callable[[], Any]] = {
    "magnitude": lambda: None,
    "random": lambda: None,
    "rigl": topkast.methods.RigL,
    "set": topkast.methods.SET,
}


def make_mesh(axes: str, spec: str, devices: Any) -> Any:
    shape, names = ((2, 2), ("x", "y")) if spec == "both" else ((4,), ("x",))
    types = (AXES[axes],) * len(names)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices[:4])


def values() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "w": generator.standard_normal((64, 80)).astype(np.float32),
        "b": np.zeros(80, np.float32),
    }


def shard(tree: Any, mesh: Any, spec: P) -> Any:
    """Put arrays on a mesh: matrices by `spec`, and replicas of the others."""
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(
            leaf.shape, NamedSharding(mesh, spec if leaf.ndim == 2 else P()), lambda i: leaf[i]
        ),
        tree,
    )


@cache
def wrap(kind: str, refresh_every: int) -> Any:
    return topkast.wrap_optimizer(
        optax.adamw(0.1),
        fwd=0.9,
        bwd=0.9 if kind in ("rigl", "set") else 0.8,
        refresh_every=refresh_every,
        explore="random" if kind == "random" else "magnitude",
        method=METHODS[kind](),
    )


def loss(alpha: Any, inputs: jax.Array, outputs: jax.Array) -> jax.Array:
    """A loss whose sums over the batch are of integers, so that their order does not matter."""
    product = jnp.sum((inputs @ alpha["w"]) * outputs) / 64
    return product + sum(jnp.sum((leaf - 0.1) ** 2) for leaf in alpha.values()) / 2


@cache
def make_step(tx: Any, treedef: Any, shardings: tuple[Any, ...]) -> Any:
    """Compile a step whose results have the given shardings; JAX chooses them if there are none."""

    def step(params: Any, state: Any, inputs: jax.Array, outputs: jax.Array) -> Any:
        alpha = topkast.forward_params(params, state)
        grads = jax.grad(loss)(alpha, inputs, outputs)
        return tx.step(grads, state, params)

    layout = treedef.unflatten(shardings) if shardings else None
    return jax.jit(step, out_shardings=layout)


def batch(number: int) -> Any:
    generator = np.random.default_rng(number)
    return tuple(
        generator.integers(-1, 2, (32, columns)).astype(np.float32) for columns in (64, 80)
    )


def run(tx: Any, params: Any, state: Any, mesh: Any, updates: range) -> tuple[Any, Any]:
    """Train on batches that are cut over the devices of the first mesh axis."""
    leaves, treedef = jax.tree.flatten((params, state))
    # With explicit axes, results have shardings of their own, and the product of a cut batch would
    # have to be given one.
    is_automatic = mesh is not None and AxisType.Explicit not in mesh.axis_types
    shardings = tuple(leaf.sharding for leaf in leaves) if is_automatic else ()
    step = make_step(tx, treedef, shardings)
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        for number in updates:
            inputs = batch(number)
            if mesh is not None:
                inputs = shard(inputs, mesh, P("x") if is_automatic else P())
            params, state = step(params, state, *inputs)
    return params, state


def train(case: str, devices: Any) -> tuple[Any, Any, Any]:
    """Train a case, `axes-spec-kind-refresh_every`; returns mesh, parameters and state."""
    axes, spec, kind, refresh_every = case.split("-")
    tx, mesh = wrap(kind, int(refresh_every)), make_mesh(axes, spec, devices)
    params = shard(values(), mesh, SPECS[spec])
    with jax.set_mesh(mesh):
        state = tx.init(params)
    return mesh, *run(tx, params, state, mesh, range(UPDATES))


def replicate(tree: Any, mesh: Any) -> Any:
    return jax.device_put(tree, NamedSharding(mesh, P()))


def as_dict(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def message_of(error: type[Exception], function: Callable[[], Any]) -> str:
    try:
        function()
    except error as raised:
        return str(raised)
    raise AssertionError(f"{error.__name__} was not raised")


def checkpoint(path: Path, tree: Any) -> Any:
    """Save a tree from all processes, and restore it into all."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, tree)


def inspect(folder: Path) -> dict[str, Any]:
    """Everything but training: returns what was seen."""
    rank, devices = jax.process_index(), jax.devices()
    mesh = make_mesh("auto", "rows", devices)
    tx, params = wrap("magnitude", 1), shard(values(), mesh, SPECS["rows"])
    state = tx.init(params)
    params, state = run(tx, params, state, mesh, range(UPDATES // 2))
    seen: dict[str, Any] = {}

    found = checkpoint(folder / "half", {"params": params, "state": state})
    resumed = run(tx, found["params"], found["state"], mesh, range(UPDATES // 2, UPDATES))
    np.savez(folder / f"resumed_{rank}.npz", **as_dict(replicate(resumed, mesh)))

    unreadable = topkast.UnsupportedTensorError
    seen["summary"] = message_of(unreadable, lambda: topkast.summary(state, params))
    seen["masks"] = message_of(unreadable, lambda: topkast.masks(state, params))
    seen["sparsify"] = message_of(unreadable, lambda: topkast_jax.sparsify(params, state, only="w"))
    assert not topkast_jax.sparsify(params, state).layouts
    assert topkast.dense_params(state, params)["w"] is params["w"]
    assert backend_of(params["w"]).host(params["w"]) is None
    masks = replicate(jax.jit(topkast.masks)(state, params), mesh)["w"]
    copies, copied_state = replicate((params, state), mesh)
    if rank == 0:  # no process waits for another: the others do not call these
        assert np.array_equal(topkast.masks(copied_state, copies)["w"].forward, masks.forward)
        seen["table"] = str(topkast.summary(copied_state, copies))

    moved = params | {"w": params["w"] * 2}
    _, stale = run(tx, moved, state, mesh, range(1))
    stale = replicate(stale, mesh)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        topkast.summary(stale, copies)
    assert [warning.category for warning in caught] == [topkast.WeightsMovedWarning]

    bad = values()
    bad["w"][3, 3] = np.nan
    seen["nan"] = message_of(
        topkast.NonFiniteError, lambda: tx.init(shard(bad, mesh, SPECS["rows"]))
    )
    bad = values()
    bad["b"][7] += rank
    seen["replicas"] = message_of(
        topkast.MismatchError, lambda: tx.init(shard(bad, mesh, SPECS["rows"]))
    )
    local = params | {"b": jnp.asarray(bad["b"])}  # an array of each process
    seen["local"] = message_of(topkast.MismatchError, lambda: tx.init(local))
    seeded = topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.9, bwd=0.8, seed=rank)
    seen["seed"] = message_of(topkast.MismatchError, lambda: seeded.init(params))
    other = params if rank else params | {"c": params["b"]}
    seen["tree"] = message_of(topkast.MismatchError, lambda: tx.init(other))
    return seen


def main() -> None:
    rank, port, folder, *cases = sys.argv[1:]
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=2, process_id=int(rank), initialization_timeout=60
    )
    for case in cases:
        if case == "inspect":
            seen = inspect(Path(folder))
            (Path(folder) / f"seen_{rank}.json").write_text(json.dumps(seen))
            continue
        mesh, *trained = train(case, jax.devices())
        np.savez(Path(folder) / f"{case}_{rank}.npz", **as_dict(replicate(trained, mesh)))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
