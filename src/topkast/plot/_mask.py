"""The picture of one mask, with the number of weights in each row and column."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from topkast._errors import MismatchError
from topkast.analysis._layers import by_units, unit_axes
from topkast.analysis._sets import TensorSets, read_sets
from topkast.plot._figure import (
    Colours,
    Style,
    add_legend,
    font_size,
    literal,
    open_figure,
    percent,
    prepare_axes,
    root_of,
)
from topkast.plot._picture import draw_cells, draw_weights, legend_of_sets, picture_of

_MARK: dict[str, Any] = {"linestyle": "none", "markersize": 5, "markeredgewidth": 1.4}
_LEFT, _DOWN = 0, 3  # markers of Matplotlib: TICKLEFT, TICKDOWN
_MAX_WEIGHTS = 400  # rows or columns of a picture that shows single weights
_MAX_CELLS = 128  # cells along an axis of the others


def mask(
    sets: Any,
    /,
    params: Any = None,
    *,
    name: str | None = None,
    output_axis: int = 0,
    figure: Figure | SubFigure | None = None,
    style: Style | None = None,
) -> Figure:
    """Draw the sets of one tensor, with the number of weights in A of each row and column.

    Parameters
    ----------
    sets
        A wrapped optimizer or masks; see :mod:`topkast.analysis`.
    params
        The weights, needed with a functional state and with supports.
    name
        Name of the tensor; needed if there are several.
    output_axis
        0 for weights (outputs, inputs, ...), as in PyTorch; -1 for weights (..., inputs, outputs),
        as in Flax.
    figure, style
        See :mod:`topkast.plot`.

    Returns
    -------
    matplotlib.figure.Figure
        Rows are output units. Columns are input units, and positions of a convolution's kernel.
        Red marks are rows and columns without a weight in A. Tensors with more than 400 rows or
        columns are drawn as cells of several weights, whose colour is the share in A.

    Raises
    ------
    MismatchError
        If there is no such tensor, if it has fewer than two axes, or if it has no weights.
    OptionError
        If `style` or `output_axis` is none of its values.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> figure = topkast.plot.mask({"w": np.eye(4, 6) > 0})
    >>> print(figure.get_suptitle())
    w: 4 of 24 weights in A (16.7 %)
    without a weight: 0 of 4 output units, 2 of 6 input units
    """
    name, tensor = _one_tensor(read_sets(sets, params), name)
    outputs, inputs = unit_axes(name, tensor.shape, output_axis)
    if not tensor.size:
        raise MismatchError(f"{name!r} has the shape {tensor.shape}: it has no weights to draw")
    picture = picture_of(name, tensor, output_axis)
    forward, size = picture.forward, picture.shape
    inches = min(max(4.2 * size[0] / size[1], 2.2), 5.5)  # height of the picture
    with open_figure(figure, style, height=inches + 2.6) as (drawn, colours):
        grid = drawn.add_gridspec(2, 2, width_ratios=(5, 1.2), height_ratios=(1.1, inches))
        image = drawn.add_subplot(grid[1, 0])
        top = drawn.add_subplot(grid[0, 0], sharex=image)
        side = drawn.add_subplot(grid[1, 1], sharey=image)
        prepare_axes(image, grid=None)
        handles: list[Any] = []
        if max(size) > _MAX_WEIGHTS:
            cells = picture.reduced(_MAX_CELLS)
            bar = drawn.colorbar(
                draw_cells(image, cells, size, cells.max() or 1, colours),
                ax=image,
                location="left",
                label="weights of a cell in A (%)",
                aspect=30,
                shrink=0.8,
            )
            prepare_axes(bar.ax, grid=None)
        else:
            draw_weights(image, picture, colours)
            handles += legend_of_sets([picture], colours)
        _draw_counts(top, forward.sum(axis=0), colours, horizontal=False)
        _draw_counts(side, forward.sum(axis=1), colours, horizontal=True)
        if not (forward.any(axis=0).all() and forward.any(axis=1).all()):
            label = "row or column without a weight in A"
            handles.append(Line2D([], [], marker="|", color=colours.alarm, label=label, **_MARK))
        if handles:
            add_legend(drawn, handles, columns=4)
        is_linear = size[1] == tensor.shape[inputs]
        image.set_xlabel("input unit" if is_linear else "input unit and position in the kernel")
        image.set_ylabel("output unit")
        rows, columns = (
            f"{(~by_units(tensor.mask, axis).any(axis=1)).sum():,} of {tensor.shape[axis]:,}"
            for axis in (outputs, inputs)
        )
        active = int(forward.sum())
        drawn.suptitle(
            f"{literal(name) or 'tensor'}: {active:,} of {tensor.size:,} weights in A "
            f"({percent(active / tensor.size)})\n"
            f"without a weight: {rows} output units, {columns} input units",
            fontsize=font_size(1.0),
        )
    return root_of(drawn)


def _draw_counts(axes: Axes, counts: NDArray[Any], colours: Colours, *, horizontal: bool) -> None:
    """Draw numbers of weights beside (or above) the picture, and mark the zeros."""
    prepare_axes(axes)
    axes.stairs(
        counts,
        np.arange(len(counts) + 1) - 0.5,
        orientation="horizontal" if horizontal else "vertical",
        fill=True,
        color=colours.active,
        linewidth=0,
    )
    # Constrained layout fails on unclipped marks without a point.
    empty = np.flatnonzero(counts == 0)
    style = {"color": colours.alarm, "clip_on": False, **_MARK}
    if horizontal:
        if empty.size:
            axes.plot(0 * empty, empty, marker=_LEFT, **style)
        axes.set_xlabel("weights in A\nof a row", fontsize=font_size())
        axes.xaxis.set_major_locator(MaxNLocator(2, integer=True))
        axes.set_xlim(left=0)
        axes.tick_params(labelleft=False)
    else:
        if empty.size:
            axes.plot(empty, 0 * empty, marker=_DOWN, **style)
        axes.set_ylabel("weights in A\nof a column", fontsize=font_size())
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.set_ylim(bottom=0)
        axes.tick_params(labelbottom=False)


def _one_tensor(sets: dict[str, TensorSets], name: str | None) -> tuple[str, TensorSets]:
    known = ", ".join(map(repr, sets))
    if name is None:
        if len(sets) > 1:
            raise MismatchError(f"the sets have the tensors {known}: pass name= of the one to draw")
        return next(iter(sets.items()))
    if name not in sets:
        raise MismatchError(f"the sets have no tensor {name!r}, only {known}")
    return name, sets[name]
