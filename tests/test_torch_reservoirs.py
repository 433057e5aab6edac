"""Training does not depend on where the weights outside B are kept."""

from __future__ import annotations

import copy
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import optax
import pytest
import topkast_torch
import torch
from products import star
from reservoir_training import INPUTS, build, save, train
from torch import Tensor, nn

import topkast
from topkast import MismatchError, OptionError, ReservoirError, StateDictError
from topkast.adapter import IncrementalSelection
from topkast.methods import Method, Static, View
from topkast.reservoirs import Generated, Init, LayeredReservoir

KINDS = ["device", "host", "disk", "seeded"]


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def executions(opt: Any) -> list[Any]:
    return list(opt._wrapper_state.executions)


def reservoirs(opt: Any) -> list[Any]:
    return [execution.reservoir for execution in executions(opt)]


def assert_same(first: Any, second: Any) -> None:
    """Equal weights, sets and inner state, bit for bit."""
    one, two = topkast.dense_params(first), topkast.dense_params(second)
    assert one.keys() == two.keys()
    for name, weights in one.items():
        assert torch.equal(weights, two[name]), name
    pairs = zip(executions(first), executions(second), strict=True)
    for left, right in pairs:
        assert torch.equal(left.support.indices, right.support.indices)
        assert torch.equal(left.values, right.values)
        states = first._wrapper_state.inner.state, second._wrapper_state.inner.state
        entries = states[0][left.values], states[1][right.values]
        for name, entry in entries[0].items():
            if isinstance(entry, Tensor):
                assert torch.equal(entry, entries[1][name]), name


# Options, sparse execution or not, and the kinds that the default session tries: others are slow.
TRAJECTORIES: dict[str, tuple[dict[str, Any], bool, list[str]]] = {
    "masked": ({}, False, ["disk"]),
    "sparse": ({}, True, ["host", "seeded"]),
    "sgd": ({"refresh_every": 3, "optimizer": momentum}, True, ["disk"]),
    "float64": ({"dtype": torch.float64}, True, ["seeded"]),
    "global": ({"distribution": "global"}, False, ["seeded"]),
    "random": ({"explore": "random"}, True, []),
    "blocks": ({"block": (2, 1)}, False, ["host"]),
    "sparse blocks": ({"block": (2, 4)}, True, ["seeded"]),
    "overrides": (
        {"overrides": {"0.*": {"bwd": 0.0}, "2.*": {"fwd": 0.99, "bwd": 0.95}}},
        True,
        ["disk"],
    ),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[] if kind in kinds else pytest.mark.slow)
        for name, (_, _, kinds) in TRAJECTORIES.items()
        for kind in ("host", "disk", "seeded")
    ],
)
def test_trajectories_are_equal(name: str, kind: str, tmp_path: Path) -> None:
    options, sparse, _ = TRAJECTORIES[name]
    model, opt = build(sparse=sparse, **options)
    other, other_opt = build(kind, folder=tmp_path, sparse=sparse, **options)
    assert {reservoir.kind for reservoir in reservoirs(other_opt)} == {kind}
    for steps in (1, 14):
        train(model, opt, steps)
        train(other, other_opt, steps)
        assert_same(opt, other_opt)
    assert any(reservoir.nbytes for reservoir in reservoirs(other_opt))


def test_a_tensor_has_a_reservoir_of_its_own(tmp_path: Path) -> None:
    overrides = {"2.weight": {"reservoir": "disk", "penalty": 0.01}}
    expected, expected_opt = build(overrides={"2.weight": {"penalty": 0.01}})
    options: Any = {"reservoir_path": tmp_path, "overrides": overrides}
    model, opt = build("seeded", **options)
    assert [reservoir.kind for reservoir in reservoirs(opt)] == ["seeded", "disk"]
    train(model, opt, 3)
    resumed, resumed_opt = build("seeded", seed=1, **options)
    resumed.load_state_dict(model.state_dict())
    resumed_opt.load_state_dict(opt.state_dict())
    train(expected, expected_opt, 3)
    for network, optimizer in ((expected, expected_opt), (model, opt), (resumed, resumed_opt)):
        optimizer.param_groups[0]["penalty"] = 0.1
        train(network, optimizer, 4)
    assert_same(expected_opt, opt)
    assert_same(expected_opt, resumed_opt)


