"""The wrapped optimizer of a run, the sizes of its sets, and its FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

import topkast
from topkast import OptionError
from topkast.methods import ACDC, IHT, GradualPruning
from topkast_paper.settings import Settings


def penalty_of(settings: Settings) -> float:
    """The coefficient of the exploration penalty; 0 in dense training."""
    if settings.method is None:
        return 0.0
    return settings.method.default_penalty if settings.penalty is None else settings.penalty


def is_sparse(name: str, param: Any, settings: Settings) -> bool:
    """Whether the run makes a Parameter sparse."""
    return (
        settings.method is not None
        and sum(size > 1 for size in param.shape) > 1
        and not any(fnmatchcase(name, pattern) for pattern in settings.dense)
    )


def decay_groups(model: nn.Module, settings: Settings, decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weights with weight decay, and all other Parameters without.

    The exploration penalty is the weight decay of sparse weights, if there is one. Biases and the
    Parameters of batch norm have none, as in RigL's experiments.
    """
    groups: dict[float, list[tuple[str, Any]]] = {decay: [], 0.0: []}
    for name, param in model.named_parameters():
        is_penalized = is_sparse(name, param, settings) and penalty_of(settings) > 0
        groups[decay if param.ndim > 1 and not is_penalized else 0.0].append((name, param))
    return [{"params": params, "weight_decay": rate} for rate, params in groups.items() if params]


def wrap(optimizer: Any, settings: Settings, *, seed: int) -> Any:
    """Wrap an optimizer as the settings say; the same optimizer in dense training."""
    if settings.method is None:
        return optimizer
    return topkast.wrap_optimizer(
        optimizer,
        fwd=settings.fwd,
        bwd=settings.bwd,
        refresh_every=settings.refresh_every,
        penalty=settings.penalty,
        explore_until=settings.explore_until,
        distribution=settings.distribution,
        dense=settings.dense,
        method=settings.method,
        seed=seed,
    )


def measure_sets(model: nn.Module, optimizer: Any, settings: Settings) -> dict[str, Any]:
    r"""Exact sizes: of each sparse tensor, and of the whole model.

    ``"tensors"`` has the number of weights, \|A\| and \|B\| by name. ``"forward_density"`` and
    ``"backward_density"`` are shares of these weights; ``"parameters"`` counts all Parameters, and
    ``"forward_parameters"`` those that the trained model needs.
    """
    parameters = sum(param.numel() for param in model.parameters())
    tensors: dict[str, list[int]] = {}
    if settings.method is not None:
        sparse = {name for name, p in model.named_parameters() if is_sparse(name, p, settings)}
        tensors = {
            row.name: [math.prod(row.shape), row.forward, row.backward]
            for row in topkast.summary(optimizer).tensors
            if row.name in sparse
        }
    sizes = [sum(column) for column in zip(*tensors.values(), strict=True)] or [0, 0, 0]
    weights, forward, backward = sizes
    return {
        "tensors": tensors,
        "parameters": parameters,
        "forward_parameters": parameters - weights + forward,
        "forward_density": forward / weights if weights else 1.0,
        "backward_density": backward / weights if weights else 1.0,
    }


def measure_flops(settings: Settings, cost: Callable[..., topkast.Cost]) -> dict[str, float]:
    """FLOPs of training by :func:`topkast.cost`, given it with its model filled in.

    ``"training_flops"`` are those of the whole run, ``"training_fraction"`` the same as a multiple
    of those of a dense run of ordinary length, ``"forward_fraction"`` those of the trained model's
    forward pass as a fraction of the dense model's.

    Raises :class:`topkast.OptionError` for a schedule that ends after the run.
    """
    parts = _costs(settings, cost)
    per_sample = sum(share * part.training_flops for share, part in parts)
    dense = parts[0][1].dense_training_flops
    return {
        "training_flops": per_sample * settings.batch * settings.total_steps,
        "training_fraction": per_sample / dense * settings.total_steps / settings.steps,
        "forward_fraction": parts[0][1].forward_fraction,
    }


def _costs(
    settings: Settings, cost: Callable[..., topkast.Cost]
) -> list[tuple[float, topkast.Cost]]:
    """Costs of a step in the stretches of a run, with their shares of the steps."""
    method = settings.method
    if method is None:
        return [(1.0, cost(method="dense"))]
    options: dict[str, Any] = {
        "method": method,
        "fwd": settings.fwd,
        "dense": settings.dense or None,
        "distribution": settings.distribution,
        "refresh_every": settings.refresh_every,
    }
    if isinstance(method, GradualPruning | IHT | ACDC) and method.end > settings.total_steps:
        raise OptionError(
            f"{type(method).__name__} reaches fwd at update {method.end}, not within "
            f"{settings.total_steps} steps of the run: choose an earlier end, or more steps"
        )
    if method.schedules:
        options["steps"] = settings.total_steps
    if method.backward != "any":
        return [(1.0, cost(**options))]
    until, total = settings.explore_until, settings.total_steps
    explored = 1.0 if until is None else min(until, total) / total
    stretches = ((explored, settings.bwd), (1 - explored, settings.fwd))
    return [(share, cost(bwd=bwd, **options)) for share, bwd in stretches if share]
