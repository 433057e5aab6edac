"""The gradient that the inner optimizer sees: that of the loss and that of the penalty."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from topkast import Support
from topkast.adapter import Step

_FEW = 1 << 14  # entries, below which a call of PyTorch costs more than its work


def add_penalty(
    gradient: Tensor, values: Tensor, support: Support, step: Step, out: Tensor | None
) -> Tensor:
    """A gradient (|B|,) plus the penalty's, zero on B∖A if that rests; in `out` if given.

    `values` (|B|,) are the weights, without gradient.
    """
    split, size = support.forward_size, support.backward_size
    if step.penalty:
        direction = values if step.penalty_kind == "l2" else torch.sgn(values)
        numbers = step.on_active, step.on_exploring
        if size <= _FEW and _is_exact(gradient) and _is_exact(direction):
            # One call in place of five; the sum has the same bits.
            coefficients = _coefficients(split, size, *numbers, values.dtype)
            out = torch.addcmul(gradient, direction, coefficients, out=out)
        else:
            sizes = [split, size - split]
            out = torch.empty_like(gradient) if out is None else out
            sections = (vector.split_with_sizes(sizes) for vector in (gradient, direction, out))
            for own, toward, target, number in zip(*sections, numbers, strict=True):
                torch.add(own, toward, alpha=number, out=target)
    elif out is None:
        out = gradient.clone()
    elif out is not gradient:
        out.copy_(gradient)
    if step.noise:
        out += step.noise_on(support.entries, out.dtype)
    if not step.exploring:
        out[split:].zero_()
    return out


def _is_exact(vector: Tensor) -> bool:
    """Whether a coefficient in the dtype of this vector is as exact as ``alpha`` of torch.add."""
    return type(vector) is Tensor and vector.is_cpu and vector.dtype in _DTYPES


_DTYPES = torch.float32, torch.float64


@functools.lru_cache(maxsize=64)
def _coefficients(
    split: int, size: int, on_active: float, on_exploring: float, dtype: torch.dtype
) -> Tensor:
    """The penalty's coefficient of each entry, A first; shared by all tensors of these sizes."""
    coefficients = torch.full((size,), on_exploring, dtype=dtype, device="cpu")
    coefficients[:split] = on_active
    return coefficients
