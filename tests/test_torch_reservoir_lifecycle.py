"""Reservoirs when something else happens: failures, copies, other folders, other state dicts."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest
import topkast_torch
import torch
from reservoir_training import INPUTS, build, train
from topkast_torch.execution import _execution
from topkast_torch.inner._inner_state import Moving
from torch import nn

import topkast
from topkast import MismatchError, OptionError, StateDictError
from topkast.methods import Random, Static
from topkast.reservoirs import LayeredReservoir
from topkast.selection._ranking import Ranking

SPARSITIES: Any = {"fwd": 0.9, "bwd": 0.8}


def kinds(opt: Any) -> list[str]:
    return [execution.reservoir.kind for execution in opt._wrapper_state.executions]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def resume(saved: Any, folder: Path) -> Any:
    """Load a state dict in a run that had other weights."""
    model, opt = build("disk", folder=folder, seed=9)
    opt.load_state_dict(saved)
    return model, opt


def assert_same(first: Any, second: Any) -> None:
    """Equal weights of the sparse tensors."""
    one, two = topkast.dense_params(first), topkast.dense_params(second)
    assert all(torch.equal(one[name], two[name]) for name in topkast.masks(first))


# Files


def test_a_copy_that_loads_another_state_dict_leaves_the_files(tmp_path: Path) -> None:
    model, opt = build("disk", folder=tmp_path)
    train(model, opt, 2)
    _, copied = copy.deepcopy((model, opt))
    copied.load_state_dict(build("device", seed=5)[1].state_dict())
    assert_same(resume(opt.state_dict(), tmp_path)[1], opt)


def test_two_runs_in_a_folder_need_their_files(tmp_path: Path) -> None:
    """Both start with the same weights, and then one of them continues from a checkpoint."""
    (_, first), (model, second) = (build("disk", folder=tmp_path) for _ in range(2))
    saved = second.state_dict()
    first.load_state_dict(build("device", seed=5)[1].state_dict())
    assert_same(resume(saved, tmp_path)[1], second)
    train(model, second, 2)
    assert_same(resume(second.state_dict(), tmp_path)[1], second)


@pytest.mark.parametrize("damage", ["indices", "params", "entered_active", "exp_avg"])
def test_a_refused_state_dict_leaves_no_file(damage: str, tmp_path: Path) -> None:
    model, opt = build("disk", folder=tmp_path)
    train(model, opt, 1)
    other_model, other = build("device", seed=5)
    train(other_model, other, 1)
    saved = other.state_dict()
    state = saved["state"][2]
    entries = state if damage == "exp_avg" else state["topkast"]
    entries[damage] = -1 if damage == "entered_active" else entries[damage].reshape(-1)[1:]
    before = files(tmp_path)
    with pytest.raises(StateDictError):
        opt.load_state_dict(saved)
    assert files(tmp_path) == before


def adam(*layers: nn.Module, **options: Any) -> torch.optim.Adam:
    groups: list[Any] = [{"params": list(layer.parameters())} for layer in layers]
    groups[-1] |= options
    return torch.optim.Adam(groups)


class Averaging(torch.optim.SGD):
    """It starts averages with the weights."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for param in self.param_groups[0]["params"]:
            average = self.state[param].setdefault("average", param.detach().clone())
            average.lerp_(param.detach(), 0.1)
        return loss


def test_a_refused_optimizer_leaves_no_file(tmp_path: Path) -> None:
    disk: Any = {"reservoir": "disk", "reservoir_path": tmp_path}
    first, second = nn.Linear(20, 30), nn.Linear(30, 20)
    with pytest.raises(OptionError, match="bwd must not exceed fwd"):
        topkast.wrap_optimizer(adam(first, second, fwd=0.1), **SPARSITIES, **disk)
    with pytest.raises(OptionError, match="matches no"):
        topkast.wrap_optimizer(
            adam(first), **SPARSITIES, **disk, overrides={"9.*": {"penalty": 0.0}}
        )
    assert files(tmp_path) == set()
    with pytest.raises(OptionError, match="copies of the weights"):
        topkast.wrap_optimizer(Averaging(first.parameters(), 0.1), **SPARSITIES, **disk, power=2)
    layer = topkast_torch.SparseLinear(20, 30, **SPARSITIES)
    with pytest.raises(OptionError, match="copies of the weights"):
        topkast.wrap_optimizer(Averaging(layer.parameters(), 0.1), **SPARSITIES, **disk, power=2)
    assert files(tmp_path) == set()
    opt = topkast.wrap_optimizer(adam(first), **SPARSITIES, **disk)
    before = files(tmp_path)
    memory = torch.randn(1_200)
    shared = [nn.Parameter(memory[start : start + 600].view(20, 30)) for start in (0, 300)]
    with pytest.raises(topkast.UnsupportedTensorError, match="share memory"):
        opt.add_param_group({"params": shared})
    assert files(tmp_path) == before


