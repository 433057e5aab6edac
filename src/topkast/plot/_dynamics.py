"""How the sets change in training, as curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from topkast._errors import MismatchError, OptionError
from topkast.analysis._history import MaskHistory, MaskRecord
from topkast.analysis._sets import ByTensor
from topkast.plot._figure import Style, add_legend, font_size, open_figure, prepare_axes, root_of

_CHANGES = {
    "forward": "share of A that left\nsince the last record",
    "backward": "share of B that left\nsince the last record",
    "flipped": "share of all weights that entered\nor left A since the last record",
}


def dynamics(
    history: MaskHistory | Sequence[MaskRecord],
    /,
    *,
    measure: str = "forward",
    figure: Figure | SubFigure | None = None,
    style: Style | None = None,
) -> Figure:
    """Draw how the sets change in training: figure 3 of the paper.

    Parameters
    ----------
    history
        A history of at least two records, or the records themselves.
    measure
        The field of :class:`topkast.analysis.Change` in the first plot: "forward", "backward" or
        "flipped".
    figure, style
        See :mod:`topkast.plot`.

    Returns
    -------
    matplotlib.figure.Figure
        Three plots against the training step. Left: the change of the sets from record to record
        (the paper's figure 3a). Middle: the share of all weights that has been in A. Right: the
        share of the first record's reservoir, the weights outside B, that has been in A since (the
        paper's figure 3b), and the share of the first record's A that is in A now. Lines are for
        all tensors together, bands are ranges over tensors.

    Raises
    ------
    MismatchError
        If there are fewer than two records.
    OptionError
        If there is no such measure, or `style` is none of its values.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> history = topkast.analysis.MaskHistory()
    >>> for step in range(3):
    ...     history.record(step, {"w": np.arange(6) % 3 == step})
    >>> change, explored, use = topkast.plot.dynamics(history).axes
    >>> [float(round(share, 1)) for share in explored.lines[0].get_ydata()]
    [33.3, 66.7, 100.0]
    """
    if measure not in _CHANGES:
        raise OptionError(f"measure={measure!r}: expected one of {', '.join(map(repr, _CHANGES))}")
    records = list(history.records if isinstance(history, MaskHistory) else history)
    if len(records) < 2:
        raise MismatchError(f"the history has {len(records)} records: a curve needs at least 2")
    steps = [record.step for record in records]
    explored = [record.explored for record in records]
    use = [record.reservoir for record in records]
    changes = [(record.step, record.change) for record in records if record.change]
    with open_figure(figure, style, height=3.3) as (drawn, colours):
        left, middle, right = (drawn.add_subplot(1, 3, number) for number in (1, 2, 3))
        for axes in (left, middle, right):
            prepare_axes(axes)
        _plot(
            left,
            [step for step, _ in changes],
            [change for _, change in changes],
            lambda change: getattr(change, measure),
            colours.active,
        )
        _plot(middle, steps, explored, lambda share: share, colours.active)
        middle.axhline(100 * explored[0].total, color=colours.text, linewidth=1, dashes=(4, 3))
        handles = [
            _line(colours.active, "all tensors"),
            Patch(facecolor=colours.active, alpha=0.3, label="range over tensors"),
            Line2D([], [], color=colours.text, linewidth=1, dashes=(4, 3), label="A at first"),
        ]
        if not all(math.isnan(value.total.reservoir) for value in use):
            _plot(right, steps, use, lambda value: value.reservoir, colours.other)
            handles.append(_line(colours.other, "reservoir: has been in A"))
        _plot(right, steps, use, lambda value: value.kept, colours.exploring)
        handles.append(_line(colours.exploring, "first A: is in A now"))
        titles = (_CHANGES[measure], "share of all weights\nthat has been in A")
        for axes, title in zip(
            (left, middle, right), (*titles, "share of the first\nrecord's set"), strict=True
        ):
            axes.set_title(title, fontsize=font_size())
            axes.set_xlabel("training step", fontsize=font_size())
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(symbol=" %"))
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        add_legend(drawn, handles, columns=3)
    return root_of(drawn)


def _line(colour: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, linewidth=1.8, label=label)


def _plot(
    axes: Axes,
    steps: Sequence[int],
    results: Sequence[ByTensor[Any]],
    read: Callable[[Any], float],
    colour: str,
) -> None:
    """Plot the total, and the range over tensors as a band."""
    totals = [100 * read(result.total) for result in results]
    marker = "o" if len(steps) <= 30 else None
    axes.plot(steps, totals, color=colour, marker=marker, markersize=3, linewidth=1.8)
    if len(results[0].tensors) < 2:
        return
    values = 100 * np.asarray(
        [[read(tensor) for tensor in result.tensors.values()] for result in results]
    )
    some = ~np.isnan(values).all(axis=0)  # a tensor may have no weight in the set
    low, high = np.nanmin(values[:, some], axis=1), np.nanmax(values[:, some], axis=1)
    axes.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
