"""Reports and figures of all studies, from results that no training made."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the studies train with PyTorch")
pytest.importorskip("sklearn", reason="the studies take their digits from scikit-learn")
pytest.importorskip("matplotlib", reason="the studies draw with matplotlib")
pytest.importorskip("tqdm", reason="the studies show their progress with tqdm")

from matplotlib.figure import Figure

from topkast.__main__ import main
from topkast_study.runs import Result, Run
from topkast_study.scales import SCALES
from topkast_study.studies import STUDIES
from topkast_study.study import Row

QUICK = SCALES["quick"]


@dataclass
class Made:
    """What a study got instead of results of training, and the figures that it drew."""

    results: dict[str, list[Result]] = field(default_factory=dict)  # of each row, by seed
    figures: dict[str, Figure] = field(default_factory=dict)

    def train(self, run: Run, _: Path | None) -> Result:
        """A result that no other row has: its final value falls from row to row."""
        row = run.with_seed(0).id
        number = list(self.results).index(row) if row in self.results else len(self.results)
        steps = [0, run.steps // 2, run.steps]
        shares = [[0.5, 0.25], [0.125, 0.25], [0.0625, 0.125]]
        result = Result(
            curve_steps=steps[1:],
            curve=[20.0, 80 - number / 8 + run.seed / 16],
            loss=1.0,
            tensors={},
            flops=0.01 * (number + 1),
            mask_change=0.01 * (number + 1) + 0.002 * run.seed,
            dynamics={
                "change_steps": steps,
                "change": shares,
                "awakened_steps": steps,
                "awakened": shares[::-1],
            }
            if run.dynamics
            else None,
            seconds=float(number + 1),
        )
        self.results.setdefault(row, []).append(result)
        return result

    def mean(self, row: Row, attribute: str = "final") -> float:
        return float(np.mean([getattr(one, attribute) for one in self.results[row.run.id]]))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    made = Made()
    savefig = Figure.savefig

    def save(figure: Figure, path: Path, **options: Any) -> None:
        made.figures[path.name] = figure
        savefig(figure, path, **options | {"dpi": 20})

    monkeypatch.setattr("topkast_study.conduct.train", made.train)
    monkeypatch.setattr(Figure, "savefig", save)
    return made


def conduct(name: str, output: Path) -> str:
    """Write the report of a study with two seeds at the scale that users have by default."""
    assert main(["study", name, "--seeds", "2", "--output", str(output)]) == 0
    return (output / "report.md").read_text(encoding="utf-8")


def points(figure: Figure, axes: int) -> set[tuple[float, float]]:
    """The points of all lines and marks in one of the plots, rounded."""
    pairs: set[tuple[float, float]] = set()
    for line in figure.axes[axes].get_lines():
        if line.get_marker() in ("|", "_"):  # an end of an error bar
            continue
        x, y = (np.asarray(values, float) for values in (line.get_xdata(), line.get_ydata()))
        pairs |= {(round(a, 6), round(b, 6)) for a, b in zip(x.tolist(), y.tolist(), strict=True)}
    return pairs


def only_in_table(name: str, row: Row) -> bool:
    """Whether a row is in no figure: ablations that the figure has no axis for."""
    run = row.run
    if name == "table1":
        return (run.method, run.bwd) == ("topkast", 0)
    if name == "figure2":
        return (run.method, run.multiple) == ("dense", 2)
    return name == "bwd" and run.method == "random"


@pytest.mark.parametrize("name", STUDIES)
def test_report_and_figures(name: str, tmp_path: Path, made: Made) -> None:
    """Every row and ordering is in the report, and every row that has a figure is in it."""
    report = conduct(name, tmp_path)
    study = STUDIES[name]
    rows = study.rows(QUICK)
    for row in rows:
        mean, deviation = made.mean(row), 0.0625 / 2**0.5
        (line,) = (
            line
            for line in report.splitlines()
            if line.startswith(f"| {' | '.join(row.labels)} |") and " ± " in line
        )
        assert f"{mean:.2f} ± {deviation:.2f}" in line or f"{mean:.3f} ± {deviation:.3f}" in line
    finals = {row.labels: made.mean(row) for row in rows}
    sign = -1 if rows[0].run.task == "text" else 1  # bits per character: less is better
    for claim in study.claims:
        if not {claim.better, claim.worse} <= finals.keys():  # a row of the scale `full`
            assert f"| {claim.text} |" not in report
            continue
        difference = sign * (finals[claim.better] - finals[claim.worse])
        verdict = "holds" if difference > 0 else "reversed" if difference < 0 else "open"
        (line,) = (line for line in report.splitlines() if line.startswith(f"| {claim.text} |"))
        assert line.endswith(f" | {verdict} |")
    assert made.figures.keys() == study.plots.keys()
    if study.plots and name != "figure3":
        drawn = {
            y
            for figure in made.figures.values()
            for k in range(len(figure.axes))
            for pair in points(figure, k)
            for y in pair
        }
        shown = [row for row in rows if not only_in_table(name, row)]
        assert {round(made.mean(row), 6) for row in shown} <= drawn
    for plot in study.plots:
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
        assert f"]({plot})" in report
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [row["mean"] for row in content["rows"]] == list(finals.values())


def test_figure2_has_operations_and_times(tmp_path: Path, made: Made) -> None:
    conduct("figure2", tmp_path)
    rows = STUDIES["figure2"].rows(QUICK)
    sparsities = sorted({row.run.fwd for row in rows if row.run.method != "dense"})
    for file, attribute in (("operations.png", "flops"), ("time.png", "seconds")):
        for k, fwd in enumerate(sparsities):
            expected = {
                (round(made.mean(row, attribute), 6), round(made.mean(row), 6))
                for row in rows
                if row.run.method != "dense" and row.run.fwd == fwd
            }
            dense = round(made.mean(rows[0]), 6)  # a horizontal line
            assert points(made.figures[file], k) == expected | {(0, dense), (1, dense)}
        assert len(made.figures[file].axes) == len(sparsities)
        names = {text.get_text() for text in made.figures[file].legends[0].get_texts()}
        assert names == {row.labels[0] for row in rows} - {"dense"}
        notes = [text.get_text() for text in made.figures[file].axes[0].texts]
        assert sorted(notes) == ["bwd 0", "bwd 0.5", "bwd 0.8"]


def test_the_penalty_has_accuracies_and_changes(tmp_path: Path, made: Made) -> None:
    conduct("penalty", tmp_path)
    rows = STUDIES["penalty"].rows(QUICK)
    figure = made.figures["penalty.png"]
    for axes, attribute, factor in ((0, "final", 1), (1, "mask_change", 100)):
        expected = {
            (row.run.penalty, round(factor * made.mean(row, attribute), 6))
            for row in rows
            if row.run.penalty and row.run.ratio is None
        }
        without = round(factor * made.mean(rows[0], attribute), 6)
        assert points(figure, axes) == expected | {(0, without), (1, without)}
        legend = figure.axes[axes].get_legend()
        assert legend is not None
        assert sorted(text.get_text() for text in legend.get_texts()) == ["l1", "l2", "no penalty"]
    ratios = [row for row in rows if row.run.ratio is not None]
    expected = {(k, round(made.mean(row), 6)) for k, row in enumerate(ratios)}
    assert points(figure, 2) == expected
    ticks = [text.get_text() for text in figure.axes[2].get_xticklabels()]
    assert ticks == ["0", "1", "10", "100"]


def test_blocks_are_drawn_by_their_size(tmp_path: Path, made: Made) -> None:
    conduct("blocks", tmp_path)
    rows = STUDIES["blocks"].rows(QUICK)
    (axes,) = made.figures["blocks.png"].axes
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    expected = {(ticks.index(row.labels[2]), round(made.mean(row), 6)) for row in rows}
    assert points(made.figures["blocks.png"], 0) == expected


def test_the_backward_sparsity_has_two_plots(tmp_path: Path, made: Made) -> None:
    conduct("bwd", tmp_path)
    figure = made.figures["backward.png"]
    rows = {row.labels: row for row in STUDIES["bwd"].rows(QUICK)}
    left = {
        (float(bwd), round(made.mean(row), 6))
        for (method, fwd, bwd), row in rows.items()
        if method == "Top-KAST" and fwd in ("0.9", "0.95") and bwd != "0.84"
    }
    assert points(figure, 0) == left
    low, high = figure.axes[0].get_xlim()
    assert low > high  # denser to the right
    ticks = [text.get_text() for text in figure.axes[1].get_xticklabels()]
    right = {
        (k, round(made.mean(rows["Top-KAST", *pair.split("/")]), 6)) for k, pair in enumerate(ticks)
    }
    assert points(figure, 1) == right
    # Two products with the density of A and one with that of B.
    pairs = [tuple(map(float, pair.split("/"))) for pair in ticks]
    assert [2 * (1 - fwd) + 1 - bwd for fwd, bwd in pairs] == pytest.approx([0.36] * 4)


def test_a_report_that_cannot_be_written(
    tmp_path: Path, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runs are kept, and the same command goes on when the fault is mended."""

    def fail(output: Path) -> str:
        with pytest.raises(SystemExit) as caught:
            conduct("age", output)
        assert caught.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    output = tmp_path / "study"
    conduct("age", output)
    count = len(made.results)
    (output / "report.md").unlink()
    (output / "report.md").mkdir()
    assert fail(output).endswith("report.md cannot be written: Is a directory")
    assert not list(output.rglob("*.part"))
    (output / "report.md").rmdir()
    assert "age" in conduct("age", output)
    assert len(made.results) == count
    (tmp_path / "file").write_text("mine")
    assert fail(tmp_path / "file" / "study").endswith("cannot be written to: Not a directory")
