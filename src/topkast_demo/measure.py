"""Sizes and bytes of a network in training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from topkast._patterns import kept_dense
from topkast_demo.trainer import Trainer


@dataclass(frozen=True)
class Size:
    """Numbers of weights of a tensor, of its set A and of its set B."""

    weights: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Memory:
    """Bytes over all tensors of a network."""

    gradient: int  # gradients that the optimizer gets
    state: int  # the inner optimizer's state
    total: int  # weights, whole gradients and everything that the optimizer holds


def measure_sizes(trainer: Trainer, dense: tuple[str, ...]) -> dict[str, Size]:
    """Measure the tensors that sparse runs make sparse, also in a dense run."""
    params, masks = trainer.params(), trainer.masks()
    dense_names = kept_dense(params, dense)
    sizes = {}
    for name, param in params.items():
        if name not in dense_names:
            weights = math.prod(param.shape)
            sizes[name] = Size(weights, weights, weights)
            if name in masks:
                sizes[name] = Size(weights, *(int(mask.sum()) for mask in masks[name]))
    return sizes


def measure_memory(trainer: Trainer) -> Memory:
    """Measure bytes of gradients and state after a step; a sparse tensor's gradient is on B."""
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
