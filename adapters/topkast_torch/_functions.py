"""The products as differentiable functions: of rows of features, and of images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from topkast_torch._products import Products, Window

_UNFOLDED = 1 << 20  # entries of unfolded images at a time: what second caches hold
_WHOLE = Window((1, 1), (1, 1), (1, 1))  # a place sees itself, in all channels


@torch.compiler.disable  # type: ignore[untyped-decorator]
def multiply(x: Tensor, values: Tensor, bias: Tensor | None, products: Products) -> Tensor:
    """The product x · Wᵀ + bias with W on A, for x of shape (batch, features); gradients on B."""
    with torch.autocast(x.device.type, enabled=False):
        found: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, values, bias, products
        )
    return found


@torch.compiler.disable  # type: ignore[untyped-decorator]
def convolve(
    images: Tensor, values: Tensor, bias: Tensor | None, products: Products, window: Window
) -> Tensor:
    """The same at each place of padded images (images, channels, height, width)."""
    with torch.autocast(images.device.type, enabled=False):
        found: Tensor = _Convolution.apply(  # type: ignore[no-untyped-call]
            images, values, bias, products, window
        )
    return found


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
        context.save_for_backward(packed, values)
        return products.forward(values.detach().view(-1), packed, bias, len(x), by_row=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        packed, values = context.saved_tensors
        products, batch = context.products, context.batch
        wanted = context.needs_input_grad
        for_x = for_values = None
        packed_slope = products.pack(slope) if wanted[0] or wanted[1] else slope
        if wanted[0]:
            for_x = products.input_gradient(values.view(-1), packed_slope, batch, by_row=True)
        if wanted[1]:
            for_values = torch.empty_like(values)
            products.weight_gradient(packed_slope, packed, for_values.view(-1), add=False)
        return for_x, for_values, slope.sum(0) if wanted[2] else None, None


class _Convolution(torch.autograd.Function):
    """The convolution of padded images, unfolded a few at a time."""

    @staticmethod
    def forward(
        context: Any,
        images: Tensor,
        values: Tensor,
        bias: Tensor | None,
        products: Products,
        window: Window,
    ) -> Tensor:
        context.window, context.products = window, products
        images = images.contiguous()
        context.save_for_backward(images, values)
        places, flat = window.places(images.shape), values.detach().view(-1)
        found = images.new_empty(len(images), products.shape[0], *places)
        for part, target in zip(*_parts(products, places, images, found), strict=True):
            packed = products.unfold(part, window)
            product = products.forward(
                flat, packed, bias, len(part) * math.prod(places), by_row=False
            )
            target.copy_(product.t().unflatten(1, (len(part), *places)).transpose(0, 1))
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        images, values = context.saved_tensors
        slope = slope.contiguous()
        window, products, wanted = context.window, context.products, context.needs_input_grad
        for_images = torch.empty_like(images) if wanted[0] else None
        for_values = torch.zeros_like(values).view(-1) if wanted[1] else None
        targets = images if for_images is None else for_images
        parts = _parts(products, window.places(images.shape), images, slope, targets)
        for part, rise, target in zip(*parts, strict=True):
            packed = products.unfold(rise, _WHOLE)
            if for_values is not None:
                unfolded = products.unfold(part, window)
                products.weight_gradient(packed, unfolded, for_values, add=True)
            if for_images is not None:
                count = len(part) * math.prod(rise.shape[2:])
                unfolded = products.input_gradient(values.view(-1), packed, count, by_row=False)
                products.fold(unfolded, target, window)
        if for_values is not None:
            for_values = for_values.view(values.shape)
        return for_images, for_values, slope.sum((0, 2, 3)) if wanted[2] else None, None, None


def _parts(
    products: Products, places: tuple[int, int], *tensors: Tensor
) -> list[tuple[Tensor, ...]]:
    """The images, and what belongs to them, a few at a time."""
    unfolded = products.shape[1] * math.prod(places)
    count = max(1, _UNFOLDED // max(unfolded, 1))
    return [tensor.split(count) for tensor in tensors]
