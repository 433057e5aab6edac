"""Sparse linear layers in a row as one differentiable function."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from topkast_torch.sparse.chains._differentiate import differentiate, multiply_unrecorded
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
            compute = partial(_compute, passes=passes)
            grad_x, *grads = differentiate(
                compute, [x, *params], [needs[0], *needs[2:]], [grad_output]
            )
            return grad_x, None, *grads
        count = len(passes.products)
        flags = needs[0], needs[2 : 2 + count], needs[2 + count :]
        grads = passes.backward(grad_output, packed, output, params[:count], flags)
        return grads.x, None, *grads.values, *grads.biases


def _compute(inputs: list[Any], passes: Passes) -> list[Tensor]:
    """The output, by the layers one by one."""
    hidden, *params = inputs
    count = len(passes.products)
    for number, products in enumerate(passes.products):
        values, bias = params[number], params[count + number]
        hidden = multiply_unrecorded(hidden, values, bias, products)
        if passes.rectifies[number]:
            hidden = hidden.relu()
    return [hidden]
