"""Averages of forward views, made sparse by the last sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import topkast
from topkast import MismatchError, OptionError
from topkast_torch.execution._masked_execution import MaskedExecution
from topkast_torch.optimizer._optimizer import TopKASTOptimizer

_MAX_HOLDERS = 8  # optimizers around each other
_PREFIXES = ("module.", "_orig_mod.", "ema_model.")  # of models inside of averages


def find_wrapper(optimizer: Any) -> TopKASTOptimizer:
    """The wrapped optimizer, which another library's optimizer may hold.

    Raises :class:`topkast.OptionError` if there is none.
    """
    current = optimizer
    for _ in range(_MAX_HOLDERS):
        if isinstance(current, TopKASTOptimizer):
            return current
        current = getattr(current, "optimizer", None)
    raise OptionError(
        "expected the optimizer that topkast.wrap_optimizer returned, or one that holds it, got "
        f"{type(optimizer).__name__}"
    )


def mask_average(average: Any, optimizer: Any, *, model: nn.Module | None = None) -> None:
    """Set the entries of an average of forward views to zero outside the last A, in place.

    An average of the model's Parameters has all entries that were in A while it averaged. Call
    this once, when training has ended. :class:`topkast_torch.WeightAverage` averages θ instead: it
    weighs the entries that entered A late like the others, and needs no call.

    Parameters
    ----------
    average
        ``torch.optim.swa_utils.AveragedModel``, timm's ``ModelEmaV2`` or another module that holds
        a copy of the model; ``torch_ema.ExponentialMovingAverage``; or a state dict.
    optimizer
        The wrapped optimizer, or the optimizer of another library that holds it.
    model
        The trained model. Needed if the optimizer was built without names or with other names than
        those of the average.

    Raises
    ------
    OptionError
        If the optimizer is not wrapped, or the average is of another type.
    MismatchError
        If the average lacks a sparse tensor or has it in another shape, or if layers were made
        sparse by :func:`topkast.sparsify`: after a refresh their values have other coordinates.
        Nothing is changed then.

    Examples
    --------
    >>> import torch, topkast
    >>> from topkast_torch.callbacks import mask_average
    >>> model = torch.nn.Linear(20, 30)
    >>> opt = torch.optim.SGD(model.named_parameters(), 0.1)
    >>> opt = topkast.wrap_optimizer(opt, fwd=0.9, bwd=0.8)
    >>> average = torch.optim.swa_utils.AveragedModel(model)
    >>> torch.nn.init.ones_(average.module.weight)[0, 0]  # as after many refreshes
    tensor(1., grad_fn=<SelectBackward0>)
    >>> mask_average(average, opt)
    >>> int((average.module.weight != 0).sum())
    60
    """
    wrapper = find_wrapper(optimizer)
    masks = topkast.masks(wrapper)
    pairs = [
        (tensor, masks[name].forward)
        for name, tensor in find_averaged(average, wrapper, model).items()
    ]
    with torch.no_grad():
        for tensor, mask in pairs:
            tensor.masked_fill_(~mask.to(tensor.device), 0)


def mask_parameters(optimizer: TopKASTOptimizer) -> None:
    """Set the model's masked Parameters to zero outside A, where others wrote an average."""
    masks = topkast.masks(optimizer)
    with torch.no_grad():
        for name, param in _masked_params(optimizer):
            param.masked_fill_(~masks[name].forward, 0)


def find_averaged(
    average: Any, optimizer: TopKASTOptimizer, model: nn.Module | None
) -> dict[str, Tensor]:
    """The tensor of the average for each sparse tensor of the optimizer, by its name there."""
    check_averageable(optimizer, type(average).__name__)
    by_name, by_param = _read_average(average)
    names_in_model: dict[int, list[str]] = {}
    named = [] if model is None else model.named_parameters(remove_duplicate=False)
    for name_in_model, model_param in named:
        names_in_model.setdefault(id(model_param), []).append(name_in_model)
    averaged: dict[str, Tensor] = {}
    for name, param in _masked_params(optimizer):
        candidates = (by_name.get(key) for key in (name, *names_in_model.get(id(param), [])))
        found = next((entry for entry in candidates if entry is not None), None)
        tensor = by_param.get(id(param), found)
        if tensor is None:
            raise MismatchError(
                f"the average {type(average).__name__} has no tensor {name}: it averages another "
                "model, or the optimizer was built without names; then pass model="
            )
        if tensor.shape != param.shape:
            raise MismatchError(
                f"{name} has shape {tuple(tensor.shape)} in the average {type(average).__name__}, "
                f"expected {tuple(param.shape)}"
            )
        averaged[name] = tensor
    return averaged


def check_averageable(optimizer: TopKASTOptimizer, average: str) -> None:
    """Raise :class:`topkast.MismatchError` if the optimizer trains layers that are sparse."""
    for execution in optimizer._wrapper_state.executions:
        if not isinstance(execution, MaskedExecution):
            raise MismatchError(
                f"{execution.ranked.key} is the weight of a sparse layer, whose values have other "
                f"coordinates after each refresh: {average} cannot average them. Use "
                "topkast_torch.WeightAverage(optimizer)"
            )


def _masked_params(optimizer: TopKASTOptimizer) -> Iterator[tuple[str, Tensor]]:
    for execution in optimizer._wrapper_state.executions:
        if isinstance(execution, MaskedExecution):
            yield from ((name, member.param) for name, member in execution.members.items())


def _read_average(average: Any) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """The averaged tensors by name, and by the identity of the Parameter that they average."""
    references = getattr(average, "_params_refs", None)  # of torch_ema
    if references is not None and hasattr(average, "shadow_params"):
        params = (reference() for reference in references)
        return {}, {
            id(param): tensor for param, tensor in zip(params, average.shadow_params, strict=True)
        }
    if isinstance(average, nn.Module):
        named: dict[str, Tensor] = {}
        named |= average.named_parameters(remove_duplicate=False)
        named |= average.named_buffers(remove_duplicate=False)
    elif isinstance(average, Mapping):
        named = {name: entry for name, entry in average.items() if isinstance(entry, Tensor)}
    else:
        raise OptionError(
            "an average must be a module that holds a copy of the model, a "
            "torch_ema.ExponentialMovingAverage, a state dict or a topkast_torch.WeightAverage, "
            f"got {type(average).__name__}"
        )
    return {_strip(name): tensor for name, tensor in named.items()} | named, {}


def _strip(name: str) -> str:
    """The name without the prefixes of wrappers."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return _strip(name.removeprefix(prefix))
    return name
