"""Loading a state dict: all of it is checked before a byte is changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast import MismatchError, OptionError, StateDictError, Support
from topkast.adapter import FIXED_OPTIONS, GROUP_OPTIONS
from topkast_torch.execution._execution import Execution
from topkast_torch.inner._inner_state import decode, map_tree
from topkast_torch.optimizer._groups import Group, WrapperState
from topkast_torch.optimizer._save import OWN, VERSION, copy_tree, is_tensor
from topkast_torch.optimizer._seat import clear_state

_OF_A_GROUP = ("params", "param_names", OWN)


def load(state: WrapperState, state_dict: Mapping[str, Any]) -> None:
    """Check all of a state dict, then take it over."""
    try:
        loaded = _check(state, state_dict)
    except StateDictError:
        raise
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        MismatchError,
    ) as error:
        raise StateDictError(f"the state dict is corrupt: {error!r}") from error
    inner = state.inner
    state.updates, state.overdue = loaded.updates, loaded.overdue
    clear_state(inner, state.stores)
    for name, value in loaded.attributes.items():
        setattr(inner, name, value)
    for key in [key for key in inner.state if not is_tensor(key)]:
        del inner.state[key]
    inner.state.update(loaded.others)
    for param, kept in loaded.entries:
        for name, entries in kept.items():
            if not hasattr(inner, name):  # made by an optimizer's first step
                setattr(inner, name, {})
            getattr(inner, name)[param] = entries
    for group, values, saved in zip(state.groups, inner.param_groups, loaded.groups, strict=True):
        _load_options(values, saved, inner.defaults)
        group.checked = ()
        for execution in group.executions:
            loaded.sets[id(execution)].restore(execution, values)
            execution.decide(values, state.updates)


def _load_options(
    values: dict[str, Any], saved: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    kept = {*_OF_A_GROUP, *FIXED_OPTIONS}
    for name in [name for name in values if name not in {*kept, *defaults, *GROUP_OPTIONS}]:
        if name not in saved:
            del values[name]  # counted by an optimizer that had not counted yet when it was saved
    values.update((name, value) for name, value in saved.items() if name not in kept)


@dataclass
class _Sets:
    """What is loaded for one execution."""

    support: Support
    entered_active: Tensor
    theta: Tensor  # one vector
    steps: int
    ages: Tensor | None

    def restore(self, execution: Execution, values: Mapping[str, Any]) -> None:
        execution.entered_active, execution.steps = self.entered_active, self.steps
        execution.restore(self.support, self.theta)
        if execution.young is not None and self.ages is not None:
            execution.young.restore(self.ages, values)


@dataclass
class _Loaded:
    updates: int
    overdue: bool
    attributes: dict[str, Any]
    others: dict[Any, Any]  # state that belongs to no Parameter
    groups: list[dict[str, Any]] = field(default_factory=list)
    entries: list[tuple[Parameter, dict[str, Any]]] = field(default_factory=list)
    sets: dict[int, _Sets] = field(default_factory=dict)  # by the id of the execution


def _check(state: WrapperState, state_dict: Mapping[str, Any]) -> _Loaded:
    groups = list(state_dict["param_groups"])
    own = groups[0].get(OWN) if groups else None
    if own is None:
        raise StateDictError(
            f"the state dict has no entry {OWN!r} in its first group: it was saved from an "
            "optimizer that was not wrapped. Load it into that optimizer, then wrap it"
        )
    if own["version"] != VERSION:
        raise StateDictError(f"the state dict has version {own['version']!r}, expected {VERSION}")
    updates = own["updates"]
    if not isinstance(updates, int) or updates < 0:
        raise StateDictError(f"the number of updates must be an integer >= 0, got {updates!r}")
    # Some libraries drop dictionaries that are empty.
    _expect("attributes of the inner optimizer", {*state.attributes}, {*own.get("attributes", {})})
    _expect("number of parameter groups", len(state.groups), len(groups))
    loaded = _Loaded(
        updates,
        bool(own["overdue"]),
        copy_tree(own.get("attributes", {})),
        copy_tree(own.get("state", {})),
    )
    uncounted = str(own["uncounted"]).split()
    for number, (group, values, saved) in enumerate(
        zip(state.groups, state.inner.param_groups, groups, strict=True)
    ):
        saved = {name: saved[name] for name in saved if f"{number}:{name}" not in uncounted}
        _expect("parameters in a group", len(group.params), len(saved["params"]))
        try:
            state.options.override({name: saved[name] for name in GROUP_OPTIONS})
        except OptionError as error:
            raise StateDictError(
                f"a parameter group has an option that is wrong: {error}"
            ) from None
        loaded.groups.append({name: copy_tree(saved[name]) for name in saved if name != "params"})
        _check_group(loaded, group, values, saved, state_dict["state"], state.stores)
    return loaded


def _check_group(
    loaded: _Loaded,
    group: Group,
    values: Mapping[str, Any],
    saved: Mapping[str, Any],
    entries: Mapping[Any, Any],
    known: tuple[str, ...],
) -> None:
    numbers = _match(group, values, saved)
    by_name: dict[str, dict[str, Any]] = {}
    for name, number in numbers.items():
        found = entries.get(number, entries.get(str(number), {}))
        if not isinstance(found, Mapping):
            raise StateDictError(f"{name}: its state must be a dictionary, got {found!r}")
        by_name[name] = decode(dict(found))
    on_device = bool(saved.get("capturable") or saved.get("fused"))
    for name, param in zip(group.names, group.params, strict=True):
        if name in group.owner:
            continue
        own = by_name[name].pop(OWN, {})
        if own.get("started"):
            stores = _stores_in(own, known)
            kept = _to_device(by_name[name], stores, param.device, on_device)
            loaded.entries.append((param, kept))
    for execution in group.executions:
        owns = {name: by_name[name].pop(OWN, None) for name in execution.ranked.shapes}
        for name, own in owns.items():
            if own is None or "params" not in own:
                raise StateDictError(f"{name}: the state dict has no sets of it")
        first, *others = owns
        if others:
            _expect_order(list(owns), owns[first].get("members"))
        loaded.sets[id(execution)] = _check_sets(execution, owns)
        if owns[first]["started"]:
            stores = _stores_in(owns[first], known)
            kept = _check_entries(execution, {"state": by_name[first]} | stores)
            state_of = kept.pop("state")
            moved = _to_device(state_of, kept, execution.values.device, on_device)
            loaded.entries.append((execution.values, moved))


def _stores_in(own: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """What is kept for a tensor in dictionaries that an optimizer has beside its state."""
    stores = dict(own.get("stores", {}))
    unknown = sorted(stores.keys() - set(known))
    if unknown:
        raise StateDictError(
            f"the state dict has what an optimizer keeps in {', '.join(unknown)}, and this one "
            "keeps nothing there"
        )
    return stores


def _expect_order(names: list[str], members: Any) -> None:
    """Raise :class:`StateDictError` if tensors that are ranked together were in another order."""
    if members is None or (members != names and sorted(members) == sorted(names)):
        raise StateDictError(
            f"the state dict has the tensors that are ranked together in the order {members}, the "
            f"optimizer in the order {names}: build it with its Parameters in the same order"
        )


def _match(group: Group, values: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The number of each tensor's state: by name where both sides have the same names."""
    names, others = values.get("param_names"), saved.get("param_names")
    if names is not None and others is not None and sorted(names) == sorted(others):
        by_name = dict(zip(others, saved["params"], strict=True))
        return {own: by_name[name] for own, name in zip(group.names, names, strict=True)}
    return dict(zip(group.names, saved["params"], strict=True))


