"""Models in DistributedDataParallel or torch.compile have other names, and train as alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from optimizer_runs import assert_same_bits
from topkast_torch.distributed import _replicas
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import topkast
from topkast.adapter import bare_name
from topkast.methods import SET, DeepRewiring, Method, Mixed, RigL, Static


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Any] = {
    "ddp": DistributedDataParallel,
    "compile": compiled,
    "both": lambda model: DistributedDataParallel(compiled(model)),
    "inside": lambda model: nn.Sequential(DistributedDataParallel(model), nn.Identity()),
}
METHODS: dict[str, Method | None] = {
    "ties": None,
    "static": Static(),
    "set": SET(),
    "rigl": RigL(),
    "mixed": Mixed(),
    "noise": DeepRewiring(0.01),
}


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


def wrap(model: nn.Module, method: Method | None = None, **options: Any) -> Any:
    inner = torch.optim.AdamW(model.named_parameters(), 0.05)
    bwd = 0.6 if method is None or method.backward == "any" else 0.8
    options = {"fwd": 0.8, "bwd": bwd, "refresh_every": 2, "method": method} | options
    return topkast.wrap_optimizer(inner, **options)


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(inputs)[:, :4] - inputs[:, :4]).square().mean().backward()
        optimizer.step()


def report(optimizer: Any) -> Any:
    theta, masks = topkast.dense_params(optimizer), topkast.masks(optimizer)
    names = list(map(bare_name, theta))
    return dict(zip(names, theta.values(), strict=True)), [tuple(own) for own in masks.values()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapper", ["ddp", "compile", "both"])
def test_draws_and_ties_are_those_of_the_model_alone(wrapper: str, method: str) -> None:
    runs = []
    for wrap_module in (lambda model: model, WRAPPERS[wrapper]):
        original = make_model()
        for param in original.parameters():
            param.detach().round_(decimals=1)  # many magnitudes are equal
        optimizer = wrap(wrap_module(original), METHODS[method])
        train(original, optimizer, 0, 5)
        runs.append(report(optimizer))
    assert_same_bits(*runs)


def test_tensors_ranked_as_one_have_the_draws_of_the_model_alone() -> None:
    runs = []
    for wrap_module in (lambda model: model, DistributedDataParallel):
        model = wrap_module(make_model())
        optimizer = wrap(model, Mixed(), distribution="global")
        train(model, optimizer, 0, 5)
        runs.append(report(optimizer))
    assert_same_bits(*runs)


def test_a_state_dict_is_matched_by_names_without_prefixes() -> None:
    """The order of the Parameters differs too."""
    model = DistributedDataParallel(make_model())
    optimizer = wrap(model, Mixed())
    train(model, optimizer, 0, 3)
    saved = copy.deepcopy((model.module.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 3, 7)
    alone = make_model(1)
    named = sorted(alone.named_parameters(), reverse=True)
    other: Any = topkast.wrap_optimizer(
        torch.optim.AdamW(named, 0.05), fwd=0.8, bwd=0.6, refresh_every=2, method=Mixed()
    )
    alone.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(alone, other, 3, 7)
    assert_same_bits(topkast.dense_params(other), report(optimizer)[0])


@pytest.mark.parametrize("block", [None, (4, 1)])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_distributed_checkpoints_of_sparse_layers(wrapper: str, block: Any) -> None:
    """PyTorch adds the prefixes to Parameters alone, and not to the indices of sparse layers."""

    def start(seed: int) -> tuple[Any, Any, Any]:
        original = make_model(seed)
        optimizer = wrap(original, block=block)
        topkast.sparsify(original, optimizer, auto=False)
        return original, WRAPPERS[wrapper](original), optimizer

    original, model, optimizer = start(0)
    train(original, optimizer, 0, 3)
    saved = copy.deepcopy(get_state_dict(model, optimizer))
    assert "0.indices" in saved[0] or "0.0.indices" in saved[0]
    train(original, optimizer, 3, 6)
    other_original, other_model, other = start(1)
    train(other_original, other, 20, 22)
    set_state_dict(other_model, other, model_state_dict=saved[0], optim_state_dict=saved[1])
    train(other_original, other, 3, 6)
    assert_same_bits(report(optimizer), report(other))
    assert_same_bits(model.state_dict(), other_model.state_dict())


@pytest.mark.parametrize("reservoir", ["device", "disk"])
def test_the_state_can_be_sent_from_the_first_process(tmp_path: Any, reservoir: Any) -> None:
    """Neither gloo nor NCCL sends int16, in which the ages are held."""
    options = {"reservoir": reservoir}
    if reservoir == "disk":
        options["reservoir_path"] = tmp_path
    model = make_model()
    optimizer = wrap(model, **options)
    train(model, optimizer, 0, 3)
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved_model, saved = copy.deepcopy(get_state_dict(model, optimizer, options=full))
    train(model, optimizer, 3, 6)
    other_model = make_model(1)
    other = wrap(other_model, **options)
    sent = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(other_model, other, saved, options=sent)
    set_model_state_dict(other_model, saved_model, options=sent)
    train(other_model, other, 3, 6)
    assert_same_bits(report(optimizer), report(other))


def test_ages_of_earlier_files_are_read() -> None:
    model = make_model()
    optimizer = wrap(model)
    train(model, optimizer, 0, 3)
    saved_model, saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    extra = saved["state"][0]["topkast"]
    assert extra["ages"].dtype == torch.int32
    extra["ages"] = extra["ages"].short()
    train(model, optimizer, 3, 4)
    after = report(optimizer)
    model.load_state_dict(saved_model)
    optimizer.load_state_dict(saved)
    train(model, optimizer, 3, 4)
    assert_same_bits(after, report(optimizer))


def test_wrapped_modules_are_copied_and_pickled() -> None:
    model = DistributedDataParallel(make_model())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with Join([other]):
            other(torch.ones(2, 12)).sum().backward()
        assert_same_bits(model.state_dict(), other.state_dict())


def test_only_prefixes_are_left_out() -> None:
    for name in ("module", "submodule.weight", "a.module", "module_list.0.weight", "w"):
        assert bare_name(name) == name
    joined = "module.0.weight + module._orig_mod.net.module.weight"
    assert bare_name(joined) == "0.weight + net.weight"


class OwnHook(DistributedDataParallel):
    """A class of one's own, with a hook of its own."""

    def join_hook(self, **options: Any) -> Any:
        self.is_joined = True
        return super().join_hook(**options)  # type: ignore[no-untyped-call]


