"""The gradient that the inner optimizer sees: that of the loss and that of the penalty."""

from __future__ import annotations

import torch
from torch import Tensor

from topkast import Support
from topkast.adapter import Step


def add_penalty(
    gradient: Tensor, values: Tensor, support: Support, step: Step, out: Tensor | None
) -> Tensor:
    """A gradient (|B|,) plus the penalty's, zero on B∖A if that rests; in `out` if given.

    `values` (|B|,) are the weights, without gradient.
    """
    split = support.forward_size
    if out is None:
        if split == len(values) and step.penalty and step.penalty_kind == "l2" and not step.noise:
            return torch.add(gradient, values, alpha=step.on_active)
        out = torch.empty_like(gradient)
    if step.penalty:
        direction = values if step.penalty_kind == "l2" else torch.sgn(values)
        if split == len(values):
            torch.add(gradient, direction, alpha=step.on_active, out=out)
        else:
            sizes = [split, len(values) - split]
            sections = (vector.split_with_sizes(sizes) for vector in (gradient, direction, out))
            coefficients = step.on_active, step.on_exploring
            for own, toward, target, coefficient in zip(*sections, coefficients, strict=True):
                torch.add(own, toward, alpha=coefficient, out=target)
    elif out is not gradient:
        out.copy_(gradient)
    if step.noise:
        out += step.noise_on(support.entries, out.dtype)
    if not step.exploring:
        out[split:].zero_()
    return out
