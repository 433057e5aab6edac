"""Which blocks the kernels for columns of weights multiply, and what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import topkast_torch
import torch
from sparse_training import check_gradients
from torch import nn

import topkast

kernels = pytest.importorskip("topkast.kernels")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the units for which kernels were made."""
    made: list[int] = []
    for name in ("UnitLinearProducts", "UnitConvolutionProducts"):

        class Recording(getattr(kernels, name)):  # type: ignore[misc]
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                made.append(options["rows"])

        monkeypatch.setattr(kernels, name, Recording)
    return made


def linear(block: tuple[int, int]) -> tuple[Any, torch.Tensor, Callable[..., Any]]:
    layer = topkast_torch.SparseLinear(6, 24, fwd=0.7, bwd=0.4, block=block, dtype=torch.float64)
    return layer, torch.randn(7, 6, dtype=torch.float64), nn.functional.linear


def convolution(
    block: tuple[int, int], groups: int
) -> tuple[Any, torch.Tensor, Callable[..., Any]]:
    model: Any = nn.Sequential(nn.Conv2d(8, 24, 3, groups=groups, dtype=torch.float64))
    inner = torch.optim.SGD(model.named_parameters(), 0.1)
    topkast.sparsify(model, topkast.wrap_optimizer(inner, fwd=0.7, bwd=0.4, block=block))

    def dense(images: Any, weight: Any, bias: Any) -> Any:
        return nn.functional.conv2d(images, weight, bias, groups=groups)

    return model[0], torch.randn(2, 8, 5, 4, dtype=torch.float64), dense


@pytest.mark.parametrize("groups", [0, 1, 4])  # 0: a linear layer; 4: of 6 rows each
@pytest.mark.parametrize("block", [(2, 1), (4, 1), (8, 1), (3, 1), (2, 2), (1, 2)], ids=str)
def test_columns_of_2_4_or_8_weights_have_kernels(
    made: list[int], block: tuple[int, int], groups: int
) -> None:
    layer, inputs, dense = convolution(block, groups) if groups else linear(block)
    inputs.requires_grad_()
    check_gradients(layer, inputs, dense)
    is_fast = block in [(2, 1), (4, 1), (8, 1)] and (groups != 4 or 6 % block[0] == 0)
    assert set(made) == ({block[0]} if is_fast else set())
    loss = layer(inputs).tanh().square().sum()
    (gradient,) = torch.autograd.grad(loss, layer.values, create_graph=True)
    torch.autograd.grad(gradient.square().sum(), inputs)  # which needs the products on all of B


def test_indices_written_to_between_the_passes_are_refused(made: list[int]) -> None:
    layer, inputs, _ = linear((4, 1))
    loss = layer(inputs).sum()
    layer.indices[: layer.active_count] = torch.arange(layer.active_count, dtype=torch.int32)
    with pytest.raises(topkast.MismatchError, match="written to between"):
        loss.backward()
    assert made
