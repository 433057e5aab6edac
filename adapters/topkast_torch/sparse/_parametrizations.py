"""Refuse parametrizations that divide a sparse tensor by the norm of a row."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from topkast import UnsupportedTensorError

_ENDINGS = {
    "original1": "original0",
    "_v": "_g",
}  # weight_norm: of the direction, and of its length


def check_parametrizations(sparse: Mapping[str, Tensor]) -> None:
    """Raise :class:`UnsupportedTensorError` for the direction of a ``weight_norm``.

    A row that loses all its entries would be divided by its norm, zero. The search goes from the
    tensors in `sparse` to the modules that hold them, since optimizers need not know names.
    """
    referrers: list[Any] = gc.get_referrers(*sparse.values())
    dictionaries = [referrer for referrer in referrers if isinstance(referrer, dict)]
    for name, direction in sparse.items():
        if any(_is_direction(direction, parameters) for parameters in dictionaries):
            raise UnsupportedTensorError(
                f"{name} is the direction of a weight_norm: rows that lose all their entries "
                f"would be divided by zero. Keep it dense, dense={name!r}, or remove the "
                "parametrization (torch.nn.utils.parametrize.remove_parametrizations)"
            )


def _is_direction(direction: Tensor, parameters: Mapping[Any, Any]) -> bool:
    """Whether a module's `parameters` have a tensor as a direction, and its length."""
    for key, value in list(parameters.items()):
        if value is direction and isinstance(key, str):
            for ending, length_ending in _ENDINGS.items():
                length = parameters.get(key.removesuffix(ending) + length_ending)
                if key.endswith(ending) and isinstance(length, Tensor):
                    return _is_length(length, direction)
    return False


def _is_length(length: Tensor, direction: Tensor) -> bool:
    """Whether `length` has the shape of a norm of `direction`, by row or of the whole tensor."""
    if length.dim() == 0:
        return True
    return length.dim() == direction.dim() and all(
        size in (1, full_size)
        for size, full_size in zip(length.shape, direction.shape, strict=True)
    )
