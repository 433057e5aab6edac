"""Layers whose weight is stored on B alone and multiplied on A alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from topkast import MismatchError, UnsupportedTensorError
from topkast.adapter import check_sparsities
from topkast_torch.sparse._convolutions import Convolution, Window, make_convolution
from topkast_torch.sparse._functions import convolve, multiply
from topkast_torch.sparse._products import Entries, Products, make_products
from topkast_torch.sparse._sparse_layer import SparseLayer, initialise


class SparseLinear(SparseLayer):
    r"""A linear layer whose weight is always sparse, in memory and in all three products.

    :func:`topkast.sparsify` makes it from ``torch.nn.Linear``. If it is constructed directly, the
    wrapped optimizer refreshes A and B and keeps their sizes.

    Parameters
    ----------
    in_features, out_features, bias
        As for ``torch.nn.Linear``, which also draws the initial weights.
    fwd, bwd
        Forward and backward sparsity, ``0 <= bwd <= fwd < 1``.
    device, dtype
        Device and dtype of the Parameters; float32 or float64.

    Attributes
    ----------
    values
        The weights on B; Parameter of shape (1, \|B\|).
    bias
        (out_features,) or None.

    Raises
    ------
    OptionError
        If the sparsities are out of range.
    UnsupportedTensorError
        If the dtype is neither float32 nor float64.

    Examples
    --------
    >>> import torch, topkast, topkast_torch
    >>> layer = topkast_torch.SparseLinear(20, 30, fwd=0.9, bwd=0.8)
    >>> layer(torch.ones(4, 20)).shape, layer.values.shape
    (torch.Size([4, 30]), torch.Size([1, 120]))
    >>> opt = torch.optim.AdamW(layer.named_parameters(), 1e-3)
    >>> opt = topkast.wrap_optimizer(opt, fwd=0.9, bwd=0.8)
    >>> layer(torch.ones(4, 20)).square().sum().backward()
    >>> opt.step()
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        fwd: float,
        bwd: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_sparsities(fwd, bwd)
        dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        if dense.weight.dtype not in (torch.float32, torch.float64):
            raise UnsupportedTensorError(
                f"sparse layers need dtype float32 or float64, got {dense.weight.dtype}"
            )
        self.in_features, self.out_features = in_features, out_features
        initialise(self, dense.weight.detach(), fwd=fwd, bwd=bwd)
        self.register_parameter("bias", dense.bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch.nn.Linear has it
        """(…, out_features) from (…, in_features).

        Raises :class:`topkast.MismatchError` if the input has another width or dtype.
        """
        inputs = self._check_input(input)
        *leading, features = inputs.shape
        if features != self.in_features:
            raise MismatchError(
                f"SparseLinear takes {self.in_features} features, got an input of shape "
                f"{tuple(inputs.shape)}"
            )
        rows = inputs.reshape(math.prod(leading), features)
        output: Tensor = multiply(rows, self.values, self.bias, lambda: self.products)
        return output.view(*leading, self.out_features)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {_describe(self)}"
        )

    def _make_products(self) -> Products:
        return make_products(self._entries, self.values.dtype)


class SparseConv2d(SparseLayer):
    """A two-dimensional convolution whose weight is always sparse.

    :func:`topkast.sparsify` makes it from ``torch.nn.Conv2d``, whose attributes it keeps. The CPU
    kernels lay images side by side in vectors, 16 of float32 with AVX-512: batch sizes that are
    multiples of the vector length are fastest.

    Examples
    --------
    >>> import torch, topkast
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, padding=1))
    >>> opt = torch.optim.SGD(model.named_parameters(), 0.1)
    >>> opt = topkast.wrap_optimizer(opt, fwd=0.9, bwd=0.8)
    >>> report = topkast.sparsify(model, opt)
    >>> model(torch.ones(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch.nn.Conv2d has it
        """(batch, out_channels, height', width') from (batch, in_channels, height, width).

        Raises :class:`topkast.MismatchError` if the input has other channels or another dtype.
        """
        inputs = self._check_input(input)
        images = inputs if inputs.dim() == 4 else inputs[None]
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise MismatchError(
                f"SparseConv2d takes images of {self.in_channels} channels, got an input of shape "
                f"{tuple(inputs.shape)}"
            )
        if self.padding_mode != "zeros":
            images = pad(images, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        if min(*images.shape[2:], *self._window.output_extent(images.shape)) < 1:
            raise MismatchError(
                f"a kernel of size {self.kernel_size} does not fit an input of shape "
                f"{tuple(inputs.shape)}"
            )
        output: Tensor = convolve(images, self.values, self.bias, lambda: self.products)
        return output if inputs.dim() == 4 else output[0]

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return (
            f"{self.in_channels}, {self.out_channels}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}, {_describe(self)}"
        )

    @property
    def _window(self) -> Window:
        left, right, top, bottom = self._reversed_padding_repeated_twice
        zeros = ((top, bottom), (left, right)) if self.padding_mode == "zeros" else ((0, 0), (0, 0))
        return Window(self.kernel_size, self.dilation, self.stride, zeros)

    def _make_products(self) -> Convolution:
        return make_convolution(self._entries, self._window, self.values.dtype)

    def _entries(self) -> Entries:
        rows, width = self._matrix_shape()
        return Entries(self.indices, self.active_count, (rows, width * self.groups), self.groups)


def _describe(layer: SparseLayer) -> str:
    size = max(math.prod(layer.weight_shape), 1)
    return f"fwd={1 - layer.active_count / size:.4g}, bwd={1 - layer.values.numel() / size:.4g}"
