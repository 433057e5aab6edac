"""Gradients of a product as functions, which can be differentiated again and transformed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from topkast import MismatchError
from topkast_torch.sparse.derivatives._operators import Operator


class LoopedFunction(torch.autograd.Function):
    """A function that ``torch.vmap`` calls once for each example, without forward mode."""

    @staticmethod
    def jvp(context: Any, *tangents: Any) -> NoReturn:
        raise MismatchError(
            "sparse layers have no forward-mode derivatives (torch.func.jvp, jacfwd and hessian, "
            "torch.autograd.forward_ad): use reverse mode (torch.func.vjp, jacrev), or "
            "differentiate topkast.densify(copy.deepcopy(model))"
        )

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *arguments: Any) -> Any:
        results = []
        for index in range(info.batch_size):
            example = [
                argument
                if dim is None or not isinstance(argument, Tensor)
                else argument.select(dim, index)
                for argument, dim in zip(arguments, in_dims, strict=True)
            ]
            results.append(cls.apply(*example))  # type: ignore[no-untyped-call]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(
            None if outputs[0] is None else torch.stack(outputs)
            for outputs in zip(*results, strict=True)
        )
        return stacked, tuple(None if output is None else 0 for output in stacked)


def differentiate(
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


class _ProductGradient(LoopedFunction):
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
    def backward(
        context: Any, grad_grad_x: Tensor | None, grad_grad_values: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad_output, x, values = context.saved_tensors
        call, transforms = context.call, torch._C._are_functorch_transforms_active()
        if grad_grad_x is not None and context.needs_input_grad[3] and not transforms:
            call.operator.record(grad_grad_x, grad_output)
        arguments = grad_output, x, values, grad_grad_x, grad_grad_values, call
        if torch.is_grad_enabled() or transforms:
            grads = _SecondGradient.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            grads = _second_gradients(*arguments)
        grad_grad_output, grad_x, grad_values = grads
        return grad_grad_output, grad_x, None, grad_values, None


class _SecondGradient(LoopedFunction):
    """Gradients of :class:`_ProductGradient`, as a function that transforms see."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        return _second_gradients(*arguments)

    @staticmethod
    def setup_context(context: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(context: Any, *grads: Tensor | None) -> NoReturn:
        raise MismatchError(
            "sparse layers have first and second derivatives alone: differentiate "
            "topkast.densify(copy.deepcopy(model)) a third time"
        )


def _second_gradients(
    grad_output: Tensor,
    x: Tensor | None,
    values: Tensor,
    grad_grad_x: Tensor | None,
    grad_grad_values: Tensor | None,
    call: _Call,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of the output's gradient, of the input and of the values."""
    operator, shape = call.operator, call.shape
    flat = values.detach().view(-1)
    grad_grad_output = torch.zeros_like(grad_output)
    grad_x = None if x is None else torch.zeros_like(x)
    grad_values = torch.zeros_like(values)
    if grad_grad_x is not None:
        packed, gradient = operator.pack(grad_grad_x), operator.pack_gradient(grad_output, shape)
        grad_grad_output += operator.forward(flat, packed, None, shape)
        operator.weight_gradient(gradient, packed, grad_values.view(-1), shape)
    if grad_grad_values is not None and x is not None and grad_x is not None:
        on_b, direction = operator.on_backward_set(), grad_grad_values.reshape(-1)
        grad_grad_output += on_b.forward(direction, on_b.pack(x), None, shape)
        gradient = on_b.pack_gradient(grad_output, shape)
        grad_x += on_b.input_gradient(direction, gradient, shape)
    return grad_grad_output, grad_x, grad_values


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
