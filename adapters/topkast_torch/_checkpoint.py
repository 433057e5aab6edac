"""The state dict: what is saved, and everything that is checked before a byte is changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topkast import OptionError, StateDictError, Support
from topkast._options import FIXED_OPTIONS, GROUP_OPTIONS
from topkast_torch._compact import CompactTensor
from topkast_torch._groups import Core, Group

VERSION = 1

_OWN_KEYS = ("params", "param_names")
_KEPT = (*_OWN_KEYS, *FIXED_OPTIONS)  # when loading


def save(core: Core, outer_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state dict of :meth:`TopKASTOptimizer.state_dict`."""
    state_dict: dict[str, Any] = core.inner.state_dict()
    for packed, outer in zip(state_dict["param_groups"], outer_groups, strict=True):
        packed.update((name, value) for name, value in outer.items() if name not in _OWN_KEYS)
    state_dict["topkast"] = {
        "version": VERSION,
        "updates": core.updates,
        "blocks": [
            {
                "indices": compact.support.indices.clone(),
                "active": compact.support.active.clone(),
                "changed": compact.changed.clone(),
                "params": compact.block.unflatten(compact.theta().clone()),
            }
            for compact in core.compact
        ],
    }
    return state_dict


def load(core: Core, outer_groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """Check all of a state dict, then take it over."""
    try:
        loaded = _check(core, state_dict)
    except StateDictError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StateDictError(f"the state dict is corrupt: {error!r}") from error
    before = core.inner.state, core.inner.param_groups
    try:
        core.inner.load_state_dict(loaded.inner)
    except Exception as error:
        core.inner.state, core.inner.param_groups = before
        raise StateDictError(f"{type(core.inner).__name__} refused its state: {error}") from error
    core.updates = loaded.updates
    for outer, saved in zip(outer_groups, loaded.groups, strict=True):
        outer.update((name, value) for name, value in saved.items() if name not in _KEPT)
    for compact, block in zip(core.compact, loaded.blocks, strict=True):
        compact.changed = block.changed
        compact.restore(block.support, block.theta)
    for own, outer in zip(core.groups, outer_groups, strict=True):
        for compact in own.compact:
            compact.set_exploring(outer["explore_until"], core.updates)


@dataclass
class _Block:
    support: Support
    changed: Tensor
    theta: Tensor  # one vector


@dataclass
class _Loaded:
    updates: int
    blocks: list[_Block]
    groups: list[dict[str, Any]]
    inner: dict[str, Any]  # state dict of the inner optimizer


def _check(core: Core, state_dict: Mapping[str, Any]) -> _Loaded:
    if "topkast" not in state_dict:
        raise StateDictError(
            "the state dict has no entry 'topkast': it was saved from an optimizer that was not "
            "wrapped. Load it into that optimizer, then wrap it"
        )
    own = state_dict["topkast"]
    if own["version"] != VERSION:
        raise StateDictError(f"the state dict has version {own['version']!r}, expected {VERSION}")
    updates = own["updates"]
    if not isinstance(updates, int) or updates < 0:
        raise StateDictError(f"the number of updates must be an integer >= 0, got {updates!r}")
    compacts = list(core.compact)
    _expect("number of sparsified tensors", len(compacts), len(own["blocks"]))
    blocks = [
        _check_block(compact, saved) for compact, saved in zip(compacts, own["blocks"], strict=True)
    ]
    groups = [dict(group) for group in state_dict["param_groups"]]
    _expect("number of parameter groups", len(core.groups), len(groups))
    for group in groups:
        try:
            core.options.override({name: group[name] for name in GROUP_OPTIONS})
        except OptionError as error:
            raise StateDictError(
                f"a parameter group has an option that is wrong: {error}"
            ) from None
    # A copy: loading must not tie this optimizer to the one that the state was taken from.
    state = copy.deepcopy(dict(state_dict["state"]))
    for own_group, inner_group, saved in zip(
        core.groups, core.inner.param_groups, groups, strict=True
    ):
        _expect("parameters in a group", len(inner_group["params"]), len(saved["params"]))
        for param, number in zip(inner_group["params"], saved["params"], strict=True):
            if number in state:
                _check_entries(own_group, param, state[number])
    # Options that a later version of the inner optimizer has, and the state dict lacks, stay.
    inner_groups = [
        {name: value for name, value in (inner | saved).items() if name not in GROUP_OPTIONS}
        for inner, saved in zip(core.inner.param_groups, groups, strict=True)
    ]
    return _Loaded(updates, blocks, groups, {"state": state, "param_groups": inner_groups})


def _check_block(compact: CompactTensor, saved: Mapping[str, Any]) -> _Block:
    block, key = compact.block, compact.block.key
    shapes = [tuple(tensor.shape) for tensor in saved["params"].values()]
    _expect(f"shapes of {key}", list(block.shapes.values()), shapes)
    theta = torch.cat([tensor.reshape(-1) for tensor in saved["params"].values()])
    _expect(f"dtype of {key}", compact.reservoir.dtype, theta.dtype)
    if not torch.isfinite(theta).all():
        raise StateDictError(f"{key}: a saved weight is NaN or infinite")
    indices, active, changed = saved["indices"], saved["active"], saved["changed"]
    _expect(f"indices of B of {key}", ((block.backward,), torch.int64), _kind(indices))
    _expect(f"flags of A of {key}", ((block.backward,), torch.bool), _kind(active))
    _expect(f"mask change of {key}", ((len(block.shapes),), torch.int32), _kind(changed))
    _expect(f"|A| of {key}", block.forward, int(active.sum()))
    rising = bool((indices[1:] > indices[:-1]).all())
    if not rising or int(indices[0]) < 0 or int(indices[-1]) >= block.size:
        raise StateDictError(
            f"{key}: the indices of B must ascend, without repetition, in [0, {block.size})"
        )
    device = compact.reservoir.device
    support = Support(indices.to(device, copy=True), active.to(device, copy=True))
    return _Block(support, changed.to(device, copy=True), theta.to(device))


def _check_entries(group: Group, param: Tensor, entries: Mapping[str, Any]) -> None:
    """The inner optimizer's state of one tensor: its entries, and one value per coordinate."""
    name = next(
        (compact.block.key for compact in group.compact if compact.values is param),
        "a dense tensor",
    )
    if entries:
        missing = group.initial.keys() - entries.keys()
        if missing:
            raise StateDictError(f"{name}: the state lacks {sorted(missing)}")
    for key, entry in entries.items():
        per_coordinate = group.initial.get(key) is not None
        if per_coordinate and entry is not None and not isinstance(entry, Tensor):
            raise StateDictError(f"{name}: {key} must be a tensor, got {type(entry).__name__}")
        if isinstance(entry, Tensor) and (per_coordinate or entry.numel() != 1):
            _expect(f"{key} of {name}", tuple(param.shape), tuple(entry.shape))


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _expect(what: str, expected: object, found: object) -> None:
    if expected != found:
        raise StateDictError(f"{what}: expected {expected}, the state dict has {found}")
