"""PyTorch's own tools around an optimizer: averages, distributed checkpoints, weight norms."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import topkast_torch
import torch
import torch.distributed as dist
from products import star
from reservoir_training import build as build_reservoir
from reservoir_training import train as train_reservoir
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import topkast

OPTIONS: dict[str, Any] = {"fwd": 0.9, "bwd": 0.7, "refresh_every": 2, "penalty": 0.1}


def make(
    build: Any = lambda params: torch.optim.AdamW(params, 0.02), **options: Any
) -> tuple[nn.Sequential, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    return model, topkast.wrap_optimizer(build(model.named_parameters()), **OPTIONS | options)


def train(model: nn.Module, opt: Any, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        (model(inputs) - inputs[:, :4]).square().mean().backward()
        opt.step()


def assert_equal(first: Any, second: Any, where: str = "") -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_equal(one, other, f"{where}/{number}")
    else:
        assert first == second, where


class TestDistributedCheckpoint:
    @pytest.fixture(autouse=True)
    def group(self) -> Any:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    def test_getting_a_state_dict_moves_nothing(self) -> None:
        model, opt = make()
        before = copy.deepcopy(model.state_dict())
        get_state_dict(model, opt)
        assert_equal(before, model.state_dict())
        assert topkast.summary(opt).updates == 0
        assert not dict(opt.state)
        train(model, opt, range(3))
        other_model, other = make()
        train(other_model, other, range(3))
        assert_equal(opt.state_dict(), other.state_dict())

    @pytest.mark.parametrize(
        ("distribution", "build", "stepped"),
        star(
            ["uniform", "global"],
            {
                "AdamW": lambda params: torch.optim.AdamW(params, 0.02),
                "SGD": lambda params: torch.optim.SGD(params, 0.1),
                "momentum": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
                "Rprop": lambda params: torch.optim.Rprop(params, 0.01),
                "counts in groups": lambda params: CountsInGroups(params, 0.01),
            },
            {"into a fresh one": False, "into a used one": True},
        ),
    )
    def test_a_run_is_resumed_bit_for_bit(
        self, tmp_path: Path, build: Any, stepped: bool, distribution: Any
    ) -> None:
        model, opt = make(build, distribution=distribution)
        train(model, opt, range(5))
        saved_model, saved = get_state_dict(model, opt)
        save({"model": saved_model, "optimizer": saved}, checkpoint_id=tmp_path)
        train(model, opt, range(5, 10))
        other_model, other = make(build, distribution=distribution)
        if stepped:
            train(other_model, other, range(20, 23))
        target_model, target = get_state_dict(other_model, other)
        state: Any = {"model": target_model, "optimizer": target}
        load(state, checkpoint_id=tmp_path)
        set_state_dict(
            other_model, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        train(other_model, other, range(5, 10))
        assert_equal(model.state_dict(), other_model.state_dict())
        assert_equal(opt.state_dict(), other.state_dict())

    @pytest.mark.parametrize("reservoir", ["disk", "seeded"])
    @pytest.mark.parametrize("sparse", [False, True], ids=["masked", "sparse"])
    def test_reservoirs_are_resumed(self, reservoir: str, sparse: bool, tmp_path: Path) -> None:
        """Whatever number of entries left B in the saved run, and in the one that loads it."""
        model, opt = build_reservoir(reservoir, folder=tmp_path / "weights", sparse=sparse)
        train_reservoir(model, opt, 5)
        saved_model, saved = get_state_dict(model, opt)
        save({"model": saved_model, "optimizer": saved}, checkpoint_id=tmp_path / "checkpoint")
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        full_model, full_saved = copy.deepcopy(get_state_dict(model, opt, options=full))
        train_reservoir(model, opt, 5)
        for steps in (0, 2):
            other_model, other = build_reservoir(
                reservoir, folder=tmp_path / "weights", sparse=sparse, seed=9
            )
            train_reservoir(other_model, other, steps)
            target_model, target = get_state_dict(other_model, other)
            state: Any = {"model": target_model, "optimizer": target}
            load(state, checkpoint_id=tmp_path / "checkpoint")
            for weights, entries, options in (
                (state["model"], state["optimizer"], None),
                (full_model, full_saved, full),
            ):
                set_state_dict(
                    other_model,
                    other,
                    model_state_dict=weights,
                    optim_state_dict=entries,
                    options=options,
                )
                train_reservoir(other_model, other, 5)
                assert_equal(model.state_dict(), other_model.state_dict())
                assert_equal(opt.state_dict(), other.state_dict())

    def test_a_full_state_dict_resumes(self) -> None:
        """For saving on one process; PyTorch drops empty dictionaries from it."""
        model, opt = make()
        train(model, opt, range(5))
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        saved_model, saved = get_state_dict(model, opt, options=options)
        other_model, other = make()
        set_state_dict(
            other_model,
            other,
            model_state_dict=saved_model,
            optim_state_dict=saved,
            options=options,
        )
        for network, wrapper in ((model, opt), (other_model, other)):
            train(network, wrapper, range(5, 10))
        assert_equal(model.state_dict(), other_model.state_dict())


class CountsInGroups(torch.optim.SGD):
    """SGD whose rate depends on a counter that the first step adds to the groups."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    param.add_(param.grad, alpha=-group["lr"] / group["count"])


