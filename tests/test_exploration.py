"""The exploration penalty and its gradient, on every array library."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from libraries import Library

import topkast
from topkast._step import Step
from topkast.adapter import decide
from topkast.testing import sparsities, to_numpy, weights

Tensor = np.ndarray[Any, Any]
PENALTY_KINDS = ["l2", "l1"]


def penalty_of_dense(
    array: Any, fwd: float, bwd: float, penalty_kind: Any, support: Any = None
) -> Any:
    """The penalty as a function of the whole θ, with fixed sets."""
    support = topkast.select(array, fwd=fwd, bwd=bwd) if support is None else support
    values = topkast.gather(array, support)
    return topkast.exploration_penalty(
        values, support, penalty=0.1, density=1 - fwd, penalty_kind=penalty_kind
    )


def gradient_of_dense(array: Any, fwd: float, bwd: float, penalty_kind: Any) -> Any:
    support = topkast.select(array, fwd=fwd, bwd=bwd)
    gradient = topkast.exploration_gradient(
        topkast.gather(array, support),
        support,
        penalty=0.1,
        density=1 - fwd,
        penalty_kind=penalty_kind,
    )
    return topkast.scatter(gradient, support, shape=tuple(array.shape))


@pytest.mark.parametrize("penalty_kind", PENALTY_KINDS)
@given(theta=weights(min_size=1), pair=sparsities())
def test_gradient_equals_the_derivative_by_torch(
    penalty_kind: Any, theta: Tensor, pair: tuple[float, float]
) -> None:
    assume(np.abs(theta).max() < 1e15)
    leaf = torch.tensor(theta, requires_grad=True)
    penalty_of_dense(leaf, *pair, penalty_kind).backward()
    expected = gradient_of_dense(leaf.detach(), *pair, penalty_kind)
    # Rounding of subnormal floats is absolute: ten of their steps.
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1.4e-44)


@pytest.mark.parametrize("penalty_kind", PENALTY_KINDS)
@pytest.mark.parametrize("pair", [(0.9, 0.8), (0.5, 0.5), (0.95, 0.0)])
def test_gradient_equals_the_derivative_by_jax(
    penalty_kind: Any, pair: tuple[float, float], rng: np.random.Generator
) -> None:
    theta = jax.numpy.asarray(rng.standard_normal((8, 9)), dtype="float32")
    support = topkast.select(theta, fwd=pair[0], bwd=pair[1])
    derivative = jax.jit(
        jax.grad(lambda array: penalty_of_dense(array, *pair, penalty_kind, support=support))
    )
    np.testing.assert_allclose(
        derivative(theta), gradient_of_dense(theta, *pair, penalty_kind), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("penalty_kind", PENALTY_KINDS)
@given(theta=weights(min_size=1), pair=sparsities())
def test_gradient_is_zero_on_the_reservoir(
    library: Library, penalty_kind: Any, theta: Tensor, pair: tuple[float, float]
) -> None:
    assume(np.abs(theta).max() < 1e15)  # 1/D times the largest float is infinite
    run = library.compile(lambda array: gradient_of_dense(array, *pair, penalty_kind))
    gradient = to_numpy(run(library.asarray(theta)))
    support = topkast.select(theta, fwd=pair[0], bwd=pair[1])
    outside = np.ones(theta.size, dtype=bool)
    outside[support.indices] = False
    assert not gradient.ravel()[outside].any()


def test_decay_of_exploring_weights_scales_with_one_over_density(library: Library) -> None:
    """A bug of SparseML: it divides by the sparsity, 0.9, instead of the density."""
    theta = library.asarray(np.asarray([4, 3, 2, 1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05]))
    gradient = to_numpy(gradient_of_dense(theta, 0.9, 0.7, "l2"))
    expected = [0.1 * 4, 0.1 * 3 / 0.1, 0.1 * 2 / 0.1, 0, 0, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_value_of_the_penalty(library: Library) -> None:
    theta = library.asarray(np.asarray([-4.0, 3.0, 2.0, 1.0]))
    assert float(penalty_of_dense(theta, 0.75, 0.5, "l2")) == pytest.approx(
        0.05 * (16 + 9 / 0.25), rel=1e-6
    )
    assert float(penalty_of_dense(theta, 0.75, 0.5, "l1")) == pytest.approx(
        0.1 * (4 + 3 / 0.25), rel=1e-6
    )


def test_complex_weights(library: Library) -> None:
    theta = library.asarray(np.asarray([3 + 4j, 0, 1j, 0.5], dtype=np.complex64))
    assert float(penalty_of_dense(theta, 0.75, 0.5, "l2")) == pytest.approx(
        0.05 * (25 + 1 / 0.25), rel=1e-6
    )
    np.testing.assert_allclose(
        to_numpy(gradient_of_dense(theta, 0.75, 0.5, "l2")), [0.3 + 0.4j, 0, 0.4j, 0], rtol=1e-6
    )


def test_a_step_has_nothing_that_was_not_asked_for() -> None:
    """No scaling of young entries, no power, no noise: the weights move as the rule moves them."""
    step = decide(
        penalty=0.25, penalty_kind="l1", density=0.5, ascends=True, explore_until=None, updates=7
    )
    assert (step.betas, step.power, step.noise, step.key) == (None, 1.0, 0.0, (0, 0, 0, 0))
    assert (step.on_active, step.on_exploring, step.exploring) == (-0.25, -0.5, True)
    assert dataclasses.replace(step, draw=0) == Step(-0.25, "l1", 0.5, True)


@pytest.mark.parametrize("is_fused", [False, True], ids=["update", "step"])
def test_weights_that_rest_keep_their_bits(library: Library, is_fused: bool) -> None:
    """Also the sign of -0.0, to which adding 0.0 gives 0.0."""
    theta = np.asarray([[4, -0.0, 0.0, -0.5], [0.25, 1e-30, -3, -0.0]], np.float32)
    tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.75, bwd=0.0, penalty=0.0, explore_until=0)
    params = {"w": library.asarray(theta)}
    state, grads = tx.init(params), {"w": library.asarray(np.ones_like(theta))}
    if is_fused:
        moved, _ = tx.step(grads, state, params)
    else:
        moved = topkast.apply_updates(params, tx.update(grads, state, params)[0])
    expected = theta.copy()
    expected.ravel()[[0, 6]] -= np.float32(0.1)
    np.testing.assert_array_equal(to_numpy(moved["w"]).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
def test_wrong_density_is_an_error(density: float) -> None:
    theta = np.ones(4)
    support = topkast.select(theta, fwd=0.5, bwd=0.5)
    values = topkast.gather(theta, support)
    with pytest.raises(topkast.OptionError, match="density"):
        topkast.exploration_penalty(values, support, penalty=0.1, density=density)
    with pytest.raises(topkast.OptionError, match="penalty_kind must be"):
        topkast.exploration_gradient(values, support, penalty=0.1, density=0.5, penalty_kind="l3")  # type: ignore[arg-type]
