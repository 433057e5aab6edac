"""The demo, run in this process for a few steps: ``topkast_demo``."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the demo trains with PyTorch")
pytest.importorskip("sklearn", reason="the demo takes its digits from scikit-learn")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")
pytest.importorskip("tqdm", reason="the demo shows its progress with tqdm")

import torch

import topkast
from topkast_demo import DemoError, cli, torch_trainer
from topkast_demo.data import load_images, load_text, read_idx
from topkast_demo.networks import MLP, Network, Transformer
from topkast_demo.settings import FRAMEWORKS, OPTIMIZERS, Settings
from topkast_demo.tasks import DigitsTask, TextTask
from topkast_demo.torch_models import build
from topkast_demo.train import train
from topkast_demo.trainer import Trainer
from topkast_demo.trainers import find_trainer

PLOTS = ("learning_curves.png", "mask_change.png", "reservoir.png")
SMALL = MLP((20, 30, 5))
SMALL_TRANSFORMER = Transformer(characters=10, context=8, width=16, layers=2, heads=4)

needs_jax = pytest.mark.skipif(
    find_spec("jax") is None or find_spec("optax") is None, reason="needs jax and optax"
)
JAX = pytest.param("jax", marks=needs_jax)
both_frameworks = pytest.mark.parametrize("framework", ["torch", JAX])


def run(*arguments: str | Path, report: Path) -> dict[str, Any]:
    """Run the demo and read the JSON that it wrote."""
    assert cli.main(["demo", *map(str, arguments), "--report", str(report)]) == 0
    for name in PLOTS:
        assert (report / name).read_bytes().startswith(b"\x89PNG")
    data: dict[str, Any] = json.loads((report / "report.json").read_text(encoding="utf-8"))
    return data


def fail(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the demo with a wrong argument; returns the one line on stderr."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo", *map(str, arguments)])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("topkast demo: error: ")
    return printed.err


def numbers(data: Any) -> list[float]:
    """All numbers in nested lists and dicts."""
    if isinstance(data, dict):
        return [number for value in data.values() for number in numbers(value)]
    if isinstance(data, list):
        return [number for value in data for number in numbers(value)]
    return [data] if isinstance(data, (int, float)) else []


def write_idx(path: Path, array: np.ndarray[Any, Any]) -> Path:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))
    return path


def start(framework: str, method: str, settings: Settings, network: Network = SMALL) -> Trainer:
    return find_trainer(framework)(network, method, settings, dense=("head.*",))


def weights(trainer: Trainer) -> dict[str, np.ndarray[Any, Any]]:
    """Copy the weights of a trainer."""
    return {
        name: array.detach().numpy().copy() if isinstance(array, torch.Tensor) else np.array(array)
        for name, array in trainer.params().items()
    }


def small_batch(seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return rng.random((16, 20), dtype=np.float32), rng.integers(0, 5, 16)


def pytree(model: torch.nn.Module) -> dict[str, Any]:
    """Convert the weights of a PyTorch model to those of the demo's JAX model."""
    tree: dict[str, Any] = {}
    for name, array in model.state_dict().items():
        *path, last = name.split(".")
        subtree = tree
        for key in path:
            subtree = subtree.setdefault(key, {})
        is_table = path[0] in ("embedding", "positions")
        subtree[last] = (array.numpy() if is_table else array.numpy().T).copy()
    if "blocks" in tree:
        tree["blocks"] = list(tree["blocks"].values())
    return tree


@pytest.fixture(autouse=True)
def compile_fast() -> Iterator[None]:
    """Disable most of XLA's optimisations: small networks gain less than they cost."""
    if find_spec("jax") is None:
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Forty images of 4×5 pixels in three classes, in MNIST's file format."""
    rng = np.random.default_rng(0)
    labels = np.arange(40, dtype=np.uint8) % 3
    pixels = rng.integers(0, 256, (40, 4, 5), dtype=np.uint8)
    write_idx(tmp_path / "some-labels-idx1-ubyte.gz", labels)
    return write_idx(tmp_path / "some-images-idx3-ubyte.gz", pixels)