def test_dense_weights_are_not_kept(tmp_path: Path) -> None:
    held = {}
    for kind in KINDS:
        _, opt = build(kind, folder=tmp_path / kind, sparse=True)
        held[kind] = topkast.summary(opt)
    size = 40 * 96 + 96 * 110
    assert (
        held["device"].held_parts["reservoir"] == held["host"].held_parts["reservoir"] == 4 * size
    )
    assert held["seeded"].held_parts["reservoir"] == held["disk"].held_parts["reservoir"] == 0
    assert held["disk"].disk_bytes == 4 * size + 2 * 4096
    assert sum(path.stat().st_size for path in (tmp_path / "disk").iterdir()) == 4 * size + 2 * 4096
    assert held["seeded"].disk_bytes == held["device"].disk_bytes == 0
    assert f"{4 * size + 2 * 4096:,} on a disk" in str(held["disk"])
    for summary in held.values():
        assert sum(summary.held_parts.values()) == summary.held_bytes
        assert summary.to_dict()["held_parts"] == summary.held_parts


# Methods that forget


class Forgetful(Method):
    """B moves on by one entry at each refresh, and what leaves is lost."""

    forgets: ClassVar[bool] = True

    def choose(self, view: View, /) -> topkast.Support:
        first = int(view.draw) % (view.weights.shape[0] - view.backward)
        indices = torch.arange(first, first + view.backward, dtype=torch.int32)
        return topkast.Support(indices, view.forward)


@pytest.mark.parametrize("sparse", [False, True], ids=["masked", "sparse"])
def test_methods_that_forget_keep_nothing(sparse: bool) -> None:
    model, opt = build(method=Forgetful(), sparse=sparse)
    for _ in range(5):
        train(model, opt, 1)
        assert {reservoir.kind for reservoir in reservoirs(opt)} == {"none"}
        assert topkast.summary(opt).held_parts["reservoir"] == 0
        for name, weights in topkast.dense_params(opt).items():
            if name in ("0.weight", "2.weight"):
                assert not weights[~topkast.masks(opt)[name].backward].any()
        for execution in executions(opt):
            assert execution.values.view(-1)[-1] == 0  # it has just entered


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_methods_that_forget_take_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model, opt = build(method=Forgetful(), dtype=dtype)
    train(model, opt, 4)
    saved = checkpoint(opt, model, tmp_path)
    resumed, resumed_opt = build(method=Forgetful(), dtype=dtype)
    resumed.load_state_dict(saved["model"])
    resumed_opt.load_state_dict(saved["optimizer"])
    train(model, opt, 4)
    train(resumed, resumed_opt, 4)
    assert_same(opt, resumed_opt)


def test_static_masks_keep_nothing() -> None:
    model, opt = build(method=Static(), explore="magnitude")
    before = [execution.support for execution in executions(opt)]
    train(model, opt, 3)
    assert topkast.summary(opt).held_parts["reservoir"] == 0
    assert [execution.support for execution in executions(opt)] == before


# Checkpoints


def checkpoint(opt: Any, model: nn.Module, folder: Path) -> Any:
    save(folder / "checkpoint.pt", model, opt)
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize(
    ("kind", "sparse", "seed"),  # the seed of the weights with which the resumed run starts
    [
        pytest.param("device", True, 1, marks=pytest.mark.slow),
        ("host", False, 1),
        ("disk", True, 0),
        ("disk", True, 1),
        pytest.param("disk", False, 1, marks=pytest.mark.slow),
        ("seeded", True, 0),
        ("seeded", True, 1),
        pytest.param("seeded", False, 1, marks=pytest.mark.slow),
    ],
)
def test_resumption_bit_for_bit(kind: str, sparse: bool, seed: int, tmp_path: Path) -> None:
    model, opt = build(kind, folder=tmp_path / "weights", sparse=sparse)
    train(model, opt, 6)
    saved = checkpoint(opt, model, tmp_path)
    resumed, resumed_opt = build(kind, folder=tmp_path / "weights", sparse=sparse, seed=seed)
    resumed.load_state_dict(saved["model"])
    resumed_opt.load_state_dict(saved["optimizer"])
    assert_same(opt, resumed_opt)
    copied, copied_opt = copy.deepcopy((model, opt))
    for network, optimizer in ((model, opt), (resumed, resumed_opt), (copied, copied_opt)):
        train(network, optimizer, 6)
    assert_same(opt, resumed_opt)
    assert_same(opt, copied_opt)
    assert torch.equal(model(INPUTS), resumed(INPUTS))
    if kind == "disk":  # and no file is left over
        assert len(list((tmp_path / "weights").iterdir())) == 2


