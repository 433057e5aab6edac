"""The three ways to train that the demo compares, whatever the framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import topkast
from topkast._options import kept_dense
from topkast_demo.settings import Settings

LABELS = {"dense": "dense", "static": "static random", "topkast": "Top-KAST"}


def wrapper_options(
    method: str, settings: Settings, dense: tuple[str, ...]
) -> dict[str, Any] | None:
    """Options of :func:`topkast.wrap_optimizer` for a method; None: it is not to be wrapped.

    Without exploration and refreshes Top-KAST trains the weights that are the largest at the
    start and no others: the random ones that are not zero.
    """
    if method == "dense":
        return None
    static = method == "static"
    return {
        "fwd": settings.fwd,
        "bwd": settings.fwd if static else settings.bwd,
        "refresh_every": settings.steps + 1 if static else settings.refresh_every,
        "penalty": 0.0 if static else settings.penalty,
        "dense": dense,
        "seed": settings.seed,
    }


def draw_static_masks(
    params: Mapping[str, Any], settings: Settings, dense: tuple[str, ...]
) -> dict[str, NDArray[np.float32]]:
    """A random |A| of each tensor that is to be sparse: 1 for what is kept of it, 0 elsewhere.

    torch draws for all frameworks.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    kept = kept_dense(params, dense)
    masks = {}
    for name, param in params.items():
        if name not in kept:
            shape = tuple(param.shape)
            draws = torch.rand(shape, generator=generator, dtype=torch.float64).numpy()
            chosen = topkast.select(draws, fwd=settings.fwd, bwd=settings.fwd)
            mask = np.zeros(draws.size, dtype=np.float32)
            mask[chosen.indices] = 1
            masks[name] = mask.reshape(shape)
    return masks
