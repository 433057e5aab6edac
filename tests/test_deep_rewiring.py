"""Deep Rewiring: noise, signs, and the same walk in every execution."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import topkast
from topkast.methods import DeepRewiring, View
from topkast.methods.rewiring._deep_rewiring import _signs
from topkast.selection import _random
from topkast.selection._random import make_key, random_normals

Array = Any

RNG = np.random.default_rng(0)
WEIGHTS = RNG.standard_normal((12, 20)).astype(np.float32) / 10
INPUTS = RNG.standard_normal((16, 20)).astype(np.float32)
TARGETS = RNG.standard_normal((16, 12)).astype(np.float32)
OPTIONS: dict[str, Any] = {"fwd": 0.8, "bwd": 0.8, "method": DeepRewiring(noise=0.02)}
RATE = 0.2


def gradient(alpha: Array) -> Array:
    return (2 / TARGETS.size) * (INPUTS @ alpha.T - TARGETS).T @ INPUTS


def signs(units: Array) -> Array:
    return _signs(View(WEIGHTS.ravel(), 48, 48, name="0.weight"), units)


def train(steps: int, tx: Any = None, **options: Any) -> list[tuple[Array, Array]]:
    """Indices of A and weights on A after each step, on NumPy arrays."""
    tx = topkast.wrap_optimizer(topkast.SGD(RATE), **OPTIONS | options)
    params = {"0.weight": WEIGHTS.copy()}
    state = tx.init(params)
    results = []
    for _ in range(steps):
        view = topkast.forward_params(params, state)["0.weight"]
        params, state = tx.step({"0.weight": gradient(view)}, state, params)
        view = topkast.forward_params(params, state)["0.weight"]
        results.append((state.supports["0.weight"].indices, view))
    return results


def test_weights_have_the_sign_of_their_position() -> None:
    results = train(10)
    replaced = 0
    for (before, _), (after, view) in itertools.pairwise(results):
        values = view.ravel()[after]
        assert len(after) == 48
        assert np.all(np.where(signs(after), values >= 0, values <= 0))
        replaced += len(set(after.tolist()) - set(before.tolist()))
    assert replaced > 10


def test_the_first_set_agrees_with_the_signs_and_is_spread() -> None:
    tx = topkast.wrap_optimizer(topkast.SGD(RATE), **OPTIONS)
    chosen = tx.init({"0.weight": WEIGHTS}).supports["0.weight"].indices
    np.testing.assert_array_equal(signs(chosen), WEIGHTS.ravel()[chosen] >= 0)
    assert 40 < np.count_nonzero(signs(np.arange(240))) * 2 / 6 < 120
    dense = topkast.wrap_optimizer(topkast.SGD(RATE), **OPTIONS | {"fwd": 0.1, "bwd": 0.1})
    assert len(dense.init({"0.weight": WEIGHTS}).supports["0.weight"].indices) == 216


@pytest.mark.parametrize("sparse", [False, True])
def test_pytorch_walks_like_numpy(sparse: bool) -> None:
    layer = torch.nn.Linear(20, 12, bias=False)
    layer.weight.data.copy_(torch.from_numpy(WEIGHTS))
    model = torch.nn.Sequential(layer)
    opt = topkast.wrap_optimizer(torch.optim.SGD(model.named_parameters(), RATE), **OPTIONS)
    if sparse:
        topkast.sparsify(model, opt)
    for _, view in train(6):
        opt.zero_grad()
        (model(torch.from_numpy(INPUTS)) - torch.from_numpy(TARGETS)).square().mean().backward()
        opt.step()
        weight: Any = model[0].weight
        np.testing.assert_allclose(weight.detach().numpy(), view, atol=1e-5)


def test_jax_walks_like_numpy_inside_jit() -> None:
    tx = topkast.wrap_optimizer(optax.sgd(RATE), **OPTIONS)
    params: Any = {"0.weight": jnp.asarray(WEIGHTS)}
    # The names of tensors decide the draws.
    names = topkast.masks(tx.init(params), params)
    step = jax.jit(tx.step)
    state = tx.init(params)
    assert list(names) == ["0.weight"]
    for _, view in train(6):
        grads = {"0.weight": gradient(topkast.forward_params(params, state)["0.weight"])}
        params, state = step(grads, state, params)
        ours = topkast.forward_params(params, state)["0.weight"]
        np.testing.assert_allclose(ours, view, atol=1e-5)


def test_the_noise_is_normal_and_new_at_each_step() -> None:
    key, units = make_key(0, "w", "noise"), np.arange(200_000)
    first, second = (random_normals(units, key, draw, np.float32) for draw in (0, 1))
    for noise in (first, second):
        assert abs(noise.mean()) < 0.01
        assert abs(noise.std() - 1) < 0.01
        assert abs((noise**3).mean()) < 0.03
        assert abs((noise**4).mean() - 3) < 0.1
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.01


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_rarest_draws_give_finite_noise(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest and the largest draw are two of a billion: no sample has them."""
    draws = np.asarray([0, (1 << 30) - 1], np.int32)
    monkeypatch.setattr(_random, "random_draws", lambda *_: draws)
    rarest, commonest = random_normals(np.arange(2), (0, 0, 0, 0), 0, dtype)
    assert rarest == pytest.approx(math.sqrt(2 * 31 * math.log(2)), rel=1e-6)  # draw 0 is 2⁻³¹
    assert commonest == pytest.approx(0, abs=1e-4)


def test_there_is_noise_for_all_steps_that_are_counted() -> None:
    """A step takes two draws, so that the last ones exceed 31 bits."""
    for step in ((1 << 30) - 1, 1 << 30, (1 << 31) - 1):
        counts = step, np.asarray(step, np.int32)
        noise, same = (random_normals(np.arange(9), (1, 2, 3, 4), n, np.float32) for n in counts)
        np.testing.assert_array_equal(noise, same)
        assert len(np.unique(noise)) == 9


def test_a_step_is_that_of_the_gradient_the_penalty_and_the_noise() -> None:
    options = {"penalty": 0.01, "penalty_kind": "l1", "refresh_every": 100}
    tx = topkast.wrap_optimizer(topkast.SGD(RATE), **OPTIONS | options)
    params = {"0.weight": WEIGHTS.astype(np.float64)}
    state = tx.init(params)
    indices = state.supports["0.weight"].indices
    after, _ = tx.step({"0.weight": np.ones_like(WEIGHTS, np.float64)}, state, params)
    noise = 0.02 * random_normals(indices, make_key(0, "0.weight", "noise"), 0, np.float64)
    before = params["0.weight"].ravel()[indices]
    expected = before - RATE * (1 + 0.01 * np.sign(before) + noise)
    np.testing.assert_allclose(after["0.weight"].ravel()[indices], expected, rtol=1e-10)


def test_defaults_and_refusals() -> None:
    tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.9, method=DeepRewiring())
    assert (tx.options.penalty, tx.options.penalty_kind, tx.options.refresh_every) == (
        1e-5,
        "l1",
        1,
    )
    for noise in (-1, float("nan"), "1", True):
        with pytest.raises(topkast.OptionError, match="noise must be a finite number"):
            DeepRewiring(noise)  # type: ignore[arg-type]
    with pytest.raises(topkast.OptionError, match=r"pass bwd=0\.9"):
        topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.8, method=DeepRewiring())
