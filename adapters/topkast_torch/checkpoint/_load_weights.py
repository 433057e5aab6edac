"""The weights in a state dict: those on B, and the reservoir, whatever kind was saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topkast import StateDictError, Support
from topkast.reservoirs import FileBase, LayeredReservoir, Reservoir
from topkast_torch._reservoirs import TensorReservoir
from topkast_torch.distributed._sharded_execution import ShardedExecution
from topkast_torch.execution._execution import Execution


def expect(name: str, expected: object, actual: object) -> None:
    """Raise :class:`topkast.StateDictError` unless the two are equal."""
    if expected != actual:
        raise StateDictError(f"{name}: expected {expected}, the state dict has {actual}")


def load_weights(
    execution: Execution, support: Support, extras: Mapping[str, Any], folder: Any
) -> tuple[Tensor, Reservoir]:
    """The saved values on B (|B|,) and a reservoir of the kind that the execution has."""
    shared = extras[next(iter(execution.ranked.shapes))]
    if isinstance(execution, ShardedExecution):
        return _load_parts(execution, support, shared)
    if "reservoir" in shared:
        for name, shape in execution.ranked.shapes.items():
            expect(f"shape of {name}", tuple(shape), tuple(extras[name]["shape"]))
        return _load_layered(execution, shared, folder)
    theta = _join(execution, extras)
    values = theta.index_select(0, support.entries)
    return values, _make_reservoir(execution, theta, folder)


def _load_parts(
    execution: ShardedExecution, support: Support, shared: Mapping[str, Any]
) -> tuple[Tensor, Reservoir]:
    """The values that this process holds, and its rows of the weights."""
    ((name, shape),) = execution.ranked.shapes.items()
    if "params" not in shared:
        raise StateDictError(
            f"{name}: the state dict generates its weights from a seed or reads them from a file, "
            "but sharded layers load all weights: load it in one process with reservoir='device', "
            "and save it again"
        )
    theta = shared["params"]
    expect(f"shape of {name}", tuple(shape), tuple(theta.shape))
    expect(f"dtype of {name}", execution.values.dtype, theta.dtype)
    rows, bad_count = execution.rows_of(theta)
    if bad_count:
        raise StateDictError(f"{name}: a saved weight is NaN or infinite")
    return execution.values_of(rows, support), TensorReservoir(rows, execution.reservoir.kind)


def _join(execution: Execution, extras: Mapping[str, Any]) -> Tensor:
    """All saved weights as one vector."""
    ranked, values = execution.ranked, execution.values
    for name, extra in extras.items():
        expect(f"shape of {name}", tuple(ranked.shapes[name]), tuple(extra["params"].shape))
        expect(f"dtype of {name}", values.dtype, extra["params"].dtype)
        _check_finite(name, extra["params"])
    return torch.cat([extra["params"].reshape(-1).to(values.device) for extra in extras.values()])


def _load_layered(
    execution: Execution, shared: Mapping[str, Any], folder: Any
) -> tuple[Tensor, Reservoir]:
    ranked, current, key = execution.ranked, execution.values, execution.ranked.key
    values, (indices, weights) = shared["values"], shared["left"]
    expected = (ranked.backward_size,), current.dtype
    expect(f"values of {key}", expected, (tuple(values.shape), values.dtype))
    expect(f"shape of the weights that left B of {key}", indices.shape, weights.shape)
    for tensor in (values, weights):
        _check_finite(key, tensor)
    changes = indices.cpu().numpy().copy(), weights.cpu().numpy().copy()
    is_ascending = bool(np.all(changes[0][1:] > changes[0][:-1]))
    if len(indices) and not (is_ascending and indices[0] >= 0 and indices[-1] < ranked.size):
        raise StateDictError(f"the indices that left B of {key} must ascend in [0, {ranked.size})")
    saved = LayeredReservoir.from_description(shared["reservoir"], changes, folder)
    expect(f"size of {key}", ranked.size, saved.size)
    values = values.to(current.device, copy=True)
    if saved.kind == execution.reservoir.kind:
        return values, saved
    theta = torch.from_numpy(saved.read(0, saved.size)).to(current)
    return values, _make_reservoir(execution, theta, folder)


def _make_reservoir(execution: Execution, theta: Tensor, folder: Any) -> Reservoir:
    """A reservoir of the execution's kind with the weights `theta` (n,)."""
    kind, key = execution.reservoir.kind, execution.ranked.key
    if kind == "seeded":
        raise StateDictError(
            f"{key}: the state dict has the weights, but reservoir='seeded' has none: load it with "
            "reservoir='device', 'host' or 'disk'"
        )
    if kind == "none":
        assert isinstance(execution.reservoir, LayeredReservoir)
        return execution.reservoir
    if kind == "disk":
        return LayeredReservoir("disk", [FileBase.create(folder, key, theta.cpu().numpy())])
    current = execution.reservoir
    assert isinstance(current, TensorReservoir)
    target = torch.empty_like(theta, device=current.tensor.device)
    if current.tensor.is_pinned():
        target = target.pin_memory()
    return TensorReservoir(target.copy_(theta), kind)


def _check_finite(name: str, weights: Tensor) -> None:
    if not torch.isfinite(weights).all():
        raise StateDictError(f"{name}: a saved weight is NaN or infinite")
