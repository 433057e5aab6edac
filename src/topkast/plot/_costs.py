"""FLOPs and bytes of methods or layers as bars, beside dense training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import EngFormatter, MaxNLocator

from topkast._errors import MismatchError
from topkast.analysis.costs._report import Cost, LayerCost
from topkast.plot._figure import (
    Colours,
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

_TRAINED = ("values", "gradient", "state")


class _Row(NamedTuple):
    """A bar of both plots."""

    name: str
    flops: float
    dense_flops: float
    bytes: Mapping[str, int]
    dense_bytes: int


def costs(
    costs: Cost | Mapping[str, Cost],
    /,
    *,
    figure: Figure | SubFigure | None = None,
    style: Style | None = None,
) -> Figure:
    """Draw the FLOPs and bytes of several methods, or of the layers of a model, beside dense ones.

    Parameters
    ----------
    costs
        A result of :func:`topkast.cost`, for bars by layer; or several by name, for bars by method.
    figure, style
        See :mod:`topkast.plot`.

    Returns
    -------
    matplotlib.figure.Figure
        Left: FLOPs of a training step for one sample. Right: bytes in memory, by what they hold.
        Grey bars behind are those of dense training, and the numbers are shares of them. Of one
        cost, tensors without a product (biases, scales) are left out.

    Raises
    ------
    MismatchError
        If `costs` is no cost and no mapping of costs, or has nothing to draw.
    OptionError
        If `style` is none of its values.

    Examples
    --------
    >>> import topkast
    >>> shapes = {"hidden": (300, 784), "output": (10, 300)}
    >>> results = {
    ...     "Top-KAST": topkast.cost(shapes, fwd=0.9, bwd=0.8),
    ...     "RigL": topkast.cost(shapes, method="rigl", fwd=0.9),
    ... }
    >>> flops, memory = topkast.plot.costs(results).axes
    >>> [text.get_text() for text in flops.texts]
    ['13.3 %', '10.3 %']
    """
    rows = _rows_of(costs)
    with open_figure(figure, style, height=1.7 + 0.32 * len(rows)) as (drawn, colours):
        left = drawn.add_subplot(1, 2, 1)
        right = drawn.add_subplot(1, 2, 2, sharey=left)
        groups = _groups(rows, colours)
        _draw(
            left,
            [row.dense_flops for row in rows],
            [(colours.active, [row.flops for row in rows])],
            colours,
        )
        _draw(
            right,
            [row.dense_bytes for row in rows],
            [(colour, [_count(row, kinds) for row in rows]) for _, colour, kinds in groups],
            colours,
        )
        left.set_title("training FLOPs of one sample", fontsize=font_size())
        right.set_title("bytes in memory", fontsize=font_size())
        left.xaxis.set_major_formatter(EngFormatter())
        right.xaxis.set_major_formatter(EngFormatter(unit="B"))
        left.set_yticks(range(len(rows)), [shorten(row.name or "tensor", 24) for row in rows])
        right.tick_params(labelleft=False)
        left.invert_yaxis()
        handles = [
            patch(colours.resting, "dense"),
            *(patch(colour, label) for label, colour, _ in groups),
        ]
        add_legend(drawn, handles, columns=3)
    return root_of(drawn)


def _rows_of(costs: Any) -> list[_Row]:
    named: Mapping[str, Cost | LayerCost]
    if isinstance(costs, Cost):
        named = {layer.name: layer for layer in costs.layers if layer.dense_forward_flops}
    elif isinstance(costs, Mapping) and all(isinstance(cost, Cost) for cost in costs.values()):
        named = costs
    else:
        raise MismatchError(
            f"expected a result of topkast.cost, or several as {{name: cost}}, got "
            f"{type(costs).__name__}"
        )
    if not named:
        raise MismatchError("there is no cost to draw: expected one, or a layer with a product")
    return [
        _Row(
            name,
            cost.training_flops,
            3 * cost.dense_forward_flops,
            cost.bytes,
            cost.dense_bytes,
        )
        for name, cost in named.items()
    ]


def _groups(rows: Sequence[_Row], colours: Colours) -> list[tuple[str, str, list[str]]]:
    """Label, colour and kinds of the bytes that are drawn as one."""
    kinds = dict.fromkeys(kind for row in rows for kind, count in row.bytes.items() if count)
    where = [kind for kind in kinds if kind not in (*_TRAINED, "reservoir", "model")]
    groups = [
        ("values, gradient, state", colours.active, [kind for kind in _TRAINED if kind in kinds]),
        (", ".join(where), colours.exploring, where),
        ("reservoir", colours.other, ["reservoir"]),
        ("dense weights and gradient", colours.alarm, ["model"]),
    ]
    return [group for group in groups if kinds.keys() & set(group[2])]


def _count(row: _Row, kinds: Sequence[str]) -> int:
    return sum(row.bytes.get(kind, 0) for kind in kinds)


def _draw(
    axes: Axes,
    dense: Sequence[float],
    parts: Sequence[tuple[str, Sequence[float]]],
    colours: Colours,
) -> None:
    """Draw stacked bars before the dense ones."""
    prepare_axes(axes, grid="x")
    positions = range(len(dense))
    axes.barh(positions, dense, 0.85, color=colours.resting)
    ends = np.zeros(len(dense))
    for colour, values in parts:
        axes.barh(positions, values, 0.5, left=ends, color=colour)
        ends = ends + np.asarray(values)
    label_rows(
        axes,
        [percent(end / whole) if whole else "" for end, whole in zip(ends, dense, strict=True)],
    )
    axes.set_xlim(left=0, right=None if math.fsum(dense) else 1)
    axes.xaxis.set_major_locator(MaxNLocator(4))
