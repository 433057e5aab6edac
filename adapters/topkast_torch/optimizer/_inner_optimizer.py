"""A handle of the inner optimizer, which steps it on compact vectors and disables direct calls.

The inner optimizer and the wrapper share the group dictionaries: both see whatever one of them or a
scheduler writes there. A group holds the model's Parameters between steps, and compact vectors in
their place during a step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.nn import Parameter

from topkast import UnsupportedOptimizerError
from topkast_torch.inner._fresh import DISABLED_METHODS, HOOKS, class_name, step_without_hooks


class InnerOptimizer:
    """An optimizer that only its wrapper may call.

    Parameters
    ----------
    inner
        The optimizer.
    find_params
        Returns, by group, the Parameters that the optimizer steps in place of the model's.
    """

    def __init__(
        self, inner: torch.optim.Optimizer, find_params: Callable[[], list[list[Parameter]]]
    ) -> None:
        self.inner, self._find_params = inner, find_params

    def take_over(self, wrapper: torch.optim.Optimizer) -> None:
        """Disable the optimizer's own methods, and move its hooks to the wrapper."""
        for name in HOOKS:
            setattr(wrapper, name, getattr(self.inner, name))
            setattr(self.inner, name, OrderedDict())
        for name in DISABLED_METHODS:
            setattr(self.inner, name, _make_refusal(self.inner, name))

    def hand_back(self, wrapper: torch.optim.Optimizer) -> None:
        """Undo :meth:`take_over`."""
        for name in HOOKS:
            setattr(self.inner, name, getattr(wrapper, name))
            setattr(wrapper, name, OrderedDict())
        for name in DISABLED_METHODS:
            delattr(self.inner, name)

    @contextmanager
    def with_compact_params(self) -> Iterator[None]:
        """Put compact vectors into the optimizer's groups."""
        model_params = [group["params"] for group in self.inner.param_groups]
        for group, params in zip(self.inner.param_groups, self._find_params(), strict=True):
            group["params"] = params
        try:
            yield
        finally:
            for group, params in zip(self.inner.param_groups, model_params, strict=False):
                group["params"] = params

    def step(self) -> None:
        """Step the optimizer without hooks, which the wrapper runs."""
        with self.with_compact_params():
            step_without_hooks(self.inner)

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer.__getstate__ would leave out its other attributes.
        state = {name: value for name, value in vars(self.inner).items() if name not in HOOKS}
        return {"class": type(self.inner), "state": state, "find_params": self._find_params}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.inner = object.__new__(state["class"])
        self.inner.__dict__.update(state["state"])
        for name in HOOKS:
            setattr(self.inner, name, OrderedDict())
        self._find_params = state["find_params"]


@dataclass(frozen=True)
class Refusal:
    """Stands in for a disabled method of an optimizer, and raises when called."""

    message: str

    def __call__(self, *arguments: Any, **named: Any) -> NoReturn:
        raise UnsupportedOptimizerError(self.message)

    @property
    def __func__(self) -> NoReturn:
        raise UnsupportedOptimizerError(self.message)


def _make_refusal(inner: torch.optim.Optimizer, method: str) -> Refusal:
    return Refusal(
        f"this {class_name(inner)} was wrapped by topkast.wrap_optimizer: call {method} of the "
        "TopKASTOptimizer that it returned, as in "
        "`opt = topkast.wrap_optimizer(opt, ...)`, or end it with topkast.unwrap"
    )


def clear_state(optimizer: torch.optim.Optimizer, stores: tuple[str, ...]) -> None:
    """Delete the optimizer's entries by Parameter."""
    for name in stores:
        store = getattr(optimizer, name, None)
        if store is not None:
            for key in [key for key in store if isinstance(key, torch.Tensor)]:
                del store[key]
