"""ResNet-50 on images, end to end on a few tiny ones."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paper_data import write_images
from PIL import Image

import topkast
from topkast.methods import IHT, GradualPruning, Method, RigL, Static, TopKAST
from topkast_paper import PaperError
from topkast_paper.imagenet import (
    ImageFolder,
    Stream,
    _import_pillow,
    crop_at_random,
    crop_centre,
    find_images,
)
from topkast_paper.resnet50 import ResNet
from topkast_paper.sparsity import measure_flops
from topkast_paper.train_resnet50 import ImageNetSettings, train

TINY = ImageNetSettings(
    steps=6,
    batch=8,
    micro_batch=8,
    size=32,
    depths=(1, 1),
    width=8,
    lr=0.1,
    warm_up=1,
    drops=(2,),
    evaluations=2,
    checkpoint_every=2,
    workers=0,
    device="cpu",
)


def sparse(method: Method, fwd: float, bwd: float, **others: Any) -> ImageNetSettings:
    return dataclasses.replace(TINY, method=method, fwd=fwd, bwd=bwd, refresh_every=2, **others)


def saved(output: Path) -> Any:
    return torch.load(output / "checkpoint.pt", weights_only=True)


def assert_equal(first: Any, second: Any) -> None:
    """Compare nested containers of tensors, bit for bit."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second