@both_frameworks
def test_digits(framework: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run(
        *("--framework", framework, "--steps", "20", "--refresh-every", "4"),
        *("--fwd", "0.93", "--bwd", "0.7"),
        report=tmp_path / "deep" / "report",
    )
    assert set(data) == {"versions", "threads", "options", "task", "table", "runs"}
    packages = {"torch"} if framework == "torch" else {"jax", "optax"}
    assert set(data["versions"]) == {"python", "numpy", "topkast", *packages}
    assert data["versions"]["topkast"] == topkast.__version__
    assert data["threads"] == (1 if framework == "torch" else None)
    assert data["options"]["framework"] == framework
    assert data["options"]["refresh_every"] == 4
    assert [row["method"] for row in data["table"]] == ["dense", "static", "topkast"]
    assert all(map(math.isfinite, numbers(data)))
    for name, run_data in data["runs"].items():
        assert run_data["loss"]["step"] == list(range(1, 21))
        assert len(run_data["loss"]["nats"]) == 20
        assert run_data["metric"]["step"][-1] == 20
        assert (run_data["mask_change"] is not None) == (name == "topkast")
    dynamics = data["runs"]["topkast"]
    for name in ("mask_change", "awakened"):
        assert dynamics[name]["step"] == [4, 8, 12, 16, 20]
        for minimum, mean, maximum in zip(
            *(dynamics[name][key] for key in ("min", "mean", "max")), strict=True
        ):
            assert 0 <= minimum <= mean <= maximum <= 1
    check_counts(data, counters=6 if framework == "torch" else 2)
    printed = capsys.readouterr()
    assert printed.out.startswith(f"Digits with {FRAMEWORKS[framework]}: ")
    assert "Dense in all runs: head.*" in printed.out
    assert "masked dense kernels" in printed.out
    assert "Every 4 steps Top-KAST" in printed.out
    assert "Top-KAST" in printed.err  # the progress bar
    assert "mask change" in printed.err


def check_counts(data: dict[str, Any], *, counters: int) -> None:
    """Check the numbers of weights and bytes for AdamW, fwd=0.93 and bwd=0.7."""
    for name, weights in (("hidden0.weight", 64 * 48), ("hidden1.weight", 48 * 48)):
        forward, backward = (weights - weights * zeros // 100 for zeros in (93, 70))
        sizes = {method: run_data["tensors"][name] for method, run_data in data["runs"].items()}
        assert sizes["dense"] == dict.fromkeys(("weights", "forward", "backward"), weights)
        assert sizes["static"] == {"weights": weights, "forward": forward, "backward": forward}
        assert sizes["topkast"] == {"weights": weights, "forward": forward, "backward": backward}
    dense_size = 48 + 48 + 48 * 10 + 10
    for row in data["table"]:
        tensors = data["runs"][row["method"]]["tensors"].values()
        trained = sum(tensor["backward"] for tensor in tensors) + dense_size
        assert row["gradient_bytes"] == 4 * trained
        # Two moments, and step counters: PyTorch has one for each of six tensors, optax one for
        # Adam and one for the learning rate.
        assert row["optimizer_state_bytes"] == 4 * (2 * trained + counters)
        if row["method"] == "dense":
            assert row["total_bytes"] == 2 * 4 * (5376 + dense_size) + row["optimizer_state_bytes"]
        else:  # θ and gradients of all tensors, and α of the sparse ones
            whole = 4 * (3 * 5376 + 2 * dense_size)
            assert row["total_bytes"] > whole + row["optimizer_state_bytes"]
        assert row["forward_density"] == sum(tensor["forward"] for tensor in tensors) / 5376


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Wörter – und noch mehr Wörter.\n" * 60, encoding="utf-8")
    data = run("--task", "text", "--data", path, "--steps", "3", report=tmp_path / "report")
    assert data["task"]["unit"] == "bits per character"
    assert data["options"]["data"] == "text.txt"
    sparse = data["runs"]["topkast"]["tensors"]
    assert len(sparse) == 8  # four in each of two layers
    assert not any(name.startswith(("embedding", "positions", "head")) for name in sparse)
    assert all(map(math.isfinite, numbers(data)))


def test_text_of_python(tmp_path: Path) -> None:
    data = run("--task", "text", "--steps", "1", report=tmp_path)
    assert "Python" in data["task"]["description"]
    # After one step hardly better than guessing, but not worse.
    assert all(3 < row["metric"] < 8 for row in data["table"])


def test_idx(images: Path, tmp_path: Path) -> None:
    data = run("--data", images, "--steps", "4", report=tmp_path / "report")
    assert "32 to train and 8 to test on; MLP 20-300-300-3" in data["task"]["description"]
    assert read_idx(images).shape == (40, 4, 5)


def test_same_seed_same_run(tmp_path: Path) -> None:
    first, again, other = (
        run("--steps", "3", "--seed", seed, report=tmp_path / str(number))["runs"]
        for number, seed in enumerate("778")
    )
    for method in first:
        assert first[method]["loss"] == again[method]["loss"]
        assert first[method]["loss"] != other[method]["loss"]


def test_sparse_execution_trains_the_same_networks(tmp_path: Path) -> None:
    options = ("--steps", "12", "--refresh-every", "4")
    masked, sparse = (
        run("--execution", execution, *options, report=tmp_path / execution)
        for execution in ("masked", "sparse")
    )
    assert sparse["options"]["execution"] == "sparse"
    for name, expected in masked["runs"].items():
        losses = sparse["runs"][name]["loss"]["nats"]
        np.testing.assert_allclose(losses, expected["loss"]["nats"], rtol=1e-4)
    for masked_row, sparse_row in zip(masked["table"], sparse["table"], strict=True):
        for key in ("gradient_bytes", "optimizer_state_bytes"):
            assert sparse_row[key] == masked_row[key]


def test_sparse_execution_is_for_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["demo", "--execution", "sparse", "--framework", "jax"])
    assert "needs --framework torch" in capsys.readouterr().err


@both_frameworks
def test_all_methods_start_with_the_same_weights(framework: str) -> None:
    settings = Settings(task="digits", steps=1, lr=0.1)
    dense = weights(start(framework, "dense", settings))
    for method in ("static", "topkast"):
        trainer = start(framework, method, settings)
        for name, array in weights(trainer).items():
            kept = array != 0
            np.testing.assert_array_equal(array[kept], dense[name][kept])
        assert {name: int(mask.forward.sum()) for name, mask in trainer.masks().items()} == {
            "hidden0.weight": 60
        }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("framework", "name"),
    [*(("torch", name) for name in OPTIMIZERS), pytest.param("jax", "adamw", marks=needs_jax)],
)
def test_static_mask_never_moves(framework: str, name: str) -> None:
    settings = Settings(task="digits", steps=5, lr=0.05, optimizer=name)
    trainer = start(framework, "static", settings)
    before = weights(trainer)["hidden0.weight"]
    outside = before == 0
    assert int(outside.sum()) == 540
    for step in range(settings.steps):
        trainer.step(small_batch(step))
        mask = trainer.masks()["hidden0.weight"]
        np.testing.assert_array_equal(mask.forward, ~outside)
        np.testing.assert_array_equal(mask.backward, ~outside)
    after = weights(trainer)["hidden0.weight"]
    np.testing.assert_array_equal(after == 0, outside)
    assert not np.array_equal(after, before)


