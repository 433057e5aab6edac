"""Sparse linear layers that read the same activations as one differentiable function."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from topkast_torch.sparse.chains._differentiate import differentiate, multiply_unrecorded
from topkast_torch.sparse.chains._parallel_passes import ParallelPasses


def run_parallel(
    x: Tensor, passes: ParallelPasses, values: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """The output of each layer for x of shape (batch, features), which `passes` accepts."""
    if not torch.is_grad_enabled():
        return passes.forward(x, values, biases)[0]
    outputs: tuple[Tensor, ...] = _Parallel.apply(x, passes, *values, *biases)  # type: ignore[no-untyped-call]
    return outputs


class _Parallel(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, x: Tensor, passes: ParallelPasses, *params: Tensor | None
    ) -> tuple[Tensor, ...]:
        count = len(passes.products)
        values: Any = params[:count]
        outputs, packed = passes.forward(x, values, params[count:])
        context.set_materialize_grads(False)
        context.passes, context.shape = passes, x.shape
        needs_values = any(context.needs_input_grad[2 : 2 + count])
        context.save_for_backward(*((x, packed) if needs_values else (None, None)), *params)
        return tuple(outputs)

    @staticmethod
    def backward(context: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        passes, needs = context.passes, context.needs_input_grad
        if all(gradient is None for gradient in grad_outputs):
            return (None,) * len(needs)
        x, packed, *params = context.saved_tensors
        count = len(passes.products)
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            if x is None:  # the gradient of x does not depend on x
                x = params[0].new_zeros(context.shape).requires_grad_()
            compute = partial(_compute, passes=passes)
            needed = [needs[0], *needs[2:]]
            grad_x, *grads = differentiate(compute, [x, *params], needed, grad_outputs)
            return grad_x, None, *grads
        flags = needs[0], needs[2 : 2 + count], needs[2 + count :]
        grads = passes.backward(grad_outputs, packed, params[:count], flags)
        return grads.x, None, *grads.values, *grads.biases


def _compute(inputs: list[Any], passes: ParallelPasses) -> list[Tensor]:
    """The outputs, by the layers one by one."""
    x, *params = inputs
    count = len(passes.products)
    layers = zip(params[:count], params[count:], passes.products, strict=True)
    return [multiply_unrecorded(x, *layer) for layer in layers]