class TestAverages:
    def test_an_average_has_the_size_of_a(self) -> None:
        model, opt = make()
        average = topkast_torch.WeightAverage(opt, decay=0.5)
        expected: dict[str, torch.Tensor] = {}
        for step in range(9):
            train(model, opt, range(step, step + 1))
            average.update()
            for name, theta in topkast.dense_params(opt).items():
                expected[name] = theta if step == 0 else expected[name].lerp(theta, 0.5)
        state = average.forward_params()
        for name, mask in topkast.masks(opt).items():
            assert torch.equal(average.dense_params()[name], expected[name])
            assert int((state[name] != 0).sum()) == int(mask.forward.sum())
            nonzero = state[name] != 0
            assert torch.equal(state[name][nonzero], expected[name][nonzero])
        nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).load_state_dict(state)

    def test_without_decay_all_updates_weigh_alike(self) -> None:
        model, opt = make()
        average = topkast_torch.WeightAverage(opt, decay=None)
        weights = []
        for step in range(5):
            train(model, opt, range(step, step + 1))
            average.update()
            weights.append(topkast.dense_params(opt)["0.weight"])
        mean = torch.stack(weights).mean(0)
        torch.testing.assert_close(average.dense_params()["0.weight"], mean)

    def test_a_saved_average_is_restored(self) -> None:
        model, opt = make()
        average = topkast_torch.WeightAverage(opt)
        with pytest.raises(topkast.MismatchError, match="has no weights yet"):
            average.forward_params()
        train(model, opt, range(2))
        average.update()
        other = topkast_torch.WeightAverage(opt)
        other.load_state_dict(copy.deepcopy(average.state_dict()))
        train(model, opt, range(2, 4))
        for weight_average in (average, other):
            weight_average.update()
        assert_equal(average.state_dict(), other.state_dict())
        with pytest.raises(topkast.StateDictError, match="tensors"):
            other.load_state_dict({"count": 1, "average": {"w": torch.ones(2)}})
        for bad in (1.0, -0.1):
            with pytest.raises(topkast.OptionError, match="decay"):
                topkast_torch.WeightAverage(opt, decay=bad)
        with pytest.raises(topkast.OptionError, match="needs the optimizer that"):
            topkast_torch.WeightAverage(torch.optim.SGD(model.parameters(), 0.1))  # type: ignore[arg-type]

    def test_sparse_layers_have_the_same_average(self) -> None:
        runs = []
        for sparse in (False, True):
            model, opt = make()
            if sparse:
                topkast.sparsify(model, opt)
            average = topkast_torch.WeightAverage(opt, decay=0.5)
            for step in range(6):
                train(model, opt, range(step, step + 1))
                average.update()
            runs.append(average.forward_params())
        for name, alpha in runs[0].items():
            torch.testing.assert_close(alpha, runs[1][name])

    @pytest.mark.parametrize("sparse", [False, True])
    def test_a_dense_average_warns(self, sparse: bool) -> None:
        model, opt = make()
        if sparse:
            topkast.sparsify(model, opt)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        with pytest.warns(topkast.DenseAverageWarning, match=r"WeightAverage\(optimizer\)"):
            train(model, opt, range(3))
        del average

    def test_a_dense_average_made_later_warns(self) -> None:
        model, opt = make()
        train(model, opt, range(4))
        average = AveragedModel(model)
        with pytest.warns(topkast.DenseAverageWarning):
            train(model, opt, range(4, 12))
        del average

    def test_a_saved_average_is_a_snapshot(self) -> None:
        model, opt = make()
        average = topkast_torch.WeightAverage(opt, decay=0.5)
        average.update()
        saved = average.state_dict()["average"]
        before = copy.deepcopy(saved)
        train(model, opt, range(2))
        average.update()
        assert_equal(saved, before)

    def test_tensors_added_later_are_averaged(self) -> None:
        model, opt = make()
        average = topkast_torch.WeightAverage(opt, decay=0.5)
        average.update()
        extra = nn.Linear(9, 9)
        opt.add_param_group({"params": list(extra.named_parameters("extra"))})
        train(model, opt, range(2))
        average.update()
        assert int((average.forward_params()["extra.weight"] != 0).sum()) == 9

    def test_an_average_of_another_model_does_not_warn(self) -> None:
        other = AveragedModel(nn.Linear(3, 3))
        model, opt = make()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, opt, range(3))
        del other


