"""The data that ``topkast.summary``, ``masks`` and ``dense_params`` report of an optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from topkast.adapter import Inspection
from topkast_torch.distributed._sharding import local_part
from topkast_torch.inner._inner_state import entries_of, walk
from topkast_torch.optimizer._groups import WrapperState
from topkast_torch.sparse._sparse_layer import layer_of


def inspect(state: WrapperState) -> Inspection:
    """Implements ``__topkast_inspect__``."""
    shapes: dict[str, tuple[int, ...]] = {}
    held: dict[str, dict[str, int]] = {}
    model_bytes = 0
    for group in state.groups:
        for name, param, inner_param in group.inner_params_by_name():
            is_sparse, nbytes = name in group.execution_by_name, local_part(param).nbytes
            shapes[name] = tuple(param.shape)
            if layer_of(param) is None:  # `held` counts sparse layers in full
                model_bytes += 2 * nbytes if is_sparse else nbytes
            if not is_sparse:
                entry_bytes = sum(entry.nbytes for entry in _entries(state, inner_param))
                held[name] = {"values": nbytes, "state": entry_bytes}
        for execution in group.executions:
            shapes |= execution.ranked.shapes
            entries = _entries(state, execution.values)
            held[execution.ranked.key] = execution.count_bytes(entries)
    executions = {execution.ranked.key: execution for execution in state.executions}
    return Inspection(
        state.updates,
        shapes,
        lambda: _copy_weights(state),
        {key: execution.ranked for key, execution in executions.items()},
        {key: execution.support for key, execution in executions.items()},
        {key: execution.entered_active for key, execution in executions.items()},
        held,
        model_bytes,
        {key: execution.reservoir.disk_bytes for key, execution in executions.items()},
    )


@torch.no_grad()
def _copy_weights(state: WrapperState) -> dict[str, Tensor]:
    """Copies of θ by name, dense tensors included."""
    theta: dict[str, Tensor] = {}
    for group in state.groups:
        for name, param in zip(group.names, group.params, strict=True):
            theta[name] = param.detach()
            if name not in group.execution_by_name:
                theta[name] = theta[name].clone()
        for execution in group.executions:
            theta |= execution.dense_weights()
    return theta


def _entries(state: WrapperState, param: Tensor) -> list[Tensor]:
    """The tensors of the inner optimizer's state for a Parameter of its own."""
    return [entry for _, entry in walk(entries_of(state.inner, param, state.stores))]
