"""The three products of a sparse convolution: on planes, by ``topkast.kernels``, or by PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import fold, pad, unfold

from topkast_torch.sparse._products import Entries, TorchProducts, has_kernels, narrow, numpy_name

_UNFOLDED = 1 << 20  # entries of unfolded images at a time: what second caches hold
_SIZES = 4  # of images for which distances are remembered

Pair = tuple[int, int]


class Window(NamedTuple):
    """What of an image each place of a convolution's output sees."""

    size: Pair
    dilation: Pair
    stride: Pair
    margins: tuple[Pair, Pair]  # zeros above and below, left and right

    @property
    def span(self) -> Pair:
        """Height and width of what a place sees."""
        height, width = (
            dilation * (size - 1) + 1
            for size, dilation in zip(self.size, self.dilation, strict=True)
        )
        return height, width

    def places(self, shape: torch.Size) -> Pair:
        """Height and width of the output, for images of some shape."""
        height, width = (
            (length + sum(margin) - span) // stride + 1
            for length, margin, span, stride in zip(
                shape[2:], self.margins, self.span, self.stride, strict=True
            )
        )
        return height, width


class Convolution(Protocol):
    """Products with a sparse weight of (rows, channels · window), with values on B as a vector.

    Images and the gradient of the output are handed over once, by :meth:`pack` and
    :meth:`pack_gradient`, in the form that the products want; `shape` is that of the images.
    """

    def pack(self, images: Tensor) -> Tensor: ...

    def pack_gradient(self, slope: Tensor, shape: torch.Size) -> Tensor: ...

    def forward(
        self, values: Tensor, packed: Tensor, bias: Tensor | None, shape: torch.Size
    ) -> Tensor:
        """The output with the weight on A, (images, rows, height', width')."""

    def input_gradient(self, values: Tensor, slope: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the images, with the weight on A."""

    def weight_gradient(
        self, slope: Tensor, packed: Tensor, out: Tensor, shape: torch.Size
    ) -> None:
        """Write the gradient of the weight on B into `out` (|B|,)."""

    def on_backward_set(self) -> Convolution:
        """The same convolution with the weight on all of B."""

    @property
    def nbytes(self) -> int: ...


def make_convolution(
    find: Callable[[], Entries], window: Window, dtype: torch.dtype
) -> Convolution:
    """A convolution with the entries that `find` returns; their columns are of all groups."""
    entries = find()
    kind = _OnPlanes if has_kernels(entries.rows.device, dtype) else _Unfolded
    return kind(entries, find, window)


class _Distances(NamedTuple):
    """The layouts of the three products, for images of one size."""

    forward: Any
    transposed: Any
    backward: list[Any]


class _OnPlanes:
    """Without unfolding: each weight looks at a fixed distance from the place of the output."""

    def __init__(self, entries: Entries, find: Callable[[], Entries], window: Window) -> None:
        from topkast.kernels import arrange

        self._find, shape = find, entries.shape
        self._window = window
        self._rows, self._channels = shape[0], shape[1] // math.prod(window.size)
        grid = _grid(window.span, window._replace(margins=((0, 0), (0, 0))), 1, 1)
        row, column = (narrow(tensor).numpy() for tensor in (entries.rows, entries.columns))
        place = np.arange(len(row), dtype=np.int32)
        active, _ = entries.parts
        across, down, there = row[active], column[active], place[active]
        self._planes = self._channels * grid.planes
        turned = self._planes, self._rows * math.prod(window.size)
        # Of A, threads share the places, and all rows can be one chunk; of B they share the rows.
        fewer = max(1, min(32, self._rows // torch.get_num_threads()))
        self._forward = arrange(across, down, there, shape=shape, most_rows=256)
        plane, opposite = grid.transpose(across, down)
        self._transposed = arrange(plane, opposite, there, shape=turned, most_rows=256)
        self._backward = [
            arrange(row[part], column[part], place[part], shape=shape, runs=True, most_rows=fewer)
            for part in entries.parts
        ]
        self._orders = [
            torch.from_numpy(layout.order) for layout in (self._forward, self._transposed)
        ]
        self._distances: dict[Any, _Distances] = {}

    def pack(self, images: Tensor) -> Tensor:
        from topkast.kernels import to_planes

        grid = self._grid_of(images.shape, images.dtype)
        packed = _planes(images, grid, self._planes, grid.length)
        to_planes(images.contiguous().numpy(), packed.numpy(), grid.of_images)
        return packed

    def pack_gradient(self, slope: Tensor, shape: torch.Size) -> Tensor:
        from topkast.kernels import to_planes

        grid = self._grid_of(shape, slope.dtype)
        packed = _planes(slope, grid, self._rows, grid.slope_length)
        to_planes(slope.contiguous().numpy(), packed.numpy(), grid.of_slopes)
        return packed

    def forward(
        self, values: Tensor, packed: Tensor, bias: Tensor | None, shape: torch.Size
    ) -> Tensor:
        from topkast.kernels import convolve, from_planes

        grid = self._grid_of(shape, packed.dtype)
        out = packed.new_empty(len(packed), self._rows, grid.count, packed.shape[3])
        ordered = values.index_select(0, self._orders[0])
        given = None if bias is None else bias.numpy()
        shifted = self._at(grid).forward
        convolve(shifted, ordered.numpy(), packed.numpy(), out.numpy(), bias=given)
        found = packed.new_empty(shape[0], self._rows, *grid.places)
        from_planes(out.numpy(), found.numpy(), grid.of_output)
        return found

    def input_gradient(self, values: Tensor, slope: Tensor, shape: torch.Size) -> Tensor:
        from topkast.kernels import convolve, from_planes

        grid = self._grid_of(shape, slope.dtype)
        out = slope.new_empty(len(slope), self._planes, grid.pixels, slope.shape[3])
        ordered = values.index_select(0, self._orders[1])
        convolve(self._at(grid).transposed, ordered.numpy(), slope.numpy(), out.numpy())
        found = slope.new_empty(shape)
        from_planes(out.numpy(), found.numpy(), grid.of_images)
        return found

    def weight_gradient(
        self, slope: Tensor, packed: Tensor, out: Tensor, shape: torch.Size
    ) -> None:
        from topkast.kernels import sampled_correlation

        grid = self._grid_of(shape, slope.dtype)
        for shifted in self._at(grid).backward:
            sampled_correlation(
                shifted,
                slope.numpy(),
                packed.numpy(),
                out.numpy(),
                places=grid.count,
                lead=grid.reach,
            )

    def on_backward_set(self) -> Convolution:
        return _Unfolded(self._find(), self._find, self._window, everywhere=True)

    @property
    def nbytes(self) -> int:
        layouts = self._forward, self._transposed, *self._backward
        shifts = [
            part.shifts
            for found in self._distances.values()
            for part in (found.forward, found.transposed, *found.backward)
        ]
        return sum(part.nbytes for part in (*layouts, *shifts))

    def _grid_of(self, shape: torch.Size, dtype: torch.dtype) -> Any:
        from topkast.kernels import lanes_of

        return _grid((shape[2], shape[3]), self._window, shape[0], lanes_of(numpy_name(dtype)))

    def _at(self, grid: Any) -> _Distances:
        """The distances in images of some size; those of the last few are remembered."""
        from topkast.kernels import shift

        found = self._distances.get(grid)
        if found is None:
            seen, seeing = grid.seen(self._channels), grid.seeing(self._rows)
            found = _Distances(
                shift(self._forward, seen),
                shift(self._transposed, seeing),
                [shift(layout, seen) for layout in self._backward],
            )
            for oldest in list(self._distances)[: 1 - _SIZES]:
                self._distances.pop(oldest, None)
            self._distances[grid] = found
        return found


@functools.lru_cache(maxsize=256)
def _grid(extent: Pair, window: Window, batch: int, lanes: int) -> Any:
    from topkast.kernels import Grid

    return Grid(extent, *window).for_batch(batch, lanes)


def _planes(images: Tensor, grid: Any, planes: int, length: int) -> Tensor:
    from topkast.kernels import lanes_of

    lanes = lanes_of(numpy_name(images.dtype))
    return images.new_empty(-(-len(images) * grid.bands // lanes), planes, length, lanes)


class _Unfolded:
    """By products with images unfolded, a few at a time."""

    def __init__(
        self,
        entries: Entries,
        find: Callable[[], Entries],
        window: Window,
        *,
        everywhere: bool = False,
    ) -> None:
        self._find = find
        self._products = TorchProducts(entries, find, everywhere=everywhere)
        self._window = window
        self._options = {"dilation": window.dilation, "stride": window.stride}

    def pack(self, images: Tensor) -> Tensor:
        (top, bottom), (left, right) = self._window.margins
        padded = pad(images, (left, right, top, bottom))
        return padded.view_as(padded)  # autograd wants an object of its own

    def pack_gradient(self, slope: Tensor, shape: torch.Size) -> Tensor:
        return slope

    def forward(
        self, values: Tensor, packed: Tensor, bias: Tensor | None, shape: torch.Size
    ) -> Tensor:
        places = self._window.places(shape)
        found = packed.new_empty(shape[0], self._products.shape[0], *places)
        for part, target in self._parts(shape, packed, found):
            rows = self._unfold(part)
            product = self._products.forward(values, rows, bias, len(rows))
            target.copy_(_unflatten(product, target).unflatten(2, target.shape[2:]))
        return found

    def input_gradient(self, values: Tensor, slope: Tensor, shape: torch.Size) -> Tensor:
        (top, bottom), (left, right) = self._window.margins
        height, width = shape[2] + top + bottom, shape[3] + left + right
        found = slope.new_empty(shape)
        for part, target in self._parts(shape, slope, found):
            rows = _as_rows(part)
            unfolded = self._products.input_gradient(values, rows, len(rows))
            pieces = _unflatten(unfolded, part)
            whole = fold(pieces, (height, width), self._window.size, **self._options)
            target.copy_(whole[:, :, top : height - bottom, left : width - right])
        return found

    def weight_gradient(
        self, slope: Tensor, packed: Tensor, out: Tensor, shape: torch.Size
    ) -> None:
        out.zero_()
        some = torch.empty_like(out)
        for part, rise in self._parts(shape, packed, slope):
            self._products.weight_gradient(_as_rows(rise), self._unfold(part), some)
            out += some

    def on_backward_set(self) -> Convolution:
        return _Unfolded(self._find(), self._find, self._window, everywhere=True)

    @property
    def nbytes(self) -> int:
        return self._products.nbytes

    def _unfold(self, images: Tensor) -> Tensor:
        """What each place sees, as (places, features)."""
        unfolded = unfold(images, self._window.size, **self._options)
        return unfolded.transpose(1, 2).flatten(0, 1)

    def _parts(self, shape: torch.Size, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        unfolded = self._products.shape[1] * math.prod(self._window.places(shape))
        count = max(1, _UNFOLDED // max(unfolded, 1))
        return zip(*(tensor.split(count) for tensor in tensors), strict=True)


def _as_rows(images: Tensor) -> Tensor:
    return images.flatten(2).transpose(1, 2).flatten(0, 1)


def _unflatten(rows: Tensor, images: Tensor) -> Tensor:
    """(images, features, places), of which there are as many as in `images`."""
    places = math.prod(images.shape[2:])
    found: Tensor = rows.view(len(images), places, rows.shape[1]).transpose(1, 2)
    return found
