"""The three training methods that the demo compares, in any framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import topkast
from topkast._patterns import kept_dense
from topkast_demo.settings import Settings

LABELS = {"dense": "dense", "static": "static random", "topkast": "Top-KAST"}


def wrapper_options(
    method: str, settings: Settings, dense: tuple[str, ...]
) -> dict[str, Any] | None:
    """Options of :func:`topkast.wrap_optimizer` for a method; None: the optimizer is not wrapped.

    The static method is Top-KAST without exploration and refreshes. It trains only the largest
    initial weights, which are the nonzero ones of the random mask.
    """
    if method == "dense":
        return None
    is_static = method == "static"
    return {
        "fwd": settings.fwd,
        "bwd": settings.fwd if is_static else settings.bwd,
        "refresh_every": settings.steps + 1 if is_static else settings.refresh_every,
        "penalty": 0.0 if is_static else settings.penalty,
        "dense": dense,
        "seed": settings.seed,
    }


def draw_static_masks(
    params: Mapping[str, Any], settings: Settings, dense: tuple[str, ...]
) -> dict[str, NDArray[np.float32]]:
    """Draw a random mask of |A| entries for each sparse tensor: 1 if kept, 0 elsewhere.

    torch draws the masks for all frameworks.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    dense_names = kept_dense(params, dense)
    masks = {}
    for name, param in params.items():
        if name not in dense_names:
            shape = tuple(param.shape)
            scores = torch.rand(shape, generator=generator, dtype=torch.float64).numpy()
            support = topkast.select(scores, fwd=settings.fwd, bwd=settings.fwd)
            mask = np.zeros(scores.size, dtype=np.float32)
            mask[support.indices] = 1
            masks[name] = mask.reshape(shape)
    return masks
