"""The state of the inner optimizer follows B, wherever the optimizer stores it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import odd_optimizers
import pytest
import torch
from odd_optimizers import REFUSED, WRAPPED, Copies, FirstGradient, OnItself, Switching
from optimizer_runs import (
    DENSE,
    OPTIONS,
    assert_same_bits,
    backward,
    entries_by_index,
    make_model,
    save_and_load,
    train,
)
from topkast_torch.execution import _profile
from topkast_torch.inner._inner_state import Start
from topkast_torch.inner._learn_layout import learn_layout
from torch import nn

import topkast
from topkast.testing import assert_forward_view


@pytest.fixture(params=WRAPPED)
def build(request: pytest.FixtureRequest) -> Any:
    return WRAPPED[request.param]


def test_without_sparsity_the_wrapper_equals_the_inner_optimizer(build: Any) -> None:
    models = make_model(), make_model()
    plain, wrapped = build(models[0].parameters()), build(models[1].parameters())
    wrapped = topkast.wrap_optimizer(wrapped, **DENSE)
    for step in range(9):
        for model, optimizer in zip(models, (plain, wrapped), strict=True):
            train(model, optimizer, range(step, step + 1))
        assert_same_bits(dict(models[0].named_parameters()), dict(models[1].named_parameters()))
    for plain_param, param in zip(*(model.parameters() for model in models), strict=True):
        assert_same_bits(
            dict(plain.state)[plain_param] if plain_param in plain.state else {},
            dict(wrapped.state[param]),
        )
    options = {"lr", "seen"} & plain.param_groups[0].keys()
    for name in options:
        assert plain.param_groups[0][name] == wrapped.param_groups[0][name]


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        pytest.param(DENSE, marks=pytest.mark.slow),
        OPTIONS | {"distribution": "global"},
    ],
    ids=str,
)
def test_a_resumed_run_equals_the_uninterrupted_one(build: Any, options: dict[str, Any]) -> None:
    model = make_model()
    optimizer = topkast.wrap_optimizer(build(model.parameters()), **options)
    train(model, optimizer, range(5))
    saved_model, saved = (save_and_load(target.state_dict()) for target in (model, optimizer))
    train(model, optimizer, range(5, 11))
    other_model = make_model()
    other = topkast.wrap_optimizer(build(other_model.parameters()), **options)
    train(other_model, other, range(50, 53))  # loading replaces this state
    other_model.load_state_dict(saved_model)
    other.load_state_dict(saved)
    train(other_model, other, range(5, 11))
    assert_same_bits(topkast.dense_params(optimizer), topkast.dense_params(other))
    assert_same_bits(optimizer.state_dict(), other.state_dict())


def test_a_deep_copy_trains_like_the_original(build: Any) -> None:
    model = make_model()
    optimizer = topkast.wrap_optimizer(build(model.parameters()), **OPTIONS)
    train(model, optimizer, range(4))
    other_model, other = copy.deepcopy((model, optimizer))
    for network, wrapper in ((model, optimizer), (other_model, other)):
        train(network, wrapper, range(4, 9))
    assert_same_bits(optimizer.state_dict(), other.state_dict())


def test_survivors_keep_their_entries_and_entrants_start_anew(build: Any) -> None:
    """Compare two copies of a run, of which one refreshes."""
    model = make_model()
    optimizer = topkast.wrap_optimizer(
        build(model.parameters()), **OPTIONS | {"refresh_every": 1000}
    )
    train(model, optimizer, range(8))
    other_model, other = copy.deepcopy((model, optimizer))
    other.param_groups[0]["refresh_every"] = 9
    train(model, optimizer, range(8, 9))
    train(other_model, other, range(8, 9))
    entered = 0
    for unrefreshed, refreshed in zip(
        optimizer._wrapper_state.executions, other._wrapper_state.executions, strict=True
    ):
        before = entries_by_index(optimizer, unrefreshed)
        after = entries_by_index(other, refreshed)
        theta = refreshed.theta()
        assert before.keys() == after.keys()
        for entry, columns in after.items():
            start = refreshed.profile.layout.starts[entry[0]]
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


def test_the_first_step_of_an_entrant_equals_a_fresh_optimizers() -> None:
    """With entries at zero, FirstGradient would divide by 1e-6."""
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
        # A fresh optimizer moves by lr · (sign + 0).
        assert torch.allclose(moved[entered], -1e-3 * gradient[entered].sign(), atol=1e-6)
        before = masks.backward
        assert step not in (4, 8) or entered.any()


@pytest.mark.parametrize("name", REFUSED)
def test_state_that_cannot_be_migrated_is_refused_and_nothing_changes(name: str) -> None:
    build, message = REFUSED[name]
    layer = nn.Linear(20, 30)
    before = copy.deepcopy(layer.state_dict())
    inner = build(layer.parameters())
    attributes = copy.deepcopy(
        {name: value for name, value in vars(inner).items() if name != "param_groups"}
    )
    with pytest.raises(topkast.UnsupportedOptimizerError, match=message):
        topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8)
    assert_same_bits(before, layer.state_dict())
    assert vars(inner).keys() - {"param_groups"} == attributes.keys()
    layer(torch.ones(1, 20)).sum().backward()
    assert inner.param_groups[0]["params"][0] is layer.weight
    assert torch.count_nonzero(layer.weight.grad) == 600
    inner.step()


class TestProbe:
    def test_entries_of_the_constructor_start_where_it_starts_them(self) -> None:
        """The start is an argument that the options do not hold; no constructor is called again."""
        layer = nn.Linear(20, 30)
        inner = odd_optimizers.WrittenInConstructor(layer.parameters(), start=0.25)
        opt: Any = topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8)
        (group,) = opt._wrapper_state.groups
        assert [*group.profiles[2].layout.starts.values()] == [0.25]

    def test_groups_that_differ_in_the_learning_rate_share_their_trials(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tried = []

        def learn(*arguments: Any) -> Any:
            tried.append(arguments)
            return learn_layout(*arguments)

        monkeypatch.setattr(_profile, "learn_layout", learn)
        options: list[dict[str, Any]] = [
            {"lr": 1e-3},
            {"lr": 5e-4},
            {"lr": 1e-3, "betas": (0.8, 0.99)},
            {"lr": 2e-4, "betas": (0.8, 0.99)},
            {"lr": 1e-3, "amsgrad": True},
            {"lr": torch.tensor(1e-3)},
        ]
        layers = [nn.Linear(20, 30) for _ in options]
        groups = [
            {"params": list(layer.parameters())} | group
            for layer, group in zip(layers, options, strict=True)
        ]
        opt: Any = topkast.wrap_optimizer(torch.optim.AdamW(groups), fwd=0.9, bwd=0.8)
        assert len(tried) == 4
        for group, param_group in zip(opt._wrapper_state.groups, opt.param_groups, strict=True):
            assert group.profiles[2].traits.betas == pytest.approx(param_group["betas"], rel=0.01)

    @pytest.mark.parametrize(
        ("build", "shape"),
        [
            (odd_optimizers.OnLongAxes, (300, 10)),
            (odd_optimizers.OnThreeDimensions, (4, 5, 6)),
            (torch.optim.Adafactor, (300, 10)),
        ],
    )
    @pytest.mark.parametrize("where", ["first group", "second group", "added group"])
    def test_the_shapes_of_all_groups_are_probed(
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

    def test_wrapping_leaves_random_state_and_inner_state_unchanged(self) -> None:
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
    def test_methods_of_the_inner_optimizer_act_on_b(self) -> None:
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
        assert_same_bits(view, model.state_dict())
        train(model, optimizer, range(7, 9))

    def test_unknown_attributes_raise(self) -> None:
        optimizer = topkast.wrap_optimizer(
            torch.optim.SGD(nn.Linear(20, 30).parameters(), 0.1), **OPTIONS
        )
        with pytest.raises(AttributeError, match="neither TopKASTOptimizer nor its SGD"):
            optimizer.eval()
        assert not hasattr(
            optimizer, "_step_supports_amp_scaling"
        )  # a gradient scaler would rely on it


class StoresEntriesLate(torch.optim.SGD):
    """Stores slow weights only from its sixth step on, like Lookahead."""

    entry_name: Any = "slow"

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["count"] = state.get("count", 0) + 1
                if state["count"] > 5:
                    state[self.entry_name or str(state["count"])] = param.clone()
                if param.grad is not None:
                    param.add_(param.grad, alpha=-group["lr"])


@pytest.mark.parametrize("entry_name", ["slow", ""], ids=["by one name", "by numbers of steps"])
def test_entries_that_trials_did_not_find_are_refused_before_sets_change(entry_name: str) -> None:
    model = make_model()
    inner = StoresEntriesLate(model.parameters(), 0.1)
    inner.entry_name = entry_name
    optimizer = topkast.wrap_optimizer(inner, **OPTIONS | {"refresh_every": 8})
    train(model, optimizer, range(7))
    masks = topkast.masks(optimizer)["0.0"]
    for step in (7, 8):  # also in later steps
        with pytest.raises(topkast.UnsupportedOptimizerError, match="StoresEntriesLate keeps '"):
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
        copied = copy.deepcopy(best)
        train(model, optimizer, range(4, 8))
        optimizer.param_groups[0]["lr"].fill_(0.5)
        assert_same_bits(copied, best)

    def test_a_loaded_state_dict_is_not_shared(self) -> None:
        first, second = (
            topkast.wrap_optimizer(
                torch.optim.Adam(nn.Linear(20, 30).parameters(), torch.tensor(0.1)), **OPTIONS
            )
            for _ in range(2)
        )
        second.load_state_dict(first.state_dict())
        second.param_groups[0]["lr"].fill_(0.5)
        assert float(first.param_groups[0]["lr"]) == pytest.approx(0.1)

    def test_unknown_stores_are_refused(self) -> None:
        model = make_model()
        optimizer = topkast.wrap_optimizer(torch.optim.Adam(model.parameters()), **OPTIONS)
        train(model, optimizer, range(1))
        state, before = optimizer.state_dict(), optimizer.state_dict()
        state["state"][0]["topkast"]["stores"] = {"step": torch.ones(3)}
        with pytest.raises(topkast.StateDictError, match="this optimizer keeps none"):
            optimizer.load_state_dict(state)
        assert_same_bits(optimizer.state_dict(), before)

    @pytest.mark.parametrize(
        "options",
        [OPTIONS, pytest.param(OPTIONS | {"distribution": "global"}, marks=pytest.mark.slow)],
        ids=str,
    )
    def test_a_state_dict_from_before_the_first_step_loads_no_state(
        self, build: Any, options: dict[str, Any]
    ) -> None:
        """The placeholders that are saved for other libraries are not loaded."""
        plain = build(make_model().parameters())  # its constructor may write a state
        models = make_model(), make_model()
        first, second = (
            topkast.wrap_optimizer(build(model.parameters()), **options) for model in models
        )
        second.load_state_dict(save_and_load(first.state_dict()))
        written = [param for param, entries in dict(second.state).items() if entries]
        assert len(written) == len(plain.state)
        for model, optimizer in zip(models, (first, second), strict=True):
            train(model, optimizer, range(5))
        assert_same_bits(models[0].state_dict(), models[1].state_dict())

    def test_tensors_in_another_order_are_matched_by_name(self) -> None:
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

    def test_keys_may_be_strings(self) -> None:
        model = make_model()
        optimizer = topkast.wrap_optimizer(torch.optim.Adam(model.parameters(), 0.01), **OPTIONS)
        train(model, optimizer, range(4))
        state = optimizer.state_dict()
        state["state"] = {str(key): entries for key, entries in state["state"].items()}
        other_model = make_model()
        other = topkast.wrap_optimizer(torch.optim.Adam(other_model.parameters(), 0.01), **OPTIONS)
        other.load_state_dict(state)
        assert_same_bits(optimizer.state_dict(), other.state_dict())

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
    def test_writes_reach_the_inner_optimizer(self) -> None:
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
    def test_parameters_replaced_in_a_group_raise(self, exchange: Any) -> None:
        model = make_model()
        optimizer = topkast.wrap_optimizer(torch.optim.Adam(model.parameters(), 0.1), **OPTIONS)
        backward(model, 0)
        theta = topkast.dense_params(optimizer)
        exchange(optimizer.param_groups[0]["params"])
        with pytest.raises(topkast.MismatchError, match="Parameters of a group were replaced"):
            optimizer.step()
        assert_same_bits(theta, topkast.dense_params(optimizer))
