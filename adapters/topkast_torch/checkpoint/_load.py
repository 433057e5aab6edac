"""Loading a state dict: it is checked in full before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast import MismatchError, OptionError, StateDictError, Support
from topkast.adapter import FIXED_OPTIONS, GROUP_OPTIONS, SETTLED, bare_name
from topkast.reservoirs import Reservoir
from topkast_torch.checkpoint._load_weights import expect, load_weights
from topkast_torch.checkpoint._save import TOPKAST_KEY, VERSION, copy_tree, is_tensor
from topkast_torch.execution._execution import Execution
from topkast_torch.inner._inner_state import decode, map_tree
from topkast_torch.optimizer._groups import Group, WrapperState
from topkast_torch.optimizer._inner_optimizer import clear_state
from topkast_torch.optimizer._interrupts import uninterrupted

_NOT_OPTIONS = ("params", "param_names", TOPKAST_KEY)  # entries of a group


def load(state: WrapperState, state_dict: Mapping[str, Any]) -> None:
    """Check all of a state dict, then load it."""
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
    with uninterrupted():
        _apply(state, loaded)


def _apply(state: WrapperState, loaded: _Loaded) -> None:
    """Load what was checked."""
    inner = state.inner
    for execution in state.executions:
        execution.is_divided = True  # until it is restored
    state.updates, state.overdue = loaded.updates, loaded.overdue
    clear_state(inner, state.stores)
    for name, value in loaded.attributes.items():
        setattr(inner, name, value)
    for key in [key for key in inner.state if not is_tensor(key)]:
        del inner.state[key]
    inner.state.update(loaded.others)
    for param, stores in loaded.entries:
        for name, entries in stores.items():
            if not hasattr(inner, name):  # the optimizer's first step creates it
                setattr(inner, name, {})
            getattr(inner, name)[param] = entries
    for group, param_group, saved in zip(
        state.groups, inner.param_groups, loaded.groups, strict=True
    ):
        _load_options(param_group, saved, inner.defaults)
        group.checked = []
        for execution in group.executions:
            loaded.sets[id(execution)].restore(execution, param_group)
            execution.decide(param_group, state.updates, overdue=state.overdue)


def _load_options(
    param_group: dict[str, Any], saved: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    skipped = {*_NOT_OPTIONS, *FIXED_OPTIONS}
    known = {*skipped, *defaults, *GROUP_OPTIONS}
    for name in [name for name in param_group if name not in known]:
        if name not in saved:
            del param_group[name]  # a counter that the saved optimizer had not created yet
    param_group.update((name, value) for name, value in saved.items() if name not in skipped)


@dataclass
class _Sets:
    """Sets, weights and ages that are loaded into one execution."""

    support: Support
    entered_active: Tensor
    values: Tensor  # on B (|B|,)
    reservoir: Reservoir
    steps: int
    ages: Tensor | None
    momentum: Tensor | None

    def restore(self, execution: Execution, param_group: Mapping[str, Any]) -> None:
        execution.entered_active, execution.steps = self.entered_active, self.steps
        execution.reservoir.discard(self.reservoir)
        execution.restore(self.support, self.values, self.reservoir)
        if execution.young is not None and self.ages is not None:
            execution.young.restore(self.ages, param_group)
        if self.momentum is not None:
            execution.momentum = self.momentum


@dataclass
class _Loaded:
    updates: int
    overdue: bool
    attributes: dict[str, Any]
    others: dict[Any, Any]  # state that is not keyed by Parameter
    groups: list[dict[str, Any]] = field(default_factory=list)
    entries: list[tuple[Parameter, dict[str, Any]]] = field(default_factory=list)
    sets: dict[int, _Sets] = field(default_factory=dict)  # by the id of the execution


def _check(state: WrapperState, state_dict: Mapping[str, Any]) -> _Loaded:
    groups = list(state_dict["param_groups"])
    header = groups[0].get(TOPKAST_KEY) if groups else None
    if header is None:
        raise StateDictError(
            f"the state dict has no entry {TOPKAST_KEY!r} in its first group: it was saved from an "
            "optimizer that was not wrapped. Load it before wrapping the optimizer"
        )
    if header["version"] != VERSION:
        raise StateDictError(
            f"the state dict has version {header['version']!r}, expected {VERSION}"
        )
    updates = header["updates"]
    if not isinstance(updates, int) or updates < 0:
        raise StateDictError(f"the number of updates must be an integer >= 0, got {updates!r}")
    attributes = header.get("attributes", {})  # some libraries drop empty dictionaries
    expect("attributes of the inner optimizer", {*state.attributes}, {*attributes})
    expect("number of parameter groups", len(state.groups), len(groups))
    loaded = _Loaded(
        updates,
        bool(header["overdue"]),
        copy_tree(attributes),
        copy_tree(header.get("state", {})),
    )
    try:
        _check_groups(state, state_dict, header, loaded)
    except BaseException:
        for sets in loaded.sets.values():
            sets.reservoir.discard()
        raise
    return loaded


def _check_groups(
    state: WrapperState,
    state_dict: Mapping[str, Any],
    header: Mapping[str, Any],
    loaded: _Loaded,
) -> None:
    groups = list(state_dict["param_groups"])
    uncounted = str(header["uncounted"]).split()
    for number, (group, param_group, saved) in enumerate(
        zip(state.groups, state.inner.param_groups, groups, strict=True)
    ):
        saved = {name: saved[name] for name in saved if f"{number}:{name}" not in uncounted}
        expect("parameters in a group", len(group.params), len(saved["params"]))
        try:
            saved_options = {name: saved[name] for name in GROUP_OPTIONS}
            state.options.override(saved_options | {"method": group.method})
        except OptionError as error:
            raise StateDictError(
                f"a parameter group of the state dict has an invalid option: {error}"
            ) from None
        loaded.groups.append({name: copy_tree(saved[name]) for name in saved if name != "params"})
        _check_group(
            loaded,
            group,
            param_group,
            saved,
            state_dict["state"],
            state.stores,
            state.options.reservoir_path,
        )


def _check_group(
    loaded: _Loaded,
    group: Group,
    param_group: Mapping[str, Any],
    saved: Mapping[str, Any],
    states: Mapping[Any, Any],
    known_stores: tuple[str, ...],
    folder: Any,
) -> None:
    numbers = _match_params(group, param_group, saved)
    by_name: dict[str, dict[str, Any]] = {}
    for name, number in numbers.items():
        entries = states.get(number, states.get(str(number), {}))
        if not isinstance(entries, Mapping):
            raise StateDictError(f"{name}: its state must be a dictionary, got {entries!r}")
        by_name[name] = decode(dict(entries))
    on_device = bool(saved.get("capturable") or saved.get("fused"))
    for name, param, inner_param in group.inner_params_by_name():
        if name in group.execution_by_name:
            continue
        extra = by_name[name].pop(TOPKAST_KEY, {})
        if extra.get("started"):
            stores = _read_stores(extra, known_stores)
            entries = {"state": by_name[name]} | stores
            if name in group.locals:
                entries = group.locals[name].load_entries(entries)
            copied = _to_device(entries, param.device, on_device)
            loaded.entries.append((inner_param, copied))
    for execution in group.executions:
        extras = {name: by_name[name].pop(TOPKAST_KEY, None) for name in execution.ranked.shapes}
        for name, extra in extras.items():
            if extra is None or not ({"params", "reservoir"} & extra.keys() or len(extras) > 1):
                raise StateDictError(f"{name}: the state dict lacks its sets")
        first, *others = extras
        if others:
            members = [extra["members"] for extra in extras.values() if "members" in extra]
            _expect_order(list(extras), members[0] if members else None)
        loaded.sets[id(execution)] = _check_sets(execution, extras, folder)
        if extras[first]["started"]:
            stores = _read_stores(extras[first], known_stores)
            checked = _check_entries(execution, {"state": by_name[first]} | stores)
            checked = execution.saved_form.load_entries(checked)
            copied = _to_device(checked, execution.values.device, on_device)
            loaded.entries.append((execution.values, copied))


def _read_stores(extra: Mapping[str, Any], known_stores: tuple[str, ...]) -> dict[str, Any]:
    """The entries of a tensor in the optimizer's stores other than ``state``."""
    stores = dict(extra.get("stores", {}))
    unknown = sorted(stores.keys() - set(known_stores))
    if unknown:
        raise StateDictError(
            f"the state dict has entries in {', '.join(unknown)}, where this optimizer keeps none"
        )
    return stores


