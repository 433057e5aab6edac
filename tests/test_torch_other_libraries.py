"""What other libraries do to optimizers and layers, by stand-ins for their classes.

``tests/ecosystem`` has the libraries themselves, which the default session does not install.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import topkast_torch
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

import topkast
from topkast import DenseAverageWarning, MismatchError, OptionError, StateDictError

INPUTS = torch.ones(4, 20)


def build(inner: Any = torch.optim.SGD, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20))
    optimizer = inner(model.named_parameters(), lr=0.1, momentum=0.9)
    return model, topkast.wrap_optimizer(optimizer, fwd=0.9, bwd=0.8, **options)


def step(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(INPUTS).square().sum().backward()
    optimizer.step()


class AverageInAList:
    """As torch_ema's ExponentialMovingAverage."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.shadow_params = [param.detach().clone() for param in params]


class AverageOfAModule:
    """As Lightning's StochasticWeightAveraging."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.average = nn.ParameterList(param.detach().clone() for param in params)


class AverageInAnOptimizer:
    """As schedulefree's ScheduleFreeWrapper."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.base = torch.optim.SGD([param.detach().clone() for param in params], lr=0.1)


@pytest.mark.parametrize("average_class", [AverageInAList, AverageOfAModule, AverageInAnOptimizer])
def test_averages_of_forward_views_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, average_class: Any
) -> None:
    module = types.ModuleType("torch_ema.ema")
    module.ExponentialMovingAverage = average_class  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_ema.ema", module)
    model, optimizer = build()
    other = average_class([torch.ones(3, 3)])  # of another model
    step(model, optimizer)
    average = average_class(model.parameters())
    with pytest.warns(DenseAverageWarning, match=f"{average_class.__name__} averages forward"):
        step(model, optimizer)
    step(model, optimizer)  # which warns no more: warnings are errors
    assert average is not other


class WithShapes(torch.optim.SGD):
    """An optimizer whose own ``add_param_group`` looks at the parameters."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["sizes"] = [param.numel() for param in group["params"]]


def test_the_optimizers_own_add_param_group_gets_vectors_over_b() -> None:
    """It is for what the optimizer trains; the wrapper's group keeps the model's Parameters."""
    model, optimizer = build(WithShapes)
    later = nn.Linear(20, 30)
    optimizer.add_param_group({"params": list(later.named_parameters()), "lr": 0.2})
    group = optimizer.param_groups[-1]
    assert group["params"] == [later.weight, later.bias]
    assert group["sizes"] == [120, 30]  # 600 weights, of which B has 0.2
    assert (group["lr"], group["momentum"]) == (0.2, 0.9)
    before = later.weight.detach().clone()
    step(nn.Sequential(later, model[1]), optimizer)  # type: ignore[index]
    assert not torch.equal(later.weight, before)
    assert int(topkast.masks(optimizer)["weight"].forward.sum()) == 60


def test_state_may_be_set() -> None:
    """As accelerate and other libraries do when they move or reset an optimizer."""
    model, optimizer = build()
    step(model, optimizer)
    entries = dict(optimizer.state)
    assert entries.keys() == set(model.parameters())
    optimizer.state = {}
    assert len(optimizer.state) == 0
    assert optimizer.state  # else libraries would take a step to fill it
    optimizer.state = entries
    assert dict(optimizer.state).keys() == entries.keys()
    for param, entry in entries.items():
        momentum = optimizer.state[param]["momentum_buffer"]
        assert torch.equal(momentum, entry["momentum_buffer"])
    step(model, optimizer)


def test_an_optimizer_without_init_has_no_groups() -> None:
    """Lightning makes such stand-ins; they must not fail in another way than by AttributeError."""
    bare = topkast_torch.TopKASTOptimizer.__new__(topkast_torch.TopKASTOptimizer)
    with pytest.raises(AttributeError, match="param_groups"):
        _ = bare.param_groups


class LightningModule:
    """Named as Lightning's base class."""

    def configure_optimizers(self) -> tuple[nn.Module, Any]:
        model, optimizer = build()
        topkast.sparsify(model, optimizer)
        return model, optimizer


class Model(LightningModule):
    pass


