"""The picture of a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from topkast._errors import MismatchError
from topkast.analysis._figures import BLUE, GREY, ORANGE, RED, make_figure
from topkast.analysis._layers import by_units, unit_axes
from topkast.analysis._sets import TensorSets, read_sets

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARK: dict[str, Any] = {"color": RED, "linestyle": "none", "markersize": 5, "markeredgewidth": 1.4}
_LEFT, _DOWN = 0, 3  # markers of Matplotlib: TICKLEFT, TICKDOWN
_MAX_CELLS = 400  # cells of the picture along an axis; more would be smaller than a pixel


def plot_mask(
    sets: Any, /, params: Any = None, *, name: str | None = None, output_axis: int = 0
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

    Returns
    -------
    matplotlib.figure.Figure
        Rows are output units. Columns are input units, and positions of a convolution's kernel.
        Red marks are rows and columns without a weight in A. Large tensors are drawn as densities
        of A.

    Raises
    ------
    MismatchError
        If there is no such tensor, if it has fewer than two axes, or if it has no weights.
    ModuleNotFoundError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.analysis import plot_mask
    >>> figure = plot_mask({"w": np.eye(4, 6) > 0})
    >>> print(figure.get_suptitle())
    w: 4 of 24 weights in A (16.7 %)
    without a weight: 0 of 4 output units, 2 of 6 input units
    """
    name, tensor = _one_tensor(read_sets(sets, params), name)
    outputs, inputs = unit_axes(name, tensor.shape, output_axis)
    if not tensor.size:
        raise MismatchError(f"{name!r} has the shape {tensor.shape}: it has no weights to draw")
    rows, columns = tensor.shape[outputs], tensor.shape[inputs]
    forward, backward = (
        by_units(np.moveaxis(mask, (outputs, inputs), (0, 1)), 0)
        for mask in (tensor.mask, tensor.backward_mask)
    )
    size = forward.shape
    inches = min(max(5.0 * size[0] / size[1], 2.4), 5.5)  # height of the picture
    figure, _ = make_figure(0, width=7.0, height=inches + 3.2)
    grid = figure.add_gridspec(2, 2, width_ratios=(5, 1.2), height_ratios=(1.2, inches))
    picture = figure.add_subplot(grid[1, 0])
    top = figure.add_subplot(grid[0, 0], sharex=picture)
    side = figure.add_subplot(grid[1, 1], sharey=picture)
    handles = _draw_sets(figure, picture, forward, backward)
    for axes, counts, length, horizontal in (
        (top, forward.sum(axis=0), size[1], False),
        (side, forward.sum(axis=1), size[0], True),
    ):
        _draw_counts(axes, counts, length, horizontal=horizontal)
    if not (forward.any(axis=0).all() and forward.any(axis=1).all()):
        handles.append(_empty_mark())
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    unit = "input unit" if size[1] == columns else "input unit and position in the kernel"
    picture.set_xlabel(unit)
    picture.set_ylabel("output unit")
    empty = [int((~by_units(tensor.mask, axis).any(axis=1)).sum()) for axis in (outputs, inputs)]
    active = int(forward.sum())
    figure.suptitle(
        f"{name or 'tensor'}: {active:,} of {tensor.size:,} weights in A "
        f"({100 * active / tensor.size:.1f} %)\n"
        f"without a weight: {empty[0]:,} of {rows:,} output units, "
        f"{empty[1]:,} of {columns:,} input units",
        fontsize=11,
    )
    return figure


def _draw_sets(
    figure: Figure, axes: Axes, forward: NDArray[Any], backward: NDArray[Any]
) -> list[Any]:
    """Draw the picture, and return the handles of its legend."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows, columns = forward.shape
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    options: dict[str, Any] = {"extent": extent, "aspect": "auto", "interpolation": "nearest"}
    if max(rows, columns) > _MAX_CELLS:
        image = axes.imshow(100 * _cell_means(forward), cmap="Blues", vmin=0, **options)
        figure.colorbar(
            image, ax=axes, location="left", label="weights in A (%)", aspect=30, shrink=0.8
        )
        return []
    codes = forward.astype(np.int8) + backward
    colours = [GREY, ORANGE, BLUE]
    axes.imshow(codes, cmap=ListedColormap(colours), vmin=0, vmax=2, **options)
    labels = ["reservoir", "B∖A", "A"] if (codes == 1).any() else ["not in A", "", "A"]
    return [
        Patch(facecolor=colour, edgecolor="#999999", linewidth=0.5, label=label)
        for colour, label in zip(colours, labels, strict=True)
        if label
    ][::-1]


def _empty_mark() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="|", label="row or column without a weight in A", **_MARK)


def _draw_counts(axes: Axes, counts: NDArray[Any], length: int, *, horizontal: bool) -> None:
    """Draw numbers of weights beside (or above) the picture, and mark the zeros."""
    from matplotlib.ticker import MaxNLocator

    edges = np.arange(length + 1) - 0.5
    axes.stairs(
        counts,
        edges,
        orientation="horizontal" if horizontal else "vertical",
        fill=True,
        color=BLUE,
        linewidth=0,
    )
    # Constrained layout fails on unclipped marks without a point.
    empty = np.flatnonzero(counts == 0)
    if horizontal:
        if empty.size:
            axes.plot(0 * empty, empty, marker=_LEFT, clip_on=False, **_MARK)
        axes.set_xlabel("weights in A\nof a row", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(2, integer=True))
        axes.set_xlim(left=0)
        axes.tick_params(labelleft=False)
    else:
        if empty.size:
            axes.plot(empty, 0 * empty, marker=_DOWN, clip_on=False, **_MARK)
        axes.set_ylabel("weights in A\nof a column", fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.set_ylim(bottom=0)
        axes.tick_params(labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)


def _cell_means(mask: NDArray[Any]) -> NDArray[np.float64]:
    """Average a mask over cells of nearly equal size, at most `_MAX_CELLS` along an axis."""
    values: NDArray[np.float64] = mask.astype(np.float64)
    for axis in (0, 1):
        size = mask.shape[axis]
        cells = min(size, _MAX_CELLS)
        starts = np.arange(cells) * size // cells
        widths = np.diff([*starts, size])
        values = np.add.reduceat(values, starts, axis=axis)
        values /= widths[:, None] if axis == 0 else widths
    return values


def _one_tensor(sets: dict[str, TensorSets], name: str | None) -> tuple[str, TensorSets]:
    known = ", ".join(map(repr, sets))
    if name is None:
        if len(sets) > 1:
            raise MismatchError(f"the sets have the tensors {known}: pass name= of the one to draw")
        return next(iter(sets.items()))
    if name not in sets:
        raise MismatchError(f"the sets have no tensor {name!r}, only {known}")
    return name, sets[name]
