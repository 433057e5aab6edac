"""A warning where forward views are averaged: once, at the first refresh."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from topkast import DenseAverageWarning

# Classes whose instances average the weights of a model, by the module that they are in.
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
    """Warn if someone averages tensors like these, whose zeros have just moved; whether it did."""
    shapes = {tuple(param.shape) for param in params}
    if _find_average(shapes) is None:
        return False
    gc.collect()  # nobody may use it any more
    kind = _find_average(shapes)
    if kind is not None:
        warnings.warn(
            f"{kind.__module__}.{kind.__qualname__} averages forward views of weights whose zeros "
            "move, so that the average has more nonzeros than A. Average the weights themselves, "
            "topkast_torch.WeightAverage(optimizer), which selects A once; or wrap an optimizer "
            "that averages itself, such as schedulefree.AdamWScheduleFree",
            DenseAverageWarning,
            stacklevel=2,
        )
    return kind is not None


def _find_average(shapes: set[tuple[int, ...]]) -> type[Any] | None:
    """The class of something that averages tensors, one of them of one of these shapes."""
    for average in _averages():
        if any(tuple(tensor.shape) in shapes for tensor in _tensors_of(average)):
            return type(average)
    return None


def _averages() -> list[Any]:
    """All living instances of the classes above, of libraries that someone has imported."""
    found = (
        getattr(sys.modules.get(module), name, None)
        for module, names in _AVERAGING.items()
        for name in names
    )
    kinds = tuple(kind for kind in found if isinstance(kind, type))
    return [one for one in gc.get_referrers(*kinds) if isinstance(one, kinds)]


def _tensors_of(average: Any) -> Iterator[Tensor]:
    """The tensors that it averages: of a model, of an optimizer, or in a list."""
    if isinstance(average, nn.Module):
        yield from average.parameters()
        return
    for held in vars(average).values():
        if isinstance(held, nn.Module):
            yield from held.parameters()
        elif isinstance(held, Optimizer):
            yield from (param for group in held.param_groups for param in group["params"])
        elif isinstance(held, list):
            yield from (one for one in held if isinstance(one, Tensor))
