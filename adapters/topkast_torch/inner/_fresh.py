"""A fresh optimizer of the kind and with the options of another, which stays as it is."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast import UnsupportedOptimizerError
from topkast.adapter import GROUP_OPTIONS, Method

HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
# What a wrapped optimizer refuses to do alone; see optimizer/_seat.py.
REFUSED_ALONE = ("step", "state_dict", "load_state_dict", "add_param_group")
# In a group, what is none of the optimizer's own options; see also optimizer/_load.py.
_NO_OPTIONS = {"params", "param_names", "topkast", "dense", *GROUP_OPTIONS}
# The group of a fresh optimizer after some steps, by optimizer.
_COUNTED: WeakKeyDictionary[torch.optim.Optimizer, dict[str, Any]] = WeakKeyDictionary()


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer's class, as messages name it."""
    return type(optimizer).__name__


def attributes_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer keeps on itself, besides groups, state and hooks."""
    others = {"state", "param_groups", "defaults", *HOOKS, *REFUSED_ALONE}
    return {name: value for name, value in vars(optimizer).items() if name not in others}


def is_store(value: Any) -> bool:
    """Whether an attribute is a dictionary by Parameter, as ``state`` is."""
    return isinstance(value, MutableMapping) and any(isinstance(key, Tensor) for key in value)


def fresh_optimizer(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], params: Sequence[Parameter]
) -> torch.optim.Optimizer:
    """An optimizer of the same kind and options, without state, for `params` in one group.

    What the optimizer counts in `group` starts anew. It is in training mode, where there is one.
    """
    chosen = _options(optimizer, group)
    others = {
        name: value
        for name, value in group.items()
        if name not in {*_NO_OPTIONS, *chosen} and not isinstance(value, Method)
    }
    if others:
        counted = _counted_in_groups(optimizer, chosen)
        chosen |= {name: value for name, value in others.items() if name not in counted}
    return _fresh(optimizer, chosen, params)


def _fresh(
    optimizer: torch.optim.Optimizer, options: Mapping[str, Any], params: Sequence[Parameter]
) -> torch.optim.Optimizer:
    try:
        fresh = _copy(optimizer, params)
        fresh.param_groups = [{**copy.deepcopy(dict(options)), "params": list(params)}]
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise UnsupportedOptimizerError(
            f"{name_of(optimizer)} cannot be tried on tensors of another size: {error}"
        ) from error
    train = getattr(fresh, "train", None)
    if callable(train):
        train()
    return fresh


def _copy(optimizer: torch.optim.Optimizer, params: Sequence[Parameter]) -> torch.optim.Optimizer:
    fresh: torch.optim.Optimizer = object.__new__(type(optimizer))
    # Where attributes hold the user's parameters, the copy holds the first of its own.
    memo: dict[int, Any] = {
        id(param): params[0] for group in optimizer.param_groups for param in group["params"]
    }
    memo[id(optimizer)] = fresh
    for name, value in attributes_of(optimizer).items():
        if is_store(value):  # what is kept by Parameter starts empty
            fresh.__dict__[name] = copy.copy(value)
            fresh.__dict__[name].clear()
        else:
            fresh.__dict__[name] = copy.deepcopy(value, memo)
    for hook in HOOKS:
        setattr(fresh, hook, OrderedDict())
    fresh.defaults = dict(optimizer.defaults)
    fresh.state = defaultdict(dict)
    return fresh


def _options(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the constructor, at their values in a group."""
    parameters = inspect.signature(type(optimizer)).parameters
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return {
        name: group[name] if name in group and (name in parameters or open_ended) else value
        for name, value in optimizer.defaults.items()
    }


def missing_counts(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """What the optimizer is going to count in a group, and does not yet, with some value."""
    counted = _counted_in_groups(optimizer, _options(optimizer, group))
    known = {*group, *optimizer.defaults, "params"}
    return {name: value for name, value in counted.items() if name not in known}


def _counted_in_groups(
    optimizer: torch.optim.Optimizer, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What the optimizer itself adds to a group when it steps; all else there is the user's."""
    if optimizer not in _COUNTED:
        param = Parameter(torch.ones(1, 3, dtype=torch.float32, device="cpu"))
        fresh = _fresh(optimizer, options, [param])
        # One that needs more options than those of its constructor (Muon's "use_muon") cannot step.
        with suppress(UnsupportedOptimizerError):
            for _ in range(2):
                param.grad = torch.ones_like(param)
                take_step(optimizer, fresh, param.device)
        _COUNTED[optimizer] = dict(fresh.param_groups[0])
    return _COUNTED[optimizer]


def take_step(
    optimizer: torch.optim.Optimizer, fresh: torch.optim.Optimizer, device: torch.device
) -> None:
    """One step of a fresh optimizer, where neither defaults nor random numbers are the user's."""
    with _undisturbed(device):
        try:
            step_without_hooks(fresh)
        except Exception as error:
            raise UnsupportedOptimizerError(
                f"{name_of(optimizer)} cannot take a plain step on a vector of weights and its "
                f"dense gradient: {error}. Wrap an elementwise optimizer (Adam, SGD, ...)"
            ) from error


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Neither the random numbers nor the default device of the user matter, or change."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # meant for the optimizer that is tried
        yield


def step_without_hooks(optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()`` without step hooks, which the wrapper fires itself."""
    step: Callable[..., Any] = type(optimizer).step
    if getattr(step, "hooked", False):  # torch.optim.Optimizer.profile_hook_step
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(optimizer)
