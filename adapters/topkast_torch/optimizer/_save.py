"""The state dict: what is saved.

It has the form of any PyTorch optimizer's: ``state`` by number of the Parameter, ``param_groups``.
What Top-KAST adds travels inside these two, since libraries that save optimizers by the names of
Parameters keep nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from topkast_torch.execution._execution import Execution
from topkast_torch.inner._fresh import missing_counts
from topkast_torch.inner._inner_state import encode, entries_of, map_tree
from topkast_torch.inner._learn_layout import first_writes
from topkast_torch.optimizer._groups import Group, WrapperState

VERSION = 3
OWN = "topkast"  # the key of what Top-KAST adds


def save(state: WrapperState) -> dict[str, Any]:
    """The state dict of :meth:`TopKASTOptimizer.state_dict`."""
    numbers = _number(state)
    saved: dict[int, dict[str, Any]] = {}
    for group, values in zip(state.groups, state.inner.param_groups, strict=True):
        _save_group(saved, state, group, values, numbers)
    groups = [
        {name: copy_tree(value) for name, value in values.items() if name != "params"}
        | {"params": [numbers[id(param)] for param in values["params"]]}
        for values in state.inner.param_groups
    ]
    # As with state that is not there yet: some libraries load into what they have saved alone.
    uncounted = []
    for number, values in enumerate(state.inner.param_groups):
        missing = missing_counts(state.inner, values)
        groups[number] |= copy_tree(missing)
        uncounted += [f"{number}:{name}" for name in missing]
    groups[0][OWN] = {
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


def _number(state: WrapperState) -> dict[int, int]:
    """The number of each Parameter, by its id, as PyTorch counts them."""
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
    values: Mapping[str, Any],
    numbers: Mapping[int, int],
) -> None:
    given = group.given()
    kept = {id(one): entries_of(state.inner, one, state.stores) for one in given}
    # What an optimizer has not stepped yet is saved as it would start, since some libraries load
    # into what they have saved alone; `started` says that it is not to be loaded.
    waiting = [
        one
        for one in given
        if all(isinstance(entry, Mapping) and not entry for entry in kept[id(one)].values())
    ]
    starts = first_writes(state.inner, values, waiting) if waiting else []
    written = {id(one): start for one, start in zip(waiting, starts, strict=True)}
    params = dict(zip(group.names, group.params, strict=True))
    for execution in group.executions:
        key = id(execution.values)
        shared: Any = {"state": written[key]} if key in written else copy_tree(kept[key])
        own = _save_execution(execution)
        # What tensors that are ranked together share, whose sizes are fixed only in all, stands
        # with the first: some libraries load into tensors of the sizes that they were given.
        first, *_ = execution.ranked.shapes
        own[first]["started"] = key not in written
        for name in execution.ranked.shapes:
            part = shared if shared and name == first else {"state": {}}
            _put(saved, numbers[id(params[name])], part, own[name])
    for name, param in params.items():
        if name not in group.owner:
            key = id(param)
            entries = {"state": written[key]} if key in written else copy_tree(kept[key])
            _put(saved, numbers[key], entries, {"started": key not in written})


def _put(
    saved: dict[int, dict[str, Any]], number: int, kept: dict[str, Any], own: dict[str, Any]
) -> None:
    others = {name: entries for name, entries in kept.items() if name != "state"}
    if others:
        own["stores"] = others
    saved[number] = dict(kept.get("state", {})) | {OWN: own}


def _save_execution(execution: Execution) -> dict[str, dict[str, Any]]:
    """θ of each member by name, and with the first one sets and ages."""
    ranked = execution.ranked
    theta = ranked.unflatten(execution.theta().clone())
    saved = {
        name: {"params": theta[name], "entered_active": int(execution.entered_active[number])}
        for number, name in enumerate(ranked.shapes)
    }
    first, *others = ranked.shapes
    shared = saved[first]
    shared["indices"] = execution.support.indices.clone()
    shared["active_count"] = execution.support.forward
    if ranked.blocks is not None:
        shared["block_rows"], shared["block_columns"] = ranked.blocks.rows, ranked.blocks.columns
    shared["steps"] = execution.steps
    if execution.young is not None:
        shared["ages"] = execution.young.current().clone()
    if others:
        shared["members"] = list(ranked.shapes)
    return saved


def copy_tree(tree: Any) -> Any:
    def copied(_: Any, leaf: Any) -> Any:
        if isinstance(leaf, np.generic):  # which torch.load refuses
            return leaf.item()
        return leaf.detach().clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf)

    return map_tree(copied, tree)


def is_tensor(key: object) -> bool:
    return isinstance(key, Tensor)
