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
from topkast_jax._tree import flatten_weights

import topkast

INPUTS = jax.random.normal(jax.random.key(2), (32, 20))
TARGETS = INPUTS[:, :4]
ADAMW = optax.adamw(1e-2)
TX = topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.9, bwd=0.8, probe=False)


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


class Scaled(eqx.nn.Linear):
    """A layer of one's own, whose call does more than that of its base."""

    def __call__(self, x: Any, *, key: Any = None) -> Any:
        return 3 * super().__call__(x, key=key)


def make_scaled() -> Any:
    layer: Any = Scaled
    return layer(20, 30, key=jax.random.key(0))


class Products(eqx.Module):
    """Products of a weight in all the ways that ``SparseWeight`` knows."""

    w: Any

    def __call__(self, x: Any) -> Any:
        rows, columns = self.w.shape
        pairs = jnp.stack([x, 2 * x])
        results = [
            self.w @ x[:columns],
            x[:rows] @ self.w,
            self.w.T @ x[:rows],
            x[:columns] @ self.w.T,
            np.asarray([1.0, 2.0], np.float32) @ (pairs[:, :rows] @ self.w),
            self.w @ pairs[:, :columns].T,
            self.w @ jnp.stack([pairs[:, :columns].T] * 3),
            np.ones(rows, np.float32) @ self.w,
        ]
        return jnp.concatenate([jnp.sin(result).ravel() for result in results])


class TiedLayers(eqx.Module):
    """Two layers of one weight."""

    shared: eqx.nn.Shared

    def __init__(self) -> None:
        first, second = (
            eqx.nn.Linear(20, 20, use_bias=False, key=jax.random.key(seed)) for seed in (0, 1)
        )
        self.shared = eqx.nn.Shared(
            (first, second), lambda pair: pair[1].weight, lambda pair: pair[0].weight
        )

    def __call__(self, x: Any) -> Any:
        first, second = self.shared()
        return second(jnp.tanh(first(x)))


class Recurrent(eqx.Module):
    """A recurrent cell along the first axis of its inputs."""

    cell: eqx.nn.GRUCell

    def __call__(self, inputs: Any) -> Any:
        def advance(hidden: Any, x: Any) -> Any:
            return self.cell(x, hidden), None

        return jax.lax.scan(advance, jnp.ones(8), inputs)[0]


def assert_same_derivatives(theta: Any, evaluate: Any, dense: Any = None) -> list[str]:
    """Equal outputs and gradients in masked and sparse execution; the names of sparse tensors."""
    tx = topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.8, bwd=0.6, dense=dense, probe=False)
    masked = tx.init(theta)

    @jax.jit
    def differentiate(alpha: Any, structures: Any) -> Any:
        def total(alpha: Any) -> Any:
            output = evaluate(alpha, structures)
            return jnp.sum(jnp.sin(output)), output

        return jax.grad(total, has_aux=True)(alpha)

    results = []
    for state in (masked, topkast_jax.sparsify(theta, masked)):
        grads, output = differentiate(topkast.forward_params(theta, state), state.structures)
        results.append((output, flatten_weights(grads)[1]))
    (expected, dense_grads), (output, grads) = results
    assert output.shape == expected.shape
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in dense_grads.items():
        if name in state.structures:
            gradient = gradient.reshape(1, -1)[:, masked.supports[name].indices]
        np.testing.assert_allclose(grads[name], gradient, rtol=1e-5, atol=1e-5)
    return [*state.structures]


@pytest.mark.parametrize(
    ("model", "x", "dense"),
    [
        (make_scaled(), INPUTS[0], None),
        (Products(jax.random.normal(jax.random.key(0), (12, 9)) / 8), INPUTS[0], None),
        (TiedLayers(), INPUTS[0], None),
        (eqx.nn.Linear("scalar", 30, key=jax.random.key(0)), INPUTS[0, 0], False),
        (eqx.nn.Linear(20, "scalar", key=jax.random.key(0)), INPUTS[0], False),
        (Recurrent(eqx.nn.GRUCell(20, 8, key=jax.random.key(0))), INPUTS, None),
    ],
    ids=["subclass", "products", "tied", "from a scalar", "to a scalar", "GRU"],
)
def test_layers_of_equinox_compute_as_they_do_with_dense_weights(
    model: Any, x: Any, dense: Any
) -> None:
    """A layer is more than its weight: what else its call does must stay."""
    theta, static = eqx.partition(model, eqx.is_inexact_array)

    def evaluate(alpha: Any, structures: Any) -> Any:
        combined = eqx.combine(alpha, static)
        return topkast_jax.equinox.with_structures(combined, structures)(x)

    assert assert_same_derivatives(theta, evaluate, dense)