def _check_sets(execution: Execution, owns: Mapping[str, Any]) -> _Sets:
    ranked, key = execution.ranked, execution.ranked.key
    device = execution.reservoir.device
    for name, own in owns.items():
        _expect(f"shape of {name}", tuple(ranked.shapes[name]), tuple(own["params"].shape))
        _expect(f"dtype of {name}", execution.reservoir.dtype, own["params"].dtype)
        if not torch.isfinite(own["params"]).all():
            raise StateDictError(f"{name}: a saved weight is NaN or infinite")
    shared = owns[next(iter(ranked.shapes))]
    blocks = ranked.blocks
    sides = (1, 1) if blocks is None else (blocks.rows, blocks.columns)
    saved_sides = shared.get("block_rows", 1), shared.get("block_columns", 1)
    _expect(f"block of {key}", sides, saved_sides)
    indices, count = shared["indices"], ranked.backward
    own = ((count,), execution.support.indices.dtype)
    _expect(f"indices of B of {key}", own, _type_of(indices))
    _expect(f"|A| of {key}", ranked.forward, shared["active_count"])
    support = Support(indices.to(device, copy=True), ranked.forward, ranked.blocks)
    try:
        support.check(ranked.size, f"{key}: the state dict")
    except MismatchError as error:
        raise StateDictError(str(error)) from None
    ages = None
    if execution.young is not None:
        _expect(f"ages of {key}", ((ranked.backward_size,), torch.int16), _type_of(shared["ages"]))
        ages = shared["ages"].to(device, copy=True)
    counts, steps = [own["entered_active"] for own in owns.values()], shared["steps"]
    if not all(isinstance(count, int) and count >= 0 for count in (*counts, steps)):
        raise StateDictError(f"{key}: mask change and steps must be integers >= 0")
    return _Sets(
        support,
        torch.tensor(counts, dtype=torch.int32, device=device),
        torch.cat([own["params"].reshape(-1).to(device) for own in owns.values()]),
        steps,
        ages,
    )