def test_a_refused_optimizer_leaves_the_file_of_a_layer(tmp_path: Path) -> None:
    layer = nn.Linear(20, 30)
    disk: Any = {"reservoir": "disk", "reservoir_path": tmp_path}
    model = nn.Sequential(layer)
    opt = topkast.wrap_optimizer(adam(model), **SPARSITIES, **disk)
    topkast.sparsify(model, opt)
    topkast.unwrap(opt)
    with pytest.raises(OptionError, match="matches no"):
        topkast.wrap_optimizer(adam(model), **SPARSITIES, overrides={"9.*": {"penalty": 0.0}})
    assert len(files(tmp_path)) == 1


def test_a_relative_path_is_that_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    model, opt = build("disk", folder=Path("weights"))
    train(model, opt, 2)
    monkeypatch.chdir(tmp_path / "other")
    saved = opt.state_dict()
    opt.load_state_dict(build("device", seed=5)[1].state_dict())  # which writes files
    assert files(tmp_path / "other") == set()
    model, opt = build("disk", folder=tmp_path / "elsewhere")
    opt.load_state_dict(saved)


@pytest.mark.parametrize("kind", ["device", "disk", "seeded"])
@pytest.mark.parametrize("shape", [(30, 20), (20, 10, 3)])
def test_the_state_of_another_shape_is_refused(
    kind: Any, shape: tuple[int, ...], tmp_path: Path
) -> None:
    opts = []
    for number, own in enumerate(((20, 30), shape)):
        model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(own))})
        topkast_torch.generate_weights(model, seed=number)
        path = tmp_path if kind == "disk" else None
        inner = torch.optim.Adam(model.named_parameters())
        opts.append(
            topkast.wrap_optimizer(inner, **SPARSITIES, reservoir=kind, reservoir_path=path)
        )
    with pytest.raises(StateDictError, match=r"shape of w: expected "):
        opts[1].load_state_dict(opts[0].state_dict())


# Interruptions