def test_static_mask_is_random() -> None:
    settings = Settings(task="digits", steps=1, lr=0.1)
    masks = [
        start("torch", "static", replace(settings, seed=seed)).masks()["hidden0.weight"].forward
        for seed in (0, 1)
    ]
    assert not np.array_equal(*masks)


def test_transformer_is_causal() -> None:
    torch.manual_seed(0)
    model = build(SMALL_TRANSFORMER)
    text = torch.randint(10, (1, 8))
    changed = text.clone()
    changed[0, 5] = (text[0, 5] + 1) % 10
    before, after = model(text), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@needs_jax
@pytest.mark.parametrize("network", [SMALL, SMALL_TRANSFORMER])
def test_jax_and_torch_networks_compute_the_same(network: Network) -> None:
    import jax.numpy as jnp

    from topkast_demo.jax_models import apply

    torch.manual_seed(0)
    model = build(network)
    inputs = torch.randint(10, (3, 6)) if network is SMALL_TRANSFORMER else torch.rand(3, 20)
    with torch.no_grad():
        expected = model(inputs)
    logits = apply(network, pytree(model), jnp.asarray(inputs.numpy()))
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-5)


@needs_jax
@pytest.mark.parametrize("network", [SMALL, SMALL_TRANSFORMER])
def test_jax_and_torch_initialise_alike(network: Network) -> None:
    settings = Settings(task="digits", steps=1, lr=0.1)
    expected, actual = (
        weights(start(framework, "dense", settings, network)) for framework in ("torch", "jax")
    )
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        other = expected[name]
        is_table = name.startswith(("embedding", "positions"))
        assert array.shape == (other.shape if is_table else other.T.shape)
        constant = np.ptp(other) == 0
        assert (np.ptp(array) == 0) == constant
        if constant:
            np.testing.assert_array_equal(array, other)
        elif array.size > 100:
            deviation = 5 / math.sqrt(array.size)
            assert array.std() == pytest.approx(other.std(), rel=deviation)
            assert abs(array.mean()) < deviation * other.std()
            # The fourth moment distinguishes uniform from normal.
            ratio = (array**4).mean() / (array**2).mean() ** 2
            is_normal = (other**4).mean() / (other**2).mean() ** 2 > 2.4
            assert (ratio > 2.4) == is_normal


