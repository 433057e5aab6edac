"""Sizes and bytes of a model in training, counted on its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

import topkast
from topkast._options import kept_dense


@dataclass(frozen=True)
class Size:
    """Number of weights of a tensor, and how many of them are in A and in B."""

    weights: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Memory:
    """Bytes over all tensors of a model."""

    gradient: int  # that the optimizer is given
    state: int  # that it keeps


def measure_sizes(model: nn.Module, optimizer: Any, dense: tuple[str, ...]) -> dict[str, Size]:
    """Sizes of the tensors that are not kept dense, whether the optimizer is wrapped or not."""
    params = dict(model.named_parameters())
    masks = _masks(optimizer)
    sizes = {}
    for name in params.keys() - kept_dense(params, dense):
        weights = params[name].numel()
        sizes[name] = Size(weights, weights, weights)
        if name in masks:
            sizes[name] = Size(weights, *(int(mask.sum()) for mask in masks[name]))
    return {name: sizes[name] for name in params if name in sizes}


def measure_memory(model: nn.Module, optimizer: Any) -> Memory:
    """Bytes of gradient and state after a step; of a wrapped optimizer those on B."""
    masks = _masks(optimizer)
    gradient = state = 0
    for name, param in model.named_parameters():
        if param.grad is not None:
            grad = param.grad[masks[name].backward] if name in masks else param.grad
            gradient += _nbytes(grad)
        entries = optimizer.state[param].values()
        state += sum(_nbytes(entry) for entry in entries if isinstance(entry, Tensor))
    return Memory(gradient, state)


def density(sizes: dict[str, Size], which: Literal["forward", "backward"]) -> float:
    """Share of the weights that are in A or in B."""
    kept: int = sum(getattr(size, which) for size in sizes.values())
    return kept / sum(size.weights for size in sizes.values())


def _masks(optimizer: Any) -> dict[str, topkast.Masks]:
    wrapped = hasattr(optimizer, "__topkast_inspect__")
    return topkast.masks(optimizer) if wrapped else {}


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
