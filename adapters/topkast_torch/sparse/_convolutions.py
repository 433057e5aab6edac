"""The three products of a sparse convolution, by ``topkast.kernels`` or by PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import fold, pad, unfold

from topkast_torch.sparse._products import (
    Entries,
    GuardedIndices,
    ProductsByWeight,
    TorchProducts,
    array_of_param,
    has_kernels,
    numpy_name,
    unit_kernels,
)
from topkast_torch.sparse.chains._group_passes import readable

_MAX_ENTRIES = 1 << 20  # entries unfolded at a time: they fit in an L2 cache

Pair = tuple[int, int]


class Window(NamedTuple):
    """The window of a convolution."""

    size: Pair
    dilation: Pair
    stride: Pair
    margins: tuple[Pair, Pair]  # zeros above and below, left and right

    @property
    def span(self) -> Pair:
        """Height and width of the pixels under the window."""
        height, width = (
            dilation * (size - 1) + 1
            for size, dilation in zip(self.size, self.dilation, strict=True)
        )
        return height, width

    def output_extent(self, shape: torch.Size) -> Pair:
        """Height and width of the output for images of a given shape."""
        height, width = (
            (length + sum(margin) - span) // stride + 1
            for length, margin, span, stride in zip(
                shape[2:], self.margins, self.span, self.stride, strict=True
            )
        )
        return height, width


class Convolution(Protocol):
    """Products with a sparse weight (rows, channels · window), whose values on B are a vector.

    :meth:`pack` and :meth:`pack_gradient` convert the images and the gradient of the output once to
    the form that the products read. `shape` is the shape of the images.
    """

    def pack(self, images: Tensor) -> Tensor: ...

    def pack_gradient(self, grad_output: Tensor, shape: torch.Size) -> Tensor: ...

    def forward(
        self, values: Tensor, packed: Tensor, bias: Tensor | None, shape: torch.Size
    ) -> Tensor:
        """The output with the weight on A, (images, rows, height', width')."""

    def input_gradient(self, values: Tensor, grad_output: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the images, with the weight on A."""

    def weight_gradient(
        self, grad_output: Tensor, packed: Tensor, out: Tensor, shape: torch.Size
    ) -> None:
        """Write the gradient of the weight on B into `out`, in the order of the values."""

    def on_backward_set(self) -> Convolution:
        """The same convolution with the weight on all of B."""

    @property
    def nbytes(self) -> int: ...


def make_convolution(
    find_entries: Callable[[], Entries], window: Window, dtype: torch.dtype
) -> Convolution:
    """Make a convolution for the entries of `find_entries`, whose columns span all groups."""
    entries = find_entries()
    is_compiled = has_kernels(entries.indices.device, dtype)
    if entries.blocks is None or (is_compiled and unit_kernels("UnitConvolutionProducts", entries)):
        convolution_type = _CompiledConvolution if is_compiled else _UnfoldedConvolution
        return convolution_type(entries, find_entries, window)
    convolution: Convolution = ProductsByWeight(
        entries, lambda find: make_convolution(find, window, dtype)
    )
    return convolution


class _CompiledConvolution:
    """Products by ``topkast.kernels``, on the memory of the tensors."""

    def __init__(
        self, entries: Entries, find_entries: Callable[[], Entries], window: Window
    ) -> None:
        self._find_entries, self._window = find_entries, window
        self._guard = GuardedIndices(entries)
        self._products = _kernels_for(entries, self._guard.array, window)

    def pack(self, images: Tensor) -> Tensor:
        shape = self._products.packed_shape(images.shape, numpy_name(images.dtype))
        packed = images.new_empty(shape)
        self._products.pack(readable(images).numpy(), packed.numpy())
        return packed

    def pack_gradient(self, grad_output: Tensor, shape: torch.Size) -> Tensor:
        packed_shape = self._products.packed_gradient_shape(shape, numpy_name(grad_output.dtype))
        packed = grad_output.new_empty(packed_shape)
        self._products.pack_gradient(readable(grad_output).numpy(), packed.numpy(), shape=shape)
        return packed

    def forward(
        self, values: Tensor, packed: Tensor, bias: Tensor | None, shape: torch.Size
    ) -> Tensor:
        self._guard.check()
        output = packed.new_empty(self._products.output_shape(shape))
        bias_array = None if bias is None else array_of_param(bias)
        self._products.forward(
            array_of_param(values), packed.numpy(), output.numpy(), shape=shape, bias=bias_array
        )
        return output

    def input_gradient(self, values: Tensor, grad_output: Tensor, shape: torch.Size) -> Tensor:
        self._guard.check()
        gradient = grad_output.new_empty(shape)
        self._products.input_gradient(
            array_of_param(values), grad_output.numpy(), gradient.numpy(), shape=shape
        )
        return gradient

    def weight_gradient(
        self, grad_output: Tensor, packed: Tensor, out: Tensor, shape: torch.Size
    ) -> None:
        self._guard.check()
        self._products.weight_gradient(
            grad_output.numpy(), readable(packed).numpy(), out.numpy(), shape=shape
        )

    def on_backward_set(self) -> Convolution:
        return _convolution_on_backward_set(self._find_entries, self._window)

    @property
    def nbytes(self) -> int:
        nbytes: int = self._products.nbytes
        return nbytes


