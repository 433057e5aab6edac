"""Warn once, after a refresh, if someone averages forward views."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from topkast import DenseAverageWarning

# Classes that average the weights of a model, by module.
_AVERAGING = {
    "torch.optim.swa_utils": ["AveragedModel"],
    "lightning.pytorch.callbacks.stochastic_weight_avg": ["StochasticWeightAveraging"],
    "pytorch_lightning.callbacks.stochastic_weight_avg": ["StochasticWeightAveraging"],
    "pytorch_optimizer.optimizer.lookahead": ["Lookahead"],
    "pytorch_optimizer.optimizer.schedulefree": ["ScheduleFreeWrapper"],
    "schedulefree.wrap_schedulefree": ["ScheduleFreeWrapper"],
    "schedulefree.wrap_schedulefree_reference": ["ScheduleFreeWrapperReference"],
    "torch_ema.ema": ["ExponentialMovingAverage"],
}


def warn_of_dense_averages(params: Iterable[Tensor]) -> bool:
    """Warn if an average of tensors with the shapes of `params` exists; return whether it did."""
    shapes = {tuple(param.shape) for param in params}
    if _find_average(shapes) is None:
        return False
    gc.collect()  # the average may be garbage
    average_class = _find_average(shapes)
    if average_class is not None:
        warnings.warn(
            f"{average_class.__module__}.{average_class.__qualname__} averages forward views of "
            "weights whose zeros move, so that the average has more nonzeros than A. Average the "
            "weights themselves with topkast_torch.WeightAverage(optimizer), which selects A once, "
            "or wrap an optimizer that averages itself, such as schedulefree.AdamWScheduleFree",
            DenseAverageWarning,
            stacklevel=2,
        )
    return average_class is not None


def _find_average(shapes: set[tuple[int, ...]]) -> type[Any] | None:
    """The class of an average that has a tensor of one of these shapes."""
    for average in _find_averages():
        if any(tuple(tensor.shape) in shapes for tensor in _averaged_tensors(average)):
            return type(average)
    return None


def _find_averages() -> list[Any]:
    """All living instances of the classes in `_AVERAGING` that have been imported."""
    candidates = (
        getattr(sys.modules.get(module), name, None)
        for module, names in _AVERAGING.items()
        for name in names
    )
    classes = tuple(candidate for candidate in candidates if isinstance(candidate, type))
    return [average for average in gc.get_referrers(*classes) if isinstance(average, classes)]


def _averaged_tensors(average: Any) -> Iterator[Tensor]:
    """The averaged tensors: of a module, of an optimizer, or in a list."""
    if isinstance(average, nn.Module):
        yield from average.parameters()
        return
    for value in vars(average).values():
        if isinstance(value, nn.Module):
            yield from value.parameters()
        elif isinstance(value, Optimizer):
            yield from (param for group in value.param_groups for param in group["params"])
        elif isinstance(value, list):
            yield from (item for item in value if isinstance(item, Tensor))
