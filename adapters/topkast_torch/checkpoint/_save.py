"""Saving a state dict.

It has the form of any PyTorch optimizer's: ``state`` by number of the Parameter, ``param_groups``.
Top-KAST's own entries are stored inside these two, since libraries that save optimizers by the
names of Parameters drop everything else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topkast.reservoirs import LayeredReservoir
from topkast_torch.execution._execution import Execution
from topkast_torch.inner._fresh import find_missing_counts
from topkast_torch.inner._inner_state import encode, entries_of, map_tree
from topkast_torch.inner._learn_layout import find_first_writes
from topkast_torch.optimizer._groups import Group, WrapperState

VERSION = 3
TOPKAST_KEY = "topkast"  # of the entries that Top-KAST adds


def save(state: WrapperState) -> dict[str, Any]:
    """Implements :meth:`TopKASTOptimizer.state_dict`."""
    state.check_whole()
    numbers = _number_params(state)
    saved: dict[int, dict[str, Any]] = {}
    for group, param_group in zip(state.groups, state.inner.param_groups, strict=True):
        _save_group(saved, state, group, param_group, numbers)
    groups = [
        {name: copy_tree(value) for name, value in param_group.items() if name != "params"}
        | {"params": [numbers[id(param)] for param in param_group["params"]]}
        for param_group in state.inner.param_groups
    ]
    # Some libraries load only entries that are saved: also save counters that do not exist yet.
    uncounted = []
    for number, param_group in enumerate(state.inner.param_groups):
        missing = find_missing_counts(state.inner, param_group)
        groups[number] |= copy_tree(missing)
        uncounted += [f"{number}:{name}" for name in missing]
    groups[0][TOPKAST_KEY] = {
        "version": VERSION,
        "updates": state.updates,
        "overdue": state.overdue,
        "uncounted": " ".join(uncounted),
        "attributes": {name: copy_tree(getattr(state.inner, name)) for name in state.attributes},
        "state": {
            key: copy_tree(entries)
            for key, entries in state.inner.state.items()
            if not is_tensor(key)
        },
    }
    return {"state": encode(dict(sorted(saved.items()))), "param_groups": groups}


def _number_params(state: WrapperState) -> dict[int, int]:
    """PyTorch's number of each Parameter, by id."""
    numbers: dict[int, int] = {}
    start = 0
    for group in state.groups:
        for number, param in enumerate(group.params, start):
            numbers.setdefault(id(param), number)
        start += len(group.params)
    return numbers


def _save_group(
    saved: dict[int, dict[str, Any]],
    state: WrapperState,
    group: Group,
    param_group: Mapping[str, Any],
    numbers: Mapping[int, int],
) -> None:
    inner_params = group.inner_params()
    stores_by_id = {
        id(param): entries_of(state.inner, param, state.stores) for param in inner_params
    }
    # Some libraries load only entries that are saved: a Parameter without a step is saved with the
    # state that it would start with, and `started` false, so that it is not loaded.
    unstepped = [
        param
        for param in inner_params
        if all(
            isinstance(entry, Mapping) and not entry for entry in stores_by_id[id(param)].values()
        )
    ]
    writes = find_first_writes(state.inner, param_group, unstepped) if unstepped else []
    starts = {id(param): entries for param, entries in zip(unstepped, writes, strict=True)}
    params = dict(zip(group.names, group.params, strict=True))
    for execution in group.executions:
        key = id(execution.values)
        shared: Any = {"state": starts[key]} if key in starts else copy_tree(stores_by_id[key])
        shared = execution.saved_form.save_entries(shared)
        extras = _save_execution(execution)
        # Tensors ranked together share one vector per entry. It is saved with the first tensor,
        # since some libraries load only into tensors of the same size, and only the total is fixed.
        first, *_ = execution.ranked.shapes
        extras[first]["started"] = key not in starts
        for name in execution.ranked.shapes:
            stores = shared if shared and name == first else {"state": {}}
            _save_entries(saved, numbers[id(params[name])], stores, extras[name])
    for name, param, inner_param in group.inner_params_by_name():
        if name not in group.execution_by_name:
            key = id(inner_param)
            stores = {"state": starts[key]} if key in starts else copy_tree(stores_by_id[key])
            if name in group.locals:
                stores = group.locals[name].save_entries(stores)
            _save_entries(saved, numbers[id(param)], stores, {"started": key not in starts})


def _save_entries(
    saved: dict[int, dict[str, Any]], number: int, stores: dict[str, Any], extra: dict[str, Any]
) -> None:
    other_stores = {name: entries for name, entries in stores.items() if name != "state"}
    if other_stores:
        extra["stores"] = other_stores
    saved[number] = dict(stores.get("state", {})) | {TOPKAST_KEY: extra}


def _save_execution(execution: Execution) -> dict[str, dict[str, Any]]:
    """θ of each member by name; the first also has the sets and ages.

    If θ outside B is not in memory, the first has what makes it instead, and the values on B.
    """
    ranked, reservoir = execution.ranked, execution.reservoir
    saved: dict[str, dict[str, Any]] = {
        name: {"entered_active": int(execution.entered_active[number])}
        for number, name in enumerate(ranked.shapes)
    }
    first, *others = ranked.shapes
    shared = saved[first]
    if isinstance(reservoir, LayeredReservoir):
        left = (torch.from_numpy(array).clone() for array in reservoir.changes())
        shared["reservoir"] = reservoir.describe()
        # A tuple, since torch.distributed.checkpoint loads only tensors of the current sizes.
        shared["left"] = tuple(left)
        shared["values"] = execution.values.detach().view(-1).clone()
        for name, shape in ranked.shapes.items():
            saved[name]["shape"] = list(shape)
    else:
        for name, theta in execution.dense_weights().items():
            saved[name]["params"] = theta
    shared["indices"] = execution.support.indices.clone()
    shared["active_count"] = execution.support.forward
    if ranked.blocks is not None:
        shared["block_rows"], shared["block_columns"] = ranked.blocks.rows, ranked.blocks.columns
    if ranked.group_size is not None:
        shared["group_size"] = ranked.group_size
    shared["steps"] = execution.steps
    if execution.young is not None:
        ages = execution.young.current_ages().int()  # neither gloo nor NCCL sends int16
        shared["ages"] = execution.saved_form.save_vector(ages)
    if execution.momentum is not None:
        shared["momentum"] = execution.momentum.clone()
    if others:
        shared["members"] = list(ranked.shapes)
    return saved


def copy_tree(tree: Any) -> Any:
    """A deep copy of nested containers, with NumPy scalars as Python's."""

    def copy_leaf(_: Any, leaf: Any) -> Any:
        if isinstance(leaf, np.generic):  # torch.load refuses it
            return leaf.item()
        return leaf.detach().clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf)

    return map_tree(copy_leaf, tree)


def is_tensor(key: object) -> bool:
    return isinstance(key, Tensor)
