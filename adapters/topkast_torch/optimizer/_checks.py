"""What is refused when an optimizer is wrapped, or a group is added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from topkast import UnsupportedOptimizerError
from topkast.adapter import GROUP_OPTIONS, Options, check_any
from topkast_torch.inner._fresh import attributes_of, name_of
from topkast_torch.optimizer._callers import is_called_by
from topkast_torch.optimizer._groups import (
    Group,
)
from topkast_torch.optimizer._seat import Refusal


def check_inner(inner: torch.optim.Optimizer) -> None:
    """Raise :class:`topkast.UnsupportedOptimizerError` for an optimizer that cannot be wrapped."""
    name = name_of(inner)
    wrapped = hasattr(inner, "__topkast_inspect__")
    if wrapped or isinstance(inner.step, Refusal):
        raise UnsupportedOptimizerError(
            "this optimizer is wrapped already: go on with the TopKASTOptimizer that "
            "topkast.wrap_optimizer returned, or end it by topkast.unwrap first"
        )
    if is_called_by("_init_local_optimizer", "ZeroRedundancyOptimizer"):
        raise UnsupportedOptimizerError(
            "ZeroRedundancyOptimizer has each process step some of the Parameters, and their "
            f"forward views would be seen in that process alone: wrap the {name} itself, without "
            "it, in every process. What it keeps is of the size of B as it is"
        )
    if hasattr(inner.step, "_wrapped_by_lr_sched"):
        raise UnsupportedOptimizerError(
            f"a learning-rate scheduler was built on this {name} and would not reach the wrapper: "
            "wrap the optimizer first, then build the scheduler on the result"
        )
    for attribute, value in attributes_of(inner).items():
        if isinstance(value, torch.optim.Optimizer):
            raise UnsupportedOptimizerError(
                f"{name} holds another optimizer, {name_of(value)}, in its attribute {attribute}: "
                f"wrap the {name_of(value)} by itself. Where a library put {name} around it "
                "(Accelerate, ZeroRedundancyOptimizer), call topkast.wrap_optimizer before that "
                "library's own preparation"
            )
    clash = sorted(set(GROUP_OPTIONS) & set(inner.defaults))
    if clash:
        raise UnsupportedOptimizerError(
            f"{name} has options of the names {', '.join(clash)}, which are Top-KAST's in a "
            "parameter group"
        )


def check_names(groups: list[Group], param_groups: list[dict[str, Any]], options: Options) -> None:
    """Raise :class:`topkast.OptionError` for globs that match nothing, or if nothing is sparse."""
    names = [
        name
        for group, values in zip(groups, param_groups, strict=True)
        if "dense" not in values
        for name in group.names
    ]
    options.check_names(names)
    everything = dict.fromkeys(name for group in groups for name in group.names)
    sparse = {name for group in groups for name in group.owner}
    asked = any(values.get("dense") is True for values in param_groups)
    if not asked:
        check_any(dict.fromkeys(sparse), everything, options)


def name_params(param_group: dict[str, Any], number: int, others: list[dict[str, Any]]) -> None:
    """Give a group's Parameters names, where those of the other groups have some."""
    params = param_group["params"]
    if not others or "param_names" not in others[0] or isinstance(params, set):
        return
    params = [params] if isinstance(params, Tensor) else list(params)
    if params and not isinstance(params[0], tuple):
        names = param_group.pop("param_names", [f"{number}.{one}" for one in range(len(params))])
        params = list(zip(names, params, strict=True))
    param_group["params"] = params
