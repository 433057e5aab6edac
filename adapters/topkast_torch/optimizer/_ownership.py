"""The wrapped optimizer that owns a Parameter: one at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakTensorKeyDictionary

from topkast import UnsupportedOptimizerError

if TYPE_CHECKING:
    from topkast_torch.execution._execution import Execution

_OWNERS: Any = WeakTensorKeyDictionary()  # weak reference to an Execution, by Parameter
_REPLACED: Any = WeakTensorKeyDictionary()  # modules that have another one now, by Parameter


def claim(param: Tensor, execution: Execution) -> None:
    """Make an execution the owner of a Parameter, for as long as the execution lives."""
    _OWNERS[param] = weakref.ref(execution)
    _REPLACED.pop(param, None)


def release(param: Tensor) -> None:
    """Remove the owner of a Parameter."""
    _OWNERS.pop(param, None)
    _REPLACED.pop(param, None)


def owner_of(param: Tensor) -> Execution | None:
    """The execution that owns a Parameter, if any."""
    reference = _OWNERS.get(param)
    owner: Execution | None = reference() if reference is not None else None
    return owner


def check_free(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise :class:`UnsupportedOptimizerError` for a Parameter that has an owner."""
    named = list(named)
    if any(owner_of(param) is not None for _, param in named):
        gc.collect()  # the owner may be an unused optimizer in a reference cycle
    for name, param in named:
        if owner_of(param) is not None:
            raise UnsupportedOptimizerError(
                f"{name} is trained by another wrapped optimizer already: use that one, or end it "
                "with topkast.unwrap(old_optimizer) first"
            )


def _notice_replacement(module: nn.Module, name: str, param: Tensor | None) -> None:
    """Notify the owner of a Parameter that a module replaces it, or that all have it again.

    ``load_state_dict(assign=True)`` replaces Parameters: the model then no longer holds what the
    optimizer trains. Another module that gets the old Parameter does not change that.
    """
    old = module._parameters.get(name)
    if old is param:
        return
    if old is not None and (owner := owner_of(old)) is not None:
        modules = _REPLACED.setdefault(old, weakref.WeakKeyDictionary())
        modules.setdefault(module, set()).add(name)
        owner.note_replacement(old, is_replaced=True)
    if param is not None and (owner := owner_of(param)) is not None:
        modules = _REPLACED.get(param, {})
        if name in modules.get(module, ()):
            modules[module].discard(name)
            owner.note_replacement(param, is_replaced=any(modules.values()))


register_module_parameter_registration_hook(_notice_replacement)
