"""The seat of the inner optimizer: what it is handed while it steps, and nothing in between.

Its parameter groups are the wrapper's own, the same dictionaries: whatever it or a scheduler writes
there, both see. Between steps a group holds the Parameters of the model; for the time of a step it
holds compact vectors in their place.
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
from topkast_torch.inner._fresh import HOOKS, REFUSED_ALONE, name_of, step_without_hooks


class Seat:
    """An optimizer that acts through its wrapper alone.

    Parameters
    ----------
    inner
        The optimizer.
    given
        Returns, for each group, what the optimizer is handed in the place of its Parameters.
    """

    def __init__(
        self, inner: torch.optim.Optimizer, given: Callable[[], list[list[Parameter]]]
    ) -> None:
        self.inner, self._given = inner, given

    def take(self, wrapper: torch.optim.Optimizer) -> None:
        """Make the optimizer refuse to act alone, and move its hooks to the wrapper."""
        for name in HOOKS:
            setattr(wrapper, name, getattr(self.inner, name))
            setattr(self.inner, name, OrderedDict())
        for name in REFUSED_ALONE:
            setattr(self.inner, name, _refuse_alone(self.inner, name))

    def leave(self, wrapper: torch.optim.Optimizer) -> None:
        """Undo :meth:`take`."""
        for name in HOOKS:
            setattr(self.inner, name, getattr(wrapper, name))
            setattr(wrapper, name, OrderedDict())
        for name in REFUSED_ALONE:
            delattr(self.inner, name)

    @contextmanager
    def seated(self) -> Iterator[None]:
        """The optimizer's groups hold compact vectors."""
        outer = [group["params"] for group in self.inner.param_groups]
        for group, params in zip(self.inner.param_groups, self._given(), strict=True):
            group["params"] = params
        try:
            yield
        finally:
            for group, params in zip(self.inner.param_groups, outer, strict=False):
                group["params"] = params

    def step(self) -> None:
        """One step of the optimizer, without hooks: the wrapper fires them."""
        with self.seated():
            step_without_hooks(self.inner)

    def __getstate__(self) -> dict[str, Any]:
        # An optimizer leaves out what it keeps on itself when it is copied.
        state = {name: value for name, value in vars(self.inner).items() if name not in HOOKS}
        return {"kind": type(self.inner), "state": state, "given": self._given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.inner = object.__new__(state["kind"])
        self.inner.__dict__.update(state["state"])
        for name in HOOKS:
            setattr(self.inner, name, OrderedDict())
        self._given = state["given"]


@dataclass(frozen=True)
class Refusal:
    """In the place of a method that an optimizer must not be asked for any more."""

    message: str

    def __call__(self, *arguments: Any, **named: Any) -> NoReturn:
        raise UnsupportedOptimizerError(self.message)

    @property
    def __func__(self) -> NoReturn:
        raise UnsupportedOptimizerError(self.message)


def _refuse_alone(inner: torch.optim.Optimizer, method: str) -> Refusal:
    return Refusal(
        f"this {name_of(inner)} was wrapped by topkast.wrap_optimizer and holds compact vectors: "
        f"call {method} of the TopKASTOptimizer that it returned, as in "
        "`opt = topkast.wrap_optimizer(opt, ...)`, or end it by topkast.unwrap"
    )


def clear_state(optimizer: torch.optim.Optimizer, stores: tuple[str, ...]) -> None:
    """Empty what an optimizer keeps by Parameter."""
    for name in stores:
        store = getattr(optimizer, name, None)
        if store is not None:
            for key in [key for key in store if isinstance(key, torch.Tensor)]:
                del store[key]