@pytest.mark.parametrize(
    ("saved_kind", "kind"),
    [(saved, kind) for saved in KINDS for kind in ("device", "host", "disk") if saved != kind],
)
def test_a_checkpoint_moves_between_reservoirs(saved_kind: str, kind: str, tmp_path: Path) -> None:
    model, opt = build(saved_kind, folder=tmp_path / "one")
    train(model, opt, 6)
    saved = checkpoint(opt, model, tmp_path)
    resumed, resumed_opt = build(kind, folder=tmp_path / "two", seed=1)
    resumed.load_state_dict(saved["model"])
    resumed_opt.load_state_dict(saved["optimizer"])
    assert {reservoir.kind for reservoir in reservoirs(resumed_opt)} == {kind}
    train(model, opt, 6)
    train(resumed, resumed_opt, 6)
    assert_same(opt, resumed_opt)


def test_seeded_checkpoints_hold_the_seed_and_what_left(tmp_path: Path) -> None:
    model, opt = build("seeded", sparse=True)
    train(model, opt, 20)
    saved = opt.state_dict()["state"]
    extra = next(state["topkast"] for state in saved.values() if "reservoir" in state["topkast"])
    assert "params" not in extra
    assert extra["reservoir"]["bases"][0]["seed"] == 0
    left, inside = {*extra["left"][0].tolist()}, {*extra["indices"].tolist()}
    assert 0 < len(left) < 40 * 96 - len(inside)


def test_weights_do_not_fit_into_a_seed(tmp_path: Path) -> None:
    _, opt = build("device")
    other, other_opt = build("seeded")
    train(other, other_opt, 3)
    before = topkast.dense_params(other_opt)
    with pytest.raises(StateDictError, match="load it with reservoir='device', 'host' or 'disk'"):
        other_opt.load_state_dict(opt.state_dict())
    after = topkast.dense_params(other_opt)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda extra: extra["left"][1].fill_(float("nan")), "NaN or infinite"),
        (lambda extra: extra["left"][0].fill_(-1), "indices that left B of 0.weight must ascend"),
        (lambda extra: extra["left"][0].fill_(10**9), "must ascend in"),
        (lambda extra: extra.update(values=extra["values"][1:]), "values of 0.weight"),
        (lambda extra: extra.update(left=(extra["left"][0], extra["values"][:1])), "that left B"),
        (lambda extra: extra["reservoir"].update(kind="tape"), "kind 'tape' is not known"),
        (lambda extra: extra["reservoir"]["bases"][0].update(size=5), "size of 0.weight"),
        (lambda extra: extra["reservoir"]["bases"][0].pop("seed"), "corrupt"),
        (lambda extra: extra.pop("left"), "corrupt"),
    ],
)
def test_damaged_checkpoints_change_nothing(change: Any, message: str) -> None:
    model, opt = build("seeded")
    train(model, opt, 4)
    saved = opt.state_dict()
    change(saved["state"][0]["topkast"])
    before = topkast.dense_params(opt)
    with pytest.raises(StateDictError, match=message):
        opt.load_state_dict(saved)
    after = topkast.dense_params(opt)
    assert all(torch.equal(before[name], after[name]) for name in before)
    train(model, opt, 2)


def test_the_file_of_another_run_is_refused(tmp_path: Path) -> None:
    model, opt = build("disk", folder=tmp_path)
    train(model, opt, 3)
    saved = opt.state_dict()
    file = next(path for path in tmp_path.iterdir() if path.name.startswith("0.weight"))
    resumed, resumed_opt = build("disk", folder=tmp_path, seed=1)
    file.unlink()
    with pytest.raises(ReservoirError, match=f"needs the file {re.escape(file.name)}"):
        resumed_opt.load_state_dict(saved)
    other = next(path for path in tmp_path.iterdir() if path.name.startswith("2.weight"))
    file.write_bytes(other.read_bytes())
    with pytest.raises(ReservoirError, match="belongs to another tensor or run: its name is"):
        resumed_opt.load_state_dict(saved)
    train(resumed, resumed_opt, 2)  # nothing has changed


