"""DSR, which moves weights between tensors, and SNFS, which keeps a dense momentum."""

from __future__ import annotations

import copy
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import topkast_torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import topkast
from topkast.methods import DSR, SNFS, SNIP, DeepRewiring, Static, View
from topkast.methods.rewiring._dsr import share_out

Array = Any

RNG = np.random.default_rng(0)
WEIGHTS = {
    "0.weight": RNG.standard_normal((12, 10)).astype(np.float32),
    "2.weight": RNG.standard_normal((5, 12)).astype(np.float32) / 10,
}
INPUTS = torch.from_numpy(RNG.standard_normal((16, 10)).astype(np.float32))
TARGETS = torch.from_numpy(RNG.standard_normal((16, 5)).astype(np.float32))


def build() -> Any:
    layers = torch.nn.Linear(10, 12, bias=False), torch.nn.Linear(12, 5, bias=False)
    model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])
    model.load_state_dict({name: torch.from_numpy(array) for name, array in WEIGHTS.items()})
    return model


def backward(model: Any) -> None:
    (model(INPUTS) - TARGETS).square().mean().backward()


def gradients(params: dict[str, Array]) -> dict[str, Array]:
    model = build()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in params.items()})
    backward(model)
    return {name: param.grad.numpy() for name, param in model.named_parameters()}


def train(options: dict[str, Any], steps: int) -> tuple[list[dict[str, Array]], list[Any]]:
    """Weights on A after each step, and states, by the rules for NumPy arrays."""
    tx = topkast.wrap_optimizer(topkast.SGD(0.3), **options)
    params = dict(WEIGHTS)
    state = tx.init(params)
    views, states = [], []
    for _ in range(steps):
        grads = gradients(topkast.forward_params(params, state))
        params, state = tx.step(grads, state, params)
        views.append(topkast.forward_params(params, state))
        states.append(state)
    return views, states


DSR_OPTIONS: dict[str, Any] = {
    "fwd": 0.8,
    "bwd": 0.8,
    "method": DSR(0.3),
    "refresh_every": 2,
    "distribution": "global",
}
SNFS_OPTIONS: dict[str, Any] = {
    "fwd": 0.8,
    "bwd": 0.8,
    "method": SNFS(until=9, momentum=0.5),
    "refresh_every": 3,
}


@pytest.mark.parametrize("options", [DSR_OPTIONS, SNFS_OPTIONS], ids=["DSR", "SNFS"])
def test_pytorch_agrees_with_numpy_and_resumes(options: dict[str, Any]) -> None:
    views, _ = train(options, 8)
    model = build()
    opt = topkast.wrap_optimizer(torch.optim.SGD(model.named_parameters(), 0.3), **options)
    saved: Any = None
    for number, view in enumerate(views):
        if number == 4:
            saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
        opt.zero_grad()
        backward(model)
        opt.step()
        for name, param in model.named_parameters():
            np.testing.assert_array_equal(param.detach().numpy() != 0, view[name] != 0)
            np.testing.assert_allclose(param.detach().numpy(), view[name], atol=1e-5)
    other = build()
    other_opt = topkast.wrap_optimizer(
        torch.optim.SGD(other.named_parameters(), 0.3), **options | {"seed": 0}
    )
    other.load_state_dict(saved[0])
    other_opt.load_state_dict(saved[1])
    for _ in range(4):
        other_opt.zero_grad()
        backward(other)
        other_opt.step()
    for first, second in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


DEEP_OPTIONS: dict[str, Any] = {"fwd": 0.8, "bwd": 0.8, "method": DeepRewiring(noise=0.1)}


@pytest.mark.parametrize("options", [DSR_OPTIONS, SNFS_OPTIONS, DEEP_OPTIONS])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_counts_are_exact_after_every_step(
    options: dict[str, Any], adaptive: bool, framework: str
) -> None:
    if framework == "numpy":
        rule: Any = topkast.AdamW(0.02) if adaptive else topkast.SGD(0.1, momentum=0.9)
        tx = topkast.wrap_optimizer(rule, **options)
        params: Any = dict(WEIGHTS)
        state = tx.init(params)
        for _ in range(7):
            grads = gradients(topkast.forward_params(params, state))
            params, state = tx.step(grads, state, params)
            counts = [sets.forward for sets in state.supports.values()]
            assert counts == ([36] if len(counts) == 1 else [24, 12])
        return
    model = build()
    named = model.named_parameters()
    inner: Any = torch.optim.SGD(named, 0.1, momentum=0.9)
    if adaptive:
        inner = torch.optim.AdamW(model.named_parameters(), 0.02)
    opt = topkast.wrap_optimizer(inner, **options)
    for _ in range(7):
        opt.zero_grad()
        backward(model)
        opt.step()
        counts = [int(mask.forward.sum()) for mask in topkast.masks(opt).values()]
        assert sum(counts) == 36
        assert "distribution" in options or counts == [24, 12]