def _expect_order(names: list[str], members: Any) -> None:
    """Raise :class:`StateDictError` if tensors ranked together were saved in another order."""
    if members is None or (members != names and sorted(members) == sorted(names)):
        raise StateDictError(
            f"the state dict has the tensors ranked together in the order {members}, the optimizer "
            f"in the order {names}: build it with its Parameters in the saved order"
        )


def _match_params(
    group: Group, param_group: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Any]:
    """The saved number of each tensor: matched by name if both sides have the same names.

    Prefixes of DistributedDataParallel and torch.compile do not count.
    """
    names, saved_names = param_group.get("param_names"), saved.get("param_names")
    if names is not None and saved_names is not None:
        for shorten in (str, bare_name):
            own, theirs = (list(map(shorten, entry)) for entry in (names, saved_names))
            if sorted(own) == sorted(theirs) and len({*own}) == len(own):
                numbers = dict(zip(theirs, saved["params"], strict=True))
                return {key: numbers[name] for key, name in zip(group.names, own, strict=True)}
    return dict(zip(group.names, saved["params"], strict=True))


def _check_sets(execution: Execution, extras: Mapping[str, Any], folder: Any) -> _Sets:
    ranked, key = execution.ranked, execution.ranked.key
    device = execution.values.device
    shared = extras[next(iter(ranked.shapes))]
    blocks = ranked.blocks
    sides = (1, 1) if blocks is None else (blocks.rows, blocks.columns)
    saved_sides = shared.get("block_rows", 1), shared.get("block_columns", 1)
    expect(f"block of {key}", sides, saved_sides)
    group_size = ranked.group_size
    expect(f"size of the groups of {key}", group_size, shared.get("group_size"))
    indices, count = shared["indices"], ranked.backward
    expected = ((count,), execution.support.indices.dtype)
    expect(f"indices of B of {key}", expected, _shape_and_dtype(indices))
    forward = ranked.forward
    if execution.method.schedules and shared["active_count"] in range(ranked.backward + 1):
        forward = shared["active_count"]
    expect(f"|A| of {key}", forward, shared["active_count"])
    support = Support(indices.to(device, copy=True), forward, ranked.blocks, group_size)
    try:
        support.check(ranked.size, f"{key}: the state dict")
    except MismatchError as error:
        raise StateDictError(str(error)) from None
    ages = None
    if execution.young is not None:
        dtype = torch.int16 if shared["ages"].dtype == torch.int16 else torch.int32  # older files
        expected = ((ranked.backward_size,), dtype)
        expect(f"ages of {key}", expected, _shape_and_dtype(shared["ages"]))
        saved_ages = execution.saved_form.load_vector(shared["ages"])
        ages = saved_ages.clamp(0, SETTLED).to(device, torch.int16)
    momentum = None
    if execution.momentum is not None:
        expected = ((ranked.size,), execution.momentum.dtype)
        expect(f"momentum of {key}", expected, _shape_and_dtype(shared.get("momentum")))
        momentum = shared["momentum"].to(device, copy=True)
    entered, steps = [extra["entered_active"] for extra in extras.values()], shared["steps"]
    if not all(isinstance(number, int) and number >= 0 for number in (*entered, steps)):
        raise StateDictError(f"{key}: entered_active and steps must be integers >= 0")
    values, reservoir = load_weights(execution, support, extras, folder)  # which may write a file
    return _Sets(
        support,
        torch.tensor(entered, dtype=torch.int32, device=device),
        values,
        reservoir,
        steps,
        ages,
        momentum,
    )


