"""Small networks, trained in masked and in sparse execution."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import topkast
from topkast.selection._support import in_forward

# Finite differences along random directions; in the thorough session, of each entry.
BY_DIRECTIONS = os.environ.get("TOPKAST_HYPOTHESIS_PROFILE") != "thorough"

OPTIONS: dict[str, Any] = {"fwd": 0.8, "bwd": 0.6, "refresh_every": 7, "penalty": 1e-2}


# No bias has a zero gradient (as that of keys, or before a BatchNorm): Adam would turn its rounding
# errors into full steps.


class Attention(nn.Module):
    """A small transformer block of ``nn.Linear``."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.project_in = nn.Linear(width, 3 * width, bias=False)
        self.project_out = nn.Linear(width, width, bias=False)
        self.feed = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))

    def forward(self, hidden: Tensor) -> Tensor:
        batch, time, width = hidden.shape
        split = self.project_in(self.norm(hidden)).view(batch, time, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.project_out(mixed.transpose(1, 2).reshape(batch, time, width))
        fed: Tensor = self.feed(hidden)
        return hidden + fed


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 5)
    ), torch.randn(33, 30)


def convolutional() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Conv2d(4, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, stride=2, dilation=2, padding=2, groups=3, bias=False),
        nn.ReLU(),
        nn.Conv2d(12, 8, (1, 3), padding="same"),
        nn.Flatten(),
        nn.Linear(8 * 25, 5),
    ), torch.randn(6, 4, 10, 10)


def divisible() -> tuple[nn.Module, Tensor]:
    """Layers whose weights consist of blocks of up to 8 × 4."""
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 16, 3, stride=2, dilation=2, padding=2, groups=4, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16 * 16, 16),
        nn.Tanh(),
        nn.Linear(16, 8, bias=False),  # a bias would soon leave nothing but rounding errors
    ), torch.randn(24, 4, 8, 8)


def transformer() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(Attention(), Attention(), nn.Linear(24, 5)), torch.randn(3, 11, 24)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": mlp,
    "convolutional": convolutional,
    "transformer": transformer,
}
BLOCKS = [(4, 1), (2, 1), (8, 1), (2, 2), (1, 4)]
# All models, and one that consists of blocks.
CASES: list[Any] = [(model, {}) for model in MODELS] + [
    pytest.param(
        "divisible",
        {"block": block},
        marks=[] if block in ((4, 1), (2, 2)) else pytest.mark.slow,
    )
    for block in BLOCKS
]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, 0.05, momentum=0.9, weight_decay=0.01),
    # With a smaller eps, rounding errors of gradients near zero would become full steps.
    "adamw": lambda params: torch.optim.AdamW(params, 1e-2, eps=1e-4),
}


def prepare(
    model: str, optimizer: str = "adamw", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    built, inputs = (MODELS | {"divisible": divisible})[model]()
    built, inputs = built.to(dtype), inputs.to(dtype)
    opt = OPTIMIZERS[optimizer](list(built.named_parameters()))
    return built, topkast.wrap_optimizer(opt, **{**OPTIONS, **options}), inputs


def train(model: nn.Module, optimizer: Any, inputs: Tensor, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)
        batch = inputs + 0.1 * torch.randn_like(inputs)
        (model(batch) - 1).square().mean().backward()
        optimizer.step()


def assert_agree(first: Any, second: Any, tolerance: float = 1e-5) -> None:
    """Raise unless supports are identical and θ agrees within `tolerance` of its norm."""
    masks, others = topkast.masks(first), topkast.masks(second)
    assert masks.keys() == others.keys()
    for name, mask in masks.items():
        assert torch.equal(mask.forward, others[name].forward), name
        assert torch.equal(mask.backward, others[name].backward), name
    for (name, theta), other in zip(
        topkast.dense_params(first).items(), topkast.dense_params(second).values(), strict=True
    ):
        assert (theta - other).norm() <= tolerance * theta.norm(), name


def check_gradients(layer: Any, inputs: Tensor, dense: Callable[..., Tensor]) -> None:
    """Compare output and gradients on B with the dense layer, and with finite differences."""
    output = layer(inputs)
    weight = layer.weight.requires_grad_()
    expected = dense(inputs, weight, layer.bias)
    torch.testing.assert_close(output, expected)
    grad_output = torch.randn_like(output)
    others = [tensor for tensor in (inputs, layer.bias) if tensor is not None]
    grads = torch.autograd.grad(output, [layer.values, *others], grad_output)
    dense_grads = torch.autograd.grad(expected, [weight, *others], grad_output)
    on_b = dense_grads[0].reshape(-1)[layer.support.entries].view(layer.values.shape)
    torch.testing.assert_close(grads, (on_b, *dense_grads[1:]))

    def on_a(inputs: Tensor, values: Tensor, *bias: Tensor) -> Tensor:
        # The output does not depend on B∖A, so that finite differences would give zero there.
        is_active = in_forward(layer.support).view(values.shape)
        masked = torch.where(is_active, values, layer.values.detach())
        params = {"values": masked} | ({"bias": bias[0]} if bias else {})
        output: Tensor = torch.func.functional_call(layer, params, inputs)
        return output

    if inputs.numel():
        sources = (inputs, layer.values, *others[1:])
        assert torch.autograd.gradcheck(on_a, sources, fast_mode=BY_DIRECTIONS)
