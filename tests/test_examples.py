"""The examples run as they stand, and learn something."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr("sys.argv", [str(path)])
    namespace = runpy.run_path(str(path))
    assert namespace["accuracy"] > 0.85
    assert "active (" in capsys.readouterr().out


def test_the_example_on_files(
    shared_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = EXAMPLES[0].with_name("cupy_mlp.py")
    monkeypatch.setattr("sys.argv", [str(path), str(shared_data)])
    namespace = runpy.run_path(str(path))
    assert namespace["pixels"] == 784
    assert namespace["accuracy"] > 0.85


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2
