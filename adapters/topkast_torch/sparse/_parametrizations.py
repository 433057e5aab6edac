"""Parametrizations under which sparse tensors break: those that divide by the norm of a row."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from topkast import UnsupportedTensorError

_ENDINGS = {"original1": "original0", "_v": "_g"}  # of a weight_norm: direction, and its length


def check_parametrizations(sparse: Mapping[str, Tensor]) -> None:
    """Raise :class:`UnsupportedTensorError` for the direction of a ``weight_norm``.

    A row that loses all its entries would be divided by its norm, zero. `sparse` are tensors that
    are to be sparsified. The modules that hold them tell, since optimizers need not have names.
    """
    holders: list[Any] = gc.get_referrers(*sparse.values())
    parameters = [holder for holder in holders if isinstance(holder, dict)]
    for name, direction in sparse.items():
        if any(_is_direction(direction, holder) for holder in parameters):
            raise UnsupportedTensorError(
                f"{name} is the direction of a weight_norm: rows that lose all their entries "
                f"would be divided by zero. Keep it dense, dense={name!r}, or remove the "
                "parametrization (torch.nn.utils.parametrize.remove_parametrizations)"
            )


def _is_direction(direction: Tensor, parameters: Mapping[Any, Any]) -> bool:
    """Whether a module with these Parameters has it as a direction, beside its length."""
    for key, value in list(parameters.items()):
        if value is direction and isinstance(key, str):
            for ending, other in _ENDINGS.items():
                length = parameters.get(key.removesuffix(ending) + other)
                if key.endswith(ending) and isinstance(length, Tensor):
                    return _is_length(length, direction)
    return False


def _is_length(length: Tensor, direction: Tensor) -> bool:
    """Whether one has the shape of the norms of the other's rows, or of all of it."""
    if length.dim() == 0:
        return True
    return length.dim() == direction.dim() and all(
        one in (1, other) for one, other in zip(length.shape, direction.shape, strict=True)
    )
