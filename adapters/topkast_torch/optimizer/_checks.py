"""Checks when an optimizer is wrapped or a group is added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from topkast import UnsupportedOptimizerError
from topkast.adapter import GROUP_OPTIONS, Options, check_any
from topkast_torch.inner._fresh import attributes_of, class_name
from topkast_torch.optimizer._callers import is_called_by
from topkast_torch.optimizer._groups import Group
from topkast_torch.optimizer._inner_optimizer import Refusal


def check_inner(inner: torch.optim.Optimizer) -> None:
    """Raise :class:`topkast.UnsupportedOptimizerError` for an optimizer that cannot be wrapped."""
    name = class_name(inner)
    wrapped = hasattr(inner, "__topkast_inspect__")
    if wrapped or isinstance(inner.step, Refusal):
        raise UnsupportedOptimizerError(
            "this optimizer is wrapped already: use the TopKASTOptimizer that "
            "topkast.wrap_optimizer returned, or end it with topkast.unwrap first"
        )
    if is_called_by("_init_local_optimizer", "ZeroRedundancyOptimizer"):
        raise UnsupportedOptimizerError(
            "in ZeroRedundancyOptimizer each process steps some of the Parameters, and only that "
            f"process would see their forward views: wrap the {name} itself, without "
            "ZeroRedundancyOptimizer, in every process. Its state has the size of B anyway; to "
            "divide it too, shard sparse layers by topkast_torch.fully_shard"
        )
    if hasattr(inner.step, "_wrapped_by_lr_sched"):
        raise UnsupportedOptimizerError(
            f"a learning-rate scheduler was built on this {name} and would not reach the wrapper: "
            "wrap the optimizer first, then build the scheduler on the result"
        )
    for attribute, value in attributes_of(inner).items():
        if isinstance(value, torch.optim.Optimizer):
            if name == "ZeroRedundancyOptimizer":
                raise UnsupportedOptimizerError(
                    f"{name} holds another optimizer, {class_name(value)}, which steps some of the "
                    f"Parameters in each process: wrap a {class_name(value)} of all Parameters in "
                    "every process, whose state has the size of B. To divide that too, shard "
                    "sparse layers by topkast_torch.fully_shard"
                )
            raise UnsupportedOptimizerError(
                f"{name} holds another optimizer, {class_name(value)}, in its attribute "
                f"{attribute}: wrap the {class_name(value)} itself. If a library put {name} around "
                "it (Accelerate), call topkast.wrap_optimizer before the "
                "library prepares the optimizer"
            )
    clash = sorted(set(GROUP_OPTIONS) & set(inner.defaults))
    if clash:
        raise UnsupportedOptimizerError(
            f"{name} has options named {', '.join(clash)}, which Top-KAST uses in parameter groups"
        )


def check_names(groups: list[Group], param_groups: list[dict[str, Any]], options: Options) -> None:
    """Raise :class:`topkast.OptionError` if a glob matches nothing, or no tensor is sparse."""
    names = [
        name
        for group, param_group in zip(groups, param_groups, strict=True)
        if "dense" not in param_group
        for name in group.names
    ]
    options.check_names(names)
    all_names = dict.fromkeys(name for group in groups for name in group.names)
    sparse = {name for group in groups for name in group.execution_by_name}
    is_dense_requested = any(param_group.get("dense") is True for param_group in param_groups)
    if not is_dense_requested:
        check_any(dict.fromkeys(sparse), all_names, options)


def name_params(param_group: dict[str, Any], number: int, others: list[dict[str, Any]]) -> None:
    """Name a new group's Parameters if those of the other groups have names."""
    params = param_group["params"]
    if not others or "param_names" not in others[0] or isinstance(params, set):
        return
    params = [params] if isinstance(params, Tensor) else list(params)
    if params and not isinstance(params[0], tuple):
        names = param_group.pop(
            "param_names", [f"{number}.{index}" for index in range(len(params))]
        )
        params = list(zip(names, params, strict=True))
    param_group["params"] = params
