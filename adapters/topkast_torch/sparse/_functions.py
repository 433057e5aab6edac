"""The products as differentiable functions: of rows of features, and of images.

They are linear in each argument, so that their derivatives are the same products again, and can be
differentiated in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from topkast import MismatchError
from topkast_torch.sparse._convolutions import Convolution
from topkast_torch.sparse._products import Products


def multiply(
    x: Tensor, values: Tensor, bias: Tensor | None, products: Callable[[], Products]
) -> Tensor:
    """The product x · Wᵀ + bias with W on A, for x of shape (batch, features); gradients on B.

    `products` is asked where no transform of functions and no compiler looks on.
    """
    return _apply(_Product, x, values, bias, _Linear(products))


def convolve(
    images: Tensor, values: Tensor, bias: Tensor | None, convolution: Callable[[], Convolution]
) -> Tensor:
    """The same at each pixel of the output, for images (images, channels, height, width)."""
    return _apply(_Product, images, values, bias, _Convolved(convolution))


def _apply(function: Any, x: Tensor, *arguments: Any) -> Tensor:
    if torch.compiler.is_exporting():
        raise MismatchError(
            "a sparse layer cannot be exported, its products being no operators of PyTorch: "
            "export topkast.densify(copy.deepcopy(model))"
        )
    if torch.compiler.is_compiling():
        compiled: Tensor = _outside(function, x, *arguments)
        return compiled
    return _without_autocast(function, x, *arguments)


def _without_autocast(function: Any, x: Tensor, *arguments: Any) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        output: Tensor = function.apply(x, *arguments)[0]
    return output


# Not called where nothing compiles: the decorator costs as much as a small product.
_outside: Any = torch.compiler.disable(
    _without_autocast,
    reason="topkast's sparse products are not traced: compile without fullgraph=True",
)


class Operator(Protocol):
    """A product of activations and values: y = x · W, and its adjoints, on tensors without graphs.

    The same for rows of features and for images; `x` is one of the two, `shape` its shape.
    """

    axes: tuple[int, ...]  # over which the gradient of the bias is summed

    def pack(self, x: Tensor) -> Tensor:
        """What the products read of `x`."""

    def forward(
        self, values: Tensor, packed: Tensor, bias: Tensor | None, shape: torch.Size
    ) -> Tensor:
        """The output, with W on A."""

    def pack_gradient(self, grad_output: Tensor, shape: torch.Size) -> Tensor:
        """What the products read of a gradient of the output."""

    def input_gradient(self, values: Tensor, packed: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of `x`, with W on A."""

    def weight_gradient(
        self, packed_gradient: Tensor, packed: Tensor, out: Tensor, shape: torch.Size
    ) -> None:
        """Write the gradient of W on B into `out` (|B|,)."""

    def on_backward_set(self) -> Operator:
        """The same with W on all of B."""


class _Linear:
    axes: tuple[int, ...] = (0,)

    def __init__(self, products: Callable[[], Products]) -> None:
        self._find_products = products

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
        return _Linear(self._products.on_backward_set)


class _Convolved:
    axes: tuple[int, ...] = (0, 2, 3)

    def __init__(self, convolution: Callable[[], Convolution]) -> None:
        self._find_convolution = convolution

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
        return _Convolved(self._convolution.on_backward_set)


class _Product(torch.autograd.Function):
    """The output, and what the backward pass reads of the input."""

    @staticmethod
    def forward(
        x: Tensor, values: Tensor, bias: Tensor | None, operator: Operator
    ) -> tuple[Tensor, Tensor]:
        packed = operator.pack(x)
        return operator.forward(values.detach().view(-1), packed, bias, x.shape), packed

    @staticmethod
    def setup_context(context: Any, inputs: Any, output: Any) -> None:
        x, values, _, context.operator = inputs
        packed = output[1]
        context.mark_non_differentiable(packed)
        context.set_materialize_grads(False)
        context.shape = x.shape
        wanted = context.needs_input_grad
        # The input itself is for derivatives of derivatives.
        context.save_for_backward(*((x, packed) if wanted[1] else (None, None)), values)

    @staticmethod
    def backward(context: Any, grad_output: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None
        x, packed, values = context.saved_tensors
        operator, wanted = context.operator, context.needs_input_grad
        grad_bias = grad_output.sum(operator.axes) if wanted[2] else None
        if not (wanted[0] or wanted[1]):
            return None, None, grad_bias, None
        arguments = grad_output, x, packed, values, _Call(operator, context.shape, wanted[:2])
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            grads = _ProductGradient.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            grads = _gradients(*arguments)
        return *grads, grad_bias, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _one_by_one(_Product, info, in_dims, arguments)


@dataclass(frozen=True, eq=False)
class _Call:
    """What a call of a product was: one object, which no library takes apart."""

    operator: Operator
    shape: torch.Size
    wanted: tuple[bool, bool]


class _ProductGradient(torch.autograd.Function):
    """The gradients of input and values, as functions of those and of the output's gradient."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, Tensor | None]:
        return _gradients(*arguments)

    @staticmethod
    def setup_context(context: Any, inputs: Any, output: Any) -> None:
        grad_output, x, _, values, context.call = inputs
        context.set_materialize_grads(False)
        context.save_for_backward(grad_output, x, values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        context: Any, for_input: Tensor | None, for_values: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad_output, x, values = context.saved_tensors
        operator, shape = context.call.operator, context.call.shape
        flat = values.detach().view(-1)
        grads = torch.zeros_like(grad_output)
        grad_x = None if x is None else torch.zeros_like(x)
        grad_values = torch.zeros_like(values)
        gradient = operator.pack_gradient(grad_output, shape)
        if for_input is not None:
            packed = operator.pack(for_input)
            grads += operator.forward(flat, packed, None, shape)
            operator.weight_gradient(gradient, packed, grad_values.view(-1), shape)
        if for_values is not None and x is not None and grad_x is not None:
            whole, direction = operator.on_backward_set(), for_values.reshape(-1)
            grads += whole.forward(direction, whole.pack(x), None, shape)
            gradient = whole.pack_gradient(grad_output, shape)
            grad_x += whole.input_gradient(direction, gradient, shape)
        return grads, grad_x, None, grad_values, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _one_by_one(_ProductGradient, info, in_dims, arguments)


def _gradients(
    grad_output: Tensor,
    x: Tensor | None,
    packed: Tensor | None,
    values: Tensor,
    call: _Call,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and values, as far as they are wanted."""
    operator, shape, wanted = call.operator, call.shape, call.wanted
    gradient = operator.pack_gradient(grad_output, shape)
    grad_x = grad_values = None
    if wanted[0]:
        grad_x = operator.input_gradient(values.detach().view(-1), gradient, shape)
    if wanted[1]:
        assert packed is not None
        grad_values = torch.empty_like(values)
        operator.weight_gradient(gradient, packed, grad_values.view(-1), shape)
    return grad_x, grad_values


def _one_by_one(function: Any, info: Any, in_dims: Any, arguments: Any) -> Any:
    """``torch.vmap`` of a function by a loop."""
    results = []
    for number in range(info.batch_size):
        chosen = [
            argument
            if dim is None or not isinstance(argument, Tensor)
            else argument.select(dim, number)
            for argument, dim in zip(arguments, in_dims, strict=True)
        ]
        results.append(function.apply(*chosen))
    stacked = tuple(
        None if parts[0] is None else torch.stack(parts) for parts in zip(*results, strict=True)
    )
    return stacked, tuple(None if part is None else 0 for part in stacked)
