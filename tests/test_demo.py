"""The demo, run in this process for a few steps: ``topkast._demo``."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
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
from topkast._demo import cli
from topkast._demo.data import read_idx
from topkast._demo.methods import build_optimizer
from topkast._demo.models import CharacterTransformer, mlp
from topkast._demo.settings import OPTIMIZERS, Settings

PLOTS = ("learning_curves.png", "mask_change.png", "reservoir.png")


def run(*arguments: str | Path, report: Path) -> dict[str, Any]:
    """Run the demo and read the JSON that it wrote."""
    assert cli.main(["demo", *map(str, arguments), "--report", str(report)]) == 0
    for name in PLOTS:
        assert (report / name).read_bytes().startswith(b"\x89PNG")
    data: dict[str, Any] = json.loads((report / "report.json").read_text(encoding="utf-8"))
    return data


def fail(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the demo with a mistake in its arguments; returns the one line on stderr."""
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


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Forty images of 4×5 pixels in three classes, as MNIST's files are written."""
    rng = np.random.default_rng(0)
    labels = np.arange(40, dtype=np.uint8) % 3
    pixels = rng.integers(0, 256, (40, 4, 5), dtype=np.uint8)
    write_idx(tmp_path / "some-labels-idx1-ubyte.gz", labels)
    return write_idx(tmp_path / "some-images-idx3-ubyte.gz", pixels)


def test_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run("--steps", "20", "--refresh-every", "4", report=tmp_path / "deep" / "report")
    assert set(data) == {"versions", "threads", "options", "task", "table", "runs"}
    assert set(data["versions"]) == {"python", "numpy", "torch", "topkast"}
    assert data["versions"]["topkast"] == topkast.__version__
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
        for least, mean, most in zip(
            *(dynamics[name][key] for key in ("min", "mean", "max")), strict=True
        ):
            assert 0 <= least <= mean <= most <= 1
    printed = capsys.readouterr()
    assert "Dense in all runs: head.*" in printed.out
    assert "masked dense kernels" in printed.out
    assert "Every 4 steps Top-KAST" in printed.out
    assert "Top-KAST" in printed.err  # the progress bar
    assert "mask change" in printed.err


def test_counts_are_exact(tmp_path: Path) -> None:
    data = run("--steps", "3", "--fwd", "0.93", "--bwd", "0.7", report=tmp_path)
    for name, weights in (("hidden0.weight", 64 * 48), ("hidden1.weight", 48 * 48)):
        forward, backward = (weights - weights * zeros // 100 for zeros in (93, 70))
        sizes = {method: of["tensors"][name] for method, of in data["runs"].items()}
        assert sizes["dense"] == dict.fromkeys(("weights", "forward", "backward"), weights)
        assert sizes["static"] == {"weights": weights, "forward": forward, "backward": forward}
        assert sizes["topkast"] == {"weights": weights, "forward": forward, "backward": backward}
    dense_parts = 48 + 48 + 48 * 10 + 10
    for row in data["table"]:
        tensors = data["runs"][row["method"]]["tensors"].values()
        trained = sum(tensor["backward"] for tensor in tensors) + dense_parts
        assert row["gradient_bytes"] == 4 * trained
        # AdamW: two moments, and one step count for each of six tensors.
        assert row["optimizer_state_bytes"] == 4 * (2 * trained + 6)
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
    # Hardly better than guessing after one step, and not worse.
    assert all(3 < row["metric"] < 8 for row in data["table"])


def test_idx(images: Path, tmp_path: Path) -> None:
    data = run("--data", images, "--steps", "4", report=tmp_path / "report")
    assert "32 to train and 8 to test on; MLP 20-300-300-3" in data["task"]["description"]
    assert read_idx(images).shape == (40, 4, 5)


def test_same_seed_same_run(tmp_path: Path) -> None:
    first, again, other = (
        run("--steps", "3", "--seed", seed, report=tmp_path / str(place))["runs"]
        for place, seed in enumerate("778")
    )
    for method in first:
        assert first[method]["loss"] == again[method]["loss"]
        assert first[method]["loss"] != other[method]["loss"]


def test_all_methods_see_the_same_batches_and_dense_weights() -> None:
    settings = Settings(task="digits", steps=1, lr=0.1)
    models = {}
    for method in ("dense", "static", "topkast"):
        torch.manual_seed(0)
        models[method] = mlp(20, 30, 5)
        build_optimizer(method, models[method], settings, ("head.*",))
    for method in ("static", "topkast"):
        found, dense = models[method].state_dict(), models["dense"].state_dict()
        for name, weights in found.items():
            kept = weights != 0
            torch.testing.assert_close(weights[kept], dense[name][kept], rtol=0, atol=0)
            assert int(kept.sum()) == (60 if name == "hidden0.weight" else weights.numel())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_static_mask_never_moves(name: str) -> None:
    settings = Settings(task="digits", steps=5, lr=0.05, optimizer=name)
    torch.manual_seed(0)
    model = mlp(20, 30, 5)
    optimizer: Any = build_optimizer("static", model, settings, ("head.*",))
    weight = model.get_parameter("hidden0.weight")
    outside = weight == 0
    assert int(outside.sum()) == 540
    for _ in range(settings.steps):
        optimizer.zero_grad()
        model(torch.ones(2, 20)).square().sum().backward()
        optimizer.step()
        assert torch.equal(weight == 0, outside)
    theta = topkast.dense_params(optimizer)["hidden0.weight"]
    assert torch.equal(theta == 0, outside)


def test_static_mask_is_random() -> None:
    masks = []
    for seed in (0, 1):
        torch.manual_seed(0)
        model = mlp(20, 30, 5)
        settings = Settings(task="digits", steps=1, lr=0.1, seed=seed)
        build_optimizer("static", model, settings, ("head.*",))
        masks.append(model.state_dict()["hidden0.weight"] != 0)
    assert not torch.equal(*masks)


def test_transformer_is_causal() -> None:
    torch.manual_seed(0)
    model = CharacterTransformer(10, context=8, width=16, layers=2, heads=4)
    text = torch.randint(10, (1, 8))
    changed = text.clone()
    changed[0, 5] = (text[0, 5] + 1) % 10
    before, after = model(text), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


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
        (("--data", "{tmp}/none-images-idx3.gz"), ("none-images-idx3.gz", "No such file")),
        (("--data", "{tmp}"), ("cannot be read",)),
        (("--task", "text", "--data", "{tmp}/none.txt"), ("none.txt", "No such file")),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...],
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = (argument.replace("{tmp}", str(tmp_path)) for argument in arguments)
    message = fail(*given, capsys=capsys)
    assert all(word in message for word in words)


def test_divergence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo", "--steps", "9", "--lr", "1e30", "--report", str(tmp_path)])
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]  # after the progress bar
    assert "training diverged at step" in message
    assert "smaller --lr" in message


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


def test_labels_that_do_not_fit(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_report_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in fail("--report", tmp_path / "file", capsys=capsys)


@pytest.mark.parametrize("missing", ["torch", "sklearn", "matplotlib", "tqdm"])
def test_missing_package(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from topkast._demo.cli import main; main(['demo'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"needs {missing}" in done.stderr
    assert "pip install 'topkast[demo]'" in done.stderr


def test_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("topkast._demo.train._timed_step", interrupt)
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
        "import sys, topkast; assert 'topkast._demo' not in sys.modules\n"
        "import topkast._demo.cli; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
