"""The plots of the report, drawn without pyplot and its global state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from topkast_demo.dynamics import Shares
from topkast_demo.tasks import Task
from topkast_demo.train import Run

# Okabe and Ito's palette, which colour-blind readers can tell apart; dashes for print.
_COLOURS = {"dense": "#595959", "static": "#E69F00", "topkast": "#0072B2"}
_DASHES: dict[str, Any] = {"dense": (0, (1, 1)), "static": (0, (5, 2)), "topkast": "solid"}
_MAX_POINTS = 100  # points of a curve; each is a mean of consecutive values


def plot_curves(path: Path, task: Task, runs: list[Run], *, title: str) -> None:
    """Plot training loss and metric of all runs against the step."""
    figure, (left, right) = _figure(2)
    for run in runs:
        style = {"color": _COLOURS[run.method], "linestyle": _DASHES[run.method], "linewidth": 1.8}
        losses = np.asarray(run.losses)
        steps = np.arange(1, len(losses) + 1)
        left.plot(_means_of_chunks(steps), _means_of_chunks(losses), **style)
        right.plot(
            run.metric_steps,
            run.metric_values,
            marker="o",
            markersize=3.5,
            label=f"{run.label}: {run.metric_values[-1]:.2f} {task.short_unit}",
            **style,
        )
    if task.log_loss:
        left.set_yscale("log")
    left.set_ylabel("training loss, cross-entropy (nats)")
    right.set_ylabel(f"{task.metric} ({task.unit})")
    right.legend(
        right.lines,
        [str(line.get_label()) for line in right.lines],
        loc="lower right" if task.higher_is_better else "upper right",
        frameon=False,
        title="after the last step",
    )
    _save(figure, path, title)


def plot_shares(path: Path, shares: Shares, *, title: str, label: str, empty: str) -> None:
    """Plot the mean over all weights and the range over tensors against the step."""
    figure, (axes,) = _figure(1)
    axes.set_ylabel(label)
    if shares.step:
        steps, mean, minimum, maximum = (
            _means_of_chunks(np.asarray(values, dtype=np.float64))
            for values in (shares.step, shares.mean, shares.min, shares.max)
        )
        colour = _COLOURS["topkast"]
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, 100 * mean, color=colour, marker=marker, label="mean over all weights")
        axes.fill_between(
            steps,
            100 * minimum,
            100 * maximum,
            color=colour,
            alpha=0.2,
            linewidth=0,
            label="from the least to the most changed tensor",
        )
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, empty, transform=axes.transAxes, ha="center", va="center")
    _save(figure, path, title)


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.9 * columns if columns > 1 else 6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    plots = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for axes in plots:
        axes.set_xlabel("training step")
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, plots


def _save(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=150)


def _means_of_chunks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Average consecutive values, because single steps are too noisy to read."""
    chunks = np.array_split(values, min(_MAX_POINTS, len(values)))
    return np.asarray([chunk.mean() for chunk in chunks])
