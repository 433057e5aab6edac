"""The plots of the report, drawn without pyplot and so without its global state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from topkast_demo.dynamics import Spread
from topkast_demo.tasks import Task
from topkast_demo.train import Run

# Okabe and Ito's palette, which the colour-blind can tell apart; dashes for print.
_COLOURS = {"dense": "#595959", "static": "#E69F00", "topkast": "#0072B2"}
_DASHES: dict[str, Any] = {"dense": (0, (1, 1)), "static": (0, (5, 2)), "topkast": "solid"}
_BLOCKS = 100  # means that a noisy curve is drawn from, at most


def plot_curves(path: Path, task: Task, runs: list[Run], *, title: str) -> None:
    """Training loss and metric of all runs, against the step."""
    figure, (left, right) = _figure(2)
    for run in runs:
        style = {"color": _COLOURS[run.method], "linestyle": _DASHES[run.method], "linewidth": 1.8}
        losses = np.asarray(run.losses)
        left.plot(_block_means(np.arange(1, len(losses) + 1)), _block_means(losses), **style)
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


def plot_spread(path: Path, spread: Spread, *, title: str, label: str, empty: str) -> None:
    """Mean over all weights and range over tensors, against the step."""
    figure, (axes,) = _figure(1)
    axes.set_ylabel(label)
    if spread.step:
        steps, mean, least, most = (
            _block_means(np.asarray(values, dtype=np.float64))
            for values in (spread.step, spread.mean, spread.least, spread.most)
        )
        colour = _COLOURS["topkast"]
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, 100 * mean, color=colour, marker=marker, label="mean over all weights")
        axes.fill_between(
            steps,
            100 * least,
            100 * most,
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
    axes = [figure.add_subplot(1, columns, place + 1) for place in range(columns)]
    for one in axes:
        one.set_xlabel("training step")
        one.grid(color="#DDDDDD", linewidth=0.6)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=150)


def _block_means(values: NDArray[Any]) -> NDArray[np.float64]:
    """At most :data:`_BLOCKS` means of consecutive values: single steps are too noisy to read."""
    blocks = np.array_split(values, min(_BLOCKS, len(values)))
    return np.asarray([block.mean() for block in blocks])