def _check_entries(execution: Execution, stores: dict[str, Any]) -> dict[str, Any]:
    """The inner optimizer's entries for a compact vector, if they fit the execution."""
    layout, compact = execution.profile.layout, execution.ranked.compact_shape
    key, count = execution.ranked.key, execution.ranked.backward_size
    missing = {str(path[1]) for path in layout.specs if path[0] == "state"} - {
        str(entry) for entry in stores["state"]
    }
    if missing and stores["state"]:
        raise StateDictError(f"{key}: the state lacks {sorted(missing)}")

    def check_entry(path: Any, entry: Any) -> Any:
        if path not in layout.specs or entry is None:
            return entry
        if not isinstance(entry, Tensor):
            raise StateDictError(f"{key}: {path[-1]} must be a tensor, got {type(entry).__name__}")
        spec = layout.specs[path]
        dims = spec.leading + (1 if spec.flat else len(compact))
        if entry.dim() < dims or entry.shape[spec.axis(compact)] != count:
            expected = (count,) if spec.flat else (*compact[:-1], count)
            expect(f"{path[-1]} of {key}", expected, tuple(entry.shape))
        return entry

    return dict(map_tree(check_entry, stores))


def _to_device(stores: Mapping[str, Any], device: torch.device, on_device: bool) -> dict[str, Any]:
    """Copies on a device, which share no memory with the state dict."""

    def copy_to_device(path: Any, entry: Any) -> Any:
        if not isinstance(entry, Tensor):
            return copy.deepcopy(entry)
        if path[-1:] == ("step",):  # fused implementations need it on the device
            return entry.to(torch.float32 if on_device else entry.dtype, copy=True).to(
                device if on_device else entry.device
            )
        return entry.to(device, copy=True)

    return {name: map_tree(copy_to_device, tree) for name, tree in stores.items()}


def _shape_and_dtype(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype
