"""The penalty's gradient in PyTorch: one call for few entries, two for many, the same bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from topkast_torch.execution._penalized import _FEW, add_penalty
from torch import Tensor

from topkast import Support
from topkast.adapter import Step

STEP = Step(penalty=0.3, penalty_kind="l2", density=0.1, exploring=True)


def vectors(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Support]:
    generator = torch.Generator().manual_seed(size)
    gradient, values = torch.randn(2, size, generator=generator, dtype=dtype)
    return gradient, values, Support(torch.arange(size, dtype=torch.int32), size // 3)


def expected(gradient: Tensor, values: Tensor, split: int, step: Step) -> Tensor:
    direction = values.sgn() if step.penalty_kind == "l1" else values
    sections = (split, step.penalty), (len(gradient) - split, step.penalty / step.density)
    parts = zip(
        gradient.split([size for size, _ in sections]),
        direction.split([size for size, _ in sections]),
        sections,
        strict=True,
    )
    return torch.cat([torch.add(own, toward, alpha=by) for own, toward, (_, by) in parts])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 3, 17, 1000, _FEW, _FEW + 1])
@pytest.mark.parametrize("penalty_kind", ["l2", "l1"])
def test_few_and_many_entries_have_the_bits_of_torch_add(
    size: int, dtype: torch.dtype, penalty_kind: Literal["l2", "l1"]
) -> None:
    gradient, values, support = vectors(size, dtype)
    step = replace(STEP, penalty_kind=penalty_kind)
    correct = expected(gradient, values, support.forward, step)
    assert torch.equal(add_penalty(gradient, values, support, step, None), correct)
    buffer = gradient.clone()  # as in masked execution, where the sum replaces the gradient
    assert add_penalty(buffer, values, support, step, buffer) is buffer
    assert torch.equal(buffer, correct)


def test_another_coefficient_or_support_takes_effect_at_once() -> None:
    gradient, values, support = vectors(10, torch.float32)
    add_penalty(gradient, values, support, STEP, None)
    for step, split in [(replace(STEP, penalty=0.5), 3), (STEP, 7), (replace(STEP, density=1), 7)]:
        other = Support(support.indices, split)
        correct = expected(gradient, values, split, step)
        assert torch.equal(add_penalty(gradient, values, other, step, None), correct)


def test_a_resting_set_has_no_gradient_and_the_gradient_of_the_model_stays() -> None:
    gradient, values, support = vectors(10, torch.float32)
    before = gradient.clone()
    for step in (replace(STEP, exploring=False), replace(STEP, exploring=False, penalty=0.0)):
        total = add_penalty(gradient, values, support, step, None)
        assert not total[support.forward :].any()
        assert torch.equal(gradient, before)
