"""From wrapping to unwrapping: who may do what, and what a step that raises leaves behind."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import topkast_torch
import torch
from odd_optimizers import FirstGradient
from torch import Tensor, nn

import topkast

OPTIONS: dict[str, Any] = {"fwd": 0.9, "bwd": 0.7, "refresh_every": 3, "penalty": 0.2}


def make_model(width: int = 16) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, 4))


def build(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.named_parameters(), 0.02)


def make(**options: Any) -> tuple[Any, Any]:
    model = make_model()
    return model, topkast.wrap_optimizer(build(model), **OPTIONS | options)


def backward(model: nn.Module, step: int) -> None:
    inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    (model(inputs) - inputs[:, :4]).square().mean().backward()


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def everything(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """All that a step may change, as a flat dictionary."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                walk(f"{prefix}/{key}", entry)
        elif isinstance(value, (list, tuple)):
            for number, entry in enumerate(value):
                walk(f"{prefix}/{number}", entry)
        else:
            flat[prefix] = value.clone() if isinstance(value, Tensor) else value

    walk("optimizer", optimizer.state_dict())
    walk("model", model.state_dict())
    walk("gradients", {name: param.grad for name, param in model.named_parameters()})
    return flat


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        same = (
            torch.equal(value, second[key]) if isinstance(value, Tensor) else value == second[key]
        )
        assert same, key


class TestOwnership:
    @pytest.mark.parametrize("method", ["step", "state_dict", "load_state_dict", "add_param_group"])
    def test_the_inner_optimizer_refuses_to_act_alone(self, method: str) -> None:
        model = make_model()
        inner = build(model)
        topkast_optimizer = topkast.wrap_optimizer(inner, **OPTIONS)
        backward(model, 0)
        message = rf"AdamW was wrapped .* call {method} of the TopKASTOptimizer"
        with pytest.raises(topkast.UnsupportedOptimizerError, match=message):
            getattr(inner, method)()
        topkast_optimizer.step()

    def test_it_is_not_wrapped_twice(self) -> None:
        model = make_model()
        inner = build(model)
        optimizer = topkast.wrap_optimizer(inner, **OPTIONS)
        for again in (inner, optimizer):
            with pytest.raises(
                topkast.UnsupportedOptimizerError, match=r"already.*topkast\.unwrap"
            ):
                topkast.wrap_optimizer(again, **OPTIONS)

    def test_nor_are_its_parameters(self) -> None:
        """As when a cell of a notebook is run twice."""
        model, optimizer = make()
        with pytest.raises(
            topkast.UnsupportedOptimizerError, match=r"0\.weight is trained by another.*unwrap"
        ):
            topkast.wrap_optimizer(build(model), **OPTIONS)
        train(model, optimizer, range(4))
        del optimizer
        gc.collect()
        train(model, topkast.wrap_optimizer(build(model), **OPTIONS), range(4))

    def test_nor_are_those_of_sparse_layers(self) -> None:
        model, optimizer = make()
        topkast.sparsify(model, optimizer)
        with pytest.raises(topkast.UnsupportedOptimizerError, match="trained by another"):
            topkast.wrap_optimizer(build(model), **OPTIONS)

    def test_a_model_without_its_optimizer_has_dense_gradients(self) -> None:
        model, optimizer = make()
        train(model, optimizer, range(2))
        masks = topkast.masks(optimizer)
        del optimizer
        gc.collect()
        sets = masks["2.weight"].backward
        backward(model, 0)
        assert model[2].weight.grad[~sets].all()


