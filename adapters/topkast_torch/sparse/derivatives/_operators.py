"""Products as operators with adjoints, for linear layers and convolutions alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from topkast_torch.sparse._convolutions import Convolution
from topkast_torch.sparse._products import Products

Record: TypeAlias = Callable[[Tensor, Tensor], None]


class Operator(Protocol):
    """A product of activations and values, y = x · W, and its adjoints, on detached tensors.

    `x` is rows of features or images, `shape` its shape.
    """

    axes: tuple[int, ...]  # summed over in the gradient of the bias
    record: Record

    def pack(self, x: Tensor) -> Tensor:
        """Convert `x` to the form that the products read."""

    def forward(
        self, values: Tensor, packed: Tensor, bias: Tensor | None, shape: torch.Size
    ) -> Tensor:
        """The output, with W on A."""

    def pack_gradient(self, grad_output: Tensor, shape: torch.Size) -> Tensor:
        """Convert a gradient of the output to the form that the products read."""

    def input_gradient(self, values: Tensor, packed: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of `x`, with W on A."""

    def weight_gradient(
        self, packed_gradient: Tensor, packed: Tensor, out: Tensor, shape: torch.Size
    ) -> None:
        """Write the gradient of W on B into `out` (|B|,)."""

    def on_backward_set(self) -> Operator:
        """The same product with W on all of B."""


class LinearOperator:
    """The product of a linear layer."""

    axes: tuple[int, ...] = (0,)

    def __init__(self, products: Callable[[], Products], record: Record) -> None:
        self._find_products, self.record = products, record

    @cached_property
    def _products(self) -> Products:
        return self._find_products()

    def pack(self, x: Tensor) -> Tensor:
        return self._products.pack(x)

    def forward(
        self, values: Tensor, packed: Tensor, bias: Tensor | None, shape: torch.Size
    ) -> Tensor:
        return self._products.forward(values, packed, bias, shape[0])

    def pack_gradient(self, grad_output: Tensor, shape: torch.Size) -> Tensor:
        return self._products.pack(grad_output)

    def input_gradient(self, values: Tensor, packed: Tensor, shape: torch.Size) -> Tensor:
        return self._products.input_gradient(values, packed, shape[0])

    def weight_gradient(
        self, packed_gradient: Tensor, packed: Tensor, out: Tensor, shape: torch.Size
    ) -> None:
        self._products.weight_gradient(packed_gradient, packed, out)

    def on_backward_set(self) -> Operator:
        return LinearOperator(self._products.on_backward_set, self.record)


class ConvolutionOperator:
    """The product of a convolution."""

    axes: tuple[int, ...] = (0, 2, 3)

    def __init__(self, convolution: Callable[[], Convolution], record: Record) -> None:
        self._find_convolution, self.record = convolution, record

    @cached_property
    def _convolution(self) -> Convolution:
        return self._find_convolution()

    def pack(self, x: Tensor) -> Tensor:
        return self._convolution.pack(x)

    def forward(
        self, values: Tensor, packed: Tensor, bias: Tensor | None, shape: torch.Size
    ) -> Tensor:
        return self._convolution.forward(values, packed, bias, shape)

    def pack_gradient(self, grad_output: Tensor, shape: torch.Size) -> Tensor:
        return self._convolution.pack_gradient(grad_output, shape)

    def input_gradient(self, values: Tensor, packed: Tensor, shape: torch.Size) -> Tensor:
        return self._convolution.input_gradient(values, packed, shape)

    def weight_gradient(
        self, packed_gradient: Tensor, packed: Tensor, out: Tensor, shape: torch.Size
    ) -> None:
        self._convolution.weight_gradient(packed_gradient, packed, out, shape)

    def on_backward_set(self) -> Operator:
        return ConvolutionOperator(self._convolution.on_backward_set, self.record)
