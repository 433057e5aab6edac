"""Whether layers may run together: what reads or changes inputs and outputs of single modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks

_OBSERVERS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_transformed() -> bool:
    """Whether a function transform, forward-mode AD, ``torch.compile`` or a trace is active."""
    return (
        torch.compiler.is_compiling() or in_transform() or torch._C._get_tracing_state() is not None
    )


def in_transform() -> bool:
    """Whether a function transform or forward-mode AD is active, which see functions alone."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_observed(modules: Iterable[Any]) -> bool:
    """Whether something may read or change inputs and outputs of some modules."""
    if (
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    ):
        return True
    for module in modules:
        state = module.__dict__
        if "forward" in state or any(map(state.__getitem__, _OBSERVERS)):
            return True
        if state.get("recording") is not None:  # of a sparse layer
            return True
    return False
