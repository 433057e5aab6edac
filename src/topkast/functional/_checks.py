"""Whether gradients, parameters and a state belong together."""

from __future__ import annotations

from collections.abc import Mapping

from array_api_compat import array_namespace, is_jax_array

from topkast._errors import MismatchError
from topkast._primitives import (
    Array,
    device,
)
from topkast.functional._plan import Plan
from topkast.functional._state import TopKASTState

_MAX_COUNT = (1 << 31) - 1  # of updates: counts are int32


def check_same(grads: Mapping[str, Array], params: Mapping[str, Array]) -> None:
    if grads.keys() != params.keys():
        odd = sorted(grads.keys() ^ params.keys())
        raise MismatchError(f"grads and params have different names: {odd} are in one alone")
    for name, grad in grads.items():
        param = params[name]
        check_together({name: param, f"the gradient of {name}": grad})
        xp = array_namespace(param)
        real = [xp.isdtype(array.dtype, "real floating") for array in (grad, param)]
        if tuple(grad.shape) != tuple(param.shape) or real[0] != real[1]:
            raise MismatchError(
                f"{name}: the gradient is {grad.dtype}{tuple(grad.shape)}, the parameter "
                f"{param.dtype}{tuple(param.shape)}"
            )


def check_together(arrays: Mapping[str, Array]) -> None:
    """Raise :class:`MismatchError` unless all are of one library and on one device."""
    (first, one), *others = arrays.items()
    for name, other in others:
        try:
            array_namespace(one, other)
        except TypeError:
            kinds = [f"{type(array).__module__}.{type(array).__name__}" for array in (one, other)]
            raise MismatchError(f"{first} is a {kinds[0]} and {name} a {kinds[1]}") from None
        if not is_jax_array(one) and device(one) != device(other):
            raise MismatchError(f"{first} is on {device(one)} and {name} on {device(other)}")


def check_plan(plan: Plan, state: TopKASTState) -> None:
    expected = {ranked.key: (ranked.forward, ranked.backward) for ranked in plan.tensors}
    given = {key: (support.forward, support.backward) for key, support in state.supports.items()}
    if expected != given:
        raise MismatchError(
            f"params differ from those given to init: |A| and |B| by tensor would be {expected}, "
            f"the state has {given}"
        )
    for ranked in plan.tensors:
        blocks = state.supports[ranked.key].blocks
        if blocks != ranked.blocks:
            raise MismatchError(
                f"{ranked.key} has units of {ranked.blocks or 'single weights'} here, and of "
                f"{blocks or 'single weights'} in the state: wrap with the `block` that the state "
                "was made with, or init anew"
            )
