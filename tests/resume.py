"""Trains from a checkpoint of Orbax: a module of its own, so that a new process can run it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import topkast


def make() -> tuple[Any, Any]:
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    tx = topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.7, refresh_every=3)
    key = jax.random.key(0)
    return tx, {"w": jax.random.normal(key, (12, 20)), "b": jnp.zeros(20, jnp.bfloat16)}


def train(tx: Any, params: Any, state: Any, steps: range) -> tuple[Any, Any]:
    @jax.jit
    def step(params: Any, state: Any, inputs: jax.Array) -> Any:
        def loss(alpha: Any) -> jax.Array:
            return jnp.mean((jnp.tanh(inputs @ alpha["w"]) + alpha["b"] - 1) ** 2)

        grads = jax.grad(loss)(topkast.forward_params(params, state))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for number in steps:
        params, state = step(params, state, jax.random.normal(jax.random.key(number), (8, 12)))
    return params, state


def save(folder: Path, params: Any, state: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), {"params": params, "state": state})


def restore(folder: Path) -> tuple[Any, Any]:
    tx, params = make()
    like = {"params": params, "state": tx.init(params)}
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(folder.absolute(), like)
    return found["params"], found["state"]


if __name__ == "__main__":
    source, target, first, last = sys.argv[1:]
    tx, _ = make()
    save(Path(target), *train(tx, *restore(Path(source)), range(int(first), int(last))))
