"""The overlap of two networks, as bars."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from topkast._errors import OptionError
from topkast.analysis._matching import UnitMatch
from topkast.analysis._overlap import Overlap
from topkast.analysis._sets import ByTensor
from topkast.plot._figure import (
    Style,
    add_legend,
    font_size,
    open_figure,
    patch,
    percent,
    prepare_axes,
    root_of,
    shorten,
)

_MEASURES = {
    "common": "share of the first network's A that is in the second's too",
    "iou": "intersection over union of A",
}


def overlap(
    overlaps: UnitMatch | ByTensor[Overlap],
    /,
    *,
    measure: str = "common",
    figure: Figure | SubFigure | None = None,
    style: Style | None = None,
) -> Figure:
    """Draw the overlap of two networks, with the values that chance gives.

    Parameters
    ----------
    overlaps
        The result of :func:`topkast.analysis.match_units`, for bars before and after matching, or
        of :func:`topkast.analysis.overlap`.
    measure
        "common" for the share in common, or "iou" for intersection over union.
    figure, style
        See :mod:`topkast.plot`.

    Returns
    -------
    matplotlib.figure.Figure
        Bars for each tensor and for all of them. A line on a bar is the chance value.

    Raises
    ------
    OptionError
        If there is no such measure, or `style` is none of its values.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> rng = np.random.default_rng(0)
    >>> first, second = ({"w": rng.random((8, 8)) < 0.2} for _ in range(2))
    >>> figure = topkast.plot.overlap(topkast.analysis.overlap(first, second))
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['w', 'all']
    """
    if measure not in _MEASURES:
        raise OptionError(f"measure={measure!r}: expected one of {', '.join(map(repr, _MEASURES))}")
    if isinstance(overlaps, UnitMatch):
        results = {"as they are": overlaps.raw, "matched": overlaps.matched}
    else:
        results = {"as they are": overlaps}
    names = list(next(iter(results.values())).tensors)
    height = 1.4 + 0.28 * (len(names) + 1) * len(results)
    with open_figure(figure, style, height=height) as (drawn, colours):
        axes = drawn.add_subplot()
        prepare_axes(axes, grid="x")
        thickness = 0.8 / len(results)
        handles = []
        for number, (label, result) in enumerate(results.items()):
            rows = [*(result.tensors[name] for name in names), result.total]
            positions = np.arange(len(rows)) + (number - (len(results) - 1) / 2) * thickness
            values = np.asarray([getattr(row, measure) for row in rows])
            chances = np.asarray([getattr(row, f"chance_{measure}") for row in rows])
            known = ~np.isnan(chances)
            colour = (colours.exploring, colours.active)[number]
            axes.barh(positions, 100 * values, 0.92 * thickness, color=colour)
            axes.vlines(
                100 * chances[known],
                positions[known] - 0.46 * thickness,
                positions[known] + 0.46 * thickness,
                color=colours.text,
                linewidth=2,
            )
            handles.append(patch(colour, label))
            for position, value in zip(positions, values, strict=True):
                axes.text(
                    1.015,
                    position,
                    "empty" if math.isnan(value) else percent(value),
                    transform=axes.get_yaxis_transform(),
                    va="center",
                    fontsize=font_size(),
                )
        mark = Line2D([], [], color=colours.text, linestyle="none", marker="|", markersize=9)
        mark.set(markeredgewidth=2, label="by chance")
        axes.set_yticks(
            range(len(names) + 1), [*(shorten(name or "tensor", 40) for name in names), "all"]
        )
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(PercentFormatter(symbol=" %"))
        axes.set_xlabel(_MEASURES[measure], fontsize=font_size(1.0))
        add_legend(drawn, [*handles, mark], columns=3)
    return root_of(drawn)