def test_sparsify_where_lightning_would_not_load_checkpoints() -> None:
    with pytest.warns(UserWarning, match="Wrap and sparsify in configure_model"):
        Model().configure_optimizers()


class Pretrained:
    """A model with Transformers' function to save it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def save_pretrained(self, state_dict: dict[str, Any] | None = None) -> dict[str, Any]:
        return self.model.state_dict() if state_dict is None else state_dict


def test_save_pretrained_of_sparse_layers_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    model, optimizer = build()
    dense = model.state_dict().keys()
    topkast.sparsify(model, optimizer)
    with pytest.warns(UserWarning, match=r"pass state_dict=topkast\.densify"):
        Pretrained(model).save_pretrained()
    saved = Pretrained(model).save_pretrained(topkast.densify(model.state_dict()))
    assert saved.keys() == dense


@pytest.fixture
def _group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_group")
def test_sparsify_inside_data_parallel_is_refused() -> None:
    model, optimizer = build()
    with pytest.raises(OptionError, match="call sparsify before wrapping the model in Dist"):
        topkast.sparsify(DistributedDataParallel(model), optimizer)
    assert all(type(layer) is nn.Linear for layer in model.children())


def test_layers_without_sparse_form_say_why() -> None:
    model, optimizer = build()
    loose = nn.Parameter(torch.randn(10, 20))
    optimizer.add_param_group({"params": [("loose", loose)]})
    reasons = {layer.name: layer.reason for layer in topkast.sparsify(model, optimizer).layers}
    assert reasons["loose"] == "not a Parameter of this model"
    low = nn.Sequential(nn.Linear(20, 30)).bfloat16()
    wrapped = topkast.wrap_optimizer(torch.optim.SGD(low.parameters(), 0.1), fwd=0.9, bwd=0.8)
    (report,) = topkast.sparsify(low, wrapped).layers
    assert (report.execution, report.reason) == ("masked", "torch.bfloat16 has no sparse products")


def test_state_dicts_that_other_tools_have_changed() -> None:
    model, optimizer = build()
    step(model, optimizer)
    saved = optimizer.state_dict()
    first = next(iter(saved["state"]))
    for entry, message in (([1.0], "must be a dictionary, got"), ({}, "lacks its sets")):
        changed = {**saved, "state": {**saved["state"], first: entry}}
        with pytest.raises(StateDictError, match=message):
            optimizer.load_state_dict(changed)
    optimizer.load_state_dict(saved)


def test_tensors_ranked_together_are_loaded_in_the_saved_order() -> None:
    """Unnamed Parameters are matched by position: another order would mix the weights."""

    def wrap(*sizes: int) -> Any:
        torch.manual_seed(0)
        named = [(f"w{size}", nn.Parameter(torch.randn(size, size))) for size in sizes]
        options: Any = {"fwd": 0.9, "bwd": 0.8, "distribution": "global"}
        return topkast.wrap_optimizer(torch.optim.SGD(named, lr=0.1), **options)

    with pytest.raises(StateDictError, match=r"in the order \['w8', 'w9'\]"):
        wrap(9, 8).load_state_dict(wrap(8, 9).state_dict())
    wrap(8, 9).load_state_dict(wrap(8, 9).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, param: state[param]["step"].add_(1), "their 'step' differ"),
        (lambda state, param: state[param].update(own=1), "they have different entries"),
        (lambda state, param: state.pop(param), r"only \['0\.weight'\] have optimizer state"),
    ],
    ids=["step", "entries", "none"],
)
def test_states_that_differ_cannot_be_ranked_together(change: Any, message: str) -> None:
    """Wrapping after dense steps joins the states of all members into one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30, bias=False), nn.Linear(30, 20, bias=False))
    adam = torch.optim.Adam(model.named_parameters(), 0.1)
    for _ in range(2):
        step(model, adam)
    change(adam.state, model.get_parameter("1.weight"))
    with pytest.raises(MismatchError, match=rf"{message}.*before its first step"):
        topkast.wrap_optimizer(adam, fwd=0.9, bwd=0.8, distribution="global")
    assert all(param.is_leaf and torch.count_nonzero(param) == 600 for param in model.parameters())
