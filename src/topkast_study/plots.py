"""Figures, in the style of the demo's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from topkast_study.methods import METHODS
from topkast_study.study import Outcome

MARKERS = "oo^sDvP*XphH<>d"


def make_figure(columns: int, *, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A figure of one row, drawn without pyplot and its global state."""
    figure = Figure(figsize=(4.6 * columns if columns > 1 else 6.4, height), layout="constrained")
    FigureCanvasAgg(figure)
    plots = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for axes in plots:
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, plots


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=100, metadata={"Software": None})


def style_of(method: str) -> dict[str, Any]:
    """Colour and marker of a method, the same in all figures."""
    entry = METHODS[method]
    return {"color": entry.colour, "marker": MARKERS[list(METHODS).index(method)]}


def plot_bars(axes: Axes, outcomes: Sequence[Outcome], names: Sequence[str]) -> None:
    """Horizontal bars of means with standard deviations, on an axis that need not begin at 0."""
    positions = np.arange(len(outcomes))[::-1]
    means = [outcome.mean for outcome in outcomes]
    axes.errorbar(
        means,
        positions,
        xerr=[outcome.deviation for outcome in outcomes],
        fmt="none",
        ecolor="#888888",
        capsize=3,
        linewidth=1.2,
    )
    for mean, position, outcome in zip(means, positions, outcomes, strict=True):
        axes.plot(mean, position, markersize=7, **style_of(outcome.row.run.method))
    axes.set_yticks(positions, names)
    axes.grid(axis="y", visible=False)


def plot_series(
    axes: Axes, x: Sequence[float], outcomes: Sequence[Outcome], *, label: str, **style: Any
) -> None:
    """A line of means with standard deviations."""
    axes.errorbar(
        x,
        [outcome.mean for outcome in outcomes],
        yerr=[outcome.deviation for outcome in outcomes],
        capsize=3,
        linewidth=1.6,
        markersize=5,
        label=label,
        **style,
    )
