"""``python -m topkast study NAME --scale paper``, with the paper's tables made small."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from paper_data import write_enwik8, write_images
from test_paper_images import TINY
from test_paper_language import CHARACTERS as TINY_TEXT

from topkast._options import Options
from topkast.methods import GradualPruning, Random, TopKAST
from topkast_paper import train_resnet50
from topkast_study import StudyError, paper_scale
from topkast_study.paper_scale import TABLES, conduct_at_paper_scale

SPARSE_FIELDS = ("method", "fwd", "bwd", "refresh_every", "penalty")


def shrink_to(tiny: Any) -> Any:
    """A function that gives the settings of a row the size of `tiny`."""

    def shrink(settings: Any) -> Any:
        kept = {name: getattr(settings, name) for name in SPARSE_FIELDS}
        return dataclasses.replace(tiny, **kept | {"refresh_every": 1 if kept["method"] else None})

    return shrink


@pytest.mark.slow
def test_table1_runs_end_to_end_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = TABLES["table1"].rows[:6]
    calls: list[int] = []

    def train(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_resnet50.train(*arguments)

    table = dataclasses.replace(TABLES["table1"], rows=rows, train=train)
    monkeypatch.setitem(paper_scale.TABLES, "table1", table)
    images, output = write_images(tmp_path / "images"), tmp_path / "out"
    options: Any = {"data": images, "output": output, "seeds": 1, "shrink": shrink_to(TINY)}
    with pytest.raises(KeyboardInterrupt):
        conduct_at_paper_scale("table1", **options)
    report = conduct_at_paper_scale("table1", **options).read_text()
    assert len(calls) == len(rows) + 1  # finished runs are not repeated
    for row in rows:
        assert f"| {row.label} |" in report
    assert "| 75.03 |" in report
    results = json.loads((output / "results.json").read_text())
    assert set(results) == {row.label for row in rows}
    tensors = results["Top-KAST 0.8/0.5"][0]["tensors"]
    assert all(active <= backward <= size for size, active, backward in tensors.values())
    with pytest.raises(StudyError, match=r"holds the study table1 at scale paper .*, not "):
        conduct_at_paper_scale("table5", **options)
    (damaged, *_) = sorted((output / "runs").glob("*/result.json"))
    damaged.write_text("{")
    with pytest.raises(StudyError, match=r"result\.json is not the result of its run: delete it"):
        conduct_at_paper_scale("table1", **options)


def test_rows_are_those_of_the_paper() -> None:
    """By forward and backward sparsity, as its tables print them."""

    def printed(name: str, method: Any, **others: Any) -> dict[Any, float | None]:
        return {
            (row.settings.fwd, row.settings.bwd, row.settings.explore_until): row.paper
            for row in TABLES[name].rows
            if type(row.settings.method) is method
        }

    all_steps = None
    assert printed("table1", Random) == {
        (0.8, 0.5, all_steps): None,
        (0.9, 0.8, all_steps): 74.76,
        (0.95, 0.9, all_steps): 68.48,
    }
    assert printed("table1", TopKAST) == {
        (0.8, 0.5, all_steps): 75.03,  # table 6
        (0.9, 0.8, all_steps): 73.03,
        (0.95, 0.9, all_steps): 70.42,
        (0.9, 0.0, 0): 68.26,
        (0.9, 0.0, 5_000): 72.05,
        (0.9, 0.0, 16_000): 74.14,
        (0.9, 0.0, 32_000): 74.65,
    }
    assert printed("table5", TopKAST) == {
        (0.8, 0.0, all_steps): 1.03,
        (0.8, 0.6, all_steps): 1.05,
        (0.9, 0.0, all_steps): 1.08,
        (0.9, 0.8, all_steps): 1.10,
        (0.95, 0.0, all_steps): 1.14,
        (0.95, 0.9, all_steps): 1.17,
    }
    assert printed("table5", GradualPruning) == {
        (0.8, 0.0, all_steps): 1.02,
        (0.9, 0.0, all_steps): 1.06,
        (0.95, 0.0, all_steps): 1.13,
    }
    assert TABLES["table5"].rows[0].paper == 1.00
    for table in TABLES.values():
        labels = [row.label for row in table.rows]
        assert len(set(labels)) == len(labels)  # they name the folders of the runs
        for row in table.rows:
            options = row.settings
            if options.method is not None:  # the sparsities fit the method
                Options(
                    fwd=options.fwd,
                    bwd=options.bwd,
                    method=options.method,
                    explore_until=options.explore_until,
                )


def test_a_result_of_other_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def train(settings: Any, data: Path, output: Path, seed: int) -> dict[str, Any]:
        calls.append(settings)
        return {"final": 1.0, "training_fraction": 0.5}

    table = dataclasses.replace(TABLES["table5"], rows=TABLES["table5"].rows[:2], train=train)
    monkeypatch.setitem(paper_scale.TABLES, "table5", table)
    options: Any = {"data": tmp_path, "output": tmp_path / "out", "seeds": 1}
    conduct_at_paper_scale("table5", **options)
    conduct_at_paper_scale("table5", **options)
    assert len(calls) == 2
    changed = [
        dataclasses.replace(row, settings=dataclasses.replace(row.settings, batch=32))
        for row in table.rows
    ]
    monkeypatch.setitem(
        paper_scale.TABLES, "table5", dataclasses.replace(table, rows=tuple(changed))
    )
    with pytest.raises(StudyError, match=r"result\.json was made with other settings: choose"):
        conduct_at_paper_scale("table5", **options)


def test_a_table_of_text_runs_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = dataclasses.replace(TABLES["table5"], rows=TABLES["table5"].rows[:2])
    monkeypatch.setitem(paper_scale.TABLES, "table5", table)
    text = write_enwik8(tmp_path / "text")
    report = conduct_at_paper_scale(
        "table5", data=text, output=tmp_path / "out", seeds=2, shrink=shrink_to(TINY_TEXT)
    )
    assert "bits per character" in report.read_text()
    assert " ± " in report.read_text()


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="enwik8"):
        conduct_at_paper_scale("table2", data=tmp_path, output=tmp_path / "out", seeds=1)
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("mine")
    with pytest.raises(StudyError, match="has files but no study"):
        conduct_at_paper_scale("table2", data=tmp_path, output=other, seeds=1)
    assert (other / "file").read_text() == "mine"