@pytest.mark.parametrize(
    ("method", "sparse", "kind"),
    [
        ("move_gradient", True, "seeded"),
        ("_switch_to", False, "disk"),
        ("update_positions", False, "device"),
        ("update_positions", True, "disk"),
    ],
)
def test_an_interruption_does_not_divide_a_refresh(
    method: str, sparse: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opt = build(sparse=sparse)
    train(model, opt, 6)
    other, other_opt = build(kind, folder=tmp_path, sparse=sparse)
    train(other, other_opt, 3)
    execution_type = type(next(other_opt._wrapper_state.executions))
    original, calls = getattr(execution_type, method), []

    def interrupt(*arguments: Any) -> Any:
        calls.append(method)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(execution_type, method, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(other, other_opt, 1)
    train(other, other_opt, 2)
    assert_same(opt, other_opt)
    assert torch.equal(model(INPUTS), other(INPUTS))
    saved, updates = opt.state_dict(), topkast.summary(opt).updates
    if method != "move_gradient" and kind != "seeded":
        train(other, other_opt, 1)
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            other_opt.load_state_dict(saved)
        assert topkast.summary(other_opt).updates == updates
        assert_same(opt, other_opt)


@pytest.mark.parametrize("method", ["finish_step", "write_forward_view", "count_step", "is_due"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("power", [1, 2])
def test_an_interruption_after_the_inner_step_loses_nothing(
    method: str, sparse: bool, power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update is finished and counted, and a refresh that was due follows after the next one."""
    options: Any = {"sparse": sparse, "power": power, "refresh_every": 4, "penalty": 0.1}
    model, opt = build(**options)
    train(model, opt, 3)
    executions = list(opt._wrapper_state.executions)
    execution_type = type(executions[0])
    original, calls = getattr(execution_type, method), []
    # Whether a refresh is due is also asked of all before the inner step.
    interrupted = 1 + len(executions) if method == "is_due" else 1

    def interrupt(*arguments: Any, **keywords: Any) -> Any:
        calls.append(method)
        if len(calls) == interrupted:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **keywords)

    opt.zero_grad()
    model(INPUTS).square().mean().backward()
    monkeypatch.setattr(execution_type, method, interrupt)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    monkeypatch.undo()
    other, other_opt = build(**options | {"refresh_every": 5})
    train(other, other_opt, 4)
    assert topkast.summary(opt).updates == topkast.summary(other_opt).updates == 4
    assert_same(opt, other_opt)
    train(model, opt, 1)
    train(other, other_opt, 1)
    assert opt._wrapper_state.refreshes == other_opt._wrapper_state.refreshes == 1
    assert_same(opt, other_opt)


FAILING = {
    "move": (Moving, "run"),
    "state": (_execution, "add_entries"),
    "sets": (_execution.Execution, "_switch_to"),
    "reservoir": (LayeredReservoir, "write"),
}


@pytest.mark.parametrize("sparse", [False, True], ids=["masked", "sparse"])
@pytest.mark.parametrize("failing", FAILING)
@pytest.mark.parametrize("number", [1, 2])
def test_a_refresh_that_fails_halfway_is_not_continued(
    number: int, failing: str, sparse: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory ends while new sets are applied, to the first tensor or to the second."""
    options: Any = {"folder": tmp_path, "sparse": sparse}
    options["optimizer"] = lambda params: torch.optim.AdamW(params, lr=3e-2)  # much enters B
    model, opt = build("disk", **options)
    train(model, opt, 3)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    original, calls = getattr(*FAILING[failing]), []

    def fail(*arguments: Any, **keywords: Any) -> Any:
        calls.append(failing)
        if len(calls) == number:
            raise MemoryError
        return original(*arguments, **keywords)

    monkeypatch.setattr(*FAILING[failing], fail)
    with pytest.raises(MemoryError):
        train(model, opt, 1)
    monkeypatch.undo()
    for use in (
        lambda: train(model, opt, 1),
        opt.state_dict,
        lambda: copy.deepcopy(opt),
        lambda: topkast.unwrap(opt),
    ):
        with pytest.raises(MismatchError, match="failed halfway"):
            use()
    model.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    train(model, opt, 3)
    other, other_opt = build("disk", **options)
    train(other, other_opt, 6)
    assert_same(opt, other_opt)


def test_a_load_that_fails_halfway_is_not_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt = build()
    saved = opt.state_dict()
    train(model, opt, 2)

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(_execution.Execution, "_switch_to", fail)
    with pytest.raises(MemoryError):
        opt.load_state_dict(saved)
    monkeypatch.undo()
    with pytest.raises(MismatchError, match="failed halfway"):
        train(model, opt, 1)
    opt.load_state_dict(saved)
    train(model, opt, 1)


def test_a_refresh_that_fails_before_it_changes_a_tensor_follows_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, opt = build()
    train(model, opt, 3)

    def fail(_: Ranking) -> None:
        raise MemoryError

    monkeypatch.setattr(Ranking, "exchange", fail)
    with pytest.raises(MemoryError):
        train(model, opt, 1)
    monkeypatch.undo()
    train(model, opt, 2)
    for execution in opt._wrapper_state.executions:
        ((name, shape),) = execution.ranked.shapes.items()
        expected = topkast.select(execution.theta().view(shape), **SPARSITIES, name=name)
        assert torch.equal(execution.support.indices, expected.indices)


# Methods


def test_a_method_that_keeps_weights_after_one_that_forgets() -> None:
    """What leaves B is kept from then on, also of layers that had no weights outside B."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60))
    opt = topkast.wrap_optimizer(adam(model), **SPARSITIES, method=Static())
    topkast.sparsify(model, opt)
    inner = topkast.unwrap(opt)
    opt = topkast.wrap_optimizer(inner, **SPARSITIES, method=Random())
    assert kinds(opt) == ["device"]
    for _ in range(3):
        model(INPUTS[:, :40]).square().mean().backward()
        opt.step()
    outside = ~topkast.masks(opt)["0.0"].backward
    assert topkast.dense_params(opt)["0.0"][outside].any()


# Layers that are loaded


def sparse_model(**options: Any) -> Any:
    layer = topkast_torch.SparseLinear(40, 60, **SPARSITIES, reservoir="seeded", **options)
    return nn.Sequential(layer, nn.Linear(60, 3))


def wrapped(model: Any, **options: Any) -> Any:
    inner = torch.optim.Adam(model.named_parameters())
    return topkast.wrap_optimizer(inner, **SPARSITIES, refresh_every=1, dense=["1.*"], **options)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("seed", [3, None])
def test_a_meta_layer_that_is_loaded_stays_seeded(seed: int | None, assign: bool) -> None:
    model = sparse_model(seed=3)
    opt = wrapped(model)
    train(model, opt, 3)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    with torch.device("meta"):
        resumed = sparse_model(seed=seed)
    with pytest.raises(MismatchError, match=r"never drawn, .* before building its optimizer"):
        wrapped(resumed)
    if not assign:
        resumed.to_empty(device="cpu")
        with pytest.raises(MismatchError, match="never drawn"):
            wrapped(resumed)
    resumed.load_state_dict(saved[0], assign=assign)
    resumed_opt = wrapped(resumed, reservoir="seeded")
    assert torch.equal(resumed(INPUTS), model(INPUTS))
    assert kinds(resumed_opt) == ["seeded"]
    resumed_opt.load_state_dict(saved[1])
    train(model, opt, 3)
    train(resumed, resumed_opt, 3)
    assert_same(opt, resumed_opt)


def test_loading_into_a_meta_layer_loads_nothing() -> None:
    """As PyTorch has it for its own layers, with a warning."""
    with torch.device("meta"):
        model = sparse_model()
    with pytest.warns(UserWarning, match="meta"):
        model.load_state_dict(sparse_model().state_dict())
    assert model[0].indices.is_meta


@pytest.mark.parametrize("reservoir", ["device", "seeded"])
def test_a_layer_that_is_not_loaded_keeps_its_weights(reservoir: Any) -> None:
    layer = topkast_torch.SparseLinear(40, 60, **SPARSITIES, reservoir=reservoir, init="default")
    model = nn.Sequential(nn.Linear(40, 40), layer)
    model.load_state_dict(nn.Sequential(nn.Linear(40, 40)).state_dict(), strict=False)
    opt = topkast.wrap_optimizer(torch.optim.Adam(layer.named_parameters()), **SPARSITIES)
    assert torch.count_nonzero(topkast.dense_params(opt)["values"]) == 40 * 60
