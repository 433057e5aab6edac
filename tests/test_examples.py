"""The examples run as they stand, and learn something."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
CLASSIFIERS = {"cupy_mlp.py", "pytorch_digits.py"}
TRANSFORMER = FOLDER / "weight_sparse_transformer.py"


@pytest.mark.parametrize("name", sorted(CLASSIFIERS))
def test_classifier(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    path = FOLDER / name
    monkeypatch.setattr("sys.argv", [str(path)])
    namespace = runpy.run_path(str(path))
    assert namespace["accuracy"] > 0.85
    assert "active (" in capsys.readouterr().out


def test_the_example_on_files(
    shared_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = FOLDER / "cupy_mlp.py"
    monkeypatch.setattr("sys.argv", [str(path), str(shared_data)])
    namespace = runpy.run_path(str(path))
    assert namespace["pixels"] == 784
    assert namespace["accuracy"] > 0.85


def run_transformer(monkeypatch: pytest.MonkeyPatch, folder: Path, *, steps: int) -> dict[str, Any]:
    arguments = [str(TRANSFORMER), "--steps", str(steps), "--output", str(folder)]
    monkeypatch.setattr("sys.argv", arguments)
    return runpy.run_path(str(TRANSFORMER))


def test_the_weight_sparse_transformer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    namespace = run_transformer(monkeypatch, tmp_path, steps=12)
    steps, training, validation = zip(*namespace["curve"], strict=True)
    assert steps == (1, 12)
    assert training[-1] < training[0]
    assert validation[-1] < validation[0] < math.log2(namespace["CHARACTERS"])
    assert namespace["active"] / namespace["total"] == pytest.approx(0.01, rel=1e-3)
    assert f"{namespace['active']:,} of {namespace['total']:,} weights active" in (
        capsys.readouterr().out
    )
    assert (tmp_path / "weight_sparse_transformer.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_weight_sparse_transformer_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = tmp_path / "new"
    losses = [run_transformer(monkeypatch, folder, steps=2)["curve"] for _ in range(2)]
    assert losses[0] == losses[1]  # the seed decides everything
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert list(folder.iterdir()) == []


def test_all_examples_are_tested() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == CLASSIFIERS | {TRANSFORMER.name}
