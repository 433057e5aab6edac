"""Callbacks: log a flat summary, draw masks to TensorBoard, end averages of weights sparse.

:class:`Monitor` serves plain loops and Accelerate. ``LightningCallback`` and
``TransformersCallback`` run one inside a trainer. Neither library is imported before its class is
asked for.
"""

from typing import TYPE_CHECKING, Any

from topkast_torch.callbacks._masked_averages import mask_average
from topkast_torch.callbacks._monitor import Monitor

if TYPE_CHECKING:
    from topkast_torch.callbacks._lightning import LightningCallback
    from topkast_torch.callbacks._transformers import TransformersCallback

__all__ = ["LightningCallback", "Monitor", "TransformersCallback", "mask_average"]


def __getattr__(name: str) -> Any:
    if name == "LightningCallback":
        from topkast_torch.callbacks._lightning import LightningCallback

        return LightningCallback
    if name == "TransformersCallback":
        from topkast_torch.callbacks._transformers import TransformersCallback

        return TransformersCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
