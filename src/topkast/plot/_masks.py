"""The pictures of all masks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

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
    panels = [
        _make_panel(name, picture_of(name, tensor, output_axis))
        for name, tensor in tensors.items()
        if tensor.size
    ]
    if not panels:
        raise MismatchError(
            f"{', '.join(map(repr, tensors))} have no weights: there is nothing to draw"
        )
    columns = _count_columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    height = (2.1 if columns > 2 else 2.6 if columns > 1 else 3.4) * rows + 0.8
    maximum = max((panel.cells.max() for panel in panels if panel.cells is not None), default=0)
    with open_figure(figure, style, height=height) as (drawn, colours):
        images, pictures = [], []
        for number, panel in enumerate(panels):
            axes = drawn.add_subplot(rows, columns, number + 1)
            prepare_axes(axes, grid=None)
            if panel.cells is not None:
                images.append(draw_cells(axes, panel.cells, panel.shape, maximum or 1, colours))
            elif panel.picture is not None:
                draw_weights(axes, panel.picture, colours)
                pictures.append(panel.picture)
            name = shorten(panel.name or "tensor", 72 // columns)
            shares = ("\n" if columns > 3 else ", ").join(panel.shares)
            axes.set_title(f"{name}\n{shares}", fontsize=font_size())
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(4, integer=True))
            if number % columns == 0:
                axes.set_ylabel("output unit", fontsize=font_size())
            if number + columns >= len(panels):
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
        if pictures:
            add_legend(drawn, legend_of_sets(pictures, colours), columns=3)
    return root_of(drawn)


class _Panel(NamedTuple):
    """What is drawn for one tensor: its weights, or cells if it is large."""

    name: str
    shares: list[str]
    shape: tuple[int, int]
    picture: Picture | None
    cells: NDArray[np.float64] | None


def _make_panel(name: str, picture: Picture) -> _Panel:
    active, trained = picture.forward.mean(), picture.backward.mean()
    shares = [f"A {percent(active)}"]
    if trained > active:
        shares.append(f"B∖A {percent(trained - active)}")
    if max(picture.shape) > _MAX_WEIGHTS:
        # The weights of a large tensor are not kept while the others are read.
        return _Panel(name, shares, picture.shape, None, picture.reduced(_MAX_CELLS))
    return _Panel(name, shares, picture.shape, picture, None)


def _count_columns(count: int) -> int:
    if count <= 3:
        return count
    return 2 if count == 4 else 3 if count <= 12 else 4