class TestUnwrap:
    @pytest.mark.parametrize("weights", ["forward", "dense"])
    @pytest.mark.parametrize("distribution", ["uniform", "global"])
    def test_the_model_and_its_optimizer_go_on(self, weights: Any, distribution: Any) -> None:
        model, optimizer = make(distribution=distribution)
        train(model, optimizer, range(5))
        theta, masks = topkast.dense_params(optimizer), topkast.masks(optimizer)
        moments = {
            name: optimizer.state[model.get_parameter(name)]["exp_avg"].clone() for name in masks
        }
        supports = optimizer.__topkast_inspect__().supports
        inner = topkast.unwrap(optimizer, weights=weights)
        assert isinstance(inner, torch.optim.AdamW)
        assert "fwd" not in inner.param_groups[0]
        for name, mask in masks.items():
            param = model.get_parameter(name)
            kept = theta[name] if weights == "dense" else torch.where(mask.forward, theta[name], 0)
            assert torch.equal(param, kept)
            moment = inner.state[param]["exp_avg"]
            assert moment.shape == param.shape
            assert not moment[~mask.backward].any()
            if distribution == "uniform":
                on_b = moment.view(-1)[supports[name].indices]
                assert torch.equal(on_b, moments[name].view(-1))
        backward(model, 0)
        for param in model.parameters():
            assert param.grad is not None
        assert model[2].weight.grad[~masks["2.weight"].backward].all()
        before = [param.detach().clone() for param in model.parameters()]
        inner.step()
        for one, param in zip(before, model.parameters(), strict=True):
            assert not torch.equal(one, param)
        inner.state_dict()
        train(model, topkast.wrap_optimizer(inner, **OPTIONS), range(3))  # and wrapped again

    def test_hooks_and_schedulers_come_back(self) -> None:
        model = make_model()
        inner = build(model)
        calls: list[str] = []
        inner.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer = topkast.wrap_optimizer(inner, **OPTIONS)
        train(model, optimizer, range(1))
        assert topkast.unwrap(optimizer) is inner
        train(model, inner, range(1))
        assert calls == ["before", "before"]

    def test_what_was_unwrapped_is_over(self) -> None:
        model, optimizer = make()
        topkast.unwrap(optimizer)
        backward(model, 0)
        with pytest.raises(topkast.UnsupportedOptimizerError, match=r"ended by topkast\.unwrap"):
            optimizer.step()

    def test_sparse_layers_stay_sparse_or_become_dense(self) -> None:
        model, optimizer = make()
        topkast.sparsify(model, optimizer)
        train(model, optimizer, range(4))
        other_model, other = copy.deepcopy((model, optimizer))
        theta = topkast.dense_params(optimizer)
        inner = topkast.unwrap(optimizer)
        assert isinstance(model[0], topkast_torch.SparseLinear)
        train(model, inner, range(4, 6))
        inner = topkast.unwrap(other, weights="dense")
        assert type(other_model[0]) is nn.Linear
        assert torch.equal(other_model[0].weight, theta["0.weight"])
        train(other_model, inner, range(4, 6))
        assert inner.state[other_model[0].weight]["exp_avg"].shape == (16, 12)

    def test_what_is_not_wrapped(self) -> None:
        for odd in (build(make_model()), topkast.SGD(0.1), None):
            with pytest.raises(topkast.OptionError, match=r"unwrap expects a PyTorch optimizer"):
                topkast.unwrap(odd)
        _, optimizer = make()
        with pytest.raises(topkast.OptionError, match="weights must be"):
            topkast.unwrap(optimizer, weights="theta")  # type: ignore[arg-type]


class SomeError(Exception):
    """Raised by the tests."""


def fail(*arguments: Any, **named: Any) -> Any:
    raise SomeError


