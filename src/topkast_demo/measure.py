"""Sizes and bytes of a network in training, counted on its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from topkast._options import kept_dense
from topkast_demo.trainer import Trainer


@dataclass(frozen=True)
class Size:
    """Number of weights of a tensor, and how many of them are in A and in B."""

    weights: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Memory:
    """Bytes over all tensors of a network."""

    gradient: int  # that the optimizer is given
    state: int  # that it keeps
    total: int  # with weights, whole gradients, and what it holds besides


def measure_sizes(trainer: Trainer, dense: tuple[str, ...]) -> dict[str, Size]:
    """Sizes of the tensors that are not kept dense, whether the method makes them sparse or not."""
    params, masks = trainer.params(), trainer.masks()
    kept = kept_dense(params, dense)
    sizes = {}
    for name, param in params.items():
        if name not in kept:
            weights = math.prod(param.shape)
            sizes[name] = Size(weights, weights, weights)
            if name in masks:
                sizes[name] = Size(weights, *(int(mask.sum()) for mask in masks[name]))
    return sizes


def measure_memory(trainer: Trainer) -> Memory:
    """Bytes of gradient and state after a step; of a sparse tensor those on B."""
    masks = trainer.masks()
    gradient = 0
    for name, param in trainer.params().items():
        weights = int(masks[name].backward.sum()) if name in masks else math.prod(param.shape)
        gradient += weights * int(param.dtype.itemsize)
    return Memory(gradient, trainer.state_bytes(), trainer.total_bytes())


def density(sizes: dict[str, Size], which: Literal["forward", "backward"]) -> float:
    """Share of the weights that are in A or in B."""
    kept: int = sum(getattr(size, which) for size in sizes.values())
    return kept / sum(size.weights for size in sizes.values())