def _check_entries(execution: Execution, kept: dict[str, Any]) -> dict[str, Any]:
    """What the inner optimizer kept for a compact vector, if it fits the one that it is for."""
    layout, compact = execution.profile.layout, execution.ranked.compact_shape
    key, count = execution.ranked.key, execution.ranked.backward_size
    missing = {str(path[1]) for path in layout.specs if path[0] == "state"} - {
        str(entry) for entry in kept["state"]
    }
    if missing and kept["state"]:
        raise StateDictError(f"{key}: the state lacks {sorted(missing)}")

    def check(path: Any, entry: Any) -> Any:
        if path not in layout.specs or entry is None:
            return entry
        if not isinstance(entry, Tensor):
            raise StateDictError(f"{key}: {path[-1]} must be a tensor, got {type(entry).__name__}")
        spec = layout.specs[path]
        dims = spec.leading + (1 if spec.flat else len(compact))
        if entry.dim() < dims or entry.shape[spec.axis(compact)] != count:
            expected = (count,) if spec.flat else (*compact[:-1], count)
            _expect(f"{path[-1]} of {key}", expected, tuple(entry.shape))
        return entry

    return dict(map_tree(check, kept))


def _to_device(
    state: Any, stores: dict[str, Any], device: torch.device, on_device: bool
) -> dict[str, Any]:
    """A copy on a device: loading must not tie an optimizer to what it was loaded from."""

    def move(path: Any, entry: Any) -> Any:
        if not isinstance(entry, Tensor):
            return copy.deepcopy(entry)
        if path[-1:] == ("step",):  # where fused implementations want it
            return entry.to(torch.float32 if on_device else entry.dtype, copy=True).to(
                device if on_device else entry.device
            )
        return entry.to(device, copy=True)

    kept = {"state": map_tree(move, state)}
    return kept | {name: map_tree(move, entries) for name, entries in stores.items()}


def _type_of(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _expect(what: str, expected: object, found: object) -> None:
    if expected != found:
        raise StateDictError(f"{what}: expected {expected}, the state dict has {found}")
