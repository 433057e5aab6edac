"""What stands around a wrapped optimizer, steps it, or averages what it trains."""

from __future__ import annotations

import copy
import gc
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_optimizer
import schedulefree
import topkast_torch
import torch
import torch.distributed as dist
from optimizer_runs import OPTIONS, assert_same_bits, loss_of, make_model, train
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch_ema import ExponentialMovingAverage

import topkast
from topkast.testing import assert_forward_view


def prepare(**options: Any) -> tuple[nn.Sequential, Any]:
    model = make_model()
    inner = torch.optim.SGD(model.named_parameters(), 0.5)
    return model, topkast.wrap_optimizer(inner, **OPTIONS | options)


def assert_sparse(model: nn.Module, optimizer: Any) -> None:
    theta = topkast.dense_params(optimizer)
    for name, masks in topkast.masks(optimizer).items():
        assert_forward_view(theta[name], model.get_parameter(name), masks.forward)


class TestPerturbations:
    """SAM and its kin step to a neighbour of the weights and back, then step the optimizer."""

    def test_sam_is_its_own_plain_loop(self) -> None:
        model, optimizer = prepare()
        outer: Any = pytorch_optimizer.SAM(
            [{"params": list(model.parameters()), "rho": 0.05, "adaptive": False}],
            lambda groups, **options: optimizer,
        )
        optimizer.param_groups[0].update(rho=0.05, adaptive=False)
        other_model, other = prepare()
        for step in range(9):
            model.zero_grad()
            loss_of(model, step).backward()

            def again(step: int = step) -> None:
                model.zero_grad()
                loss_of(model, step).backward()

            outer.step(again)
            assert_sparse(model, optimizer)
            self.perturbed_step(other_model, other, step)
        for name, theta in topkast.dense_params(other).items():
            torch.testing.assert_close(topkast.dense_params(optimizer)[name], theta)

    @staticmethod
    def perturbed_step(model: nn.Module, optimizer: Any, step: int) -> None:
        model.zero_grad()
        loss_of(model, step).backward()
        grads = [param.grad.clone() for param in model.parameters() if param.grad is not None]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        kept = [param.detach().clone() for param in model.parameters()]
        with torch.no_grad():
            for param, grad in zip(model.parameters(), grads, strict=True):
                param.add_(grad * (0.05 / (norm + 1e-12)))
        model.zero_grad()
        loss_of(model, step).backward()
        with torch.no_grad():
            for param, old in zip(model.parameters(), kept, strict=True):
                param.copy_(old)
        optimizer.step()


class TestGradientSurgery:
    """What changes gradients between the backward pass and the step."""

    def test_orthograd_gives_gradients_that_are_restricted_again(self) -> None:
        model, optimizer = prepare()
        outer = pytorch_optimizer.OrthoGrad(optimizer)
        for step in range(9):
            masks, before = topkast.masks(optimizer), topkast.dense_params(optimizer)
            train(model, outer, range(step, step + 1))
            assert_sparse(model, optimizer)
            for name, mask in masks.items():
                outside = ~mask.backward
                after = topkast.dense_params(optimizer)[name]
                assert torch.equal(after[outside], before[name][outside])

    def test_pcgrad(self) -> None:
        model, optimizer = prepare()
        outer = pytorch_optimizer.PCGrad(optimizer)
        for step in range(9):
            outer.zero_grad()
            outer.pc_backward([loss_of(model, step), loss_of(model, step + 20)])
            outer.step()
            assert_sparse(model, optimizer)
        assert topkast.summary(optimizer).updates == 9


OUTER: dict[str, Callable[[Any], Any]] = {
    "Lookahead": lambda optimizer: pytorch_optimizer.Lookahead(optimizer, k=2),
    "ScheduleFreeWrapper": lambda optimizer: pytorch_optimizer.ScheduleFreeWrapper(optimizer),
    "schedulefree's": lambda optimizer: schedulefree.ScheduleFreeWrapper(optimizer),
    "its reference": lambda optimizer: schedulefree.ScheduleFreeWrapperReference(optimizer),
}


