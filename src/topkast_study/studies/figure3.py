"""Figure 3: the change of the sets in training, and the use of the reservoir."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from topkast_study.plots import make_figure, save
from topkast_study.scales import Scale
from topkast_study.study import Labels, Outcome, Published, Row, Study

_COLOURS = {"topkast": "#0072B2", "random": "#D55E00"}


def _labels(name: str, fwd: float, bwd: float, penalty: str) -> Labels:
    return name, f"{fwd:g}", f"{bwd:g}", penalty


def _rows(scale: Scale) -> list[Row]:
    def run(method: str, fwd: float, bwd: float, penalty: float) -> Row:
        name = "Top-KAST" if method == "topkast" else "Top-KAST (random)"
        return Row(
            _labels(name, fwd, bwd, f"{penalty:g}"),
            scale.images(method, fwd, bwd, penalty=penalty, dynamics=True),
        )

    return [
        run("topkast", 0.8, 0.5, 1e-4),
        run("random", 0.8, 0.5, 1e-4),
        run("topkast", 0.8, 0.5, 0.0),
        run("topkast", 0.95, 0.9, 1e-4),
    ]


def _series(outcome: Outcome, name: str) -> tuple[list[int], np.ndarray[tuple[int, ...], np.dtype]]:
    """Steps, and shares by step and tensor in percent, the mean over seeds."""
    records = [result.dynamics or {} for result in outcome.results]
    shares = np.mean([np.asarray(record[name]) for record in records], axis=0)
    return records[0][f"{name}_steps"], 100 * shares


def _plot(path: Path, outcomes: Sequence[Outcome]) -> str:
    figure, (left, right) = make_figure(2, height=3.8)
    for outcome in outcomes:
        run = outcome.row.run
        label = f"{outcome.row.labels[0]} {run.fwd:g}/{run.bwd:g}"
        dashes = "solid" if run.penalty else "dotted"
        colour = "#009E73" if run.fwd == 0.95 else _COLOURS[run.method]
        if not run.penalty:
            label += ", no penalty"
        for axes, name in ((left, "change"), (right, "awakened")):
            steps, shares = _series(outcome, name)
            x = np.asarray(steps) / run.steps
            axes.plot(x, shares.mean(axis=1), color=colour, linestyle=dashes, label=label)
            if run.penalty:
                low, high = shares.min(axis=1), shares.max(axis=1)
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    for axes in (left, right):
        axes.set_xlabel("share of training")
        axes.set_ylim(bottom=0)
    left.set_ylabel("units of a tensor that change\nwithin 5/32 of the run (%)")
    right.set_ylabel("units of the initial reservoir C\nthat were in A so far (%)")
    left.legend(frameon=False, fontsize=8)
    save(figure, path)
    return (
        "Left: share of units that differ between the sets A at two points of training, 5/32 of "
        "the run apart, against the first. Right: share of the initial reservoir that was ever "
        "in A. Lines are means over tensors and seeds, bands go from the least to the most of the "
        "two tensors."
    )


def describe(outcome: Outcome) -> tuple[str, ...]:
    """First and last change, and use of the reservoir, in percent."""
    _, change = _series(outcome, "change")
    steps, awakened = _series(outcome, "awakened")
    half = next(k for k, step in enumerate(steps) if 2 * step >= outcome.row.run.steps)
    values = (change[0], change[-1], awakened[half], awakened[-1])
    return tuple(f"{statistics.mean(value.tolist()):.1f} %" for value in values)


STUDY = Study(
    name="figure3",
    title="Figure 3: the dynamics of the sets",
    question=(
        "Do the sets settle in training? How much of the reservoir C, the weights outside B at the "
        "start, is ever used?"
    ),
    columns=("method", "fwd", "bwd", "penalty"),
    rows=_rows,
    published=(
        Published(
            "Jayakumar et al. (2020), figure 3 and section 4.1, in words: ResNet-50 on ImageNet, "
            "0.8/0.5, points 5,000 of 32,000 steps apart.",
            ("quantity", "what the figure shows"),
            (
                ("units of A that change", "fall in training: the sets settle"),
                ("share of C that is ever in A", "about 5 %, most of it at the start"),
            ),
        ),
    ),
    plots={"dynamics.png": _plot},
    details=(
        (
            "units that change, first 5/32",
            "last 5/32",
            "of C ever in A, half of the run",
            "at the end",
        ),
        describe,
    ),
)