def test_a_killed_run_continues(tmp_path: Path) -> None:
    """Killed between any two writes, while it builds files or trains: a step is lost at most."""
    script = Path(__file__).parent / "reservoir_training.py"
    rng = random.Random(0)
    steps = []
    for number, last in enumerate((12, 60, 90)):
        # Another start in each run: the weights must come from the checkpoint's files.
        numbers = {"RUN": str(number), "KILLED_AT": str(rng.randrange(1, last))}
        command = [sys.executable, "-W", "ignore", str(script), str(tmp_path)]
        run = subprocess.run(command, env=os.environ | numbers, timeout=120, check=False)
        assert run.returncode == -signal.SIGKILL
        if (tmp_path / "checkpoint.pt").exists():
            saved = torch.load(tmp_path / "checkpoint.pt")
            steps.append((number, saved["optimizer"]["param_groups"][0]["topkast"]["updates"]))
    (first, _), (_, last_step) = steps[0], steps[-1]
    assert last_step > steps[0][1]
    resumed, resumed_opt = build("disk", folder=tmp_path / "weights", sparse=True, seed=9)
    resumed.load_state_dict(saved["model"])
    resumed_opt.load_state_dict(saved["optimizer"])
    # The same as without an interruption, from the start of the run with the first checkpoint.
    model, opt = build("device", sparse=True, seed=first)
    train(model, opt, last_step)
    assert_same(opt, resumed_opt)


# What is refused


def test_refusals_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="reservoir must be one of 'device', 'host'"):
        build("tape")
    with pytest.raises(OptionError, match="needs reservoir_path"):
        build("disk", folder=None)
    with pytest.raises(OptionError, match="needs reservoir_path"):
        build(overrides={"2.*": {"reservoir": "disk"}})
    with pytest.raises(OptionError, match="reservoir_path must be a path"):
        build(reservoir_path=3)
    with pytest.raises(OptionError, match="which no tensor has: pass both, or neither"):
        build("seeded", reservoir_path=tmp_path)
    for kind in ("disk", "seeded"):
        with pytest.raises(OptionError, match=r"keeps float32 and float64, but 0.weight is torch"):
            build(kind, folder=tmp_path, dtype=torch.bfloat16)
    model = nn.Linear(20, 30)
    inner = torch.optim.SGD(model.named_parameters(), 0.1)
    with pytest.raises(OptionError, match=r"were drawn otherwise: call topkast_torch.generate"):
        topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8, reservoir="seeded")
    topkast_torch.generate_weights(model)
    with torch.no_grad():
        model.weight[3, 4] += 1
    with pytest.raises(OptionError, match=r"weight have changed since they were generated"):
        topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8, reservoir="seeded")
    functional: Any = (topkast.SGD(0.1), optax.sgd(0.1))
    for rule in functional:
        with pytest.raises(OptionError, match=r"of PyTorch's optimizers"):
            topkast.wrap_optimizer(rule, fwd=0.9, bwd=0.8, reservoir="host")
    group: Any = {"params": [nn.Linear(20, 30).weight], "reservoir": "host"}
    with pytest.raises(OptionError, match="a parameter group cannot set reservoir"):
        topkast.wrap_optimizer(torch.optim.SGD([group], 0.1), fwd=0.9, bwd=0.8)


def test_a_file_that_was_written_again_survives_loading(tmp_path: Path) -> None:
    """Its checkpoint needs it, though this process has just created it."""
    model, opt = build("disk", folder=tmp_path / "weights")
    train(model, opt, 2)
    saved = checkpoint(opt, model, tmp_path)
    for path in (tmp_path / "weights").iterdir():
        path.unlink()
    for seed in (0, 1):  # the first run writes the same files, the second others
        resumed, resumed_opt = build("disk", folder=tmp_path / "weights", seed=seed)
        resumed.load_state_dict(saved["model"])
        resumed_opt.load_state_dict(saved["optimizer"])
        assert_same(opt, resumed_opt)