def _kernels_for(entries: Entries, indices: Any, window: Window) -> Any:
    from topkast.kernels import ConvolutionProducts

    options: dict[str, Any] = {"shape": entries.shape, "groups": entries.groups} | window._asdict()
    if entries.blocks is None:
        return ConvolutionProducts(indices, entries.active_count, **options)
    products_type = unit_kernels("UnitConvolutionProducts", entries)
    return products_type(indices, entries.active_count, **options, rows=entries.blocks.rows)


def _convolution_on_backward_set(
    find_entries: Callable[[], Entries], window: Window
) -> Convolution:
    def make(find: Callable[[], Entries]) -> _UnfoldedConvolution:
        return _UnfoldedConvolution(find(), find, window, uses_backward_set=True)

    entries = find_entries()
    if entries.blocks is None:
        return make(find_entries)
    convolution: Convolution = ProductsByWeight(entries, make)
    return convolution


class _UnfoldedConvolution:
    """Products by matrix products with unfolded images, a few images at a time."""

    def __init__(
        self,
        entries: Entries,
        find_entries: Callable[[], Entries],
        window: Window,
        *,
        uses_backward_set: bool = False,
    ) -> None:
        self._find_entries = find_entries
        self._products = TorchProducts(entries, find_entries, uses_backward_set=uses_backward_set)
        self._window = window
        self._options = {"dilation": window.dilation, "stride": window.stride}

    def pack(self, images: Tensor) -> Tensor:
        (top, bottom), (left, right) = self._window.margins
        padded = pad(images, (left, right, top, bottom))
        return padded.view_as(padded)  # autograd needs a new tensor object

    def pack_gradient(self, grad_output: Tensor, shape: torch.Size) -> Tensor:
        return grad_output

    def forward(
        self, values: Tensor, packed: Tensor, bias: Tensor | None, shape: torch.Size
    ) -> Tensor:
        extent = self._window.output_extent(shape)
        output = packed.new_empty(shape[0], self._products.shape[0], *extent)
        for images, target in self._split(shape, packed, output):
            rows = self._unfold(images)
            product = self._products.forward(values, rows, bias, len(rows))
            target.copy_(_unflatten(product, target).unflatten(2, target.shape[2:]))
        return output

    def input_gradient(self, values: Tensor, grad_output: Tensor, shape: torch.Size) -> Tensor:
        (top, bottom), (left, right) = self._window.margins
        height, width = shape[2] + top + bottom, shape[3] + left + right
        gradient = grad_output.new_empty(shape)
        for grad_images, target in self._split(shape, grad_output, gradient):
            rows = _as_rows(grad_images)
            product = self._products.input_gradient(values, rows, len(rows))
            unfolded = _unflatten(product, grad_images)
            padded = fold(unfolded, (height, width), self._window.size, **self._options)
            target.copy_(padded[:, :, top : height - bottom, left : width - right])
        return gradient

    def weight_gradient(
        self, grad_output: Tensor, packed: Tensor, out: Tensor, shape: torch.Size
    ) -> None:
        out.zero_()
        addend = torch.empty_like(out)
        for images, gradient in self._split(shape, packed, grad_output):
            self._products.weight_gradient(_as_rows(gradient), self._unfold(images), addend)
            out += addend

    def on_backward_set(self) -> Convolution:
        return _UnfoldedConvolution(
            self._find_entries(), self._find_entries, self._window, uses_backward_set=True
        )

    @property
    def nbytes(self) -> int:
        return self._products.nbytes

    def _unfold(self, images: Tensor) -> Tensor:
        """The pixels under the window at each output position, as (positions, features)."""
        unfolded = unfold(images, self._window.size, **self._options)
        return unfolded.transpose(1, 2).flatten(0, 1)

    def _split(self, shape: torch.Size, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Split tensors into groups of images that are small enough when unfolded."""
        unfolded = self._products.shape[1] * math.prod(self._window.output_extent(shape))
        count = max(1, _MAX_ENTRIES // max(unfolded, 1))
        return zip(*(tensor.split(count) for tensor in tensors), strict=True)


def _as_rows(images: Tensor) -> Tensor:
    return images.flatten(2).transpose(1, 2).flatten(0, 1)


def _unflatten(rows: Tensor, images: Tensor) -> Tensor:
    """Rows as (images, features, positions), with the positions of `images`."""
    positions = math.prod(images.shape[2:])
    features: Tensor = rows.view(len(images), positions, rows.shape[1]).transpose(1, 2)
    return features
