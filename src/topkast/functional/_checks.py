"""Checks that gradients, parameters and a state belong together."""

from __future__ import annotations

from collections.abc import Mapping

from array_api_compat import array_namespace, is_jax_array

from topkast._errors import MismatchError, UnsupportedTensorError
from topkast._primitives import (
    Array,
    device,
)
from topkast.backends import backend_of
from topkast.backends._base import Backend
from topkast.functional._plan import Plan
from topkast.functional._state import TopKASTState

_FLOATS = ("real floating", "complex floating")


def check_weights(params: Mapping[str, Array]) -> None:
    """Raise :class:`UnsupportedTensorError` unless all are arrays of floats, of a known library."""
    for name, array in params.items():
        backend = _backend_of(name, array)
        try:
            is_float = array_namespace(array).isdtype(array.dtype, _FLOATS)
        except TypeError:  # a dtype of another package, such as ml_dtypes
            raise UnsupportedTensorError(
                f"{name}: {type(array).__module__} does not know the dtype {array.dtype}: convert "
                "the weights to float32"
            ) from None
        if not is_float:
            raise UnsupportedTensorError(f"{name}: weights must be floats, got {array.dtype}")
        backend.check(name, array)


def _backend_of(name: str, array: Array) -> Backend:
    try:
        array_namespace(array)
        return backend_of(array)
    except TypeError as error:
        raise UnsupportedTensorError(f"{name}: {error}") from None


def check_gradients(grads: Mapping[str, Array], params: Mapping[str, Array]) -> None:
    """Raise :class:`MismatchError` unless gradients and parameters agree in names and shapes.

    Raises :class:`UnsupportedTensorError` for a gradient of an unknown library.
    """
    if grads.keys() != params.keys():
        unmatched = sorted(grads.keys() ^ params.keys())
        raise MismatchError(
            f"grads and params must have the same names, but {unmatched} are in one alone"
        )
    for name, grad in grads.items():
        param = params[name]
        if grad is None:
            raise MismatchError(
                f"{name} has no gradient, None: pass zeros for a tensor that the loss does not use"
            )
        _backend_of(f"the gradient of {name}", grad)
        check_compatible({name: param, f"the gradient of {name}": grad})
        xp = array_namespace(param)
        is_real = [xp.isdtype(array.dtype, "real floating") for array in (grad, param)]
        if tuple(grad.shape) != tuple(param.shape) or is_real[0] != is_real[1]:
            raise MismatchError(
                f"{name}: the gradient is {grad.dtype}{tuple(grad.shape)}, but the parameter is "
                f"{param.dtype}{tuple(param.shape)}"
            )


def check_compatible(arrays: Mapping[str, Array]) -> None:
    """Raise :class:`MismatchError` unless all arrays share one library and one device."""
    (first_name, first), *others = arrays.items()
    for name, other in others:
        try:
            array_namespace(first, other)
        except TypeError:
            types = [f"{type(array).__module__}.{type(array).__name__}" for array in (first, other)]
            raise MismatchError(
                f"{first_name} is a {types[0]} and {name} a {types[1]}: expected one library"
            ) from None
        if not is_jax_array(first) and device(first) != device(other):
            raise MismatchError(
                f"{first_name} is on {device(first)} and {name} on {device(other)}: expected one "
                "device"
            )


def check_plan(plan: Plan, state: TopKASTState) -> None:
    """Raise :class:`MismatchError` unless the state was initialised under this plan."""
    expected = {ranked.key: (ranked.forward, ranked.backward) for ranked in plan.tensors}
    actual = {key: (support.forward, support.backward) for key, support in state.supports.items()}
    for ranked in plan.tensors:
        if plan.method(ranked).schedules and ranked.key in actual:
            expected[ranked.key] = actual[ranked.key][0], ranked.backward
    if expected != actual:
        raise MismatchError(
            f"params differ from those given to init: they need |A| and |B| of {expected} by "
            f"tensor, but the state has {actual}"
        )
    for ranked in plan.tensors:
        blocks = state.supports[ranked.key].blocks
        if blocks != ranked.blocks:
            raise MismatchError(
                f"{ranked.key} has units of {ranked.blocks or 'single weights'} under the current "
                f"options, but {blocks or 'single weights'} in the state: wrap with the `block` of "
                "the state, or call init again"
            )
        group_size = state.supports[ranked.key].group_size
        if group_size != ranked.group_size:
            raise MismatchError(
                f"{ranked.key} is ranked in {_format_groups(ranked.group_size)} under the current "
                f"options, but in {_format_groups(group_size)} in the state: wrap with the "
                "`pattern` of the state, or call init again"
            )


def _format_groups(group_size: int | None) -> str:
    return "one group" if group_size is None else f"groups of {group_size} weights"