def test_the_defaults_are_the_papers() -> None:
    settings = ImageNetSettings()
    assert (settings.batch, settings.total_steps, settings.lr) == (4096, 32_000, 1.6)
    assert ImageNetSettings(multiplier=5).total_steps == 160_000
    with torch.device("meta"):
        model = settings.build(1000)
    assert sum(param.numel() for param in model.parameters()) == 25_557_032
    state = model.state_dict()
    assert len(state) == 320  # of torchvision: 53 convolutions, 5 entries a batch norm, 2 of fc
    assert state["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert state["layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert state["layer3.5.bn2.running_var"].shape == (256,)
    assert model.get_submodule("layer2.0.conv2").stride == (2, 2)
    assert model.get_submodule("layer2.0.conv1").stride == (1, 1)


def test_flops_of_the_whole_network_are_rigls() -> None:
    with torch.device("meta"):
        model, example = ImageNetSettings().build(1000), torch.empty(1, 3, 224, 224)
    cost = topkast.cost(model, example, method="dense")
    assert round(cost.dense_forward_flops / 1e9, 2) == 8.18  # two operations a product
    fractions = topkast.cost(model, example, fwd=0.8, bwd=0.5, dense=list(ImageNetSettings().dense))
    # 3 % of the products are in the first layer: 2/3 · 0.2 + 1/3 · 0.5 = 0.3 of the rest.
    assert fractions.fraction == pytest.approx(0.029 + 0.971 * 0.3, abs=2e-3)


def test_a_block_begins_as_its_shortcut() -> None:
    model = ResNet(3, depths=(2,), width=4).eval()
    inputs = torch.rand(2, 16, 8, 8)  # not negative, so that relu does nothing
    block = model.get_submodule("layer1.1")
    assert torch.equal(block(inputs), inputs)


@pytest.mark.parametrize(
    ("method", "fwd", "bwd"),
    [(TopKAST(), 0.9, 0.8), (RigL(until=4), 0.9, 0.9), (Static(), 0.5, 0.5)],
)
def test_training_keeps_exact_counts(
    tmp_path: Path, method: Method, fwd: float, bwd: float
) -> None:
    images = write_images(tmp_path / "images")
    result = train(sparse(method, fwd, bwd), images, tmp_path / "run", seed=0)
    assert set(result["tensors"]) == {
        name
        for name, param in TINY.build(4).named_parameters()
        if param.ndim > 1 and name not in ("conv1.weight", "fc.weight")
    }
    for size, forward, backward in result["tensors"].values():
        assert forward == size - math.floor(size * fwd + 1e-9)
        assert backward == size - math.floor(size * bwd + 1e-9)
    model = saved(tmp_path / "run")["model"]
    for name, (_, forward, _) in result["tensors"].items():
        assert int((model[name] != 0).sum()) <= forward
    assert [row["step"] for row in result["curve"]] == [3, 6]
    assert result["final"] == result["curve"][-1]["value"]
    assert 0 <= result["final"] <= 100
    assert json.loads((tmp_path / "run" / "curve.json").read_text()) == result["curve"]


@pytest.mark.slow
def test_results_of_topkast_and_dense(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    dense = train(TINY, images, tmp_path / "dense", seed=0)
    assert dense["training_fraction"] == dense["forward_density"] == 1
    assert dense["forward_parameters"] == dense["parameters"]
    settings = sparse(TopKAST(), 0.9, 0.8, multiplier=0.5)
    result = train(settings, images, tmp_path / "sparse", seed=0)
    assert result["steps"] == 3
    sizes = np.asarray(list(result["tensors"].values()))
    assert result["forward_density"] == sizes[:, 1].sum() / sizes[:, 0].sum()
    assert (
        result["forward_parameters"] == dense["parameters"] - sizes[:, 0].sum() + sizes[:, 1].sum()
    )
    cost = topkast.cost(
        TINY.build(4), torch.zeros(1, 3, 32, 32), fwd=0.9, bwd=0.8, dense=list(TINY.dense)
    )
    assert result["training_fraction"] == pytest.approx(cost.fraction / 2)
    assert result["training_flops"] == pytest.approx(cost.training_flops * 8 * 3)
    stopped = dataclasses.replace(settings, explore_until=1)
    mixed = train(stopped, images, tmp_path / "stopped", seed=0)
    without = topkast.cost(
        TINY.build(4), torch.zeros(1, 3, 32, 32), fwd=0.9, bwd=0.9, dense=list(TINY.dense)
    )
    expected = (cost.fraction + 2 * without.fraction) / 3 / 2
    assert mixed["training_fraction"] == pytest.approx(expected)


def test_flops_of_a_fixed_mask_are_those_of_both_sets() -> None:
    model, example = TINY.build(4), torch.zeros(1, 3, 32, 32)
    expected = topkast.cost(model, example, fwd=0.9, bwd=0.5, dense=list(TINY.dense))
    cost = functools.partial(topkast.cost, model, example)
    flops = measure_flops(sparse(Static(), 0.9, 0.5), cost)
    assert flops["training_flops"] == expected.training_flops * TINY.batch * TINY.total_steps


def test_gradual_pruning_runs(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    settings = sparse(GradualPruning(start=0, end=4), 0.9, 0.0)
    result = train(settings, images, tmp_path / "run", seed=0)
    assert result["forward_density"] == pytest.approx(0.1, abs=0.01)
    assert 0.1 < result["training_fraction"] < 1


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    settings = sparse(TopKAST(), 0.5, 0.2, multiplier=6, lr=0.05)
    result = train(settings, images, tmp_path / "run", seed=0)
    assert result["curve"][-1]["loss"] < 1.2  # ln 4 = 1.39 by chance
    assert result["final"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("method", [TopKAST(), RigL(until=5)], ids=["topkast", "rigl"])
def test_a_killed_run_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    images = write_images(tmp_path / "images")
    settings = sparse(method, 0.9, 0.9)
    whole = train(settings, images, tmp_path / "whole", seed=3)
    lr_after = ImageNetSettings.lr_after

    def killed(self: ImageNetSettings, epochs: float) -> float:
        if epochs == 5 * 8 / 24:  # before the sixth update; the last checkpoint has four
            raise KeyboardInterrupt
        return lr_after(self, epochs)

    with monkeypatch.context() as patch:
        patch.setattr(ImageNetSettings, "lr_after", killed)
        with pytest.raises(KeyboardInterrupt):
            train(settings, images, tmp_path / "killed", seed=3)
    assert saved(tmp_path / "killed")["step"] == 4
    (tmp_path / "killed" / "checkpoint.pt.1.part").write_bytes(b"half")  # killed while writing
    assert train(settings, images, tmp_path / "killed", seed=3) == whole
    assert_equal(saved(tmp_path / "killed"), saved(tmp_path / "whole"))
    assert train(settings, images, tmp_path / "killed", seed=3) == whole  # it is finished


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    settings = sparse(TopKAST(), 0.9, 0.8, multiplier=0.5)
    train(settings, images, tmp_path / "run", seed=0)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    others = dataclasses.replace(settings, bwd=0.5)
    with pytest.raises(PaperError, match=r"another run: bwd is 0\.8 there, and 0\.5 here"):
        train(others, images, tmp_path / "run", seed=0)
    with pytest.raises(PaperError, match="another run: seed is 0 there, and 1 here"):
        train(settings, images, tmp_path / "run", seed=1)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    train(dataclasses.replace(settings, checkpoint_every=9), images, tmp_path / "run", seed=0)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(before[:1000])
    with pytest.raises(PaperError, match="is damaged"):
        train(settings, images, tmp_path / "run", seed=0)


def test_the_recipe_written_out(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    train(TINY, images, tmp_path / "run", seed=5)
    torch.manual_seed(5)
    model = TINY.build(4)
    listing, _ = find_images(images)
    dataset = ImageFolder(listing, size=32, seed=5)
    stream = Stream(24, batch=8, micro_batch=8, steps=(0, 6), seed=5)
    order = [key for part in stream for key in part]
    velocity = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    for step in range(6):
        samples = [dataset[key] for key in order[8 * step : 8 * step + 8]]
        pixels = torch.stack([image for image, _ in samples]) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        scores = model((pixels - mean[:, None, None]) / std[:, None, None]).log_softmax(dim=1)
        labels = torch.tensor([label for _, label in samples])
        target = 0.9 * torch.nn.functional.one_hot(labels, 4) + 0.1 / 4
        model.zero_grad()
        (-(target * scores).sum() / 8).backward()
        epoch = step / 3
        lr = 0.1 * epoch if epoch < 1 else 0.1 if epoch < 2 else 0.01
        with torch.no_grad():
            for name, param in model.named_parameters():
                assert param.grad is not None
                grad = param.grad + (1e-4 * param if param.ndim > 1 else 0)
                velocity[name] = 0.9 * velocity[name] + grad
                param.sub_(lr * (grad + 0.9 * velocity[name]))
    state = model.state_dict()
    for name, value in saved(tmp_path / "run")["model"].items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-5)


def test_accumulated_gradients_are_those_of_the_batch(tmp_path: Path) -> None:
    """Without batch norm, whose statistics are those of a micro-batch."""
    images = write_images(tmp_path / "images")
    states = []
    for size in (8, 3):
        settings = dataclasses.replace(TINY, micro_batch=size, lr=1e-3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn, "BatchNorm2d", _Scale)
            train(settings, images, tmp_path / f"run{size}", seed=0)
        states.append(saved(tmp_path / f"run{size}")["model"])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6)


class _Scale(torch.nn.Module):
    """The scale and shift of a batch norm without its normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.weight.view(-1, 1, 1)


@pytest.mark.slow
def test_workers_and_bfloat16(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    settings = dataclasses.replace(TINY, multiplier=0.5, evaluations=1)
    plain = train(settings, images, tmp_path / "plain", seed=0)
    worker = dataclasses.replace(settings, workers=1)
    assert train(worker, images, tmp_path / "worker", seed=0) == plain
    half = dataclasses.replace(settings, precision="bfloat16")
    rounded = train(half, images, tmp_path / "half", seed=0)
    assert 0 < abs(rounded["curve"][0]["loss"] - plain["curve"][0]["loss"]) < 0.1


def test_weight_decay_and_penalty_do_not_overlap() -> None:
    from topkast_paper.sparsity import decay_groups

    def decayed(settings: ImageNetSettings) -> set[str]:
        groups = decay_groups(settings.build(4), settings, 1e-4)
        return {name for group in groups if group["weight_decay"] for name, _ in group["params"]}

    weights = {name for name, param in TINY.build(4).named_parameters() if param.ndim > 1}
    assert decayed(TINY) == decayed(sparse(RigL(), 0.9, 0.9)) == weights
    assert decayed(sparse(TopKAST(), 0.9, 0.8)) == {"conv1.weight", "fc.weight"}
    assert decayed(sparse(TopKAST(), 0.9, 0.8, penalty=0.0)) == weights


def test_the_schedule_is_stretched() -> None:
    settings = ImageNetSettings(multiplier=2)
    assert settings.lr_after(5) == pytest.approx(0.8)
    assert settings.lr_after(59.9) == pytest.approx(1.6)
    assert settings.lr_after(60) == pytest.approx(0.16)
    assert settings.lr_after(199) == pytest.approx(0.0016)


def test_images_are_cropped(tmp_path: Path) -> None:
    images = find_images(write_images(tmp_path))
    train_set = ImageFolder(images[0], size=16, seed=1)
    pixels, label = train_set[(0, 7)]
    assert (pixels.shape, pixels.dtype, label) == ((3, 16, 16), torch.uint8, 1)
    assert torch.equal(train_set[(0, 7)][0], pixels)
    assert not torch.equal(train_set[(1, 7)][0], pixels)
    plain = ImageFolder(images[1], size=16, seed=None)
    assert torch.equal(plain[(0, 3)][0], plain[(9, 3)][0])
    gradient = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 512))
    image = Image.fromarray(gradient).convert("RGB")
    centre = crop_centre(image, 224)  # rows 16 to 240
    assert np.array_equal(centre[:, 0, 0], np.arange(16, 240))
    flips = [
        crop_at_random(Image.fromarray(gradient.T).convert("RGB"), np.random.default_rng(seed), 8)
        for seed in range(40)
    ]
    falling = sum(int(crop[0, 0, 0]) > int(crop[0, -1, 0]) for crop in flips)
    assert 10 <= falling <= 30
    narrow = crop_at_random(Image.new("RGB", (400, 4)), np.random.default_rng(0), 8)
    assert narrow.shape == (8, 8, 3)


def test_an_epoch_has_each_image_once() -> None:
    stream = Stream(24, batch=10, micro_batch=4, steps=(0, 12), seed=0)
    keys = [key for part in stream for key in part]
    assert len(keys) == 120
    assert len(stream) == 36
    assert sorted(keys) == [(epoch, number) for epoch in range(5) for number in range(24)]
    assert [number for _, number in keys[:24]] != [number for _, number in keys[24:48]]


def test_missing_and_wrong_folders_are_named(tmp_path: Path) -> None:
    output = tmp_path / "run"

    def error(folder: Path) -> str:
        with pytest.raises(PaperError) as caught:
            train(TINY, folder, output, seed=0)
        assert not output.exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    missing = error(tmp_path / "nothing")
    assert "there is no folder" in missing
    assert "folders train and val" in missing
    assert "image-net.org" in missing
    images = write_images(tmp_path / "images")
    (images / "val").rename(images / "validation")
    assert f"there is no folder {images / 'val'}" in error(images)
    (images / "val").mkdir()
    assert f"{images / 'val'} has no class folders" in error(images)
    Image.new("RGB", (8, 8)).save(images / "val" / "ILSVRC2012_val_00000001.JPEG")
    assert "val has 1 images, but no class folders" in error(images)
    for label in range(3):
        (images / "val" / f"n{label:02}").mkdir()
    assert "n00 has no JPEG or PNG image" in error(images)
    (images / "val").rename(images / "other")
    (images / "validation").rename(images / "val")
    (images / "val" / "n03").rename(images / "val" / "n04")
    assert "train has a folder n03, but" in error(images)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_unreadable_image_is_named(tmp_path: Path, workers: int) -> None:
    images = write_images(tmp_path / "images")
    for path in (images / "train" / "n02").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(PaperError, match=r"^the image .*n02.*\.(png|JPEG) cannot be read: .*$"):
        train(dataclasses.replace(TINY, workers=workers), images, tmp_path / "run", seed=0)


def test_impossible_runs_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, output = write_images(tmp_path / "images"), tmp_path / "run"
    late = GradualPruning(start=0, end=100)  # the run has six updates
    for settings, message in (
        (sparse(late, 0.9, 0.0), "within 6 steps"),
        (sparse(IHT(end=100), 0.9, 0.0), "IHT reaches fwd at update 100, not within 6 steps"),
        (sparse(RigL(), 0.9, 0.5), "bwd"),
        (sparse(TopKAST(), 0.8, 0.9), "bwd"),
    ):
        with pytest.raises(topkast.OptionError, match=message):
            train(settings, images, output, seed=0)
    _import_pillow.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        with pytest.raises(PaperError, match=r"needs Pillow, which is not installed: pip install"):
            train(TINY, images, output, seed=0)
    assert not output.exists()
    output.write_text("a file")
    with pytest.raises(PaperError, match="run cannot be written to: File exists"):
        train(TINY, images, output, seed=0)


def test_wrong_settings_are_named() -> None:
    for changes, message in (
        ({"batch": 0}, "batch must be a positive integer, got 0"),
        ({"multiplier": 0}, "multiplier must be a positive number"),
        ({"fwd": 0.9}, "method=None is dense training, but fwd=0.9"),
        ({"precision": "half"}, "precision must be float32 or bfloat16"),
    ):
        with pytest.raises(PaperError, match=message):
            dataclasses.replace(TINY, **changes)


def test_divergence_is_named(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    settings = sparse(TopKAST(), 0.9, 0.8, lr=1e30, warm_up=0.0001)
    with pytest.raises(PaperError, match="training diverged at update"):
        train(settings, images, tmp_path / "run", seed=0)


def test_an_infinite_gradient_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is finite, but a gradient before a refresh is not: the refresh finds it."""
    images, build = write_images(tmp_path / "images"), ImageNetSettings.build
    factors = iter((1.0, float("inf")))

    def build_with_hook(self: ImageNetSettings, classes: int) -> ResNet:
        model = build(self, classes)
        model.get_parameter("layer1.0.conv1.weight").register_hook(
            lambda grad: grad * next(factors)
        )
        return model

    monkeypatch.setattr(ImageNetSettings, "build", build_with_hook)
    settings = sparse(TopKAST(), 0.9, 0.8, checkpoint_every=1)
    with pytest.raises(
        PaperError, match=r"diverged at update 2 \(layer1\.0\.conv1\.weight: .*\): the"
    ):
        train(settings, images, tmp_path / "run", seed=0)
    assert saved(tmp_path / "run")["step"] == 1