class TestAverages:
    @pytest.mark.parametrize("name", OUTER)
    def test_optimizers_that_average_forward_views_are_warned_of(self, name: str) -> None:
        model, optimizer = prepare()
        outer = OUTER[name](optimizer)
        if callable(getattr(outer, "train", None)):
            outer.train()
        with pytest.warns(topkast.DenseAverageWarning, match=type(outer).__name__):
            train(model, outer, range(3))

    @pytest.mark.filterwarnings("ignore::topkast.DenseAverageWarning")
    def test_lookahead_is_refused_once_its_average_is_not_sparse(self) -> None:
        model, optimizer = prepare()
        outer = OUTER["Lookahead"](optimizer)
        with pytest.raises(topkast.MismatchError, match="nonzero weights outside its forward set"):
            train(model, outer, range(9))

    def test_lookahead_between_refreshes_writes_what_is_trained(self) -> None:
        model, optimizer = prepare(refresh_every=1000)
        train(model, OUTER["Lookahead"](optimizer), range(6))
        other_model, other = prepare(refresh_every=1000)
        slow = [param.detach().clone() for param in other_model.parameters()]
        for step in range(6):
            train(other_model, other, range(step, step + 1))
            if step % 2:
                with torch.no_grad():
                    for param, average in zip(other_model.parameters(), slow, strict=True):
                        average.copy_(param.lerp_(average, 0.5))
        assert_sparse(model, optimizer)
        assert_same_bits(topkast.dense_params(optimizer), topkast.dense_params(other))

    @pytest.mark.filterwarnings("ignore::topkast.DenseAverageWarning")
    def test_torch_ema_beside_it_changes_no_training(self) -> None:
        model, optimizer = prepare()
        average = ExponentialMovingAverage(model.parameters(), decay=0.5)
        for step in range(9):
            train(model, optimizer, range(step, step + 1))
            average.update()
            with average.average_parameters():
                loss_of(model, step)
        other_model, other = prepare()
        train(other_model, other, range(9))
        assert_same_bits(optimizer.state_dict(), other.state_dict())
        assert_same_bits(model.state_dict(), other_model.state_dict())

    def test_torch_ema_is_warned_of_and_an_average_of_the_weights_is_sparse(self) -> None:
        model, optimizer = prepare()
        average = topkast_torch.WeightAverage(optimizer, decay=0.5)
        dense = ExponentialMovingAverage(model.parameters(), decay=0.5)
        train(model, optimizer, range(2))
        with pytest.warns(topkast.DenseAverageWarning, match="ExponentialMovingAverage"):
            train(model, optimizer, range(2, 3))
        for step in range(3, 9):
            train(model, optimizer, range(step, step + 1))
            average.update()
            dense.update()
        assert int(torch.count_nonzero(dense.shadow_params[0])) > 39
        assert int(torch.count_nonzero(average.forward_params()["0.weight"])) == 39

    def test_one_that_nobody_uses_any_more_is_not_warned_of(self) -> None:
        model, optimizer = prepare()
        holder: list[Any] = [ExponentialMovingAverage(model.parameters(), decay=0.5)]
        holder.append(holder)  # only the garbage collector ends it
        del holder
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, optimizer, range(6))
        gc.collect()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # when it is imported
class TestZeroRedundancy:
    @pytest.fixture
    def zero(self) -> Iterator[Any]:
        kind = importlib.import_module("torch.distributed.optim").ZeroRedundancyOptimizer
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        yield kind
        dist.destroy_process_group()

    def test_around_a_wrapper_it_is_refused_by_name(self, zero: Any) -> None:
        model = make_model()
        before = copy.deepcopy(model.state_dict())

        def build(params: Any, **defaults: Any) -> torch.optim.Optimizer:
            inner = torch.optim.AdamW(params, **defaults)
            wrapped: torch.optim.Optimizer = topkast.wrap_optimizer(inner, **OPTIONS)
            return wrapped

        with pytest.raises(
            topkast.UnsupportedOptimizerError,
            match=r"ZeroRedundancyOptimizer.*wrap the AdamW itself",
        ):
            zero(model.parameters(), build, lr=0.1)
        assert_same_bits(before, model.state_dict())

    def test_inside_a_wrapper_it_is_refused_by_name(self, zero: Any) -> None:
        model = make_model()
        inner = zero(model.parameters(), torch.optim.AdamW, lr=0.1)
        with pytest.raises(
            topkast.UnsupportedOptimizerError, match="ZeroRedundancyOptimizer holds another"
        ):
            topkast.wrap_optimizer(inner, **OPTIONS)
        assert int(torch.count_nonzero(model.get_parameter("0.weight"))) == 192
