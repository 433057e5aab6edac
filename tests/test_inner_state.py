"""The inner optimizer keeps its state, wherever it keeps it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import odd_optimizers
import pytest
import torch
from odd_optimizers import KEPT, REFUSED, Copies, FirstGradient, OnItself, Switching
from optimizer_runs import (
    NOTHING,
    OPTIONS,
    assert_alike,
    backward,
    kept_by_index,
    make_model,
    through_a_file,
    train,
)
from topkast_torch.inner._inner_state import Start
from torch import nn

import topkast
from topkast.testing import assert_forward_view


@pytest.fixture(params=KEPT)
def kept(request: pytest.FixtureRequest) -> Any:
    return KEPT[request.param]


def test_without_sparsity_it_is_the_unwrapped_optimizer(kept: Any) -> None:
    models = make_model(), make_model()
    plain, wrapped = kept(models[0].parameters()), kept(models[1].parameters())
    wrapped = topkast.wrap_optimizer(wrapped, **NOTHING)
    for step in range(9):
        for model, optimizer in zip(models, (plain, wrapped), strict=True):
            train(model, optimizer, range(step, step + 1))
        assert_alike(dict(models[0].named_parameters()), dict(models[1].named_parameters()))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert_alike(
            dict(plain.state)[one] if one in plain.state else {}, dict(wrapped.state[other])
        )
    counted = {"lr", "seen"} & plain.param_groups[0].keys()
    for name in counted:
        assert plain.param_groups[0][name] == wrapped.param_groups[0][name]


@pytest.mark.parametrize(
    "options", [OPTIONS, NOTHING, OPTIONS | {"distribution": "global"}], ids=str
)
def test_a_resumed_run_is_the_uninterrupted_one(kept: Any, options: dict[str, Any]) -> None:
    model = make_model()
    optimizer = topkast.wrap_optimizer(kept(model.parameters()), **options)
    train(model, optimizer, range(5))
    saved_model, saved = (through_a_file(one.state_dict()) for one in (model, optimizer))
    train(model, optimizer, range(5, 11))
    other_model = make_model()
    other = topkast.wrap_optimizer(kept(other_model.parameters()), **options)
    train(other_model, other, range(50, 53))  # what is there is replaced
    other_model.load_state_dict(saved_model)
    other.load_state_dict(saved)
    train(other_model, other, range(5, 11))
    assert_alike(topkast.dense_params(optimizer), topkast.dense_params(other))
    assert_alike(optimizer.state_dict(), other.state_dict())


def test_a_copy_is_one_of_all(kept: Any) -> None:
    model = make_model()
    optimizer = topkast.wrap_optimizer(kept(model.parameters()), **OPTIONS)
    train(model, optimizer, range(4))
    other_model, other = copy.deepcopy((model, optimizer))
    for one, two in ((model, optimizer), (other_model, other)):
        train(one, two, range(4, 9))
    assert_alike(optimizer.state_dict(), other.state_dict())


def test_survivors_keep_their_entries_and_entrants_start_anew(kept: Any) -> None:
    """Between two copies of a run, of which one refreshes."""
    model = make_model()
    optimizer = topkast.wrap_optimizer(
        kept(model.parameters()), **OPTIONS | {"refresh_every": 1000}
    )
    train(model, optimizer, range(8))
    other_model, other = copy.deepcopy((model, optimizer))
    other.param_groups[0]["refresh_every"] = 9
    train(model, optimizer, range(8, 9))
    train(other_model, other, range(8, 9))
    entered = 0
    for one, two in zip(
        optimizer._wrapper_state.executions, other._wrapper_state.executions, strict=True
    ):
        before, after = kept_by_index(optimizer, one), kept_by_index(other, two)
        theta = two.theta()
        assert before.keys() == after.keys()
        for entry, columns in after.items():
            start = two.profile.layout.starts[entry[0]]
            for index, column in columns.items():
                if index in before[entry]:
                    assert torch.equal(column, before[entry][index]), entry
                else:
                    entered += 1
                    expected = theta[index] if isinstance(start, Start) else torch.tensor(start)
                    assert torch.equal(column, expected.to(column).expand_as(column)), entry
    assert entered > 0


def test_entries_that_copy_the_weight_start_at_the_weight() -> None:
    layer = nn.Linear(20, 30)
    optimizer = topkast.wrap_optimizer(Copies(layer.parameters()), **OPTIONS)
    (execution,) = optimizer._wrapper_state.executions
    starts = {path[-1]: start for path, start in execution.profile.layout.starts.items()}
    assert starts == {"z": Start.WEIGHT, "step_size": 0.25}


def test_the_first_step_of_an_entrant_is_that_of_a_fresh_optimizer() -> None:
    """Where zeros would not do: FirstGradient would divide by 1e-6."""
    layer = nn.Linear(20, 30, bias=False)
    optimizer = topkast.wrap_optimizer(
        FirstGradient(layer.parameters(), 1e-3),
        fwd=0.9,
        bwd=0.5,
        refresh_every=4,
        explore="random",
        penalty=0.0,
    )
    generator = torch.Generator().manual_seed(0)
    before = topkast.masks(optimizer)["0.0"].backward
    for step in range(9):
        masks, theta = topkast.masks(optimizer)["0.0"], topkast.dense_params(optimizer)["0.0"]
        gradient = torch.randn(30, 20, generator=generator)
        layer.weight.grad = gradient.clone()
        entered = masks.backward & ~before if step in (4, 8) else torch.zeros_like(masks.backward)
        optimizer.step()
        moved = topkast.dense_params(optimizer)["0.0"] - theta
        # A fresh one moves by lr · (sign + 0).
        assert torch.allclose(moved[entered], -1e-3 * gradient[entered].sign(), atol=1e-6)
        before = masks.backward
        assert step not in (4, 8) or entered.any()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_follow_is_refused_by_name_and_nothing_changed(name: str) -> None:
    build, message = REFUSED[name]
    layer = nn.Linear(20, 30)
    before = copy.deepcopy(layer.state_dict())
    inner = build(layer.parameters())
    attributes = copy.deepcopy({k: v for k, v in vars(inner).items() if k != "param_groups"})
    with pytest.raises(topkast.UnsupportedOptimizerError, match=message):
        topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8)
    assert_alike(before, layer.state_dict())
    assert vars(inner).keys() - {"param_groups"} == attributes.keys()
    layer(torch.ones(1, 20)).sum().backward()
    assert inner.param_groups[0]["params"][0] is layer.weight
    assert torch.count_nonzero(layer.weight.grad) == 600
    inner.step()


class TestProbe:
    @pytest.mark.parametrize(
        ("build", "shape"),
        [
            (odd_optimizers.OnLongAxes, (300, 10)),
            (odd_optimizers.OnThreeDimensions, (4, 5, 6)),
            (torch.optim.Adafactor, (300, 10)),
        ],
    )
    @pytest.mark.parametrize("where", ["first group", "second group", "added group"])
    def test_every_tensor_that_is_there_is_asked_about(
        self, build: Any, shape: tuple[int, ...], where: str
    ) -> None:
        harmless, odd = (nn.Parameter(torch.randn(size)) for size in ((8, 8), shape))
        if build is torch.optim.Adafactor:
            harmless = nn.Parameter(torch.randn(8))
        options: dict[str, Any] = {"fwd": 0.9, "bwd": 0.8}
        refused = pytest.raises(topkast.UnsupportedOptimizerError, match="bag of coordinates")
        if where == "added group":
            dense = nn.Parameter(torch.randn(6, 6))
            optimizer = (
                topkast.wrap_optimizer(odd_optimizers.Odd.__subclasses__()[0]([dense]), **options)
                if build is torch.optim.Adafactor
                else topkast.wrap_optimizer(build([harmless]), **options)
            )
            if build is torch.optim.Adafactor:
                return
            with refused:
                optimizer.add_param_group({"params": [odd]})
            assert len(optimizer.param_groups) == 1
            return
        params = [{"params": [odd]}, {"params": [harmless]}]
        with refused:
            topkast.wrap_optimizer(
                build(params if where == "first group" else params[::-1]), **options
            )

    def test_nothing_of_the_users_is_touched(self) -> None:
        torch.manual_seed(5)
        layer = nn.Linear(20, 30)
        inner = OnItself(layer.parameters())
        random = torch.get_rng_state()
        topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8)
        assert torch.equal(random, torch.get_rng_state())
        assert (inner.counter, inner.means, dict(inner.state)) == (0, {}, {})

    @pytest.mark.parametrize("device", ["meta", None])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, None])
    def test_defaults_of_torch_do_not_matter(self, device: str | None, dtype: Any) -> None:
        layer = nn.Linear(20, 30)
        try:
            torch.set_default_device(device)
            torch.set_default_dtype(dtype or torch.float32)
            optimizer = topkast.wrap_optimizer(
                torch.optim.Rprop(layer.parameters(), lr=0.0123), **OPTIONS
            )
            (execution,) = optimizer._wrapper_state.executions
            starts = {path[-1]: start for path, start in execution.profile.layout.starts.items()}
            assert starts["step_size"] == float(np.float32(0.0123))
            topkast.sparsify(layer, optimizer)
            layer(torch.ones(2, 20, device="cpu", dtype=torch.float32)).sum().backward()
            optimizer.step()
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)


class TestMethods:
    def test_what_users_call_is_there_and_acts_on_b(self) -> None:
        model = make_model()
        optimizer = topkast.wrap_optimizer(Switching(model.named_parameters()), **OPTIONS)
        train(model, optimizer, range(7))
        theta, masks = topkast.dense_params(optimizer), topkast.masks(optimizer)
        view = copy.deepcopy(model.state_dict())
        optimizer.eval()
        assert optimizer.training is False
        average = topkast.dense_params(optimizer)
        for name, mask in masks.items():
            assert torch.equal(theta[name][~mask.backward], average[name][~mask.backward])
            assert not torch.equal(theta[name], average[name])
            assert_forward_view(average[name], model.get_parameter(name), mask.forward)
        optimizer.train()
        assert_alike(view, model.state_dict())
        train(model, optimizer, range(7, 9))

    def test_what_nobody_has_is_an_attribute_error(self) -> None:
        optimizer = topkast.wrap_optimizer(
            torch.optim.SGD(nn.Linear(20, 30).parameters(), 0.1), **OPTIONS
        )
        with pytest.raises(AttributeError, match="neither TopKASTOptimizer nor the SGD"):
            optimizer.eval()
        assert not hasattr(optimizer, "_step_supports_amp_scaling")  # a scaler would rely on it


class KeepsMoreLater(torch.optim.SGD):
    """As Lookahead does, which keeps slow weights from its sixth step on."""

    at: Any = "slow"

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["count"] = state.get("count", 0) + 1
                if state["count"] > 5:
                    state[self.at or str(state["count"])] = param.clone()
                if param.grad is not None:
                    param.add_(param.grad, alpha=-group["lr"])


@pytest.mark.parametrize("at", ["slow", ""], ids=["by one name", "by numbers of steps"])
def test_what_is_kept_only_later_is_refused_before_sets_change(at: str) -> None:
    model = make_model()
    inner = KeepsMoreLater(model.parameters(), 0.1)
    inner.at = at
    optimizer = topkast.wrap_optimizer(inner, **OPTIONS | {"refresh_every": 8})
    train(model, optimizer, range(7))
    masks = topkast.masks(optimizer)["0.0"]
    for step in (7, 8):  # and whatever is done next
        with pytest.raises(topkast.UnsupportedOptimizerError, match="KeepsMoreLater keeps '"):
            train(model, optimizer, range(step, step + 1))
    assert torch.equal(topkast.masks(optimizer)["0.0"].backward, masks.backward)


class TestStateDict:
    def test_it_is_a_snapshot(self) -> None:
        model = make_model()
        optimizer = topkast.wrap_optimizer(
            torch.optim.Adam(model.parameters(), torch.tensor(0.01)), **OPTIONS
        )
        train(model, optimizer, range(4))
        best = optimizer.state_dict()
        kept = copy.deepcopy(best)
        train(model, optimizer, range(4, 8))
        optimizer.param_groups[0]["lr"].fill_(0.5)
        assert_alike(kept, best)

    def test_loading_ties_nothing_to_what_was_loaded(self) -> None:
        first, second = (
            topkast.wrap_optimizer(
                torch.optim.Adam(nn.Linear(20, 30).parameters(), torch.tensor(0.1)), **OPTIONS
            )
            for _ in range(2)
        )
        second.load_state_dict(first.state_dict())
        second.param_groups[0]["lr"].fill_(0.5)
        assert float(first.param_groups[0]["lr"]) == pytest.approx(0.1)

    def test_what_it_keeps_elsewhere_must_be_kept_there_here_too(self) -> None:
        model = make_model()
        optimizer = topkast.wrap_optimizer(torch.optim.Adam(model.parameters()), **OPTIONS)
        train(model, optimizer, range(1))
        state, before = optimizer.state_dict(), optimizer.state_dict()
        state["state"][0]["topkast"]["stores"] = {"step": torch.ones(3)}
        with pytest.raises(topkast.StateDictError, match="keeps nothing there"):
            optimizer.load_state_dict(state)
        assert_alike(optimizer.state_dict(), before)

    @pytest.mark.parametrize("options", [OPTIONS, OPTIONS | {"distribution": "global"}], ids=str)
    def test_before_the_first_step_there_is_no_state_to_load(
        self, kept: Any, options: dict[str, Any]
    ) -> None:
        """What is saved in its place, for libraries that load into what is there, is not taken."""
        models = make_model(), make_model()
        one, other = (topkast.wrap_optimizer(kept(m.parameters()), **options) for m in models)
        other.load_state_dict(through_a_file(one.state_dict()))
        assert not [param for param, entries in dict(other.state).items() if entries]
        for model, optimizer in zip(models, (one, other), strict=True):
            train(model, optimizer, range(5))
        assert_alike(models[0].state_dict(), models[1].state_dict())

    def test_tensors_in_another_order_are_found_by_name(self) -> None:
        def make(order: int) -> tuple[nn.Module, Any]:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            named = list(model.named_parameters())[::order]
            return model, topkast.wrap_optimizer(torch.optim.Adam(named, 0.01), **OPTIONS)

        (model, optimizer), (_, other) = make(1), make(-1)
        for step in range(4):
            inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            (model(inputs) - inputs).square().mean().backward()
            optimizer.step()
        other.load_state_dict(optimizer.state_dict())
        theta, expected = topkast.dense_params(other), topkast.dense_params(optimizer)
        for name in topkast.masks(optimizer):
            assert torch.equal(theta[name], expected[name])

    def test_keys_of_strings_are_numbers(self) -> None:
        model = make_model()
        optimizer = topkast.wrap_optimizer(torch.optim.Adam(model.parameters(), 0.01), **OPTIONS)
        train(model, optimizer, range(4))
        state = optimizer.state_dict()
        state["state"] = {str(key): entries for key, entries in state["state"].items()}
        other_model = make_model()
        other = topkast.wrap_optimizer(torch.optim.Adam(other_model.parameters(), 0.01), **OPTIONS)
        other.load_state_dict(state)
        assert_alike(optimizer.state_dict(), other.state_dict())

    def test_loading_in_inference_mode_leaves_a_working_optimizer(self) -> None:
        model = make_model()
        optimizer = topkast.wrap_optimizer(torch.optim.Adam(model.parameters(), 0.01), **OPTIONS)
        twin = make_model()
        straight = topkast.wrap_optimizer(torch.optim.Adam(twin.parameters(), 0.01), **OPTIONS)
        train(twin, straight, range(8))
        train(model, optimizer, range(4))
        with torch.inference_mode():
            optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, range(4, 8))
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one, other)


class TestWritesToTheState:
    def test_they_are_honoured(self) -> None:
        model = make_model()
        optimizer = topkast.wrap_optimizer(torch.optim.Adam(model.parameters(), 0.1), **OPTIONS)
        train(model, optimizer, range(2))
        weight, bias = next(model.parameters()), list(model.parameters())[1]
        optimizer.state[weight]["exp_avg"].zero_()
        assert not optimizer.state[weight]["exp_avg"].any()
        del optimizer.state[bias]
        assert bias not in optimizer.state
        optimizer.state[weight] = {}
        assert optimizer.state[weight] == {}
        optimizer.state.clear()
        assert len(optimizer.state) == 0
        train(model, optimizer, range(2, 3))
        assert int(optimizer.state[weight]["step"]) == 1

    @pytest.mark.parametrize(
        "exchange",
        [
            lambda params: params.__setitem__(0, nn.Parameter(params[0].detach().clone())),
            lambda params: params.append(nn.Parameter(torch.ones(3))),
            lambda params: params.pop(),
        ],
        ids=["replaced", "appended", "removed"],
    )
    def test_parameters_exchanged_in_a_group_are_told(self, exchange: Any) -> None:
        model = make_model()
        optimizer = topkast.wrap_optimizer(torch.optim.Adam(model.parameters(), 0.1), **OPTIONS)
        backward(model, 0)
        theta = topkast.dense_params(optimizer)
        exchange(optimizer.param_groups[0]["params"])
        with pytest.raises(topkast.MismatchError, match="Parameters of a group were exchanged"):
            optimizer.step()
        assert_alike(theta, topkast.dense_params(optimizer))
