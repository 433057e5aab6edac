"""The pictures of all masks."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from topkast._errors import MismatchError
from topkast._patterns import Patterns, check_names_of, check_patterns, matches
from topkast.analysis._sets import read_sets
from topkast.plot._figure import (
    Style,
    add_legend,
    font_size,
    open_figure,
    percent,
    prepare_axes,
    root_of,
    shorten,
)
from topkast.plot._picture import Picture, draw_cells, draw_weights, legend_of_sets, picture_of

_MAX_WEIGHTS = 200  # rows or columns of a picture that shows single weights
_MAX_CELLS = 64  # cells along an axis of the others: each has enough weights for a share


def masks(
    sets: Any,
    /,
    params: Any = None,
    *,
    names: Patterns = None,
    output_axis: int = 0,
    figure: Figure | SubFigure | None = None,
    style: Style | None = None,
) -> Figure:
    """Draw A, B∖A and the weights outside B of every sparsified tensor.

    Parameters
    ----------
    sets
        A wrapped optimizer or masks; see :mod:`topkast.analysis`.
    params
        The weights, needed with a functional state and with supports.
    names
        Names or globs of the tensors to draw. None: all that have weights.
    output_axis
        0 for weights (outputs, inputs, ...), as in PyTorch; -1 for weights (..., inputs, outputs),
        as in Flax.
    figure, style
        See :mod:`topkast.plot`.

    Returns
    -------
    matplotlib.figure.Figure
        A picture for each tensor. Rows are output units; columns are input units, and positions of
        a convolution's kernel. A tensor with one axis is one row. Tensors with more than 200 rows
        or columns are drawn as cells of several weights, whose colour is the share in A; the scale
        is the same for all of them. :func:`mask` shows one tensor with more detail.

    Raises
    ------
    OptionError
        If a pattern matches no tensor, or `style` or `output_axis` is none of its values.
    MismatchError
        If there is no tensor with weights.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.8)
    >>> params = {name: np.random.default_rng(0).standard_normal((20, 30)) for name in "ab"}
    >>> figure = topkast.plot.masks(tx.init(params), params)
    >>> print(*(axes.get_title() for axes in figure.axes), sep="; ")
    a
    A 10.0 %, B∖A 10.0 %; b
    A 10.0 %, B∖A 10.0 %
    """
    tensors = read_sets(sets, params)
    if names is not None:
        check_names_of("names", names)
        check_patterns(tensors, "names", names)
        tensors = {name: tensor for name, tensor in tensors.items() if matches(name, names)}
    pictures = {
        name: picture_of(name, tensor, output_axis)
        for name, tensor in tensors.items()
        if tensor.size
    }
    if not pictures:
        raise MismatchError(
            f"{', '.join(map(repr, tensors))} have no weights: there is nothing to draw"
        )
    columns = _count_columns(len(pictures))
    rows = math.ceil(len(pictures) / columns)
    height = (2.1 if columns > 2 else 2.6 if columns > 1 else 3.4) * rows + 0.8
    with open_figure(figure, style, height=height) as (drawn, colours):
        reduced = {
            name: picture.reduced(_MAX_CELLS)
            for name, picture in pictures.items()
            if max(picture.shape) > _MAX_WEIGHTS
        }
        maximum = max((cells.max() for cells in reduced.values()), default=0) or 1
        images = []
        for number, (name, picture) in enumerate(pictures.items()):
            axes = drawn.add_subplot(rows, columns, number + 1)
            prepare_axes(axes, grid=None)
            if name in reduced:
                images.append(draw_cells(axes, picture, reduced[name], maximum, colours))
            else:
                draw_weights(axes, picture, colours)
            axes.set_title(_title(name, picture, 72 // columns), fontsize=font_size())
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(4, integer=True))
            if number % columns == 0:
                axes.set_ylabel("output unit", fontsize=font_size())
            if number + columns >= len(pictures):
                axes.set_xlabel("input unit", fontsize=font_size())
        if images:
            bar = drawn.colorbar(
                images[0],
                ax=drawn.axes,
                label="weights of a cell in A (%)",
                pad=0.02,
                aspect=20 * rows,
            )
            prepare_axes(bar.ax, grid=None)
        if len(reduced) < len(pictures):
            weights = [picture for name, picture in pictures.items() if name not in reduced]
            add_legend(drawn, legend_of_sets(weights, colours), columns=3)
    return root_of(drawn)


def _count_columns(count: int) -> int:
    if count <= 3:
        return count
    return 2 if count == 4 else 3 if count <= 12 else 4


def _title(name: str, picture: Picture, length: int) -> str:
    active, trained = picture.forward.mean(), picture.backward.mean()
    shares = f"A {percent(active)}"
    if picture.has_exploring:
        shares += f", B∖A {percent(trained - active)}"
    return f"{shorten(name or 'tensor', length)}\n{shares}"