def test_a_join_hook_of_ones_own_is_called() -> None:
    model = OwnHook(make_model())
    optimizer = wrap(model)
    with Join([model]):
        train(model, optimizer, 0, 1)
    assert model.is_joined


class WithModule(nn.Module):
    """Its names without the prefix would be one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 12))
        self.module = nn.Linear(12, 12, bias=False)

    def forward(self, x: Any) -> Any:
        return self.module(x @ self.weight)


def test_names_that_are_equal_without_prefixes_are_matched_whole() -> None:
    models, optimizers = [], []
    for order in (1, -1):
        torch.manual_seed(order + 1)
        model = WithModule()
        named = [*model.named_parameters()][::order]
        inner = torch.optim.SGD(named, 0.1, momentum=0.9)
        models.append(model)
        optimizers.append(topkast.wrap_optimizer(inner, fwd=0.5, bwd=0.25))
    train(models[0], optimizers[0], 0, 3)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    first, second = map(topkast.dense_params, optimizers)
    assert_same_bits(first, second)


def test_all_comparisons_are_made_before_one_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes would wait in those that are left out, as on meshes of two axes."""
    compared = []

    def all_reduce(extremes: torch.Tensor, **options: Any) -> None:
        compared.append(options["group"])
        extremes[0] += 1  # another process has a larger number

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    cpu = torch.device("cpu")
    with pytest.raises(topkast.MismatchError, match="first"):
        _replicas._compare_all([({"first": 3}, "rows", cpu), ({"second": 4}, "columns", cpu)])
    assert compared == ["rows", "columns"]
