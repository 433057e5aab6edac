"""The training loop of a PyTorch optimizer: gather, step on B, write back, refresh."""

from __future__ import annotations

from typing import Any, TypeAlias

from topkast import NonFiniteError
from topkast_torch._dense_averages import warn_of_dense_averages
from topkast_torch.execution._execution import Execution
from topkast_torch.optimizer._groups import WrapperState
from topkast_torch.optimizer._interrupts import uninterrupted

# Each execution with its parameter group.
Pairs: TypeAlias = list[tuple[Execution, dict[str, Any]]]


def step(state: WrapperState, pairs: Pairs) -> None:
    """Update all tensors with the inner optimizer, and refresh the sets that are due."""
    state.check_whole()
    for execution, param_group in pairs:
        is_due = execution.is_due(param_group, state.updates + 1) or state.overdue
        execution.accept_external_writes(thorough=is_due or not state.updates)
        execution.decide(param_group, state.updates, overdue=state.overdue)
    has_gradient = any(param.grad is not None for group in state.groups for param in group.params)
    loaded: Pairs = []
    due: Pairs | None = None
    stepped = False
    try:
        for execution, param_group in pairs:
            loaded.append((execution, param_group))
            execution.load_gradient(state.inner, param_group)
        for local in state.locals:
            local.load_gradient()
        state.handle.step()
        stepped = True
    finally:
        with uninterrupted():
            for local in state.locals:
                local.part.grad = None
            for execution, param_group in loaded:
                execution.finish_step(state.inner, param_group, stepped=stepped)
            if stepped and has_gradient:
                due = _count_update(state, pairs)
    if due is not None:
        try:
            _refresh(state, due)
        finally:  # a refresh that failed is due after the next step
            for execution, param_group in pairs:
                execution.decide(param_group, state.updates, overdue=state.overdue)


def _count_update(state: WrapperState, pairs: Pairs) -> Pairs:
    """Count an update, and return the executions whose sets are due for a refresh."""
    state.updates += 1
    for execution, _ in pairs:
        execution.count_step()
    due = [
        (execution, param_group)
        for execution, param_group in pairs
        if execution.is_due(param_group, state.updates) or (state.overdue and execution.refreshes)
    ]
    state.overdue = bool(due)  # until the refresh has succeeded
    return due


def _refresh(state: WrapperState, due: Pairs) -> None:
    """Refresh all sets that are due after an update, or none of them."""
    for execution, _ in due:
        execution.check_migratable(state.inner)
    try:
        refreshes = [
            execution.choose_sets(
                state.options.override(param_group | execution.overrides), state.updates
            )
            for execution, param_group in due
        ]
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{error}. The weights have moved, but A and B are as before this update: repair the "
            "weights or the gradient and call step again"
        ) from None
    refreshes.reverse()
    with uninterrupted():
        for execution, param_group in due:  # what was applied is freed
            execution.apply_refresh(refreshes.pop(), state.inner, param_group)
        state.overdue = False
    if due:
        state.refreshes += 1
        # The search takes milliseconds: at refreshes 1, 2, 4, 8, … until it finds an average.
        if state.refreshes.bit_count() == 1 and not state.warned:
            params = (param for group in state.groups for param in group.params)
            state.warned = warn_of_dense_averages(params)
