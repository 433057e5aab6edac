"""The products as differentiable functions of rows of features or of images.

A product is linear in each argument, so its derivatives are products of the same kind, and can be
differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, Protocol, TypeAlias

import torch
from torch import Tensor

from topkast import MismatchError
from topkast_torch.sparse._convolutions import Convolution
from topkast_torch.sparse._products import CompiledProducts, Products
from topkast_torch.sparse.chains._observers import in_transform

Record: TypeAlias = Callable[[Tensor, Tensor], None]


def multiply(
    x: Tensor, values: Tensor, bias: Tensor | None, products: Callable[[], Products], record: Record
) -> Tensor:
    """The product x · Wᵀ + bias with W on A, for x of shape (batch, features); gradients on B.

    `products` is called outside of function transforms and compilation. `record` gets x and the
    gradient of the output in each backward pass, outside of function transforms.
    """
    if not (torch.compiler.is_compiling() or in_transform()):
        compiled = products()
        if isinstance(compiled, CompiledProducts) and compiled.passes.accepts(x, [values], [bias]):
            if not torch.is_grad_enabled():
                return compiled.passes.forward(x, [values], [bias])[0]
            output: Tensor = _CompiledProduct.apply(x, values, bias, compiled, record)  # type: ignore[no-untyped-call]
            return output
    return _apply(_Product, x, values, bias, _LinearOperator(products, record))


def unflatten(rows: Tensor, leading: Sequence[int]) -> Tensor:
    """Rows (batch, features) as (*leading, features); not a view, which FSDP2 warns of."""
    if len(leading) == 1:
        return rows
    shaped: Tensor = torch.ops.aten._unsafe_view(rows, [*leading, rows.shape[1]])
    return shaped


def convolve(
    images: Tensor,
    values: Tensor,
    bias: Tensor | None,
    convolution: Callable[[], Convolution],
    record: Record,
) -> Tensor:
    """The convolution of images (images, channels, height, width) with W on A; gradients on B."""
    return _apply(_Product, images, values, bias, _ConvolutionOperator(convolution, record))


def _apply(function: Any, x: Tensor, *arguments: Any) -> Tensor:
    if torch.compiler.is_exporting():
        refuse_export()
    if torch.compiler.is_compiling():
        compiled: Tensor = _apply_untraced(function, x, *arguments)
        return compiled
    return _without_autocast(function, x, *arguments)


def refuse_export() -> NoReturn:
    """Raise :class:`topkast.MismatchError`: an export would lack the products of the layer."""
    raise MismatchError(
        "a sparse layer cannot be exported, because its products are not PyTorch operators: "
        "export topkast.densify(copy.deepcopy(model))"
    )


def _refuse_forward_mode() -> NoReturn:
    raise MismatchError(
        "sparse layers have no forward-mode derivatives (torch.func.jvp, jacfwd and hessian, "
        "torch.autograd.forward_ad): use reverse mode (torch.func.vjp, jacrev), or differentiate "
        "topkast.densify(copy.deepcopy(model))"
    )


def _without_autocast(function: Any, x: Tensor, *arguments: Any) -> Tensor:
    output: Tensor
    if not torch.is_autocast_enabled(x.device.type):  # the context costs as much as a product
        output = function.apply(x, *arguments)[0]
        return output
    with torch.autocast(x.device.type, enabled=False):
        output = function.apply(x, *arguments)[0]
    return output


# Only used while compiling: the decorator costs as much as a small product.
_apply_untraced: Any = torch.compiler.disable(
    _without_autocast,
    reason="topkast's sparse products are not traced: compile without fullgraph=True",
)


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


class _LinearOperator:
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
        return _LinearOperator(self._products.on_backward_set, self.record)


class _ConvolutionOperator:
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
        return _ConvolutionOperator(self._convolution.on_backward_set, self.record)


class _Product(torch.autograd.Function):
    """The output, and the packed input for the backward pass."""

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
        needs_grad = context.needs_input_grad
        # The second derivative needs the input itself.
        context.save_for_backward(*((x, packed) if needs_grad[1] else (None, None)), values)

    @staticmethod
    def backward(context: Any, grad_output: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None
        x, packed, values = context.saved_tensors
        arguments = x, packed, values, context.operator, context.shape, context.needs_input_grad
        return *_differentiate(grad_output, *arguments), None

    @staticmethod
    def jvp(context: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode()

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _vmap_by_loop(_Product, info, in_dims, arguments)


class _CompiledProduct(torch.autograd.Function):
    """:class:`_Product` by compiled products, outside of function transforms and compilation.

    Each pass is one call of compiled code.
    """

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        products: CompiledProducts,
        record: Record,
    ) -> Tensor:
        output, packed = products.passes.forward(x, [values], [bias])
        context.products, context.record, context.shape = products, record, x.shape
        context.set_materialize_grads(False)
        needs_values = context.needs_input_grad[1]
        context.save_for_backward(*((x, packed) if needs_values else (None, None)), values)
        return output

    @staticmethod
    def backward(context: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None, None
        x, packed, values = context.saved_tensors
        products, needs_grad = context.products, context.needs_input_grad
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            operator = _LinearOperator(lambda: products, context.record)
            packed = None if packed is None else packed.view(products.packed_shape(len(x)))
            arguments = x, packed, values, operator, context.shape, needs_grad[:3]
            return *_differentiate(grad_output, *arguments), None, None
        if needs_grad[1]:
            context.record(x, grad_output)
        needs = needs_grad[0], (needs_grad[1],), (needs_grad[2],)
        grads = products.passes.backward(grad_output, packed, None, [values], needs)
        return grads.x, grads.values[0], grads.biases[0], None, None


def _differentiate(
    grad_output: Tensor,
    x: Tensor | None,
    packed: Tensor | None,
    values: Tensor,
    operator: Operator,
    shape: torch.Size,
    needs_grad: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, values and bias, which can be differentiated again."""
    grad_bias = grad_output.sum(operator.axes) if needs_grad[2] else None
    if not (needs_grad[0] or needs_grad[1]):
        return None, None, grad_bias
    in_transform = torch._C._are_functorch_transforms_active()
    if needs_grad[1] and not in_transform:
        assert x is not None
        operator.record(x, grad_output)
    call = _Call(operator, shape, (needs_grad[0], needs_grad[1]))
    arguments = grad_output, x, packed, values, call
    if torch.is_grad_enabled() or in_transform:
        grads = _ProductGradient.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        grads = _gradients(*arguments)
    return *grads, grad_bias