@pytest.mark.slow
@needs_jax
@pytest.mark.parametrize(
    ("method", "name"), [*(("dense", name) for name in OPTIMIZERS), ("topkast", "adamw")]
)
def test_jax_and_torch_train_alike(method: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = build(SMALL)
    params = pytree(model)
    monkeypatch.setattr("topkast_demo.torch_trainer.build", lambda _: model)
    monkeypatch.setattr("topkast_demo.jax_trainer.initialise", lambda *_: params)
    settings = Settings(task="digits", steps=6, lr=0.02, optimizer=name, refresh_every=2)
    trainers = [start(framework, method, settings) for framework in ("torch", "jax")]
    # The momentum of torch.optim.NAdam rises from 0.45; optax.nadam starts at 0.9.
    tolerance = 0.05 if name == "nadam" else 1e-4
    for step in range(settings.steps):
        expected, actual = (trainer.step(small_batch(step)) for trainer in trainers)
        assert actual == pytest.approx(expected, rel=tolerance)
    expected, actual = (trainer.loss(small_batch()) for trainer in trainers)
    assert actual == pytest.approx(expected, rel=tolerance)
    if name != "nadam":
        pixels, _ = small_batch(7)
        classes, others = (trainer.predict(pixels) for trainer in trainers)
        np.testing.assert_array_equal(classes, others)
        for key, mask in trainers[0].masks().items():
            other = trainers[1].masks()[key]
            np.testing.assert_array_equal(mask.forward, other.forward.T)
            np.testing.assert_array_equal(mask.backward, other.backward.T)


@needs_jax
def test_optimizers_have_counterparts() -> None:
    from topkast_demo import jax_trainer

    assert list(torch_trainer.OPTIMIZERS) == list(jax_trainer.OPTIMIZERS) == list(OPTIMIZERS)


@pytest.mark.slow
@needs_jax
def test_text_with_jax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Wörter – und noch mehr Wörter.\n" * 60, encoding="utf-8")
    # Fewer sparse tensors compile faster.
    monkeypatch.setattr(TextTask, "dense", (*TextTask.dense, "*.feed_*"))
    task = TextTask(load_text(path), width=16, layers=1)
    settings = Settings(framework="jax", task="text", steps=3, lr=4e-3, refresh_every=2)
    result = train(task, "topkast", settings, quiet=True)
    assert list(result.sizes) == ["blocks.0.attention_in.weight", "blocks.0.attention_out.weight"]
    assert result.dynamics is not None
    assert result.dynamics.change.step == [2]
    assert result.metric_steps == [1, 2, 3]
    assert all(map(math.isfinite, (*result.losses, *result.metric_values)))


@needs_jax
def test_jax_with_the_same_seed_is_the_same(images: Path) -> None:
    task = DigitsTask(load_images(images), hidden=(4,))
    settings = Settings(framework="jax", task="digits", steps=2, lr=0.1)
    losses = [
        train(task, "dense", replace(settings, seed=seed), quiet=True).losses
        for seed in (7, 7, 2**63 - 1)
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(("fwd", "bwd"), [("0", "0"), ("0.9", "0"), ("0.9", "0.9")])
def test_limits_of_the_sparsities(fwd: str, bwd: str, tmp_path: Path) -> None:
    data = run("--fwd", fwd, "--bwd", bwd, "--steps", "2", report=tmp_path)
    assert data["runs"]["topkast"]["awakened"]["step"] == ([] if bwd == "0" else [1, 2])


def test_no_refresh_in_a_short_run(tmp_path: Path) -> None:
    data = run("--refresh-every", "100", "--steps", "1", report=tmp_path)
    assert data["runs"]["topkast"]["mask_change"]["step"] == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name: str, images: Path, tmp_path: Path) -> None:
    data = run("--data", images, "--optimizer", name.upper(), "--steps", "2", report=tmp_path)
    assert data["options"]["optimizer"] == name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--fwd", "1"), ("fwd is a sparsity", "1.0")),
        (("--fwd", "nan"), ("fwd is a sparsity",)),
        (("--fwd", "0.5", "--bwd", "0.6"), ("bwd must not exceed fwd",)),
        (("--fwd", "much"), ("--fwd", "invalid float")),
        (("--refresh-every", "0"), ("refresh_every", "at least 1")),
        (("--penalty", "-1"), ("penalty",)),
        (("--steps", "0"), ("steps must be at least 1",)),
        (("--seed", "-1"), ("seed",)),
        (("--seed", str(2**63)), ("seed",)),
        (("--lr", "0"), ("lr must be",)),
        (("--optimizer", "muon"), ("adamw", "'muon'")),
        (("--task", "speech"), ("--task", "'speech'")),
        (("--framework", "mxnet"), ("--framework", "'mxnet'")),
        (("--data", "{tmp}/none-images-idx3.gz"), ("none-images-idx3.gz", "No such file")),
        (("--data", "{tmp}"), ("cannot be read",)),
        (("--task", "text", "--data", "{tmp}/none.txt"), ("none.txt", "No such file")),
    ],
)
def test_wrong_arguments(
    arguments: tuple[str, ...],
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = fail(*(text.replace("{tmp}", str(tmp_path)) for text in arguments), capsys=capsys)
    assert all(word in message for word in words)


def test_a_folder_that_cannot_be_written_to_is_found_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:  # noqa: A002
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    message = fail("--report", str(tmp_path), capsys=capsys)
    assert "the report cannot be written to" in message
    assert "Permission denied" in message


@both_frameworks
@pytest.mark.parametrize("steps", ["1", "9"])  # the last step is checked like the others
def test_divergence(
    framework: str, steps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--framework", framework, "--steps", steps, "--lr", "1e30"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo", *arguments, "--report", str(tmp_path)])
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]  # after the progress bar
    assert "training diverged at step" in message
    assert "smaller --lr" in message


