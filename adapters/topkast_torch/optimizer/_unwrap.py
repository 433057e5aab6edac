"""Unwrap: the inner optimizer trains dense tensors again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from topkast import OptionError
from topkast.adapter import GROUP_OPTIONS
from topkast_torch.execution._execution import Execution
from topkast_torch.execution._sparse_execution import SparseExecution
from topkast_torch.inner._inner_state import entries_of, expand_entries, gather_entries
from topkast_torch.optimizer._groups import WrapperState
from topkast_torch.optimizer._optimizer import TopKASTOptimizer

Weights = Literal["forward", "dense"]


def unwrap(optimizer: TopKASTOptimizer, weights: Weights) -> torch.optim.Optimizer:
    """Implements :func:`topkast.unwrap` for PyTorch."""
    if weights not in ("forward", "dense"):
        raise OptionError(f"weights must be 'forward' or 'dense', got {weights!r}")
    state = optimizer._wrapper_state
    sharded = [name for group in state.groups for name in group.sharded_names()]
    if sharded:
        raise OptionError(
            f"unwrap needs whole tensors, but {sharded[0]} is sharded over processes: save the run "
            "with torch.distributed.checkpoint, load it in one process, and unwrap there"
        )
    state.check_whole()
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
    for param_group in optimizer.param_groups:
        for name in GROUP_OPTIONS:
            param_group.pop(name, None)
    inner = state.inner
    state.handle.hand_back(optimizer)
    optimizer.retire()
    return inner


def _expand_state(state: WrapperState, execution: Execution, params: Mapping[str, Tensor]) -> None:
    """Expand the inner optimizer's entries from B to the dense tensors, fresh outside B."""
    layout, compact = execution.profile.layout, execution.ranked.compact_shape
    entries = entries_of(state.inner, execution.values, state.stores)
    for store in entries:
        del getattr(state.inner, store)[execution.values]
    theta = execution.ranked.unflatten(execution.theta())
    flat, bounds = execution.support.entries, execution.ranked.bounds
    all_positions = torch.arange(len(flat), device=flat.device)
    for name, slices in execution.member_slices().items():
        positions = torch.cat([all_positions[section] for section in slices])
        on_b = gather_entries(entries, layout, compact, positions) if entries else {}
        indices = flat.index_select(0, positions) - bounds[name][0]
        dense = expand_entries(on_b, layout, compact, indices, theta[name])
        for store, dense_entries in dense.items():
            getattr(state.inner, store)[params[name]] = dense_entries
