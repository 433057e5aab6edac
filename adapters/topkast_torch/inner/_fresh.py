"""A fresh optimizer of the class and options of another one, which is left unchanged."""

from __future__ import annotations

import copy
import inspect
import textwrap
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
# Methods that a wrapped optimizer refuses; see optimizer/_inner_optimizer.py.
DISABLED_METHODS = ("step", "state_dict", "load_state_dict", "add_param_group")
# Entries of a group that are not the inner optimizer's options; see also optimizer/_load.py.
_NOT_OPTIONS = {"params", "param_names", "topkast", "dense", *GROUP_OPTIONS}
_MESSAGE_WIDTH = 200  # of what other libraries' errors say
# In a trial, a learning rate below the first, whose steps rounding would hide, becomes the second.
LEAST_LEARNING_RATE, _LEARNING_RATE = 1e-7, 1e-3
# The group of a fresh optimizer after its trial steps, by optimizer.
_STEPPED_GROUPS: WeakKeyDictionary[torch.optim.Optimizer, dict[str, Any]] = WeakKeyDictionary()
# Whether a step fails on a tensor without the entries of the constructor, by optimizer.
_LACKS_ENTRIES: WeakKeyDictionary[torch.optim.Optimizer, bool] = WeakKeyDictionary()


def class_name(optimizer: torch.optim.Optimizer) -> str:
    """The name of the optimizer's class, for messages."""
    return type(optimizer).__name__


def attributes_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Attributes of an optimizer besides groups, state and hooks."""
    others = {"state", "param_groups", "defaults", *HOOKS, *DISABLED_METHODS}
    return {name: value for name, value in vars(optimizer).items() if name not in others}


def is_store(value: Any) -> bool:
    """Whether an attribute is a dictionary by Parameter, as ``state`` is."""
    return isinstance(value, MutableMapping) and any(isinstance(key, Tensor) for key in value)


def make_fresh_optimizer(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], params: Sequence[Parameter]
) -> torch.optim.Optimizer:
    """An optimizer of the same class and options, without state, for `params` in one group.

    Counters that the optimizer keeps in `group` are left out. The optimizer is in training mode if
    it has one.
    """
    options = _constructor_options(optimizer, group)
    others = {
        name: value
        for name, value in group.items()
        if name not in {*_NOT_OPTIONS, *options} and not isinstance(value, Method)
    }
    if others:
        counters = _find_counters(optimizer, options)
        options |= {name: value for name, value in others.items() if name not in counters}
    fresh = _fresh(optimizer, options, params)
    if entries := first_entries(optimizer, group):
        for param in params:
            fresh.state[param] = {
                name: _copy_start(entry, param.detach()) for name, entry in entries.items()
            }
    return fresh


def with_moving_weights(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a group for a trial: a schedule may have set the learning rate to 0."""
    rate = group.get("lr")
    if isinstance(rate, (int, float, Tensor)) and abs(float(rate)) < LEAST_LEARNING_RATE:
        return {**group, "lr": 0.0 * rate + _LEARNING_RATE}
    return group


def _fresh(
    optimizer: torch.optim.Optimizer, options: Mapping[str, Any], params: Sequence[Parameter]
) -> torch.optim.Optimizer:
    try:
        fresh = _copy(optimizer, params)
        fresh.param_groups = [{**copy.deepcopy(dict(options)), "params": list(params)}]
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise UnsupportedOptimizerError(
            f"{class_name(optimizer)} cannot be copied to try it on other tensors: {error}"
        ) from error
    train = getattr(fresh, "train", None)
    if callable(train):
        train()
    return fresh