def test_generated_weights_are_refused_as_a_whole() -> None:
    models: Any = {
        "w.weight is torch.bfloat16": nn.Linear(4, 4, dtype=torch.bfloat16),
        "w.weight is torch.float32 on meta": nn.Linear(4, 4, device="meta"),
        "w.values belongs to a sparse layer": topkast_torch.SparseLinear(4, 4, fwd=0.5, bwd=0.5),
    }
    for message, last in models.items():
        first = nn.Linear(4, 4)
        model = nn.ModuleDict({"first": first, "w": last})
        before = first.weight.clone()
        with pytest.raises(OptionError, match=re.escape(message)):
            topkast_torch.generate_weights(model)
        assert torch.equal(first.weight, before)
    with pytest.raises(OptionError, match="seed must be an integer"):
        topkast_torch.generate_weights(nn.Linear(4, 4), seed=-1)


def test_a_failed_wrapping_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20))
    inner = torch.optim.SGD(model.named_parameters(), 0.1)
    options: Any = {"reservoir": "disk", "reservoir_path": tmp_path / "weights"}
    overrides = {"1.weight": {"reservoir": "seeded"}}
    with pytest.raises(OptionError, match="were drawn otherwise"):
        topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8, overrides=overrides, **options)
    assert list((tmp_path / "weights").iterdir()) == []


# Sparse layers without dense weights


def sparse_model(reservoir: str, **options: Any) -> Any:
    arguments: Any = {"fwd": 0.9, "bwd": 0.8, "reservoir": reservoir, "init": "kaiming_normal"}
    arguments |= options
    torch.manual_seed(0)
    return nn.Sequential(
        topkast_torch.SparseLinear(40, 96, **arguments),
        nn.Tanh(),
        topkast_torch.SparseLinear(96, 30, **arguments),
    )


def wrapped(model: nn.Module, **options: Any) -> Any:
    inner = torch.optim.AdamW(model.named_parameters(), lr=3e-3)
    return topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8, refresh_every=1, **options)


@pytest.mark.parametrize(
    ("init", "seed_and_block"),
    star(
        ["kaiming_normal", Init("uniform", 0.2)],
        [(5, None), (None, None), (5, (6, 1)), (5, (2, 4))],
    ),
)
def test_seeded_layers_train_as_dense_ones(init: Any, seed_and_block: Any) -> None:
    seed, block = seed_and_block
    model, other = (
        sparse_model(kind, seed=seed, init=init, block=block) for kind in ("device", "seeded")
    )
    opt, other_opt = wrapped(model), wrapped(other)
    assert {reservoir.kind for reservoir in reservoirs(other_opt)} == {"seeded"}
    assert_same(opt, other_opt)
    train(model, opt, 25)
    train(other, other_opt, 25)
    assert_same(opt, other_opt)
    if seed is None:  # each layer has a seed of its own
        seeds = {base.seed for one in reservoirs(other_opt) for base in one.bases}
        assert len(seeds) == 2


@pytest.mark.parametrize("block", [None, (6, 1)])
def test_seeded_layers_resume(block: Any, tmp_path: Path) -> None:
    model = sparse_model("seeded", block=block)
    opt = wrapped(model)
    train(model, opt, 8)
    saved = checkpoint(opt, model, tmp_path)
    resumed = sparse_model("seeded", seed=77, block=block)
    resumed_opt = wrapped(resumed)
    resumed.load_state_dict(saved["model"])
    resumed_opt.load_state_dict(saved["optimizer"])
    train(model, opt, 8)
    train(resumed, resumed_opt, 8)
    assert_same(opt, resumed_opt)