def test_dsr_is_constant_in_all_and_follows_what_stays() -> None:
    _, states = train(DSR_OPTIONS, 8)
    support = [next(iter(state.supports.values())) for state in states]
    assert {sets.forward for sets in support} == {36}  # a fifth of 120 + 60
    first = [int(np.count_nonzero(sets.indices < 120)) for sets in support]
    assert first[-1] > first[0]  # the second layer is ten times smaller and loses its weights
    assert min(36 - count for count in first) >= 1


def test_dsr_by_hand() -> None:
    """Two of six leave the first tensor: one of them comes back there, one goes to the second."""
    weights = np.zeros(12)
    weights[[0, 1, 2, 6, 7, 8]] = [0.1, 0.2, 0.9, 0.8, 0.7, 0.6]
    support = topkast.Support(np.asarray([0, 1, 2, 6, 7, 8]), 6)
    view = View(
        weights,
        6,
        6,
        support=support,
        values=weights[support.indices],
        members={"a": (0, 6), "b": (6, 12)},
    )
    chosen = DSR(0.34).choose(view).indices.tolist()
    kept = {2, 6, 7, 8}
    assert kept < set(chosen)
    grown = set(chosen) - kept
    # One stays in a and three in b, whose shares of two are 1/2 and 3/2: the first of equal
    # remainders is rounded up.
    assert len([unit for unit in grown if unit < 6]) == 1
    assert grown <= {3, 4, 5, 9, 10, 11}  # not those that were dropped


@given(
    total=st.integers(0, 60),
    parts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), min_size=1, max_size=5),
)
def test_shares_add_up(total: int, parts: list[tuple[int, int]]) -> None:
    weights: list[Any] = [part[0] for part in parts]
    limits: list[Any] = [part[1] for part in parts]
    shares = share_out(total, weights, limits)
    assert sum(shares) == min(total, sum(limits))
    assert all(0 <= share <= limit for share, limit in zip(shares, limits, strict=True))
    if total <= min(limits) and sum(weights):
        for share, weight in zip(shares, weights, strict=True):
            assert abs(share - total * weight / sum(weights)) < 1


def test_the_momentum_of_snfs_is_a_running_mean() -> None:
    _, states = train(SNFS_OPTIONS, 2)
    tx = topkast.wrap_optimizer(topkast.SGD(0.3), **SNFS_OPTIONS)
    params: Any = dict(WEIGHTS)
    state = tx.init(params)
    mean: Any = 0.0
    for _ in range(2):
        grads = gradients(topkast.forward_params(params, state))
        mean = 0.5 * mean + 0.5 * grads["0.weight"].ravel()
        params, state = tx.step(grads, state, params)
    np.testing.assert_allclose(states[-1].momenta["0.weight"], mean, rtol=1e-6)


def test_refusals() -> None:
    with pytest.raises(topkast.OptionError, match="DSR changes the number of weights"):
        topkast.wrap_optimizer(optax.sgd(0.1), **DSR_OPTIONS)
    tx = topkast.wrap_optimizer(optax.sgd(0.1), **SNFS_OPTIONS)
    state = tx.init({"w": jnp.ones((4, 5))})
    assert state.core.momenta["w"].shape == (20,)
    model = build()
    opt = topkast.wrap_optimizer(torch.optim.SGD(model.named_parameters(), 0.1), **SNFS_OPTIONS)
    report = topkast.sparsify(model, opt)
    assert "keeps a dense momentum" in str(report)
    with pytest.raises(topkast.OptionError, match="fraction is a share"):
        DSR(2)
    with pytest.raises(topkast.OptionError, match="momentum is a share"):
        SNFS(momentum=-1)


def test_sets_that_are_chosen_once_need_a_dense_layer() -> None:
    layer = topkast_torch.SparseLinear(10, 12, fwd=0.8, bwd=0.8)
    inner = torch.optim.SGD(layer.named_parameters(), 0.1)
    method = SNIP({"values": torch.ones(12, 10)})
    with pytest.raises(topkast.OptionError, match="SNIP chooses its sets once"):
        topkast.wrap_optimizer(inner, fwd=0.8, bwd=0.8, method=method)
    topkast.wrap_optimizer(inner, fwd=0.8, bwd=0.8, method=Static())
