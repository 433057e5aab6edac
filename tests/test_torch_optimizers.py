"""Every elementwise optimizer of ``torch.optim``, wrapped, in each of its implementations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import topkast
from topkast.testing import (
    assert_forward_view,
    assert_masks,
    assert_reservoir_unchanged,
    assert_survivors_unchanged,
)

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "Adadelta": [{"lr": 1.0}],
    "Adagrad": [{"lr": 0.05}, {"lr": 0.05, "initial_accumulator_value": 0.1}],
    "Adam": [{"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.01, "amsgrad": True}],
    "Adamax": [{"lr": 0.01, "weight_decay": 0.1}],
    "AdamW": [{"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.05, "maximize": True}],
    "ASGD": [{"lr": 0.05, "t0": 3}],
    "NAdam": [{"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RAdam": [{"lr": 0.01, "weight_decay": 0.1}],
    "RMSprop": [{"lr": 0.01, "momentum": 0.9, "centered": True}],
    "Rprop": [{"lr": 0.01}],
    "SGD": [
        {"lr": 0.05},
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
        {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    ],
}
FUSED = {"Adagrad", "Adam", "AdamW", "SGD"}  # they have a fused CPU implementation
REFUSED = {"Muon", "Adafactor", "SparseAdam", "LBFGS"}


@dataclass(frozen=True)
class Case:
    name: str
    options: dict[str, Any]

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer_class = getattr(torch.optim, self.name)
        optimizer: torch.optim.Optimizer = optimizer_class(model.named_parameters(), **self.options)
        return optimizer

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


# The default session tries the other implementations of these alone.
IMPLEMENTED = {"Adam", "SGD"}

CASES = [
    pytest.param(
        Case(name, options | implementation),
        id=str(Case(name, options | implementation)),
        marks=[]
        if implementation == {"foreach": False} or name in IMPLEMENTED
        else pytest.mark.slow,
    )
    for name, variants in OPTIONS.items()
    for options in variants
    for implementation in (
        {"foreach": False},
        {"foreach": True},
        *([{"fused": True}] if name in FUSED else []),
    )
]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    selected: Case = request.param
    return selected


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 12, generator=generator)
    model.zero_grad()
    (model(inputs) - inputs[:, :4]).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def test_list_of_optimizers_is_complete() -> None:
    elementwise = {
        name
        for name in torch.optim.__all__
        if isinstance(getattr(torch.optim, name), type) and name not in {"Optimizer"}
    }
    assert elementwise == set(OPTIONS) | REFUSED


def test_without_sparsity_the_wrapper_equals_the_inner_optimizer(case: Case) -> None:
    plain_model, model = make_model(), make_model()
    plain = case.build(plain_model)
    wrapped = topkast.wrap_optimizer(
        case.build(model), fwd=0.0, bwd=0.0, penalty=0.0, refresh_every=3
    )
    for step in range(12):
        train(plain_model, plain, range(step, step + 1))
        train(model, wrapped, range(step, step + 1))
        for expected, param in zip(plain_model.parameters(), model.parameters(), strict=True):
            assert torch.equal(expected, param)
            for key, entry in plain.state[expected].items():
                other = wrapped.state[param][key]
                if isinstance(entry, Tensor):
                    assert torch.equal(entry.flatten(), other.flatten()), key
                else:
                    assert entry == other, key


def test_reservoir_does_not_move_between_refreshes(case: Case) -> None:
    model = make_model()
    optimizer = topkast.wrap_optimizer(case.build(model), fwd=0.9, bwd=0.7, refresh_every=4)
    for step in range(13):
        before, masks = topkast.dense_params(optimizer), topkast.masks(optimizer)
        train(model, optimizer, range(step, step + 1))
        after = topkast.dense_params(optimizer)
        for name, (_, inside) in masks.items():
            assert_reservoir_unchanged(before[name], after[name], inside)
            assert not torch.equal(before[name], after[name])


def test_state_has_the_size_of_the_backward_set(case: Case) -> None:
    model = make_model()
    optimizer = topkast.wrap_optimizer(case.build(model), fwd=0.9, bwd=0.7, refresh_every=2)
    train(model, optimizer, range(5))
    for name, param in model.named_parameters():
        count = (
            int(topkast.masks(optimizer)[name].backward.sum()) if param.dim() > 1 else param.numel()
        )
        sizes = {
            entry.numel()
            for entry in optimizer.state[param].values()
            if isinstance(entry, Tensor) and entry.numel() > 1
        }
        assert sizes <= {count}
    expected = 58  # 192 - floor(0.7 * 192)
    assert int(topkast.masks(optimizer)["0.weight"].backward.sum()) == expected


def test_refresh_keeps_the_state_of_survivors(case: Case) -> None:
    model = make_model()
    # No refresh, so that the state just before a refresh is known; the copy refreshes next.
    optimizer = topkast.wrap_optimizer(
        case.build(model), fwd=0.9, bwd=0.7, refresh_every=1000, penalty=0.3
    )
    train(model, optimizer, range(9))
    copied_model, copied = copy.deepcopy((model, optimizer))
    copied.param_groups[0]["refresh_every"] = 10
    train(model, optimizer, range(9, 10))
    train(copied_model, copied, range(9, 10))
    initial = 0.01 if case.name == "Rprop" else case.options.get("initial_accumulator_value", 0.0)
    moved = 0
    for (name, param), other in zip(
        model.named_parameters(), copied_model.parameters(), strict=True
    ):
        if param.dim() < 2:
            continue
        old, new = (
            optimizer.__topkast_inspect__().supports[name],
            copied.__topkast_inspect__().supports[name],
        )
        moved += len(np.setdiff1d(new.indices, old.indices))
        assert torch.equal(
            topkast.dense_params(optimizer)[name], topkast.dense_params(copied)[name]
        )
        for key, entry in optimizer.state[param].items():
            if isinstance(entry, Tensor) and entry.numel() > 1:
                fresh: Any = float(np.float32(initial)) if key in ("step_size", "sum") else 0.0
                if key == "ax":  # the average of the weights starts at the weight
                    fresh = topkast.gather(topkast.dense_params(copied)[name], new)
                assert_survivors_unchanged(entry, copied.state[other][key], old, new, fresh=fresh)
    # With `maximize`, weights in B only grow, so that B does not change.
    assert moved > 0 or case.options.get("maximize")


def test_parameters_hold_the_forward_view_and_keep_their_identity(case: Case) -> None:
    model = make_model()
    identities = [id(param) for param in model.parameters()]
    addresses = [param.data_ptr() for param in model.parameters()]
    optimizer = topkast.wrap_optimizer(case.build(model), fwd=0.9, bwd=0.7, refresh_every=2)
    for step in range(7):
        train(model, optimizer, range(step, step + 1))
        assert identities == [id(param) for param in model.parameters()]
        assert identities == [id(param) for param in optimizer.param_groups[0]["params"]]
        assert addresses == [param.data_ptr() for param in model.parameters()]
        theta, masks = topkast.dense_params(optimizer), topkast.masks(optimizer)
        for name, param in model.named_parameters():
            if name in masks:
                assert_forward_view(theta[name], param, masks[name].forward)
            else:
                assert torch.equal(theta[name], param)
    # Before update 8, the sets are still those of the refresh at update 6.
    train(model, optimizer, range(7, 8))
    theta, masks = topkast.dense_params(optimizer), topkast.masks(optimizer)
    for name in masks:
        assert_masks(theta[name], masks[name], fwd=0.9, bwd=0.7)


def test_promoted_entry_carries_its_learned_value() -> None:
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.9], [0.1, 0.0]]))
    optimizer = topkast.wrap_optimizer(
        torch.optim.SGD(layer.parameters(), 0.1), fwd=0.75, bwd=0.5, refresh_every=2, penalty=0.0
    )
    for _ in range(2):
        layer.weight.grad = torch.tensor([[0.0, -1.0], [-5.0, -5.0]])
        assert layer.weight.tolist() == [[1.0, 0.0], [0.0, 0.0]]
        optimizer.step()
    assert layer.weight[0, 1].item() == pytest.approx(1.1)
    assert torch.count_nonzero(layer.weight) == 1


@pytest.mark.parametrize(
    "build",
    [
        lambda params: torch.optim.Muon(params),
        lambda params: torch.optim.Adafactor(params),
    ],
    ids=["Muon", "Adafactor"],
)
def test_optimizers_of_whole_matrices_are_refused(
    build: Callable[[Any], torch.optim.Optimizer],
) -> None:
    layer = nn.Linear(8, 8, bias=False)
    before = layer.weight.detach().clone()
    inner = build(layer.parameters())
    with pytest.raises(
        topkast.UnsupportedOptimizerError,
        match=rf"{type(inner).__name__} does not treat a tensor as a bag of coordinates",
    ):
        topkast.wrap_optimizer(inner, fwd=0.5, bwd=0.5)
    assert torch.equal(layer.weight, before)
    assert inner.param_groups[0]["params"][0] is layer.weight
    assert not inner.state


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_optimizers_without_a_plain_step_are_refused(name: str) -> None:
    layer = nn.Linear(8, 8, bias=False)
    inner = getattr(torch.optim, name)(layer.parameters())
    with pytest.raises(topkast.UnsupportedOptimizerError, match=f"{name} cannot take a plain step"):
        topkast.wrap_optimizer(inner, fwd=0.5, bwd=0.5)
    assert torch.count_nonzero(layer.weight) == 64


def test_probe_false_skips_the_probe() -> None:
    layer = nn.Linear(8, 8, bias=False)
    inner = torch.optim.Adafactor(layer.parameters())
    topkast.wrap_optimizer(inner, fwd=0.5, bwd=0.5, probe=False)
    assert torch.count_nonzero(layer.weight) == 32


class NoisySGD(torch.optim.SGD):
    """SGD that adds noise: its probe fails although it is elementwise."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.add_(torch.randn_like(param.grad))
        return super().step(closure)


