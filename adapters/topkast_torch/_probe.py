"""Whether an optimizer treats a tensor as a bag of coordinates, and how its state starts."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from topkast import UnsupportedOptimizerError

_SHAPE = (128, 130)  # optimizers that factor tensors do so from 128 rows and columns on
_TOLERANCE = 1e-4  # of the largest update; a reduction over the tensor rounds in another order


def probe(optimizer: torch.optim.Optimizer) -> None:
    """Raise :class:`UnsupportedOptimizerError` unless permuting coordinates permutes the update."""
    group = optimizer.param_groups[0]
    like = next((param for param in group["params"]), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(_SHAPE, generator=generator).to(like.device) for _ in range(3))
    order = torch.randperm(start.numel(), generator=generator).to(like.device)

    def permuted(tensor: Tensor) -> Tensor:
        return tensor.flatten()[order].reshape(_SHAPE)

    plain = _train(optimizer, group, start, gradients)
    mixed = _train(optimizer, group, permuted(start), [permuted(grad) for grad in gradients])
    largest = (plain - start).abs().max()
    difference = (permuted(plain) - mixed).abs().max()
    if difference > _TOLERANCE * largest:
        raise UnsupportedOptimizerError(
            f"{_name(optimizer)} does not treat a tensor as a bag of coordinates: permuting them "
            f"changes its update by {float(difference / largest):.1e} of its size. It looks at "
            "rows, columns or the whole matrix (as Muon, Shampoo and Adafactor do), which the "
            "vector of the weights that Top-KAST updates does not have. Wrap an elementwise "
            "optimizer (Adam, SGD, ...), or pass probe=False if it adds noise"
        )


def initial_state(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any]
) -> dict[str, float | None]:
    """Each entry of a parameter's state: its initial value if it is one per coordinate, or None.

    Observed, not listed: the value that a new optimizer writes first for a parameter of zeros.
    Nearly always 0; Rprop's step sizes start at the learning rate, Adagrad's sums at an option.
    """
    like = next((param for param in group["params"]), torch.zeros(()))
    param = torch.nn.Parameter(torch.zeros((1, 3), device=like.device))
    param.grad = torch.zeros_like(param)
    fresh = _fresh(optimizer, group, param)
    entries = _FirstWrites(fresh.state[param])
    fresh.state[param] = entries
    _step(optimizer, fresh)
    return {
        name: float(value.flatten()[0])
        if isinstance(value, Tensor) and value.shape == param.shape
        else None
        for name, value in entries.first.items()
    }


class _FirstWrites(dict[str, Any]):
    """A state that remembers what each entry was set to first."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        super().__init__(entries)
        self.first = copy.deepcopy(dict(entries))

    def __setitem__(self, name: str, value: Any) -> None:
        self.first.setdefault(name, value.clone() if isinstance(value, Tensor) else value)
        super().__setitem__(name, value)


def _train(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    start: Tensor,
    gradients: list[Tensor],
) -> Tensor:
    param = torch.nn.Parameter(start.clone())
    fresh = _fresh(optimizer, group, param)
    for gradient in gradients:
        param.grad = gradient.clone()
        _step(optimizer, fresh)
    return param.detach()


def _step(optimizer: torch.optim.Optimizer, fresh: torch.optim.Optimizer) -> None:
    try:
        with warnings.catch_warnings():  # meant for the optimizer that is being tried
            warnings.simplefilter("ignore")
            step_without_hooks(fresh)
    except Exception as error:
        raise UnsupportedOptimizerError(
            f"{_name(optimizer)} cannot take a plain step on a vector of weights and its dense "
            f"gradient: {error}. Wrap an elementwise optimizer (Adam, SGD, ...)"
        ) from error


def step_without_hooks(optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()`` without step hooks: a wrapped optimizer has fired them already."""
    step = type(optimizer).step
    if getattr(step, "hooked", False):  # torch.optim.Optimizer.profile_hook_step
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(optimizer)


def _fresh(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], param: torch.nn.Parameter
) -> torch.optim.Optimizer:
    """An optimizer of the same kind and options as `optimizer`, without state, for `param`."""
    kind: Any = type(optimizer)
    accepted = inspect.signature(kind).parameters
    options = {name: value for name, value in group.items() if name in accepted}
    try:
        fresh: torch.optim.Optimizer = kind(**options | {"params": [param]})
    except Exception:
        # A constructor of another form: the same attributes, another parameter.
        fresh = object.__new__(kind)
        fresh.__dict__.update(optimizer.__dict__)
        fresh.state = defaultdict(dict)
        fresh.param_groups = [{**group, "params": [param]}]
    return fresh


def _name(optimizer: torch.optim.Optimizer) -> str:
    return type(optimizer).__name__