def first_entries(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that only the constructor writes for a weight, as Adagrad's does; mostly none.

    Those of all weights have to start at one number. Masks do not: a mask of a vector on B would
    have to be chosen among all weights.
    """
    if optimizer not in _LACKS_ENTRIES and optimizer.state:
        _LACKS_ENTRIES[optimizer] = _lacks_entries(optimizer, group)
    if _LACKS_ENTRIES.get(optimizer, False):
        for param in group["params"]:
            entries: dict[str, Any] = optimizer.state.get(param, {})
            if entries and all(_is_start(entry, param) for entry in entries.values()):
                return entries
    return {}


def _lacks_entries(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a step on a tensor without entries fails: it does not write them itself."""
    param = Parameter(torch.ones(1, 3, dtype=torch.float32, device="cpu"))
    param.grad = torch.ones_like(param)
    try:
        fresh = _fresh(optimizer, _constructor_options(optimizer, group), [param])
        take_step(optimizer, fresh, param.device)
    except UnsupportedOptimizerError as error:
        return isinstance(error.__cause__, KeyError)
    return False


def _is_start(entry: Any, param: Tensor) -> bool:
    """Whether an entry is a number, or one number for each weight."""
    if not isinstance(entry, Tensor):
        return isinstance(entry, (int, float))
    if not entry.is_floating_point() or entry.shape not in (param.shape, ()):
        return False
    return entry.numel() > 0 and bool((entry == entry.reshape(-1)[0]).all())


def _copy_start(entry: Any, param: Tensor) -> Any:
    """A copy of an entry for another weight."""
    if isinstance(entry, Tensor) and entry.dim():
        number = float(entry.reshape(-1)[0])
        return torch.full_like(param, number, dtype=entry.dtype, device=entry.device)
    return copy.deepcopy(entry)


def _copy(optimizer: torch.optim.Optimizer, params: Sequence[Parameter]) -> torch.optim.Optimizer:
    fresh: torch.optim.Optimizer = object.__new__(type(optimizer))
    # In attributes, the user's Parameters are replaced by the first of the copy's own.
    memo: dict[int, Any] = {
        id(param): params[0] for group in optimizer.param_groups for param in group["params"]
    }
    memo[id(optimizer)] = fresh
    for name, value in attributes_of(optimizer).items():
        if is_store(value):  # starts empty
            fresh.__dict__[name] = copy.copy(value)
            fresh.__dict__[name].clear()
        else:
            fresh.__dict__[name] = copy.deepcopy(value, memo)
    for hook in HOOKS:
        setattr(fresh, hook, OrderedDict())
    fresh.defaults = dict(optimizer.defaults)
    fresh.state = defaultdict(dict)
    return fresh


def _constructor_options(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of the constructor, with their values in a group."""
    parameters = inspect.signature(type(optimizer)).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {
        name: group[name] if name in group and (name in parameters or takes_any) else value
        for name, value in optimizer.defaults.items()
    }


def find_missing_counts(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any]
) -> dict[str, Any]:
    """Counters that a group lacks and the first step adds, with placeholder values."""
    counters = _find_counters(optimizer, _constructor_options(optimizer, group))
    known = {*group, *optimizer.defaults, "params"}
    return {name: value for name, value in counters.items() if name not in known}


def _find_counters(optimizer: torch.optim.Optimizer, options: Mapping[str, Any]) -> dict[str, Any]:
    """The group after two trial steps: entries that the optimizer adds are its counters."""
    if optimizer not in _STEPPED_GROUPS:
        param = Parameter(torch.ones(1, 3, dtype=torch.float32, device="cpu"))
        fresh = _fresh(optimizer, options, [param])
        # Optimizers that need other options than the constructor's (Muon's "use_muon") cannot step.
        with suppress(UnsupportedOptimizerError):
            for _ in range(2):
                param.grad = torch.ones_like(param)
                take_step(optimizer, fresh, param.device)
        _STEPPED_GROUPS[optimizer] = dict(fresh.param_groups[0])
    return _STEPPED_GROUPS[optimizer]


def take_step(
    optimizer: torch.optim.Optimizer, fresh: torch.optim.Optimizer, device: torch.device
) -> None:
    """Step a fresh optimizer, isolated from the user's defaults and random numbers."""
    with _isolated(device):
        try:
            step_without_hooks(fresh)
        except Exception as error:
            raise UnsupportedOptimizerError(
                f"{class_name(optimizer)} cannot take a plain step on a vector of weights with a "
                f"dense gradient: {_describe(error)}. {_remedy(optimizer, error)}"
            ) from error


def _describe(error: Exception) -> str:
    """The first line of an error's message, shortened; a KeyError's message is only the key."""
    first = (str(error).strip().splitlines() or [""])[0]
    line = textwrap.shorten(first, _MESSAGE_WIDTH).rstrip(".:")
    return f"{type(error).__name__}: {line}" if isinstance(error, KeyError) or not line else line


def _remedy(optimizer: torch.optim.Optimizer, error: Exception) -> str:
    stores = [value for value in attributes_of(optimizer).values() if is_store(value)]
    if isinstance(error, KeyError) and (optimizer.state or stores):
        return (
            "Entries that the constructor writes for each weight do not exist for the vectors on "
            "B: write them at a weight's first step, as torch.optim.Adam does"
        )
    return "Wrap an elementwise optimizer (Adam, SGD, ...)"


@contextmanager
def _isolated(device: torch.device) -> Iterator[None]:
    """Isolate from the user's random state, default device and warning filters."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the optimizer in its trial
        yield


def step_without_hooks(optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()`` without step hooks, which the wrapper runs itself."""
    step: Callable[..., Any] = type(optimizer).step
    if getattr(step, "hooked", False):  # torch.optim.Optimizer.profile_hook_step
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(optimizer)
