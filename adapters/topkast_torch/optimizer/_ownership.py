"""Which wrapped optimizer a Parameter belongs to: it can be trained by one alone."""

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

_OWNERS: Any = WeakTensorKeyDictionary()  # a weak reference to an Execution, by Parameter


def claim(param: Tensor, execution: Execution) -> None:
    """From now on the Parameter belongs to an execution, for as long as that lives."""
    _OWNERS[param] = weakref.ref(execution)


def release(param: Tensor) -> None:
    """The Parameter belongs to nobody."""
    _OWNERS.pop(param, None)


def owner_of(param: Tensor) -> Execution | None:
    """The execution that a Parameter belongs to."""
    reference = _OWNERS.get(param)
    owner: Execution | None = reference() if reference is not None else None
    return owner


def check_free(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise :class:`UnsupportedOptimizerError` for a Parameter that has an owner."""
    named = list(named)
    if any(owner_of(param) is not None for _, param in named):
        gc.collect()  # an optimizer that nobody uses any more may still wait for it
    for name, param in named:
        if owner_of(param) is not None:
            raise UnsupportedOptimizerError(
                f"{name} is trained by another wrapped optimizer already. End that one first, "
                "topkast.unwrap(old_optimizer), or go on with it"
            )


def _notice_replacement(module: nn.Module, name: str, param: Tensor) -> None:
    """Tell the owner of a Parameter that its module has another one now.

    So does ``load_state_dict(assign=True)``: what the optimizer trains is no longer in the model.
    """
    old = module._parameters.get(name)
    owner = owner_of(old) if old is not None and old is not param else None
    if owner is not None and old is not None:
        owner.replaced(old)


register_module_parameter_registration_hook(_notice_replacement)