class Renamed(torch.optim.SGD):
    """An optimizer whose constructor takes other arguments."""

    def __init__(self, pairs: Any, first: Any, second: Any) -> None:
        super().__init__(pairs, first)
        self.second = second

    def step(self, closure: Any = None) -> Any:
        assert self.second == "kept"
        return super().step(closure)


def test_third_party_optimizers() -> None:
    layer = nn.Linear(8, 8)
    with pytest.raises(topkast.UnsupportedOptimizerError, match=r"NoisySGD.*probe=False"):
        topkast.wrap_optimizer(NoisySGD(layer.parameters(), 0.1), fwd=0.5, bwd=0.5)
    wrapped = topkast.wrap_optimizer(
        Renamed(layer.parameters(), 0.1, second="kept"), fwd=0.5, bwd=0.5
    )
    layer(torch.ones(1, 8)).sum().backward()
    wrapped.step()


def test_wrapping_after_dense_steps_keeps_the_state_on_the_backward_set(case: Case) -> None:
    model = make_model()
    inner = case.build(model)
    train(model, inner, range(3))
    dense = {
        name: {
            key: entry.clone() if isinstance(entry, Tensor) else entry
            for key, entry in inner.state[param].items()
        }
        for name, param in model.named_parameters()
    }
    theta = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.7)
    supports = optimizer.__topkast_inspect__().supports
    for name, param in model.named_parameters():
        assert torch.equal(topkast.dense_params(optimizer)[name], theta[name])
        assert optimizer.state[param].keys() == dense[name].keys()
        for key, entry in optimizer.state[param].items():
            before = dense[name][key]
            if name in supports and isinstance(entry, Tensor) and entry.numel() > 1:
                assert torch.equal(entry.flatten(), before.flatten()[supports[name].indices])
            elif isinstance(entry, Tensor):
                assert torch.equal(entry, before)
            else:
                assert entry == before
    train(model, optimizer, range(3, 6))


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0), 1e-12])
@pytest.mark.parametrize("probe", [True, False])
def test_a_learning_rate_that_a_schedule_has_set_to_zero(rate: Any, probe: bool) -> None:
    """A warmup starts there, and a decayed run that is wrapped again ends there."""
    layer = nn.Linear(10, 10)
    adam = torch.optim.Adam(layer.named_parameters(), lr=rate)
    optimizer = topkast.wrap_optimizer(adam, fwd=0.9, bwd=0.8, probe=probe)
    assert "ages" in optimizer.state_dict()["state"][0]["topkast"]
    assert optimizer.param_groups[0]["lr"] is rate

    muon = torch.optim.Muon([nn.Parameter(torch.randn(10, 10))], lr=0.0)
    with pytest.raises(topkast.UnsupportedOptimizerError, match="bag of coordinates"):
        topkast.wrap_optimizer(muon, fwd=0.9, bwd=0.8)