@pytest.mark.parametrize("block", [None, (6, 1)])
def test_the_first_selection_is_not_repeated(block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building reads all weights once, and the reserve that it found serves the first refresh."""
    read: list[int] = []
    original = Generated.read

    def note(weights: Generated, start: int, stop: int) -> Any:
        read.append(stop)
        return original(weights, start, stop)

    monkeypatch.setattr(Generated, "read", note)
    model = sparse_model("seeded", block=block)
    opt = wrapped(model)
    assert max(read) > 0
    read.clear()
    for execution in executions(opt):
        assert execution.selection.reserve is not None
    train(model, opt, 1)
    assert not any(read)


@pytest.mark.parametrize("kind", ["device", "disk", "seeded"])
def test_an_interrupted_refresh_changes_no_set(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opt = build(kind, folder=tmp_path, sparse=True)
    train(model, opt, 3)
    supports = [execution.support for execution in executions(opt)]
    chosen: list[Any] = []
    original = IncrementalSelection.prepare

    def interrupt_second(*arguments: Any, **named: Any) -> Any:
        chosen.append(arguments)
        if len(chosen) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(IncrementalSelection, "prepare", interrupt_second)
    with pytest.raises(KeyboardInterrupt):
        train(model, opt, 1)
    pairs = list(zip(executions(opt), supports, strict=True))
    assert all(execution.support is support for execution, support in pairs)
    train(model, opt, 3)  # and the refresh that is due is made up for
    assert not any(execution.support is support for execution, support in pairs)


@pytest.mark.parametrize("block", [None, (3, 4)])
def test_layers_on_the_meta_device(block: Any) -> None:
    with torch.device("meta"):
        model = sparse_model("seeded", seed=3, block=block)
    assert all(param.is_meta for param in model.parameters())
    model.to_empty(device="cpu")
    with pytest.raises(MismatchError, match=r"call reset_parameters\(\) after to_empty"):
        model(INPUTS)
    torch.manual_seed(0)
    for layer in model:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    expected = sparse_model("seeded", seed=3, block=block)
    assert torch.equal(model(INPUTS), expected(INPUTS))
    opt, expected_opt = wrapped(model), wrapped(expected)
    train(model, opt, 10)
    train(expected, expected_opt, 10)
    assert_same(opt, expected_opt)


def test_a_layer_on_the_meta_device_takes_a_state_dict() -> None:
    with torch.device("meta"):
        model = sparse_model("seeded", seed=3)
    model.to_empty(device="cpu")
    expected = sparse_model("seeded", seed=3)
    model.load_state_dict(expected.state_dict())
    assert torch.equal(model(INPUTS), expected(INPUTS))


def test_layers_refuse_what_they_cannot_do() -> None:
    with pytest.raises(OptionError, match="must be 'device' or 'seeded', got 'disk'"):
        sparse_model("disk")
    with pytest.raises(OptionError, match="init must be"):
        sparse_model("seeded", init="orthogonal")
    with pytest.raises(OptionError, match="seed=3 is of generated weights: pass init too"):
        topkast_torch.SparseLinear(4, 4, fwd=0.5, bwd=0.5, seed=3)
    with pytest.raises(OptionError, match="needs a weight with inputs and outputs"):
        topkast_torch.SparseLinear(0, 4, fwd=0.5, bwd=0.5, reservoir="seeded")
    for seed in (-1, 1.5, True):
        with pytest.raises(OptionError, match="seed must be an integer"):
            sparse_model("seeded", seed=seed)
    model = sparse_model("seeded")
    with pytest.raises(MismatchError, match=r"build it with dtype=torch.float64"):
        model.double()
    with pytest.raises(OptionError, match="was built with reservoir='seeded', but the optimizer"):
        wrapped(model, reservoir="host")
    with pytest.raises(OptionError, match=r"build the layer as topkast_torch.SparseLinear\("):
        wrapped(sparse_model("device"), reservoir="seeded")
    opt = wrapped(model)
    with pytest.raises(MismatchError, match="before its optimizer is built"):
        model[0].reset_parameters()
    train(model, opt, 1)


def test_unwrapping_returns_all_weights() -> None:
    model, other = sparse_model("device"), sparse_model("seeded")
    opt, other_opt = wrapped(model), wrapped(other)
    train(model, opt, 5)
    train(other, other_opt, 5)
    expected = topkast.dense_params(opt)
    inner = topkast.unwrap(other_opt)
    train(other, inner, 1)  # it trains B alone
    again = topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8)
    weights = topkast.dense_params(again)["0.values"]
    outside = ~topkast.masks(again)["0.values"].backward
    assert torch.equal(weights[outside], expected["0.values"][outside])
    topkast.unwrap(opt, weights="dense")
    assert torch.equal(model[0].weight, expected["0.values"])


def test_seeded_reservoirs_are_values() -> None:
    reservoir = LayeredReservoir("seeded", [Generated("w", 0, Init("normal", 1.0), 100)])
    assert (
        pickle.loads(pickle.dumps(reservoir)).read(0, 100).tolist()
        == reservoir.read(0, 100).tolist()
    )
