"""Units of r × 1, which sparse execution computes fastest, on images and on text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from topkast_study.plots import make_figure, plot_series, save
from topkast_study.runs import Run
from topkast_study.scales import PAIRS, Scale
from topkast_study.study import Claim, Labels, Outcome, Plot, Row, Study

_SPARSITIES = (0.9, 0.95, 0.98)
_ROWS = (1, 2, 4, 8)  # of a unit


def _labels(fwd: float, rows: int) -> Labels:
    return f"{fwd:g}", f"{PAIRS[fwd]:g}", f"{rows}×1"


def _rows(scale: Scale, task: str) -> list[Row]:
    def run(fwd: float, rows: int) -> Run:
        make_run = scale.images if task == "images" else scale.text
        return make_run("topkast", fwd, block=(rows, 1))

    return [Row(_labels(fwd, rows), run(fwd, rows)) for fwd in _SPARSITIES for rows in _ROWS]


def _plot(metric: str) -> Plot:
    def plot(path: Path, outcomes: Sequence[Outcome]) -> str:
        figure, (axes,) = make_figure(1)
        for fwd, colour in zip(_SPARSITIES, ("#0072B2", "#D55E00", "#009E73"), strict=True):
            here = [outcome for outcome in outcomes if outcome.row.run.fwd == fwd]
            label = f"{fwd:g}/{PAIRS[fwd]:g}"
            plot_series(axes, range(len(here)), here, label=label, color=colour, marker="o")
        axes.set_xticks(range(len(_ROWS)), [f"{rows}×1" for rows in _ROWS])
        axes.set_xlabel("rows × columns of a unit")
        axes.set_ylabel(metric)
        axes.legend(frameon=False, title="fwd/bwd")
        save(figure, path)
        return f"The {metric} against the size of a unit: mean ± standard deviation."

    return plot


def _study(name: str, task: str, metric: str) -> Study:
    return Study(
        name=name,
        title=f"Units of r × 1 on {task}",
        question=(
            "What do units of 2, 4 or 8 rows cost, which sparse execution computes faster than "
            "single weights?"
        ),
        columns=("fwd", "bwd", "unit"),
        rows=lambda scale: _rows(scale, task),
        claims=tuple(
            Claim(
                f"{fwd:g}/{PAIRS[fwd]:g}: single weights are better than units of {rows}×1",
                _labels(fwd, 1),
                _labels(fwd, rows),
            )
            for fwd in _SPARSITIES
            for rows in _ROWS[1:]
        ),
        plots={f"{name}.png": _plot(metric)},
        notes="The paper chooses single weights only; the orderings are what one would expect.",
    )


IMAGES = _study("units", "images", "test accuracy (%)")
TEXT = _study("units_text", "text", "bits per character")
