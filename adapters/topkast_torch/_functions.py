"""The products as differentiable functions: of rows of features, and of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from topkast_torch._convolutions import Convolution
from topkast_torch._products import Products


def multiply(x: Tensor, values: Tensor, bias: Tensor | None, products: Products) -> Tensor:
    """The product x · Wᵀ + bias with W on A, for x of shape (batch, features); gradients on B."""
    return _apply(_Product, x, values, bias, products)


def convolve(
    images: Tensor, values: Tensor, bias: Tensor | None, convolution: Convolution
) -> Tensor:
    """The same at each place of images (images, channels, height, width)."""
    return _apply(_Convolution, images, values, bias, convolution)


def _apply(function: Any, x: Tensor, *arguments: Any) -> Tensor:
    if torch.compiler.is_compiling():
        compiled: Tensor = _outside(function, x, *arguments)
        return compiled
    return _as_written(function, x, *arguments)


def _as_written(function: Any, x: Tensor, *arguments: Any) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        found: Tensor = function.apply(x, *arguments)
    return found


# Not called where nothing compiles: the decorator costs as much as a small product.
_outside: Any = torch.compiler.disable(_as_written)


class _Product(torch.autograd.Function):
    """x · Wᵀ + bias for x of shape (batch, features)."""

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        products: Products,
    ) -> Tensor:
        packed = products.pack(x)
        context.products, context.batch = products, len(x)
        context.save_for_backward(packed if context.needs_input_grad[1] else None, values)
        return products.forward(values.detach().view(-1), packed, bias, len(x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        packed, values = context.saved_tensors
        products, batch = context.products, context.batch
        wanted = context.needs_input_grad
        for_x = for_values = None
        packed_slope = products.pack(slope) if wanted[0] or wanted[1] else slope
        if wanted[0]:
            for_x = products.input_gradient(values.view(-1), packed_slope, batch)
        if wanted[1]:
            for_values = torch.empty_like(values)
            products.weight_gradient(packed_slope, packed, for_values.view(-1))
        return for_x, for_values, slope.sum(0) if wanted[2] else None, None


class _Convolution(torch.autograd.Function):
    """The convolution of images."""

    @staticmethod
    def forward(
        context: Any,
        images: Tensor,
        values: Tensor,
        bias: Tensor | None,
        convolution: Convolution,
    ) -> Tensor:
        packed = convolution.pack(images)
        context.convolution, context.shape = convolution, images.shape
        context.save_for_backward(packed if context.needs_input_grad[1] else None, values)
        return convolution.forward(values.detach().view(-1), packed, bias, images.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        packed, values = context.saved_tensors
        convolution, shape = context.convolution, context.shape
        wanted = context.needs_input_grad
        for_images = for_values = None
        packed_slope = slope
        if wanted[0] or wanted[1]:
            packed_slope = convolution.pack_slope(slope, shape)
        if wanted[0]:
            for_images = convolution.input_gradient(values.view(-1), packed_slope, shape)
        if wanted[1]:
            for_values = torch.empty_like(values)
            convolution.weight_gradient(packed_slope, packed, for_values.view(-1), shape)
        return for_images, for_values, slope.sum((0, 2, 3)) if wanted[2] else None, None
