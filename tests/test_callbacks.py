"""A monitor in a plain loop: what it logs and when, its pictures, and how averages end."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import topkast_torch
import torch
from optimizer_runs import OPTIONS, backward, make_model
from topkast_torch import callbacks
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import topkast


class Writer:
    """What is used of a SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.figures: list[tuple[str, Any, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        self.figures.append((tag, figure.get_suptitle(), step))


class Holder:
    """An optimizer of another library around ours, as Accelerate's."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def prepare(named: bool = True, **options: Any) -> tuple[nn.Module, Any]:
    model = make_model()
    params: Any = model.named_parameters() if named else model.parameters()
    return model, topkast.wrap_optimizer(torch.optim.SGD(params, 0.5), **OPTIONS | options)


def run(model: nn.Module, optimizer: Any, monitor: callbacks.Monitor, steps: int) -> None:
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        monitor.step()


@pytest.mark.parametrize(
    ("every", "steps"), [(1, [1, 2, 3, 4, 5, 6, 7]), (2, [2, 4, 6]), ("refresh", [3, 6])]
)
def test_the_summary_is_logged_flat(every: Any, steps: list[int]) -> None:
    model, optimizer = prepare()
    logged: list[tuple[dict[str, float], int]] = []
    monitor = callbacks.Monitor(optimizer, lambda *entry: logged.append(entry), every=every)
    run(model, optimizer, monitor, 7)
    assert [step for _, step in logged] == steps
    scalars, step = logged[-1]
    assert scalars["topkast/updates"] == step
    assert {f"topkast/mask_change/{name}" for name in ("0.weight", "2.weight")} <= scalars.keys()
    last = topkast.summary(optimizer).scalars() | {"updates": step}
    assert scalars == {f"topkast/{name}": value for name, value in last.items()}


def test_only_updates_count() -> None:
    model, optimizer = prepare()
    logged: list[int] = []
    monitor = callbacks.Monitor(optimizer, lambda scalars, step: logged.append(step), every=1)
    for _ in range(2):  # as in accumulation
        backward(model, 0)
        monitor.step()
    assert not logged
    optimizer.step()
    monitor.step(70)
    monitor.step(71)
    assert logged == [70]


def test_masks_are_drawn_and_scalars_go_to_the_writer() -> None:
    pytest.importorskip("matplotlib")
    model, optimizer = prepare()
    writer = Writer()
    monitor = callbacks.Monitor(Holder(optimizer), writer=writer, every=3, draw_every=4, draw="0.*")
    run(model, optimizer, monitor, 9)
    assert [(tag, step) for tag, _, step in writer.figures] == [
        ("topkast/mask/0.weight", step) for step in (1, 4, 8)
    ]
    assert "0.weight: 39 of 192 weights in A" in writer.figures[0][1]
    assert {step for _, _, step in writer.scalars} == {3, 6, 9}
    assert ("topkast/updates", 9, 9) in writer.scalars
    everything = Writer()
    callbacks.Monitor(optimizer, writer=everything).draw(0)
    tags = [tag for tag, _, _ in everything.figures]
    assert tags == ["topkast/mask/0.weight", "topkast/mask/2.weight"]


class ModelEma(nn.Module):
    """As timm's ModelEmaV2."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", [AveragedModel, ModelEma, lambda model: model.state_dict()])
def test_averages_end_with_the_last_forward_sets(kind: Any, named: bool) -> None:
    model, optimizer = prepare(named)
    average = kind(copy.deepcopy(model))
    entries: dict[str, Tensor] = (
        average if isinstance(average, dict) else dict(average.named_parameters())
    )
    model_names = {id(param): name for name, param in model.named_parameters()}
    params = {model_names[id(param)]: param for param in model.parameters()}
    options: Any = {"averages": [average], "model": None if named else model}
    monitor = callbacks.Monitor(optimizer, **options)
    for step in range(7):
        backward(model, step)
        optimizer.step()
        with torch.no_grad():
            for name, param in params.items():
                entry = entries.get(name, entries.get(f"module.{name}"))
                assert entry is not None
                entry.lerp_(param, 0.3)
        monitor.step()
    before = {name: entry.clone() for name, entry in entries.items()}
    monitor.finish()
    masks = list(topkast.masks(optimizer).values())
    for number, name in enumerate(("0.weight", "2.weight")):
        (key,) = (key for key in entries if key.endswith(name))
        mask = masks[number].forward
        assert torch.count_nonzero(before[key]) > mask.sum()
        assert torch.equal(entries[key], before[key] * mask)
    for key in entries:
        if key.endswith("bias"):
            assert torch.equal(entries[key], before[key])


def test_averages_of_weights_are_updated() -> None:
    model, optimizer = prepare()
    average, expected = (topkast_torch.WeightAverage(optimizer, decay=0.5) for _ in range(2))
    monitor = callbacks.Monitor(optimizer, averages=[average])
    for step in range(5):
        backward(model, step)
        optimizer.step()
        expected.update()
        monitor.step()
        monitor.step()
    monitor.finish()
    for name, tensor in expected.dense_params().items():
        assert torch.equal(average.dense_params()[name], tensor)


@pytest.mark.filterwarnings("error::topkast.DenseAverageWarning")
def test_averages_that_end_sparse_are_not_warned_of() -> None:
    model, optimizer = prepare()
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5))
    run(model, optimizer, callbacks.Monitor(optimizer, averages=[average]), 7)


