"""Gradients of layers that ran together, for derivatives of derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from topkast_torch.sparse._functions import multiply


def differentiate(
    compute: Callable[[list[Any]], Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of `compute` that can be differentiated again, None where they are not needed."""
    with torch.enable_grad():
        # An alias for each position: a tensor may be the input of several layers.
        aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        outputs = compute(aliases)
    pairs = [
        pair
        for pair in zip(outputs, grad_outputs, strict=True)
        if pair[0].requires_grad and pair[1] is not None
    ]
    wanted: Any = [alias for alias, needed in zip(aliases, needs, strict=True) if needed]
    grads = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            wanted,
            [gradient for _, gradient in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    )
    return [next(grads) if needed else None for needed in needs]


def multiply_unrecorded(x: Tensor, values: Tensor, bias: Tensor | None, products: Any) -> Tensor:
    """The output of one layer. Layers do not run together while their products are recorded."""
    return multiply(x, values, bias, lambda: products, _ignore)


def _ignore(x: Tensor, grad_output: Tensor) -> None:
    pass
