"""The products as differentiable functions of rows of features or of images.

A product is linear in each argument, so its derivatives are products of the same kind, and can be
differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from topkast import MismatchError
from topkast_torch.sparse._convolutions import Convolution
from topkast_torch.sparse._products import CompiledProducts, Products
from topkast_torch.sparse.chains._observers import in_transform
from topkast_torch.sparse.derivatives._gradients import LoopedFunction, differentiate
from topkast_torch.sparse.derivatives._operators import (
    ConvolutionOperator,
    LinearOperator,
    Operator,
    Record,
)


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
    return _apply(_Product, x, values, bias, LinearOperator(products, record))


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
    return _apply(_Product, images, values, bias, ConvolutionOperator(convolution, record))


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


class _Product(LoopedFunction):
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
        return *differentiate(grad_output, *arguments), None


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
            operator = LinearOperator(lambda: products, context.record)
            packed = None if packed is None else packed.view(products.packed_shape(len(x)))
            arguments = x, packed, values, operator, context.shape, needs_grad[:3]
            return *differentiate(grad_output, *arguments), None, None
        if needs_grad[1]:
            context.record(x, grad_output)
        needs = needs_grad[0], (needs_grad[1],), (needs_grad[2],)
        grads = products.passes.backward(grad_output, packed, None, [values], needs)
        return grads.x, grads.values[0], grads.biases[0], None, None
