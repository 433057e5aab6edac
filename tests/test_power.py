"""Powerpropagation: the inner optimizer updates φ, and the weight is φ · |φ|^(power − 1)."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import topkast
from topkast.methods import SET, Random

Array = Any

RNG = np.random.default_rng(0)
WEIGHTS = RNG.standard_normal((6, 10)).astype(np.float32)
INPUTS = RNG.standard_normal((8, 10)).astype(np.float32)
TARGETS = RNG.standard_normal((8, 6)).astype(np.float32)
OPTIONS: dict[str, Any] = {"fwd": 0.75, "bwd": 0.5, "refresh_every": 3, "penalty": 0.01}


def gradient(alpha: Array) -> Array:
    return (2 / TARGETS.size) * (INPUTS @ alpha.T - TARGETS).T @ INPUTS


def train_in_numpy(rule: Any, power: float, steps: int, **options: Any) -> Array:
    tx = topkast.wrap_optimizer(rule, power=power, **OPTIONS | options)
    params = {"weight": WEIGHTS.copy()}
    state = tx.init(params)
    for _ in range(steps):
        grads = {"weight": gradient(topkast.forward_params(params, state)["weight"])}
        params, state = tx.step(grads, state, params)
    return params["weight"]


def train_in_torch(optimizer: Any, power: float, steps: int, *, sparse: bool = False) -> Array:
    layer = torch.nn.Linear(10, 6, bias=False)
    layer.weight.data.copy_(torch.from_numpy(WEIGHTS))
    model = torch.nn.Sequential(layer)
    named = [("weight", model[0].weight)]
    opt = topkast.wrap_optimizer(optimizer(named), power=power, **OPTIONS)
    if sparse:
        topkast.sparsify(model, opt)
    for _ in range(steps):
        opt.zero_grad()
        loss = (model(torch.from_numpy(INPUTS)) - torch.from_numpy(TARGETS)).square().mean()
        loss.backward()
        opt.step()
    return topkast.dense_params(opt)["weight"].detach().numpy()


def test_a_step_of_sgd_is_the_chain_rule() -> None:
    """Compared with a network whose weights are φ |φ|, differentiated by PyTorch."""
    power, rate = 3.0, 0.1
    start = torch.from_numpy(WEIGHTS).double()
    phi = (start.sign() * start.abs() ** (1 / power)).requires_grad_()
    alpha = phi * phi.abs() ** (power - 1)
    x, y = torch.from_numpy(INPUTS).double(), torch.from_numpy(TARGETS).double()
    (x @ alpha.T - y).square().mean().backward()
    assert phi.grad is not None
    with torch.no_grad():
        moved = phi - rate * phi.grad
        expected = (moved * moved.abs() ** (power - 1)).numpy()
    tx = topkast.wrap_optimizer(topkast.SGD(rate), fwd=0.0, bwd=0.0, penalty=0, power=power)
    params = {"weight": WEIGHTS.astype(np.float64)}
    grads = {"weight": (2 / 48) * ((x @ start.T - y).T @ x).numpy()}
    params, _ = tx.step(grads, tx.init(params), params)
    np.testing.assert_allclose(params["weight"], expected, rtol=1e-10)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_all_loops_agree(sparse: bool, adaptive: bool) -> None:
    rule: Any = topkast.Adam(0.02) if adaptive else topkast.SGD(0.2)

    def optimizer(named: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(named, 0.02) if adaptive else torch.optim.SGD(named, 0.2)

    expected = train_in_numpy(rule, 2.0, 7)
    np.testing.assert_allclose(
        train_in_torch(optimizer, 2.0, 7, sparse=sparse), expected, atol=2e-5
    )
    assert np.abs(expected - train_in_numpy(rule, 1.0, 7)).max() > 1e-3


def test_jax_agrees_inside_jit() -> None:
    tx = topkast.wrap_optimizer(optax.sgd(0.2), power=2.0, **OPTIONS)
    params: Any = {"weight": jnp.asarray(WEIGHTS)}
    state = tx.init(params)

    @jax.jit
    def train(params: Any, state: Any) -> Any:
        alpha = topkast.forward_params(params, state)["weight"]
        grads = {"weight": (2 / TARGETS.size) * (INPUTS @ alpha.T - TARGETS).T @ INPUTS}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(7):
        params, state = train(params, state)
    expected = train_in_numpy(topkast.SGD(0.2), 2.0, 7)
    np.testing.assert_allclose(params["weight"], expected, atol=2e-5)


def test_weights_that_do_not_move_keep_their_bits() -> None:
    tx = topkast.wrap_optimizer(topkast.SGD(0.1), power=2.0, **OPTIONS | {"penalty": 0})
    params = {"weight": WEIGHTS.copy()}
    params, _ = tx.step({"weight": np.zeros_like(WEIGHTS)}, tx.init(params), params)
    np.testing.assert_array_equal(params["weight"], WEIGHTS)


def test_the_models_gradient_is_left_alone_and_runs_resume() -> None:
    def build() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(10, 6))
        opt = topkast.wrap_optimizer(
            torch.optim.Adam(model.named_parameters(), 0.01), power=2.0, **OPTIONS
        )
        topkast.sparsify(model, opt)
        return model, opt

    def step(model: Any, opt: Any) -> None:
        opt.zero_grad()
        model(torch.from_numpy(INPUTS)).square().mean().backward()
        opt.step()

    model, opt = build()
    opt.zero_grad()
    model(torch.from_numpy(INPUTS)).square().mean().backward()
    before = model[0].values.grad.clone()
    opt.step()
    torch.testing.assert_close(model[0].values.grad, before, rtol=0, atol=0)
    step(model, opt)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    for _ in range(4):
        step(model, opt)
    other, other_opt = build()
    other.load_state_dict(saved[0])
    other_opt.load_state_dict(saved[1])
    for _ in range(4):
        step(other, other_opt)
    torch.testing.assert_close(other[0].values, model[0].values, rtol=0, atol=0)


def test_b_without_a_rests_when_exploration_stops() -> None:
    options = OPTIONS | {"refresh_every": 100}
    tx = topkast.wrap_optimizer(topkast.SGD(0.1), power=2.0, explore_until=0, **options)
    params = {"weight": WEIGHTS.copy()}
    state = tx.init(params)
    exploring = state.supports["weight"].exploring
    params, _ = tx.step({"weight": np.ones_like(WEIGHTS)}, state, params)
    moved = params["weight"].ravel()[exploring]
    np.testing.assert_array_equal(moved, WEIGHTS.ravel()[exploring])


def test_refusals() -> None:
    for power in (0.5, "2", float("inf"), True):
        with pytest.raises(topkast.OptionError, match="power must be a finite number"):
            topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.8, power=power)  # type: ignore[arg-type]
    with pytest.raises(topkast.OptionError, match="as SET starts them"):
        topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.9, power=2, method=SET())
    topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.8, power=2, method=Random())