def fail_at(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that fails when it is called for the `number`-th time."""
    calls = iter(range(1, 1000))

    def failing(*arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            raise SomeError
        return function(*arguments, **named)

    return failing


@pytest.mark.parametrize("sparse", [False, True], ids=["masked", "sparse"])
class TestAStepThatRaises:
    def ready(self, sparse: bool, **options: Any) -> tuple[Any, Any]:
        model, optimizer = make(**options)
        if sparse:
            topkast.sparsify(model, optimizer)
        train(model, optimizer, range(2))
        backward(model, 2)  # the step to come refreshes
        return model, optimizer

    def check(self, sparse: bool, attempt: Callable[[Any, Any, pytest.MonkeyPatch], Any]) -> None:
        """Before anything has moved: all is as it was, and a second attempt does as if never."""
        model, optimizer = self.ready(sparse)
        expected_model, expected = self.ready(sparse)
        before = everything(model, optimizer)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SomeError):
            attempt(model, optimizer, patch)
        assert_equal(before, everything(model, optimizer))
        optimizer.step()
        expected.step()
        assert_equal(everything(expected_model, expected), everything(model, optimizer))

    def test_in_the_closure(self, sparse: bool) -> None:
        self.check(sparse, lambda model, optimizer, patch: optimizer.step(fail))

    @pytest.mark.parametrize("number", [1, 2])
    def test_in_a_gather(self, sparse: bool, number: int) -> None:
        def attempt(model: Any, optimizer: Any, patch: pytest.MonkeyPatch) -> None:
            kind = type(next(iter(optimizer._wrapper_state.executions)))
            patch.setattr(kind, "gather_gradient", fail_at(number, kind.gather_gradient))
            optimizer.step()

        self.check(sparse, attempt)

    def test_in_a_gather_after_a_refresh_of_what_starts_with_a_gradient(self, sparse: bool) -> None:
        """Entrants of other tensors must not have made their first step."""

        def ready() -> tuple[Any, Any]:
            model = make_model()
            inner = FirstGradient(model.parameters(), 1e-3)
            optimizer = topkast.wrap_optimizer(inner, **OPTIONS | {"explore": "random"})
            if sparse:
                topkast.sparsify(model, optimizer)
            train(model, optimizer, range(3))
            backward(model, 3)
            return model, optimizer

        (model, optimizer), (_, expected) = ready(), ready()
        before = everything(model, optimizer)
        with pytest.MonkeyPatch.context() as patch:
            kind = type(next(iter(optimizer._wrapper_state.executions)))
            patch.setattr(kind, "gather_gradient", fail_at(2, kind.gather_gradient))
            with pytest.raises(SomeError):
                optimizer.step()
        assert_equal(before, everything(model, optimizer))
        optimizer.step()
        expected.step()
        for name, theta in topkast.dense_params(expected).items():
            assert torch.equal(theta, topkast.dense_params(optimizer)[name])

    @pytest.mark.parametrize("number", [1, 2])
    def test_when_writes_are_taken_over(self, sparse: bool, number: int) -> None:
        def attempt(model: Any, optimizer: Any, patch: pytest.MonkeyPatch) -> None:
            kind = type(next(iter(optimizer._wrapper_state.executions)))
            accept = kind.accept_external_writes
            patch.setattr(kind, "accept_external_writes", fail_at(number, accept))
            optimizer.step()

        self.check(sparse, attempt)

    def test_in_the_inner_step_before_it_moves(self, sparse: bool) -> None:
        def attempt(model: Any, optimizer: Any, patch: pytest.MonkeyPatch) -> None:
            patch.setattr("topkast_torch.optimizer._inner_optimizer.step_without_hooks", fail)
            optimizer.step()

        self.check(sparse, attempt)

    def test_a_bad_option(self, sparse: bool) -> None:
        for name, value in {
            "refresh_every": 0,
            "penalty": float("nan"),
            "penalty_kind": "L2",
            "explore_until": -1,
            "explore": "gradient",
            "fwd": 0.5,
        }.items():
            model, optimizer = self.ready(sparse)
            before = everything(model, optimizer)
            kept = optimizer.param_groups[0][name]
            optimizer.param_groups[0][name] = value
            with pytest.raises(topkast.OptionError, match=name):
                optimizer.step()
            optimizer.param_groups[0][name] = kept
            assert_equal(before, everything(model, optimizer))
            optimizer.step()

    @pytest.mark.parametrize("error", [SomeError, KeyboardInterrupt])
    def test_in_the_inner_step_halfway(self, sparse: bool, error: type[BaseException]) -> None:
        """What has moved is shown, gradients are as they were, and nothing was counted."""
        model, optimizer = self.ready(sparse)
        gradients = [param.grad.clone() for param in model.parameters() if param.grad is not None]
        executions = list(optimizer._wrapper_state.executions)

        def halfway(inner: Any) -> None:
            with torch.no_grad():
                executions[0].values.add_(1.0)
            raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("topkast_torch.optimizer._inner_optimizer.step_without_hooks", halfway)
            with pytest.raises(error):
                optimizer.step()
        for one, param in zip(gradients, model.parameters(), strict=True):
            assert param.grad is not None
            assert torch.equal(one, param.grad)
        assert optimizer._wrapper_state.updates == 2
        check_forward_view(model, optimizer)

    @pytest.mark.parametrize("tensor", [0, 1])
    @pytest.mark.parametrize("distribution", ["uniform", "global"])
    def test_at_a_refresh(self, sparse: bool, tensor: int, distribution: Any) -> None:
        """No set has changed; mended, the same call can be made again."""
        if sparse and distribution == "global":
            pytest.skip("tensors that are ranked together stay masked")
        model, optimizer = self.ready(sparse, distribution=distribution)
        masks = topkast.masks(optimizer)
        param = list(model.parameters())[2 * tensor]
        assert param.grad is not None
        param.grad.fill_(float("nan"))
        with pytest.raises(topkast.NonFiniteError, match=r"NaN.*have moved.*call step again"):
            optimizer.step()
        for name, mask in topkast.masks(optimizer).items():
            assert torch.equal(mask.forward, masks[name].forward)
            assert torch.equal(mask.backward, masks[name].backward)
        assert optimizer._wrapper_state.updates == 3
        assert int(optimizer.state[param]["step"]) == 3
        check_forward_view(model, optimizer)
        with torch.no_grad():
            for one in model.parameters():
                one.nan_to_num_(0.01)
            for execution in optimizer._wrapper_state.executions:
                execution.values.nan_to_num_(0.01)
            for entries in optimizer.state.values():
                for entry in entries.values():
                    entry.nan_to_num_(0.0)
        backward(model, 3)
        optimizer.step()  # not due by itself, but overdue
        changed = topkast.masks(optimizer)
        assert any(not torch.equal(changed[n].backward, masks[n].backward) for n in masks)

    def test_overdue_refreshes_are_saved(self, sparse: bool) -> None:
        _, optimizer = self.ready(sparse)
        optimizer._wrapper_state.overdue = True
        _, other = self.ready(sparse)
        other.load_state_dict(optimizer.state_dict())
        assert other._wrapper_state.overdue


def check_forward_view(model: nn.Module, optimizer: Any) -> None:
    """The model computes with θ on A."""
    theta, masks = topkast.dense_params(optimizer), topkast.masks(optimizer)
    for name, mask in masks.items():
        module: Any = model.get_submodule(name.rpartition(".")[0])
        view = torch.where(mask.forward, theta[name], 0)
        assert torch.equal(module.weight.detach().nan_to_num(7.0), view.nan_to_num(7.0)), name


class TestForeignWrites:
    @pytest.mark.parametrize(
        "read",
        [
            lambda model, optimizer: optimizer.state_dict(),
            lambda model, optimizer: topkast.dense_params(optimizer),
            lambda model, optimizer: topkast.summary(optimizer),
            lambda model, optimizer: copy.deepcopy((model, optimizer))[1],
            lambda model, optimizer: pickle.dumps((model, optimizer)),
            lambda model, optimizer: optimizer.step(),
        ],
        ids=["state_dict", "dense_params", "summary", "deepcopy", "pickle", "step"],
    )
    def test_whoever_reads_first_takes_them_over(self, read: Callable[..., Any]) -> None:
        model, optimizer = make()
        train(model, optimizer, range(4))
        with torch.no_grad():
            for param in model.parameters():
                param.clamp_(-0.05, 0.05)
        model.zero_grad()
        read(model, optimizer)
        masks = topkast.masks(optimizer)
        for name, theta in topkast.dense_params(optimizer).items():
            if name in masks:
                limit = torch.tensor(0.05)
                assert (theta[masks[name].forward].abs() <= limit).all()
                assert theta.abs().max() > limit  # what the model does not show is not clamped

    def test_a_copy_holds_them(self) -> None:
        model, optimizer = make()
        train(model, optimizer, range(4))
        with torch.no_grad():
            model[0].weight.mul_(0.5)
        half = model[0].weight.detach().clone()
        other_model, other = copy.deepcopy((model, optimizer))
        backward(other_model, 4)
        other.param_groups[0]["lr"] = 0.0
        other.param_groups[0]["weight_decay"] = 0.0
        other.step()
        assert torch.equal(other_model[0].weight, half)

    @pytest.mark.parametrize("sparse", [False, True])
    def test_load_state_dict_with_assign_is_told(self, sparse: bool) -> None:
        """Otherwise the model would compute with Parameters that nobody trains."""
        model, optimizer = make()
        if sparse:
            topkast.sparsify(model, optimizer)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        backward(model, 0)
        with pytest.raises(topkast.MismatchError, match=r"another Parameter|other Parameters"):
            optimizer.step()

    @pytest.mark.parametrize("distribution", ["uniform", "global"])
    @pytest.mark.parametrize("read", [True, False], ids=["read", "step"])
    def test_what_leaves_no_stamp_is_taken_over_too(self, read: bool, distribution: Any) -> None:
        """`param.data` and NumPy, as the clipping of critics is written."""
        model, optimizer = make(distribution=distribution, refresh_every=100, penalty=0.0)
        optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
        train(model, optimizer, range(2))
        model[0].weight.data.clamp_(-0.05, 0.05)
        model[2].weight.detach().numpy()[...] *= 0.5
        expected = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
        if read:
            theta, masks = topkast.dense_params(optimizer), topkast.masks(optimizer)
            for name, view in zip(("0.weight", "2.weight"), expected, strict=True):
                assert torch.equal(torch.where(masks[name].forward, theta[name], 0), view)
        train(model, optimizer, range(2, 4))
        assert torch.equal(model[0].weight, expected[0])
        assert torch.equal(model[2].weight, expected[1])

    def test_asking_moves_nothing(self) -> None:
        model, optimizer = make()
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        theta = topkast.dense_params(optimizer)
        for _ in range(2):
            optimizer.state_dict()
            topkast.masks(optimizer)
            topkast.summary(optimizer)
            repr(optimizer)
            copy.deepcopy(optimizer)
        assert optimizer._wrapper_state.updates == 0
        assert not dict(optimizer.state)
        for name, param in model.named_parameters():
            assert torch.equal(param, before[name])
            assert torch.equal(topkast.dense_params(optimizer)[name], theta[name])


class TestOptionsThatChange:
    def test_the_end_of_exploration_holds_from_the_next_step_on(self) -> None:
        model, optimizer = make(refresh_every=100, penalty=0.0)
        optimizer.param_groups[0]["weight_decay"] = 0.0
        train(model, optimizer, range(2))
        for until, moves in ((0, False), (None, True)):
            optimizer.param_groups[0]["explore_until"] = until
            masks, theta = topkast.masks(optimizer), topkast.dense_params(optimizer)
            train(model, optimizer, range(2, 3))
            for name, mask in masks.items():
                changed = topkast.dense_params(optimizer)[name] != theta[name]
                assert changed[mask.forward].any()
                assert changed[mask.backward & ~mask.forward].any() == moves

    @pytest.mark.parametrize("sparse", [False, True], ids=["masked", "sparse"])
    def test_exploration_that_begins_again_has_a_gradient(self, sparse: bool) -> None:
        layer = torch.nn.Linear(8, 6, bias=False)
        inner = torch.optim.SGD(layer.named_parameters(), 0.1)
        optimizer = topkast.wrap_optimizer(inner, fwd=0.5, bwd=0.25, penalty=0.0, explore_until=0)
        if sparse:
            topkast.sparsify(layer, optimizer)
        optimizer.param_groups[0]["explore_until"] = None
        optimizer.zero_grad()
        masks, theta = topkast.masks(optimizer)["weight"], topkast.dense_params(optimizer)["weight"]
        layer(torch.eye(8)).sum().backward()
        optimizer.step()
        expected = torch.where(masks.backward, theta - 0.1, theta)
        assert torch.equal(topkast.dense_params(optimizer)["weight"], expected)

    def test_numbers_of_numpy_can_be_saved_at_once(self) -> None:
        _, optimizer = make()
        optimizer.param_groups[0]["penalty"] = np.float64(0.1)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        torch.load(file, weights_only=True)

    def test_groups_come_by_add_param_group_alone(self) -> None:
        model, optimizer = make()
        backward(model, 0)
        optimizer.param_groups.append(dict(optimizer.param_groups[0]))
        with pytest.raises(topkast.MismatchError, match="add_param_group"):
            optimizer.step()

    def test_a_scheduler_of_the_inner_optimizer_is_refused(self) -> None:
        model = make_model()
        inner = build(model)
        optimizer = topkast.wrap_optimizer(inner, **OPTIONS)
        with pytest.raises(topkast.UnsupportedOptimizerError, match="call step of the TopKAST"):
            torch.optim.lr_scheduler.StepLR(inner, 1)
        torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def test_wrapping_in_inference_mode(self) -> None:
        model = make_model()
        inner = build(model)
        with torch.inference_mode():
            optimizer = topkast.wrap_optimizer(inner, **OPTIONS)
        train(model, optimizer, range(4))


class TestGradients:
    def test_one_that_was_frozen_is_restricted_from_its_first_gradient_on(self) -> None:
        model = make_model()
        model[0].weight.requires_grad_(False)
        optimizer = topkast.wrap_optimizer(build(model), **OPTIONS)
        train(model, optimizer, range(2))
        model[0].weight.requires_grad_(True)
        backward(model, 2)
        grad = model[0].weight.grad
        assert grad is not None
        assert grad.any()
        assert not grad[~topkast.masks(optimizer)["0.weight"].backward].any()

    @pytest.mark.parametrize("change", ["assigned", "in place"])
    def test_what_was_written_afterwards_is_restricted_by_the_step(self, change: str) -> None:
        """As a hook of communication does, which changes gradients after they were accumulated."""
        model, optimizer = make(refresh_every=100)
        backward(model, 0)
        weight = model[0].weight
        if change == "assigned":
            weight.grad = torch.ones_like(weight)
        else:
            assert weight.grad is not None
            weight.grad.add_(1.0)
        optimizer.step()
        assert weight.grad is not None
        assert not weight.grad[~topkast.masks(optimizer)["0.weight"].backward].any()

    @pytest.mark.parametrize("sparse", [False, True])
    def test_the_penalty_shrinks_weights_whatever_the_sign_of_the_objective(
        self, sparse: bool
    ) -> None:
        for maximize in (False, True):
            model = make_model()
            inner = torch.optim.SGD(model.named_parameters(), 0.1, maximize=maximize)
            optimizer = topkast.wrap_optimizer(
                inner, fwd=0.8, bwd=0.5, penalty=1.0, refresh_every=100
            )
            if sparse:
                topkast.sparsify(model, optimizer)
            before = topkast.dense_params(optimizer)
            for _ in range(3):
                for param in model.parameters():
                    param.grad = torch.zeros_like(param)
                optimizer.step()
            masks = topkast.masks(optimizer)
            for name, mask in masks.items():
                after = topkast.dense_params(optimizer)[name].abs()
                assert (after[mask.backward] < before[name].abs()[mask.backward]).all()


def test_a_predicate_does_not_prevent_pickling() -> None:
    model = make_model()
    optimizer = topkast.wrap_optimizer(
        build(model), **OPTIONS, dense=lambda name, tensor: name == "2.weight"
    )
    other_model, other = pickle.loads(pickle.dumps((model, optimizer)))
    train(other_model, other, range(3))
    assert list(topkast.masks(other)) == ["0.weight"]
    with pytest.raises(topkast.OptionError, match="predicate"):
        other.add_param_group({"params": [("w", nn.Parameter(torch.randn(9, 9)))]})
