"""The notebooks of the docs run, and their outputs are those of the code that they show."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("sklearn")

DOCS = Path(__file__).parents[1] / "docs"
SCRIPT = runpy.run_path(str(DOCS / "notebooks" / "execute.py"))
PATHS = SCRIPT["PATHS"]
by_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds_of(notebook: Any) -> list[list[str]]:
    """What each cell printed and drew, but not the numbers: processors round differently."""
    return [
        [
            output.get("name", "image" if "image/png" in output.get("data", {}) else "value")
            for output in cell.outputs
        ]
        for cell in code_cells(notebook)
    ]


def test_there_are_notebooks() -> None:
    assert [path.stem for path in PATHS] == ["methods_in_jax", "train_and_look"]
    assert sum(path.stat().st_size for path in PATHS) < 300_000


@by_path
def test_outputs_belong_to_the_code(path: Path) -> None:
    notebook = SCRIPT["read"](path)
    stored = notebook.metadata["topkast"]["code_sha256"]
    assert stored == SCRIPT["code_hash"](notebook), f"run docs/notebooks/execute.py {path.stem}"
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    kinds = [kind for outputs in kinds_of(notebook) for kind in outputs]
    assert kinds.count("image") == 5
    assert {*kinds} == {"image", "stdout"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] if "jax" in path.stem else [], id=path.stem)
        for path in PATHS
    ],
)
def test_a_notebook_runs(path: Path) -> None:
    notebook = SCRIPT["read"](path)
    stored = kinds_of(notebook)
    SCRIPT["execute"](notebook)  # raises what a cell raises
    assert kinds_of(notebook) == stored


def test_other_code_has_another_hash() -> None:
    notebook = SCRIPT["read"](PATHS[0])
    code_cells(notebook)[0].source += "\n"
    assert SCRIPT["code_hash"](notebook) != notebook.metadata["topkast"]["code_sha256"]


@pytest.mark.slow
def test_the_figures_of_the_docs_can_be_drawn_again(tmp_path: Path) -> None:
    runpy.run_path(str(DOCS / "images" / "draw.py"))["main"](tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == set(re.findall(r"images/([\w-]+\.png)", (DOCS / "analysis.md").read_text()))
