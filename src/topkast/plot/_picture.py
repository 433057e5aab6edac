"""Sets of a tensor as an image: a pixel for each weight, or for a cell of several."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from topkast.analysis._layers import by_units, unit_axes
from topkast.analysis._sets import Flags, TensorSets
from topkast.plot._figure import Colours, patch


@dataclass(frozen=True)
class Picture:
    """A and B of a tensor as matrices of flags: a row for each output unit."""

    forward: Flags
    backward: Flags

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.forward.shape
        return rows, columns

    @property
    def has_exploring(self) -> bool:
        return bool((self.backward & ~self.forward).any())

    def reduced(self, max_cells: int) -> NDArray[np.float64]:
        """Shares of A in cells of nearly equal size, in percent."""
        counts: NDArray[Any] = self.forward
        weights = np.ones((1, 1))
        for axis in (0, 1):
            size = counts.shape[axis]
            cells = min(size, max_cells)
            starts = np.arange(cells) * size // cells
            counts = np.add.reduceat(counts, starts, axis=axis, dtype=np.int64)
            widths = np.diff([*starts, size])
            weights = weights * (widths[:, None] if axis == 0 else widths)
        return np.asarray(100 * counts / weights)


def picture_of(name: str, tensor: TensorSets, output_axis: int) -> Picture:
    """Arrange the sets of a tensor; one with a single axis is one row."""
    masks = (tensor.mask, tensor.backward_mask)
    if len(tensor.shape) < 2:
        return Picture(*(mask.reshape(1, -1) for mask in masks))
    axes = unit_axes(name, tensor.shape, output_axis)
    return Picture(*(by_units(np.moveaxis(mask, axes, (0, 1)), 0) for mask in masks))


def draw_weights(axes: Axes, picture: Picture, colours: Colours) -> AxesImage:
    """Draw each weight in the colour of its set: 0 outside B, 1 in B∖A, 2 in A."""
    codes = picture.forward.astype(np.int8) + picture.backward
    colour_map = ListedColormap([colours.resting, colours.exploring, colours.active])
    return axes.imshow(codes, cmap=colour_map, vmin=0, vmax=2, **_options(picture.shape))


def draw_cells(
    axes: Axes,
    cells: NDArray[np.float64],
    shape: tuple[int, int],
    maximum: float,
    colours: Colours,
) -> AxesImage:
    """Draw shares of A, in percent, of a tensor's cells on a scale from 0 to the maximum."""
    colour_map = LinearSegmentedColormap.from_list("share of A", [colours.resting, colours.active])
    return axes.imshow(cells, cmap=colour_map, vmin=0, vmax=maximum, **_options(shape))


def legend_of_sets(pictures: Iterable[Picture], colours: Colours) -> list[Any]:
    """The entries of the legend for pictures of single weights."""
    if any(picture.has_exploring for picture in pictures):
        return [
            patch(colours.active, "A"),
            patch(colours.exploring, "B∖A"),
            patch(colours.resting, "outside B"),
        ]
    return [patch(colours.active, "A"), patch(colours.resting, "not in A")]


def _options(shape: tuple[int, int]) -> dict[str, Any]:
    rows, columns = shape
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    return {"extent": extent, "aspect": "auto", "interpolation": "nearest"}