def test_weights_that_equinox_does_not_multiply_by_are_refused_by_name() -> None:
    def convert(model: Any) -> Any:
        theta, static = eqx.partition(model, eqx.is_inexact_array)
        state = topkast_jax.sparsify(theta, TX.init(theta))
        combined = eqx.combine(topkast.forward_params(theta, state), static)
        return topkast_jax.equinox.with_structures(combined, state.structures)

    with pytest.raises(topkast.MismatchError, match=r"^weight has .* one of an equinox.nn.Embed"):
        convert(eqx.nn.Embedding(8, 8, key=jax.random.key(0)))
    normalised = convert(eqx.nn.WeightNorm(eqx.nn.Linear(8, 8, key=jax.random.key(0))))
    with pytest.raises(TypeError, match="SparseWeight"):
        normalised(jnp.ones(8))


class SharedKernels(nnx.Module):
    """Layers with one kernel, under names that are not those of the first layer."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.second = nnx.Linear(20, 20, rngs=rngs)
        self.first = nnx.Linear(20, 20, preferred_element_type=jnp.float32, rngs=rngs)
        self.first.kernel = self.second.kernel
        self.third = nnx.List([nnx.Linear(20, 4, rngs=rngs), self.second])

    def __call__(self, inputs: Any) -> Any:
        return self.third[0](self.third[1](nnx.tanh(self.second(nnx.tanh(self.first(inputs))))))


def test_layers_of_nnx_that_share_a_kernel() -> None:
    graph, theta = nnx.split(SharedKernels(), nnx.Param)

    def evaluate(alpha: Any, structures: Any) -> Any:
        return topkast_jax.nnx.with_structures(nnx.merge(graph, alpha), structures)(INPUTS)

    names = assert_same_derivatives(theta, evaluate)
    assert names == ["first.kernel", "third.0.kernel"]


class Decoder(nnx.Module):
    """A kernel that is used outside its layer too."""

    def __init__(self) -> None:
        self.layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.output = self.layer.kernel


def own_product(x: Any, kernel: Any, *arguments: Any, **options: Any) -> Any:
    return 2 * jax.lax.dot_general(x, kernel, *arguments, **options)


class Transposed(nnx.Linear):
    """A layer that multiplies along the other axis of its kernel."""

    def __call__(self, inputs: Any) -> Any:  # type: ignore[override]
        return self.dot_general(inputs, self.kernel[...], (((1,), (1,)), ((), ())))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nnx.Embed(8, 8, rngs=nnx.Rngs(0)), "the model holds it as 'embedding'"),
        (Decoder(), "^layer.kernel has .* the model holds it as 'output'"),
        (
            nnx.Linear(8, 8, dot_general=own_product, rngs=nnx.Rngs(0)),
            "the model has a dot_general of its own",
        ),
        (Transposed(8, 8, rngs=nnx.Rngs(0)), "multiplies along the dimensions"),
    ],
    ids=["Embed", "shared", "dot_general", "transposed"],
)
def test_kernels_that_nnx_uses_in_other_ways_are_refused_by_name(model: Any, message: str) -> None:
    graph, theta = nnx.split(model, nnx.Param)
    state = topkast_jax.sparsify(theta, TX.init(theta))
    merged = nnx.merge(graph, topkast.forward_params(theta, state))
    with pytest.raises(topkast.MismatchError, match=message):
        topkast_jax.nnx.with_structures(merged, state.structures)(jnp.ones((2, 8)))


def test_structures_of_other_models_are_refused_by_name() -> None:
    graph, theta = nnx.split(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Param)
    structure = topkast_jax.sparsify(theta, TX.init(theta)).structures["kernel"]
    with pytest.raises(topkast.MismatchError, match=r"hidden.kernel has .* nnx.Linear of this"):
        topkast_jax.nnx.with_structures(nnx.merge(graph, theta), {"hidden.kernel": structure})
    model = eqx.nn.Linear(8, 8, key=jax.random.key(0))
    with pytest.raises(topkast.MismatchError, match=r"hidden.weight has .* not a weight of this"):
        topkast_jax.equinox.with_structures(model, {"hidden.weight": structure})
