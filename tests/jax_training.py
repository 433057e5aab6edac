"""A small network trained by a wrapped optax transformation, as optax users write it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import topkast

Pytree = Any
ADAMW = optax.adamw(1e-2)


def make_params(seed: int = 0, dtype: Any = jnp.float32) -> Pytree:
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "body": [
            {"w": jax.random.normal(keys[0], (12, 20), dtype), "b": jnp.zeros(20, dtype)},
            {"w": jax.random.normal(keys[1], (20, 16), dtype), "b": jnp.zeros(16, dtype)},
        ],
        "head": {"w": jax.random.normal(keys[2], (16, 4), dtype)},
    }


def loss(alpha: Pytree, inputs: jax.Array) -> jax.Array:
    hidden = inputs
    for layer in alpha["body"]:
        hidden = jnp.tanh(hidden @ layer["w"] + layer["b"])
    return jnp.mean((hidden @ alpha["head"]["w"] - 1) ** 2)


def inputs_of(step: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(100 + step), (8, 12), dtype)


def make_step(tx: Any) -> Callable[..., tuple[Pytree, Any]]:
    """Make a training step as optax users write it."""

    def train(params: Pytree, state: Any, inputs: jax.Array) -> tuple[Pytree, Any]:
        grads = jax.grad(loss)(topkast.forward_params(params, inner_state(state)), inputs)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return train


def inner_state(state: Any) -> Any:
    """Find the state of the wrapped transformation inside a state."""
    states = (
        entry
        for entry in jax.tree.leaves(state, is_leaf=lambda entry: hasattr(entry, "supports"))
        if hasattr(entry, "supports")
    )
    return next(states)


def wrap(inner: Any = ADAMW, **options: Any) -> Any:
    all_options = {"fwd": 0.9, "bwd": 0.7, "refresh_every": 3, **options}
    return _wrap(inner, tuple(sorted(all_options.items())))


@functools.cache
def _wrap(inner: Any, options: tuple[tuple[str, Any], ...]) -> Any:
    return topkast.wrap_optimizer(inner, **dict(options))


@functools.cache
def compiled_step(tx: Any) -> Any:
    """Compile the step; it is cached because compiling takes longest in these tests."""
    return jax.jit(make_step(tx))


def run(tx: Any, params: Pytree, steps: int = 7, *, jit: bool = True) -> tuple[Pytree, Any]:
    step = compiled_step(tx) if jit else make_step(tx)
    state = tx.init(params)
    for number in range(steps):
        params, state = step(params, state, inputs_of(number))
    return params, state


def assert_close(actual: Pytree, expected: Pytree, tolerance: float = 1e-6) -> None:
    assert structure(actual) == structure(expected)
    for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=tolerance, atol=tolerance)


def assert_equal(actual: Pytree, expected: Pytree) -> None:
    assert structure(actual) == structure(expected)
    for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, other)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            np.testing.assert_array_equal(jnp.signbit(leaf), jnp.signbit(other))


def structure(tree: Pytree) -> Any:
    return jax.tree.structure(tree)


def avals(tree: Pytree) -> Any:
    return jax.tree.map(lambda leaf: jax.typeof(leaf), tree)