@dataclass(frozen=True, eq=False)
class _Call:
    """Arguments of a product as one object, opaque to function transforms."""

    operator: Operator
    shape: torch.Size
    needs_grad: tuple[bool, bool]  # of input and values


class _ProductGradient(torch.autograd.Function):
    """Gradients of input and values, as a function of the output's gradient, input and values."""

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
        context: Any, grad_grad_x: Tensor | None, grad_grad_values: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad_output, x, values = context.saved_tensors
        operator, shape = context.call.operator, context.call.shape
        flat = values.detach().view(-1)
        grad_grad_output = torch.zeros_like(grad_output)
        grad_x = None if x is None else torch.zeros_like(x)
        grad_values = torch.zeros_like(values)
        gradient = operator.pack_gradient(grad_output, shape)
        if grad_grad_x is not None:
            packed = operator.pack(grad_grad_x)
            if context.needs_input_grad[3] and not torch._C._are_functorch_transforms_active():
                operator.record(grad_grad_x, grad_output)
            grad_grad_output += operator.forward(flat, packed, None, shape)
            operator.weight_gradient(gradient, packed, grad_values.view(-1), shape)
        if grad_grad_values is not None and x is not None and grad_x is not None:
            on_b, direction = operator.on_backward_set(), grad_grad_values.reshape(-1)
            grad_grad_output += on_b.forward(direction, on_b.pack(x), None, shape)
            gradient = on_b.pack_gradient(grad_output, shape)
            grad_x += on_b.input_gradient(direction, gradient, shape)
        return grad_grad_output, grad_x, None, grad_values, None

    @staticmethod
    def jvp(context: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode()

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _vmap_by_loop(_ProductGradient, info, in_dims, arguments)


def _gradients(
    grad_output: Tensor,
    x: Tensor | None,
    packed: Tensor | None,
    values: Tensor,
    call: _Call,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and values; None for one that is not needed."""
    operator, shape, needs_grad = call.operator, call.shape, call.needs_grad
    gradient = operator.pack_gradient(grad_output, shape)
    grad_x = grad_values = None
    if needs_grad[0]:
        grad_x = operator.input_gradient(values.detach().view(-1), gradient, shape)
    if needs_grad[1]:
        assert packed is not None
        grad_values = torch.empty_like(values)
        operator.weight_gradient(gradient, packed, grad_values.view(-1), shape)
    return grad_x, grad_values


def _vmap_by_loop(function: Any, info: Any, in_dims: Any, arguments: Any) -> Any:
    """``torch.vmap`` of a function as a loop over the batch."""
    results = []
    for index in range(info.batch_size):
        example = [
            argument
            if dim is None or not isinstance(argument, Tensor)
            else argument.select(dim, index)
            for argument, dim in zip(arguments, in_dims, strict=True)
        ]
        results.append(function.apply(*example))
    stacked = tuple(
        None if outputs[0] is None else torch.stack(outputs)
        for outputs in zip(*results, strict=True)
    )
    return stacked, tuple(None if output is None else 0 for output in stacked)