class TestNorms:
    @pytest.mark.parametrize("named", [True, False])
    @pytest.mark.parametrize("way", ["parametrization", "hook"])
    def test_directions_of_weight_norm_are_refused(self, named: bool, way: str) -> None:
        """A row that loses all its entries would be divided by zero."""
        layer = nn.Linear(20, 30)
        if way == "parametrization":
            nn.utils.parametrizations.weight_norm(layer)
            name = "parametrizations.weight.original1"
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nn.utils.weight_norm(layer)
            name = "weight_v"
        before = copy.deepcopy(dict(layer.named_parameters()))
        params: Any = layer.named_parameters() if named else layer.parameters()
        with pytest.raises(topkast.UnsupportedTensorError, match="direction of a weight_norm"):
            topkast.wrap_optimizer(torch.optim.SGD(params, 0.1), fwd=0.9, bwd=0.8)
        assert_equal(dict(layer.named_parameters()), before)
        model = nn.ModuleList([layer, nn.Linear(9, 9)])
        opt = topkast.wrap_optimizer(
            torch.optim.SGD(model.named_parameters(), 0.1), fwd=0.9, bwd=0.8, dense=f"0.{name}"
        )
        assert list(topkast.masks(opt)) == ["1.weight"]
        assert torch.isfinite(layer(torch.ones(1, 20))).all()

    @pytest.mark.parametrize(
        "arrange",
        [
            lambda named: named[::-1],
            lambda named: [pair for pair in named if not pair[0].endswith("0")],
            lambda named: [{"params": [pair]} for pair in named],
        ],
        ids=["reversed", "without lengths", "groups"],
    )
    def test_directions_are_refused_in_any_order_and_grouping(self, arrange: Any) -> None:
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(20, 30))
        params = arrange(list(layer.named_parameters()))
        with pytest.raises(topkast.UnsupportedTensorError, match="direction of a weight_norm"):
            topkast.wrap_optimizer(torch.optim.SGD(params, 0.1), fwd=0.9, bwd=0.8)

    def test_a_scale_next_to_a_weight_is_accepted(self) -> None:
        params = [nn.Parameter(torch.ones(30, 1)), nn.Parameter(torch.randn(30, 20))]
        topkast.wrap_optimizer(torch.optim.SGD(params, 0.1), fwd=0.9, bwd=0.8)


class TestGlobal:
    def test_rules_that_normalise_by_tensor_are_refused(self) -> None:
        class ByNorm(torch.optim.SGD):
            @torch.no_grad()
            def step(self, closure: Any = None) -> Any:
                for group in self.param_groups:
                    for param in group["params"]:
                        if param.grad is not None:
                            param -= group["lr"] * param.grad / (1e-6 + param.grad.norm())

        model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 4))
        inner = ByNorm(model.parameters(), 0.1)
        topkast.wrap_optimizer(copy.deepcopy(inner), fwd=0.9, bwd=0.8)
        with pytest.raises(topkast.UnsupportedOptimizerError, match=r"ByNorm.*'global'"):
            topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8, distribution="global")


class TestWrappersOfOptimizers:
    def test_an_optimizer_around_another_is_refused_by_name(self) -> None:
        class Lookahead(torch.optim.Optimizer):
            def __init__(self, base: torch.optim.Optimizer) -> None:
                self.base = base
                super().__init__(base.param_groups, base.defaults)

        base = torch.optim.SGD(nn.Linear(9, 9).parameters(), 0.1)
        with pytest.raises(
            topkast.UnsupportedOptimizerError, match="Lookahead holds another optimizer, SGD"
        ):
            topkast.wrap_optimizer(Lookahead(base), fwd=0.9, bwd=0.8)

    def test_optimizers_with_options_of_topkast_are_refused(self) -> None:
        class Penalised(torch.optim.SGD):
            def __init__(self, params: Any) -> None:
                super().__init__(params, 0.1)
                self.defaults["penalty"] = 0.1
                self.param_groups[0]["penalty"] = 0.1

        with pytest.raises(topkast.UnsupportedOptimizerError, match="options named penalty"):
            topkast.wrap_optimizer(Penalised(nn.Linear(9, 9).parameters()), fwd=0.9, bwd=0.8)


def test_deterministic_algorithms_with_channels_last() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for memory_format in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(0)
            model: Any = nn.Sequential(nn.Conv2d(4, 8, 3))
            model.to(memory_format=memory_format)
            opt = topkast.wrap_optimizer(
                torch.optim.SGD(model.named_parameters(), 0.1), fwd=0.9, bwd=0.8, refresh_every=2
            )
            for step in range(5):
                inputs = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(step))
                opt.zero_grad()
                model(inputs.to(memory_format=memory_format)).square().mean().backward()
                opt.step()
            assert int((model[0].weight != 0).sum()) == 29
            runs.append(topkast.dense_params(opt)["0.weight"])
        torch.testing.assert_close(*runs)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("names", [True, False])
def test_groups_without_names_may_be_added_to_named_ones(names: bool) -> None:
    """Callbacks that unfreeze a backbone add such groups."""
    _, opt = make(dense="2.*")
    extra = nn.Linear(9, 9)
    params: Any = list(extra.named_parameters() if names else extra.parameters())
    opt.add_param_group({"params": params, "lr": 0.5})
    assert [*topkast.masks(opt)] == ["0.weight", "weight" if names else "1.0"]
    assert opt.param_groups[1]["params"][0] is extra.weight
