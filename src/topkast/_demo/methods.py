"""The three ways to train that the demo compares, each as an optimizer for a given network."""

from __future__ import annotations

import torch
from torch import nn

import topkast
from topkast._demo.settings import Settings, find_optimizer
from topkast._options import kept_dense

LABELS = {"dense": "dense", "static": "static random", "topkast": "Top-KAST"}


def build_optimizer(
    method: str, model: nn.Module, settings: Settings, dense: tuple[str, ...]
) -> torch.optim.Optimizer:
    """Optimizer that trains the model densely, on a fixed random mask, or with Top-KAST."""
    if method == "static":
        _zero_at_random(model, settings, dense)
    choice = find_optimizer(settings.optimizer)
    optimizer: torch.optim.Optimizer = getattr(torch.optim, choice.name)(
        model.named_parameters(), lr=settings.lr, **choice.options
    )
    if method == "dense":
        return optimizer
    # Without exploration and refreshes Top-KAST trains the weights that are the largest at the
    # start and no others: the random ones that are not zero.
    static = method == "static"
    wrapped: torch.optim.Optimizer = topkast.wrap_optimizer(
        optimizer,
        fwd=settings.fwd,
        bwd=settings.fwd if static else settings.bwd,
        refresh_every=settings.steps + 1 if static else settings.refresh_every,
        penalty=0.0 if static else settings.penalty,
        dense=dense,
        seed=settings.seed,
    )
    return wrapped


def _zero_at_random(model: nn.Module, settings: Settings, dense: tuple[str, ...]) -> None:
    """Zero all weights but a random |A| of each tensor that is to be sparse."""
    generator = torch.Generator().manual_seed(settings.seed)
    params = dict(model.named_parameters())
    kept = kept_dense(params, dense)
    for name, param in params.items():
        if name not in kept:
            draws = torch.rand(param.shape, generator=generator, dtype=torch.float64)
            chosen = topkast.select(draws, fwd=settings.fwd, bwd=settings.fwd)
            mask = torch.zeros(param.numel(), dtype=param.dtype)
            mask[chosen.indices] = 1
            with torch.no_grad():
                param.mul_(mask.view_as(param))
