"""The loop of the method, for a PyTorch optimizer: gather, step on B, write back, refresh."""

from __future__ import annotations

from typing import Any, TypeAlias

from topkast import NonFiniteError
from topkast_torch._dense_averages import warn_of_dense_averages
from topkast_torch.execution._execution import Execution
from topkast_torch.optimizer._groups import WrapperState

# Each execution with the options of its parameter group.
Pairs: TypeAlias = list[tuple[Execution, dict[str, Any]]]


def step(state: WrapperState, pairs: Pairs) -> None:
    """One update of all tensors, by the inner optimizer, and new sets where they are due."""
    for execution, _ in pairs:
        execution.accept_external_writes()
    moved = any(param.grad is not None for group in state.groups for param in group.params)
    loaded: list[tuple[Execution, dict[str, Any]]] = []
    stepped = False
    try:
        for execution, values in pairs:
            loaded.append((execution, values))
            execution.decide(values, state.updates)
            execution.load_gradient(state.inner, values)
        state.seat.step()
        stepped = True
    finally:
        for execution, values in loaded:
            execution.finish_step(state.inner, values, stepped=stepped)
    if moved:
        state.updates += 1
        refresh_if_due(state, pairs)


def refresh_if_due(state: WrapperState, pairs: Pairs) -> None:
    """After an update: choose the sets anew that are due, all of them or none."""
    for execution, values in pairs:
        execution.count_step()
        execution.decide(values, state.updates)
    due = [
        (execution, values)
        for execution, values in pairs
        if execution.is_due(values, state.updates) or (state.overdue and execution.refreshes)
    ]
    state.overdue = bool(due)  # until it is done
    for execution, _ in due:
        execution.check_known(state.inner)
    try:
        chosen = [
            execution.choose(state.options.override(values | execution.overrides), state.updates)
            for execution, values in due
        ]
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{error}. The weights have moved, and A and B are as before this update: mend the "
            "weights, and call step again"
        ) from None
    for (execution, values), sets in zip(due, chosen, strict=True):
        execution.adopt(sets, state.inner, values)
    state.overdue = False
    if due:
        state.refreshes += 1
        # Ever more rarely, since to look takes milliseconds; and until something is found.
        if state.refreshes.bit_count() == 1 and not state.warned:
            params = (param for group in state.groups for param in group.params)
            state.warned = warn_of_dense_averages(params)
