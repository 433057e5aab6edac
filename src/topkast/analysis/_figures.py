"""Figures of curves and bars, drawn without pyplot and its global state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from topkast._errors import MismatchError, OptionError
from topkast.analysis._history import MaskHistory, MaskRecord
from topkast.analysis._matching import UnitMatch
from topkast.analysis._overlap import Overlap
from topkast.analysis._sets import ByTensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY = "#EEEEEE"

_CHANGES = {
    "forward": "share of A that left since\nthe record before (%)",
    "backward": "share of B that left since\nthe record before (%)",
    "flipped": "share of all weights that entered or\nleft A since the record before (%)",
}
_OVERLAPS = {
    "common": "share of the first network's A\nthat is in the second's too (%)",
    "iou": "intersection over union of A (%)",
}


def plot_change(
    history: MaskHistory | Sequence[MaskRecord], /, *, measure: str = "forward"
) -> Figure:
    """Plot the change of the sets from record to record: the paper's figure 3a.

    Parameters
    ----------
    history
        A history of at least two records, or the records themselves.
    measure
        The field of :class:`Change` to plot: "forward", "backward" or "flipped".

    Returns
    -------
    matplotlib.figure.Figure
        The change of all tensors together, and the range over tensors, against the training step.
        ``figure.savefig(path)`` writes it.

    Raises
    ------
    MismatchError
        If there are fewer than two records.
    OptionError
        If there is no such measure.
    ModuleNotFoundError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.analysis import MaskHistory, plot_change
    >>> history = MaskHistory()
    >>> for step in range(3):
    ...     history.record(step, {"w": np.arange(6) % 3 == step})
    >>> plot_change(history).axes[0].get_xlabel()
    'training step'
    """
    label = _choice("measure", measure, _CHANGES)
    changes = [(record.step, record.change) for record in _records(history, 2) if record.change]
    figure, (axes,) = make_figure(1)
    results = [change for _, change in changes]
    steps = [step for step, _ in changes]
    _plot_range(axes, steps, results, lambda change: getattr(change, measure), "all tensors", BLUE)
    _finish(axes, label)
    return figure


def plot_ever_active(history: MaskHistory | Sequence[MaskRecord], /) -> Figure:
    """Plot which weights have been in A, and the use of the reservoir (the paper's figure 3b).

    Parameters
    ----------
    history
        A history of at least two records, or the records themselves.

    Returns
    -------
    matplotlib.figure.Figure
        Left: the share of all weights that has been in A. Right: the share of the first record's
        reservoir that has been in A since, and the share of its A that is in A now. Bands are
        ranges over tensors.

    Raises
    ------
    MismatchError
        If there are fewer than two records.
    ModuleNotFoundError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.analysis import MaskHistory, plot_ever_active
    >>> history = MaskHistory()
    >>> for step in range(3):
    ...     history.record(step, {"w": np.arange(6) % 3 == step})
    >>> print(plot_ever_active(history).axes[1].get_ylabel())
    share of the first record's set (%)
    """
    records = _records(history, 2)
    figure, (left, right) = make_figure(2)
    steps = [record.step for record in records]
    explored = [record.explored for record in records]
    _plot_range(left, steps, explored, lambda value: value, "all tensors", BLUE)
    start = 100 * explored[0].total
    left.axhline(start, color="black", linewidth=1, linestyle=(0, (4, 3)), label="A at the start")
    _finish(left, "share of all weights that\nhas been in A (%)")
    use = [record.reservoir for record in records]
    if not all(math.isnan(value.total.reservoir) for value in use):
        _plot_range(
            right, steps, use, lambda value: value.reservoir, "reservoir: has been in A", GREEN
        )
    _plot_range(right, steps, use, lambda value: value.kept, "A: is in A now", ORANGE)
    _finish(right, "share of the first record's set (%)")
    return figure


def plot_overlap(overlaps: UnitMatch | ByTensor[Overlap], /, *, measure: str = "common") -> Figure:
    """Plot the overlap of two networks as bars, with the values that chance gives.

    Parameters
    ----------
    overlaps
        The result of :func:`match_units`, for bars before and after matching, or of
        :func:`overlap`.
    measure
        "common" for the share in common, or "iou" for intersection over union.

    Returns
    -------
    matplotlib.figure.Figure
        Bars for each tensor and for all of them. A black line on a bar is the chance value.

    Raises
    ------
    OptionError
        If there is no such measure.
    ModuleNotFoundError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.analysis import overlap, plot_overlap
    >>> rng = np.random.default_rng(0)
    >>> first, second = ({"w": rng.random((8, 8)) < 0.2} for _ in range(2))
    >>> figure = plot_overlap(overlap(first, second))
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['w', 'all']
    """
    label = _choice("measure", measure, _OVERLAPS)
    if isinstance(overlaps, UnitMatch):
        series = [("as they are", ORANGE, overlaps.raw), ("matched", BLUE, overlaps.matched)]
    else:
        series = [("as they are", ORANGE, overlaps)]
    names = list(series[0][2].tensors)
    height = 1.6 + 0.32 * (len(names) + 1) * len(series)
    figure, (axes,) = make_figure(1, height=height)
    thickness = 0.8 / len(series)
    for number, (series_label, colour, result) in enumerate(series):
        rows = [*(result.tensors[name] for name in names), result.total]
        positions = np.arange(len(rows)) + (number - (len(series) - 1) / 2) * thickness
        values = np.asarray([getattr(row, measure) for row in rows])
        chances = np.asarray([getattr(row, f"chance_{measure}") for row in rows])
        axes.barh(positions, 100 * values, 0.92 * thickness, color=colour, label=series_label)
        axes.vlines(
            100 * chances[~np.isnan(chances)],
            positions[~np.isnan(chances)] - 0.46 * thickness,
            positions[~np.isnan(chances)] + 0.46 * thickness,
            color="black",
            linewidth=2,
            label="by chance" if number == 0 else "_",
        )
        for position, value in zip(positions, values, strict=True):
            axes.text(
                1.01,
                position,
                "empty" if math.isnan(value) else f"{100 * value:.1f} %",
                transform=axes.get_yaxis_transform(),
                va="center",
                fontsize=8,
            )
    axes.set_yticks(range(len(names) + 1), [*(name or "tensor" for name in names), "all"])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.grid(visible=False, axis="y")
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(handles)), key=lambda number: labels[number] == "by chance")
    figure.legend(
        [handles[number] for number in order],
        [labels[number] for number in order],
        loc="outside upper center",
        ncols=len(order),
        frameon=False,
    )
    return figure


def _records(history: MaskHistory | Sequence[MaskRecord], minimum: int) -> list[MaskRecord]:
    records = list(history.records if isinstance(history, MaskHistory) else history)
    if len(records) < minimum:
        raise MismatchError(
            f"the history has {len(records)} records: a curve needs at least {minimum}"
        )
    return records


def _choice(option: str, value: str, labels: dict[str, str]) -> str:
    if value not in labels:
        raise OptionError(f"{option}={value!r}: expected one of {', '.join(map(repr, labels))}")
    return labels[value]


def _plot_range(
    axes: Axes,
    steps: Sequence[int],
    results: Sequence[ByTensor[Any]],
    read: Callable[[Any], float],
    label: str,
    colour: str,
) -> None:
    """Plot the total, and the range over tensors as a band."""
    totals = [100 * read(result.total) for result in results]
    axes.plot(steps, totals, color=colour, marker="o", markersize=3.5, linewidth=1.8, label=label)
    if len(results[0].tensors) < 2:
        return
    values = 100 * np.asarray(
        [[read(tensor) for tensor in result.tensors.values()] for result in results]
    )
    some = ~np.isnan(values).all(axis=0)  # a tensor may have no weight in the set
    low, high = np.nanmin(values[:, some], axis=1), np.nanmax(values[:, some], axis=1)
    band = "range over tensors" if label == "all tensors" else "_"
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0, label=band)


def _finish(axes: Axes, label: str) -> None:
    axes.set_xlabel("training step")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8.5)


def make_figure(
    columns: int, *, width: float | None = None, height: float = 4.0
) -> tuple[Figure, list[Axes]]:
    """Make a figure with plots side by side; sizes are in inches."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the figures of topkast.analysis need matplotlib: pip install 'topkast[analysis]'",
            name="matplotlib",
        ) from None
    if width is None:
        width = 4.9 * columns if columns > 1 else 6.4
    figure = Figure(figsize=(width, height), layout="constrained")
    plots = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for axes in plots:
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, plots
