"""Models of Equinox and Flax nnx in sparse execution train as in masked execution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import topkast_jax
import topkast_jax.equinox
import topkast_jax.nnx
from flax import nnx

import topkast

INPUTS = jax.random.normal(jax.random.key(2), (32, 20))
TARGETS = INPUTS[:, :4]
ADAMW = optax.adamw(1e-2)


def train(theta: Any, tx: Any, evaluate: Callable[[Any, Any], Any], *, sparse: bool) -> Any:
    """Seven steps with two refreshes; the parameters, the state, and the last loss."""

    def loss(alpha: Any, structures: Any) -> Any:
        return jnp.mean((evaluate(alpha, structures) - TARGETS) ** 2)

    @jax.jit
    def step(theta: Any, state: Any) -> Any:
        alpha = topkast.forward_params(theta, state)
        value, grads = jax.value_and_grad(loss)(alpha, state.structures)
        return *tx.step(grads, state, theta), value

    state = tx.init(theta)
    if sparse:
        state = topkast_jax.sparsify(theta, state)
    for _ in range(7):
        theta, state, value = step(theta, state)
    return theta, state, value


def assert_same_training(theta: Any, tx: Any, evaluate: Any, names: list[str]) -> None:
    masked, _, _ = train(theta, tx, evaluate, sparse=False)
    trained, state, value = train(theta, tx, evaluate, sparse=True)
    assert [*state.structures] == names
    for leaf, expected in zip(jax.tree.leaves(trained), jax.tree.leaves(masked), strict=True):
        np.testing.assert_allclose(leaf, expected, atol=1e-5)
    alpha = topkast.forward_params(trained, topkast_jax.densify(state))
    dense = jnp.mean((evaluate(alpha, {}) - TARGETS) ** 2)
    sparse = jnp.mean(
        (evaluate(topkast.forward_params(trained, state), state.structures) - TARGETS) ** 2
    )
    np.testing.assert_allclose(sparse, dense, rtol=1e-5)
    assert sparse < value


def test_equinox() -> None:
    model = eqx.nn.MLP(20, 4, 64, 2, key=jax.random.key(0))
    theta, static = eqx.partition(model, eqx.is_inexact_array)
    tx = topkast.wrap_optimizer(ADAMW, fwd=0.9, bwd=0.8, refresh_every=3, dense="layers.2.*")

    def evaluate(alpha: Any, structures: Any) -> Any:
        combined = eqx.combine(alpha, static)
        return jax.vmap(topkast_jax.equinox.with_structures(combined, structures))(INPUTS)

    assert_same_training(theta, tx, evaluate, ["layers.0.weight", "layers.1.weight"])


class Net(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([nnx.Linear(20, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs)])
        self.head = nnx.Linear(32, 4, use_bias=False, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        for block in self.blocks:
            inputs = nnx.relu(block(inputs))
        return self.head(inputs)


def test_flax_nnx() -> None:
    graph, theta = nnx.split(Net(), nnx.Param)
    tx = topkast.wrap_optimizer(ADAMW, fwd=0.9, bwd=0.8, refresh_every=3)

    def evaluate(alpha: Any, structures: Any) -> Any:
        return topkast_jax.nnx.with_structures(nnx.merge(graph, alpha), structures)(INPUTS)

    names = ["blocks.0.kernel", "blocks.1.kernel", "head.kernel"]
    assert_same_training(theta, tx, evaluate, names)


def test_weights_of_other_layers_are_refused_by_name() -> None:
    model = eqx.nn.GRUCell(8, 8, key=jax.random.key(0))
    theta, static = eqx.partition(model, eqx.is_inexact_array)
    tx = topkast.wrap_optimizer(ADAMW, fwd=0.9, bwd=0.8)
    state = topkast_jax.sparsify(theta, tx.init(theta))
    combined = eqx.combine(topkast.forward_params(theta, state), static)
    with pytest.raises(topkast.MismatchError, match=r"weight_hh, weight_ih has sparse execution"):
        topkast_jax.equinox.with_structures(combined, state.structures)

    graph, variables = nnx.split(nnx.Embed(8, 8, rngs=nnx.Rngs(0)), nnx.Param)
    state = topkast_jax.sparsify(variables, tx.init(variables))
    merged = nnx.merge(graph, topkast.forward_params(variables, state))
    with pytest.raises(topkast.MismatchError, match="embedding has sparse execution"):
        topkast_jax.nnx.with_structures(merged, state.structures)
