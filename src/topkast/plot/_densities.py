"""Densities of the layers as bars."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import PercentFormatter

from topkast._errors import MismatchError
from topkast._inspect import Summary, TensorSummary, summary
from topkast.plot._figure import (
    Style,
    add_legend,
    font_size,
    label_rows,
    open_figure,
    patch,
    percent,
    prepare_axes,
    root_of,
    shorten,
)


def densities(
    x: Any,
    /,
    params: Any = None,
    *,
    figure: Figure | SubFigure | None = None,
    style: Style | None = None,
) -> Figure:
    r"""Draw the forward and the backward density of each layer.

    Parameters
    ----------
    x
        A :class:`topkast.Summary`, or what :func:`topkast.summary` accepts: a wrapped PyTorch
        optimizer, or the state of a wrapped functional one.
    params
        The weights, needed with a functional state.
    figure, style
        See :mod:`topkast.plot`.

    Returns
    -------
    matplotlib.figure.Figure
        A bar for each tensor, and one for all of them. Its blue part is the forward density
        \|A\| / n, the whole bar is the backward density \|B\| / n; both stand beside it. Dense
        tensors with fewer than two axes (biases, scales) are left out.

    Raises
    ------
    MismatchError
        If there is no state of a wrapped optimizer, or no tensor to draw.
    OptionError
        If `style` is none of its values.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.8, dense="b")
    >>> params = {name: np.random.default_rng(0).standard_normal((20, 30)) for name in "ab"}
    >>> figure = topkast.plot.densities(tx.init(params), params)
    >>> print(*(text.get_text() for text in figure.axes[0].texts), sep="; ")
    10.0 % / 20.0 %; 100 % / 100 %; 55.0 % / 60.0 %
    """
    result = x if isinstance(x, Summary) else summary(x, params)
    rows = [
        (row.forward, row.backward, math.prod(row.shape))
        for row in result.tensors
        if _is_drawn(row)
    ]
    names = [shorten(row.name or "tensor", 40) for row in result.tensors if _is_drawn(row)]
    if not rows:
        raise MismatchError(
            "the summary has no sparsified tensor and none with two axes: there is nothing to draw"
        )
    totals = [sum(column) for column in zip(*rows, strict=True)]
    forward = [row[0] / row[2] for row in (*rows, totals)]
    backward = [row[1] / row[2] for row in (*rows, totals)]
    with open_figure(figure, style, height=1.7 + 0.3 * len(rows)) as (drawn, colours):
        axes = drawn.add_subplot()
        prepare_axes(axes, grid="x")
        positions = range(len(rows) + 1)
        active = [100 * share for share in forward]
        exploring = [100 * (b - a) for a, b in zip(forward, backward, strict=True)]
        axes.barh(positions, active, 0.7, color=colours.active)
        axes.barh(positions, exploring, 0.7, left=active, color=colours.exploring)
        label_rows(
            axes,
            [f"{percent(a)} / {percent(b)}" for a, b in zip(forward, backward, strict=True)],
        )
        axes.set_yticks(positions, [*names, "all"])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(PercentFormatter(symbol=" %"))
        axes.set_xlabel("share of the weights", fontsize=font_size(1.0))
        handles = [
            patch(colours.active, "A: forward density"),
            patch(colours.exploring, "B∖A: up to the backward density"),
        ]
        add_legend(drawn, handles, columns=2)
    return root_of(drawn)


def _is_drawn(row: TensorSummary) -> bool:
    return bool(math.prod(row.shape) and (len(row.shape) > 1 or row.has_sets))