@both_frameworks
def test_divergence_of_sparse_training(framework: str, images: Path) -> None:
    task = DigitsTask(load_images(images), hidden=(4,))
    settings = Settings(framework=framework, task="digits", steps=9, lr=1e10)
    with pytest.raises(DemoError, match="diverged at step"):
        train(task, "topkast", settings, quiet=True)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x-images-idx3-ubyte.gz", b"no gzip", "not a gzipped IDX file"),
        (
            "x-images-idx3-ubyte.gz",
            gzip.compress(b"\0\0\x08\x01\0\0\0\x05ab", mtime=0)[:-9],
            "not a gzipped",
        ),
        ("x-images-idx3-ubyte.gz", gzip.compress(b"PNG", mtime=0), "not an IDX file of bytes"),
        (
            "x-images-idx3-ubyte.gz",
            gzip.compress(b"\0\0\x0d\x01\0\0\0\0", mtime=0),
            "not an IDX file of bytes",
        ),
        ("x-images-idx3-ubyte.gz", gzip.compress(b"\0\0\x08\x02\0\0\0\x05ab", mtime=0), "shape"),
        (
            "images.gz",
            gzip.compress(b"\0\0\x08\x01\0\0\0\x01a", mtime=0),
            "must contain 'images-idx3'",
        ),
        (
            "x-images-idx3.gz",
            gzip.compress(b"\0\0\x08\x01\0\0\0\x01a", mtime=0),
            "x-labels-idx1.gz",
        ),
    ],
)
def test_bad_idx(
    name: str, content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert words in fail("--data", path, capsys=capsys)


def test_wrong_number_of_labels(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = images.with_name("some-labels-idx1-ubyte.gz")
    write_idx(labels, np.zeros(39, dtype=np.uint8))
    assert "one label for each" in fail("--data", images, capsys=capsys)


def test_too_few_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_idx(tmp_path / "labels-idx1", np.zeros(1, dtype=np.uint8))
    path = write_idx(tmp_path / "images-idx3", np.zeros((1, 2, 2), dtype=np.uint8))
    assert "too few" in fail("--data", path, capsys=capsys)


@pytest.mark.parametrize(
    ("content", "words"), [(b"\xff\xfe", "not text in UTF-8"), (b"short", "5 characters")]
)
def test_bad_text(
    content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert words in fail("--task", "text", "--data", path, capsys=capsys)


def test_unwritable_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in fail("--report", tmp_path / "file", capsys=capsys)


@pytest.mark.parametrize("missing", ["torch", "sklearn", "matplotlib", "tqdm"])
def test_missing_package(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from topkast_demo.cli import main; main(['demo'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"needs {missing}" in done.stderr
    assert "pip install 'topkast[demo]'" in done.stderr


@pytest.mark.parametrize("missing", ["jax", pytest.param("optax", marks=needs_jax)])
def test_missing_package_of_jax(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "topkast_demo.jax_trainer", raising=False)
    message = fail("--framework", "jax", capsys=capsys)
    assert f"needs {missing}" in message
    assert "pip install 'topkast[demo,jax]'" in message


def test_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("topkast_demo.train._timed_step", interrupt)
    threads = torch.get_num_threads()
    assert cli.main(["demo", "--report", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted")
    assert torch.get_num_threads() == threads
    assert not any(tmp_path.iterdir())


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "demo" in capsys.readouterr().out
    for arguments, words in ((["--version"], topkast.__version__), (["demo", "--help"], "--bwd")):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
        assert words in capsys.readouterr().out


def test_module_and_what_it_imports() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "topkast", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"topkast {topkast.__version__}\n"
    code = (
        "import sys, topkast; assert 'topkast_demo' not in sys.modules\n"
        "import topkast_demo.cli; assert 'torch' not in sys.modules\n"
        "import topkast_demo.compare, topkast_demo.torch_trainer\n"
        "assert 'jax' not in sys.modules and 'optax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_command_is_answered_with_all_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bogus"])
    assert "'demo', 'study'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["study --list", "study --help", "--version", ""])
def test_a_reader_that_stops_is_no_error(arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # argparse hides errors of its own writes
    command = [sys.executable, "-m", "topkast", *arguments.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1