class TestRefusals:
    def test_averages_of_sparse_layers(self) -> None:
        model, optimizer = prepare()
        average = AveragedModel(model)
        topkast.sparsify(model, optimizer)
        with pytest.raises(topkast.MismatchError, match=r"0\.weight is the .*Use topkast_torch\.W"):
            callbacks.Monitor(optimizer, averages=[average])
        callbacks.Monitor(optimizer, averages=[topkast_torch.WeightAverage(optimizer)])

    def test_averages_of_something_else(self) -> None:
        model, optimizer = prepare()
        for average, message in (
            (AveragedModel(nn.Linear(3, 3)), r"AveragedModel has no tensor 0\.weight"),
            ({"0.weight": torch.ones(3)}, r"0\.weight has shape \(3,\) in the average dict"),
        ):
            with pytest.raises(topkast.MismatchError, match=message):
                callbacks.mask_average(average, optimizer)
        with pytest.raises(topkast.OptionError, match="got list"):
            callbacks.mask_average([torch.ones(3)], optimizer)
        _, unnamed = prepare(named=False)
        with pytest.raises(topkast.MismatchError, match="pass model="):
            callbacks.mask_average(AveragedModel(model), unnamed)

    def test_a_mismatch_changes_nothing(self) -> None:
        _, optimizer = prepare()
        average = {"0.weight": torch.ones(16, 12), "2.weight": torch.ones(3)}
        with pytest.raises(topkast.MismatchError):
            callbacks.mask_average(average, optimizer)
        assert average["0.weight"].all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"every": 0}, "every must be a positive integer or 'refresh', got 0"),
            ({"every": True}, "got True"),
            ({"draw_every": "refresh"}, "draw_every must be a positive integer, got 'refresh'"),
            ({"draw": "3.*"}, "3"),
            ({"log": 3}, "log must be a function"),
            ({"writer": object()}, "writer must have add_figure"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(topkast.OptionError, match=message):
            callbacks.Monitor(prepare()[1], **options)

    def test_an_optimizer_that_is_not_wrapped(self) -> None:
        inner = torch.optim.SGD(make_model().parameters(), 0.1)
        with pytest.raises(topkast.OptionError, match="or one that holds it, got SGD"):
            callbacks.Monitor(inner)

    def test_a_name_that_does_not_exist(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'Other'"):
            _ = callbacks.Other


def test_missing_libraries_are_named_when_their_classes_are_used() -> None:
    code = """
import sys
from topkast_torch import callbacks
names = ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers")
assert not {*names} & {*sys.modules}
sys.modules |= dict.fromkeys(names)
for make, library in (
    (lambda: callbacks.LightningCallback(), "lightning"),
    (lambda: callbacks.TransformersCallback(None), "transformers"),
):
    try:
        make()
    except ModuleNotFoundError as error:
        assert f"pip install {library}" in str(error)
    else:
        raise AssertionError(library)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
