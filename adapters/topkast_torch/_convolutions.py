"""The three products of a sparse convolution: on planes, by ``topkast.kernels``, or by PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import fold, pad, unfold

from topkast_torch._products import TorchProducts, are_compiled, name_of

_UNFOLDED = 1 << 20  # entries of unfolded images at a time: what second caches hold
_GRIDS = 8  # sizes of images for which distances are remembered

Pair = tuple[int, int]


class Window(NamedTuple):
    """What of an image each place of a convolution's output sees."""

    size: Pair
    dilation: Pair
    stride: Pair
    margins: tuple[Pair, Pair]  # zeros above and below, left and right

    @property
    def reach(self) -> Pair:
        """Height and width of what a place sees."""
        height, width = (
            dilation * (size - 1) + 1
            for size, dilation in zip(self.size, self.dilation, strict=True)
        )
        return height, width

    def places(self, extent: torch.Size) -> Pair:
        """Height and width of the output, for images of some shape."""
        height, width = (
            (length + sum(margin) - reach) // stride + 1
            for length, margin, reach, stride in zip(
                extent[2:], self.margins, self.reach, self.stride, strict=True
            )
        )
        return height, width


class Convolution(Protocol):
    """Products with a sparse weight of (rows, channels · window), with values on B as a vector.

    Images and the gradient of the output are handed over once, by :meth:`pack` and
    :meth:`pack_slope`, in the form that the products want; `extent` is the shape of the images.
    """

    def pack(self, images: Tensor) -> Tensor: ...

    def pack_slope(self, slope: Tensor, extent: torch.Size) -> Tensor: ...

    def forward(
        self, values: Tensor, packed: Tensor, bias: Tensor | None, extent: torch.Size
    ) -> Tensor:
        """The output with the weight on A, (images, rows, height', width')."""

    def input_gradient(self, values: Tensor, slope: Tensor, extent: torch.Size) -> Tensor:
        """The gradient of the images, with the weight on A."""

    def weight_gradient(
        self, slope: Tensor, packed: Tensor, out: Tensor, extent: torch.Size
    ) -> None:
        """Write the gradient of the weight on B into `out` (|B|,)."""

    @property
    def nbytes(self) -> int: ...


def make_convolution(
    rows: Tensor,
    columns: Tensor,
    active: Tensor,
    shape: Pair,
    window: Window,
    dtype: torch.dtype,
) -> Convolution:
    """A convolution with entries at `rows` and `columns` of B; columns are of all groups.

    `active` are the positions in B of the entries that are in A.
    """
    kind = _OnPlanes if are_compiled(rows.device, dtype) else _Unfolded
    return kind(rows, columns, active, shape, window)


class _Distances(NamedTuple):
    """The layouts, for images of one size."""

    grid: Any
    forward: Any
    transposed: Any
    backward: Any


