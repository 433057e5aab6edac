"""Sparse linear layers in a row as one differentiable function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from topkast_torch.sparse._functions import multiply
from topkast_torch.sparse.chains._passes import Passes


def run_chain(
    x: Tensor, passes: Passes, values: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Tensor:
    """The output of all layers for x of shape (batch, features), which `passes` accepts."""
    if not torch.is_grad_enabled():
        return passes.forward(x, values, biases)[0]
    output: Tensor = _Chain.apply(x, passes, *values, *biases)  # type: ignore[no-untyped-call]
    return output


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, passes: Passes, *params: Tensor | None) -> Tensor:
        count = len(passes.products)
        values: Any = params[:count]
        output, packed = passes.forward(x, values, params[count:])
        context.set_materialize_grads(False)
        context.passes = passes
        context.save_for_backward(x, packed, output if passes.reads_output else None, *params)
        return output

    @staticmethod
    def backward(context: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        passes, needs = context.passes, context.needs_input_grad
        if grad_output is None:
            return (None,) * len(needs)
        x, packed, output, *params = context.saved_tensors
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            grad_x, *grads = _differentiate(
                grad_output, passes, [x, *params], [needs[0], *needs[2:]]
            )
            return grad_x, None, *grads
        count = len(passes.products)
        flags = needs[0], needs[2 : 2 + count], needs[2 + count :]
        grads = passes.backward(grad_output, packed, output, params[:count], flags)
        return grads.x, None, *grads.values, *grads.biases


def _differentiate(
    grad_output: Tensor, passes: Passes, inputs: list[Any], needs: list[bool]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: those of the layers one by one."""
    hidden, count = inputs[0], len(passes.products)
    with torch.enable_grad():
        for number, products in enumerate(passes.products):
            values, bias = inputs[1 + number], inputs[1 + count + number]
            hidden = multiply(hidden, values, bias, lambda products=products: products, _ignore)  # type: ignore[misc]
            if passes.rectifies[number]:
                hidden = hidden.relu()
    wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed]
    create_graph = torch.is_grad_enabled()
    grads = iter(torch.autograd.grad(hidden, wanted, grad_output, create_graph=create_graph))
    return [next(grads) if needed else None for needed in needs]


def _ignore(x: Tensor, grad_output: Tensor) -> None:
    """Chains do not run while products are recorded."""
