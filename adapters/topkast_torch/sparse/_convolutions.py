"""The three products of a sparse convolution: on planes, by ``topkast.kernels``, or by PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import fold, pad, unfold

from topkast_torch.sparse._products import Entries, Guarded, TorchProducts, has_kernels, numpy_name

_UNFOLDED = 1 << 20  # entries of unfolded images at a time: what second caches hold

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
    kind = _OnPlanes if has_kernels(entries.indices.device, dtype) else _Unfolded
    return kind(entries, find, window)


class _OnPlanes:
    """By ``topkast.kernels.ConvolutionProducts``, which works on the memory of these tensors."""

    def __init__(self, entries: Entries, find: Callable[[], Entries], window: Window) -> None:
        from topkast.kernels import ConvolutionProducts

        self._find, self._window = find, window
        self._guard = Guarded(entries)
        self._products = ConvolutionProducts(
            self._guard.array,
            entries.active_count,
            shape=entries.shape,
            groups=entries.groups,
            **window._asdict(),
        )

    def pack(self, images: Tensor) -> Tensor:
        shape = self._products.packed_shape(images.shape, numpy_name(images.dtype))
        packed = images.new_empty(shape)
        self._products.pack(images.contiguous().numpy(), packed.numpy())
        return packed

    def pack_gradient(self, grad_output: Tensor, shape: torch.Size) -> Tensor:
        packed_shape = self._products.packed_gradient_shape(shape, numpy_name(grad_output.dtype))
        packed = grad_output.new_empty(packed_shape)
        self._products.pack_gradient(grad_output.contiguous().numpy(), packed.numpy(), shape=shape)
        return packed

    def forward(
        self, values: Tensor, packed: Tensor, bias: Tensor | None, shape: torch.Size
    ) -> Tensor:
        self._guard.check()
        output = packed.new_empty(self._products.output_shape(shape))
        given = None if bias is None else bias.numpy()
        self._products.forward(
            values.numpy(), packed.numpy(), output.numpy(), shape=shape, bias=given
        )
        return output

    def input_gradient(self, values: Tensor, grad_output: Tensor, shape: torch.Size) -> Tensor:
        self._guard.check()
        gradient = grad_output.new_empty(shape)
        self._products.input_gradient(
            values.numpy(), grad_output.numpy(), gradient.numpy(), shape=shape
        )
        return gradient

    def weight_gradient(
        self, grad_output: Tensor, packed: Tensor, out: Tensor, shape: torch.Size
    ) -> None:
        self._guard.check()
        self._products.weight_gradient(
            grad_output.numpy(), packed.numpy(), out.numpy(), shape=shape
        )

    def on_backward_set(self) -> Convolution:
        return _Unfolded(self._find(), self._find, self._window, everywhere=True)

    @property
    def nbytes(self) -> int:
        return self._products.nbytes


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

    def pack_gradient(self, grad_output: Tensor, shape: torch.Size) -> Tensor:
        return grad_output

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

    def input_gradient(self, values: Tensor, grad_output: Tensor, shape: torch.Size) -> Tensor:
        (top, bottom), (left, right) = self._window.margins
        height, width = shape[2] + top + bottom, shape[3] + left + right
        found = grad_output.new_empty(shape)
        for part, target in self._parts(shape, grad_output, found):
            rows = _as_rows(part)
            unfolded = self._products.input_gradient(values, rows, len(rows))
            pieces = _unflatten(unfolded, part)
            whole = fold(pieces, (height, width), self._window.size, **self._options)
            target.copy_(whole[:, :, top : height - bottom, left : width - right])
        return found

    def weight_gradient(
        self, grad_output: Tensor, packed: Tensor, out: Tensor, shape: torch.Size
    ) -> None:
        out.zero_()
        some = torch.empty_like(out)
        for part, rise in self._parts(shape, packed, grad_output):
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