class _OnPlanes:
    """Without unfolding: each weight looks at a fixed distance from the place of the output."""

    def __init__(
        self, rows: Tensor, columns: Tensor, active: Tensor, shape: Pair, window: Window
    ) -> None:
        from topkast.kernels import Grid, arrange

        self._window = window
        self._rows, self._weights = shape[0], math.prod(window.size)
        grid = Grid(window.reach, window.size, window.dilation, window.stride)
        row, column, place = (tensor.int().numpy() for tensor in (rows, columns, active))
        everywhere = torch.arange(len(row), dtype=torch.int32).numpy()
        channel, weight = column // self._weights, column % self._weights
        plane = (channel * grid.phases + grid.phase[weight]).astype("int32")
        opposite = row * self._weights + weight
        self._planes = shape[1] // self._weights * grid.phases
        turned = self._planes, self._rows * self._weights
        # Many places are there for threads to share, so that all rows of A can be one chunk; the
        # entries of B are theirs to share.
        self._forward = arrange(row[place], column[place], place, shape=shape, most_rows=256)
        self._transposed = arrange(
            plane[place], opposite[place], place, shape=turned, most_rows=256
        )
        self._backward = arrange(row, column, everywhere, shape=shape, runs=True, most_rows=32)
        self._orders = [
            torch.from_numpy(layout.order) for layout in (self._forward, self._transposed)
        ]
        self._distances: dict[tuple[int, ...], _Distances] = {}

    def pack(self, images: Tensor) -> Tensor:
        from topkast.kernels import to_planes

        grid = self._at(images).grid
        packed = self._planes_of(images, grid, self._planes, grid.length)
        to_planes(images.contiguous().numpy(), packed.numpy(), **_of_images(grid))
        return packed

    def pack_slope(self, slope: Tensor, extent: torch.Size) -> Tensor:
        from topkast.kernels import to_planes

        grid = self._at(slope, extent).grid
        packed = self._planes_of(slope, grid, self._rows, grid.slope_length)
        options = {"width": grid.width, "lead": grid.reach, "bands": grid.output_bands}
        to_planes(slope.contiguous().numpy(), packed.numpy(), **options)
        return packed

    def forward(
        self, values: Tensor, packed: Tensor, bias: Tensor | None, extent: torch.Size
    ) -> Tensor:
        from topkast.kernels import convolve, from_planes

        grid, shifted, *_ = self._at(packed, extent)
        out = packed.new_empty(len(packed), self._rows, grid.count, packed.shape[3])
        ordered = values.index_select(0, self._orders[0])
        given = None if bias is None else bias.numpy()
        convolve(shifted, ordered.numpy(), packed.numpy(), out.numpy(), bias=given)
        found = packed.new_empty(extent[0], self._rows, *grid.places)
        from_planes(out.numpy(), found.numpy(), width=grid.width, bands=grid.output_bands)
        return found

    def input_gradient(self, values: Tensor, slope: Tensor, extent: torch.Size) -> Tensor:
        from topkast.kernels import convolve, from_planes

        grid, _, shifted, _ = self._at(slope, extent)
        out = slope.new_empty(len(slope), self._planes, grid.pixels, slope.shape[3])
        ordered = values.index_select(0, self._orders[1])
        convolve(shifted, ordered.numpy(), slope.numpy(), out.numpy())
        found = slope.new_empty(extent)
        from_planes(out.numpy(), found.numpy(), **_of_images(grid))
        return found

    def weight_gradient(
        self, slope: Tensor, packed: Tensor, out: Tensor, extent: torch.Size
    ) -> None:
        from topkast.kernels import sampled_correlation

        grid, *_, shifted = self._at(slope, extent)
        sampled_correlation(
            shifted,
            slope.numpy(),
            packed.numpy(),
            out.numpy(),
            places=grid.count,
            lead=grid.reach,
        )

    @property
    def nbytes(self) -> int:
        layouts = self._forward, self._transposed, self._backward
        shifts = [part.shifts for found in self._distances.values() for part in found[1:]]
        return sum(part.nbytes for part in (*layouts, *shifts))

    def _at(self, tensor: Tensor, extent: torch.Size | None = None) -> _Distances:
        """The distances in images of this shape, and of the dtype of `tensor`."""
        from topkast.kernels import Grid, lanes_of, shift

        extent = tensor.shape if extent is None else extent
        key = tuple(extent)
        if key not in self._distances:
            if len(self._distances) == _GRIDS:
                self._distances.clear()
            whole = Grid((extent[2], extent[3]), *self._window)
            grid = whole.for_batch(extent[0], lanes_of(name_of(tensor.dtype)))
            channel = torch.arange(self._planes // grid.phases).numpy()[:, None]
            row = torch.arange(self._rows).numpy()[:, None]
            seen = (channel * grid.phases + grid.phase) * grid.length + grid.shifts
            slopes = row * grid.slope_length + grid.reach - grid.shifts
            self._distances[key] = _Distances(
                grid,
                shift(self._forward, seen.ravel()),
                shift(self._transposed, slopes.ravel()),
                shift(self._backward, seen.ravel()),
            )
        return self._distances[key]

    @staticmethod
    def _planes_of(images: Tensor, grid: Any, planes: int, length: int) -> Tensor:
        from topkast.kernels import lanes_of

        lanes = lanes_of(name_of(images.dtype))
        slabs = -(-len(images) * grid.bands // lanes)
        return images.new_empty(slabs, planes, length, lanes)


def _of_images(grid: Any) -> dict[str, Any]:
    """How images become planes."""
    (top, _), (left, _) = grid.margins
    margin, bands = (top, left), grid.input_bands
    return {"width": grid.width, "stride": grid.stride, "margin": margin, "bands": bands}


class _Unfolded:
    """By products with images unfolded, a few at a time."""

    def __init__(
        self, rows: Tensor, columns: Tensor, active: Tensor, shape: Pair, window: Window
    ) -> None:
        self._products = TorchProducts(rows, columns, active, shape)
        self._window = window
        self._options = {"dilation": window.dilation, "stride": window.stride}

    def pack(self, images: Tensor) -> Tensor:
        (top, bottom), (left, right) = self._window.margins
        return pad(images, (left, right, top, bottom))

    def pack_slope(self, slope: Tensor, extent: torch.Size) -> Tensor:
        return slope

    def forward(
        self, values: Tensor, packed: Tensor, bias: Tensor | None, extent: torch.Size
    ) -> Tensor:
        places = self._window.places(extent)
        found = packed.new_empty(extent[0], self._products.shape[0], *places)
        for part, target in self._parts(extent, packed, found):
            product = self._products.forward(values, self._unfold(part), bias, 0)
            target.copy_(_as_images(product, target.shape))
        return found

    def input_gradient(self, values: Tensor, slope: Tensor, extent: torch.Size) -> Tensor:
        (top, bottom), (left, right) = self._window.margins
        height, width = extent[2] + top + bottom, extent[3] + left + right
        found = slope.new_empty(extent)
        for part, target in self._parts(extent, slope, found):
            unfolded = self._products.input_gradient(values, _as_rows(part), 0)
            pieces = unfolded.unflatten(0, (len(part), -1)).transpose(1, 2)
            whole = fold(pieces, (height, width), self._window.size, **self._options)
            target.copy_(whole[:, :, top : height - bottom, left : width - right])
        return found

    def weight_gradient(
        self, slope: Tensor, packed: Tensor, out: Tensor, extent: torch.Size
    ) -> None:
        out.zero_()
        some = torch.empty_like(out)
        for part, rise in self._parts(extent, packed, slope):
            self._products.weight_gradient(_as_rows(rise), self._unfold(part), some)
            out += some

    @property
    def nbytes(self) -> int:
        return self._products.nbytes

    def _unfold(self, images: Tensor) -> Tensor:
        """What each place sees, as (places, features)."""
        unfolded = unfold(images, self._window.size, **self._options)
        return unfolded.transpose(1, 2).flatten(0, 1)

    def _parts(self, extent: torch.Size, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        unfolded = self._products.shape[1] * math.prod(self._window.places(extent))
        count = max(1, _UNFOLDED // max(unfolded, 1))
        return zip(*(tensor.split(count) for tensor in tensors), strict=True)


def _as_rows(images: Tensor) -> Tensor:
    return images.flatten(2).transpose(1, 2).flatten(0, 1)


def _as_images(rows: Tensor, shape: torch.Size) -> Tensor:
    found: Tensor = rows.unflatten(0, (shape[0], -1)).transpose(1, 2).reshape(shape)
    return found
