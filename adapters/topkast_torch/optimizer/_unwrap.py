"""The end of a wrapper: the inner optimizer trains the whole tensors again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from topkast import OptionError
from topkast.adapter import GROUP_OPTIONS
from topkast_torch.execution._execution import Execution
from topkast_torch.execution._sparse_execution import SparseExecution
from topkast_torch.inner._inner_state import entries_of, expand, take
from topkast_torch.optimizer._groups import WrapperState
from topkast_torch.optimizer._optimizer import TopKASTOptimizer

Weights = Literal["forward", "dense"]


def unwrap(optimizer: TopKASTOptimizer, weights: Weights) -> torch.optim.Optimizer:
    """The PyTorch part of :func:`topkast.unwrap`."""
    if weights not in ("forward", "dense"):
        raise OptionError(f"weights must be 'forward' or 'dense', got {weights!r}")
    state = optimizer._wrapper_state
    with torch.no_grad():
        for execution in state.executions:
            execution.accept_external_writes()
        params = {
            name: param
            for group in state.groups
            for name, param in zip(group.names, group.params, strict=True)
        }
        for execution in state.executions:
            if weights == "dense" or not isinstance(execution, SparseExecution):
                _expand_state(state, execution, params)
            execution.uninstall(dense=weights == "dense")
    for values in optimizer.param_groups:
        for name in GROUP_OPTIONS:
            values.pop(name, None)
    inner = state.inner
    state.seat.leave(optimizer)
    optimizer.retire()
    return inner


def _expand_state(state: WrapperState, execution: Execution, params: Mapping[str, Tensor]) -> None:
    """Spread what the inner optimizer keeps on B over the whole tensors, fresh outside B."""
    layout, compact = execution.profile.layout, execution.ranked.compact_shape
    kept = entries_of(state.inner, execution.values, state.stores)
    for store in kept:
        del getattr(state.inner, store)[execution.values]
    theta = execution.ranked.unflatten(execution.theta())
    flat, bounds = execution.support.entries, execution.ranked.bounds
    everywhere = torch.arange(len(flat), device=flat.device)
    for name, parts in execution.member_parts().items():
        positions = torch.cat([everywhere[part] for part in parts])
        own = take(kept, layout, compact, positions) if kept else {}
        places = flat.index_select(0, positions) - bounds[name][0]
        for store, entries in expand(own, layout, compact, places, theta[name]).items():
            getattr(state.inner, store)[params[name]] = entries
