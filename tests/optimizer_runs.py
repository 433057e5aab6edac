"""Short runs of wrapped optimizers, saved and compared bit for bit."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from topkast_torch.inner._inner_state import entries_of, walk
from torch import Tensor, nn

OPTIONS: dict[str, Any] = {"fwd": 0.8, "bwd": 0.5, "refresh_every": 3, "penalty": 0.2}
DENSE: dict[str, Any] = {"fwd": 0.0, "bwd": 0.0, "penalty": 0.0, "refresh_every": 2}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


def loss_of(model: nn.Module, step: int) -> Tensor:
    inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
    loss: Tensor = (model(inputs) - inputs[:, :4]).square().mean()
    return loss


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    loss_of(model, step).backward()


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        backward(model, step)
        torch.manual_seed(step)  # for optimizers that draw random numbers
        optimizer.step()


def save_and_load(state: Any) -> Any:
    """Save to a file and load without running code from it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_bits(first: Any, second: Any, where: str = "") -> None:
    """Raise unless two trees have equal bits; tensors may differ in shape, as compact ones do."""
    if isinstance(first, Tensor):
        assert torch.equal(first.reshape(-1), second.reshape(-1)), where
    elif isinstance(first, Mapping):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same_bits(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)) or hasattr(first, "maxlen"):
        assert len(first) == len(second), where
        for item, other in zip(first, second, strict=True):
            assert_same_bits(item, other, where)
    else:
        assert first == second, where


def entries_by_index(optimizer: Any, execution: Any) -> dict[Any, dict[int, Tensor]]:
    """The values of each entry per weight, by index of the weight."""
    state = optimizer._wrapper_state
    entries = entries_of(state.inner, execution.values, state.stores)
    indices = execution.support.indices
    specs = execution.profile.layout.specs
    columns: dict[Any, dict[int, Tensor]] = {}
    for number, (path, entry) in enumerate(walk(entries)):
        if path in specs:
            axis = specs[path].axis(execution.ranked.compact_shape)
            rows = entry.movedim(axis, 0).reshape(len(indices), -1)
            pairs = zip(indices.tolist(), rows.clone(), strict=True)
            columns[path, number] = dict(pairs)
        else:
            assert entry.numel() < len(indices), f"{path} may have one value per weight"
    return columns
