"""The state of a wrapped update rule, its inspection, and the forward view of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from array_api_compat import array_namespace, is_jax_array

from topkast._errors import MismatchError
from topkast._inspect import Inspection, find_states
from topkast._primitives import Array, is_traced, where
from topkast._tensors import RankedTensors, members
from topkast.selection._compact import forward_view, gather, scatter
from topkast.selection._distribution import Shape
from topkast.selection._support import Support, in_forward

Arrays = dict[str, Array]
Params = TypeVar("Params")
Visit = Callable[[str, Array, Array], Any]  # key, entry of the state, entry of a fresh state


class TopKASTState(NamedTuple):
    """State of a wrapped update rule.

    Attributes
    ----------
    updates
        Number of updates so far; 0-d int32.
    supports
        The sets, by name of the tensor.
    entered_active
        Number of entries that entered A at the last refresh, by name of the tensor; int32 (1,).
    ages
        Number of updates since each entry entered B, int16, by name of the tensor. Only for rules
        of the Adam family, whose entrants would move too fast.
    inner
        State of the inner rule, whose arrays cover B alone.
    momenta
        Running means of the gradient on all weights (n,), by name of the tensor. Only for methods
        that need them.
    """

    updates: Array
    supports: dict[str, Support]
    entered_active: Arrays
    ages: Arrays
    inner: Any
    momenta: Arrays = {}  # noqa: RUF012 - never written to

    def __topkast_inspect__(self, params: Arrays | None) -> Inspection:
        if params is None:
            raise MismatchError("a functional state does not hold the weights: pass params too")
        nbytes: dict[str, int] = dict.fromkeys({*params, *self.supports}, 0)

        def count(key: str, entry: Array, _: Array) -> Array:
            nbytes[key] += count_bytes(entry)
            return entry

        keys = {*self.supports, *params} - {
            name for key in self.supports for name in members(key, params) if name != key
        }
        map_dictionaries(count, self.inner, self.inner, keys)
        return inspection(self, params, nbytes)

    def __topkast_forward__(self, params: Mapping[str, Array]) -> Arrays:
        return forward_views(params, self.supports)


def inspection(state: Any, params: Arrays, nbytes: Mapping[str, int]) -> Inspection:
    """Inspect a functional state; `nbytes` are the bytes of its inner state, by key."""
    ranked = {}
    held = {key: {"state": count} for key, count in nbytes.items()}
    for key, support in state.supports.items():
        shapes = _shapes_of(key, support, params)
        ranked[key] = _ranked(shapes, support)
        held[key]["indices"] = count_bytes(support.indices)
        if support.blocks is not None and not is_jax_array(support.indices):  # cached entries
            held[key]["indices"] += count_bytes(support.entries)
        if key in state.ages:
            held[key]["ages"] = count_bytes(state.ages[key])
        if key in state.momenta:
            held[key]["momentum"] = count_bytes(state.momenta[key])
    # Parameters, their gradients, and the forward views of sparsified tensors.
    sparsified = {name for tensors in ranked.values() for name in tensors.shapes}
    model = sum(
        (3 if name in sparsified else 2) * count_bytes(array) for name, array in params.items()
    )
    return Inspection(
        state.updates if is_traced(state.updates) else int(state.updates),
        {name: tuple(array.shape) for name, array in params.items()},
        lambda: params,
        ranked,
        state.supports,
        state.entered_active,
        held,
        model,
    )


def forward_params(params: Params, state: Any, /) -> Params:
    """Make the forward view α of every tensor, at which the model is evaluated.

    Parameters
    ----------
    params
        θ, by name; in JAX any pytree.
    state
        State of the wrapped rule, or of an optimizer that contains it.

    Returns
    -------
    dict of str to array, or a pytree
        Sparsified tensors with zeros outside A; dense tensors unchanged.

    Raises
    ------
    MismatchError
        If `state` is no such state, or `params` lack a tensor of it or have too few entries.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.75, bwd=0.5)
    >>> params = {"w": np.asarray([[0.1, -0.9], [0.5, 0.3]])}
    >>> topkast.forward_params(params, tx.init(params))["w"]
    array([[ 0. , -0.9],
           [ 0. ,  0. ]])
    """
    views: Any = params
    for wrapped_state in find_states(state, "__topkast_forward__"):
        views = wrapped_state.__topkast_forward__(views)
    return views  # type: ignore[no-any-return]


def forward_views(params: Mapping[str, Array], supports: Mapping[str, Support]) -> Arrays:
    """:func:`forward_params`, for parameters by name."""
    views = dict(params)
    for key, support in supports.items():
        shapes = _shapes_of(key, support, params)
        ranked = _ranked(shapes, support)
        if is_jax_array(support.indices):
            # If parameters are sharded over devices, XLA shards the result of `where` likewise.
            flags = in_forward(support)
            active = ranked.unflatten(scatter(flags, support, shape=(ranked.size,), fill=False))
            views |= {name: where(active[name], params[name], 0.0) for name in shapes}
        else:
            values = gather(ranked.flatten(params), support)
            views |= ranked.unflatten(forward_view(values, support, shape=(ranked.size,)))
    return views


def _shapes_of(key: str, support: Support, params: Mapping[str, Array]) -> dict[str, Shape]:
    """Shapes of the tensors of a support, by name, if `params` has room for it."""
    names = members(key, params)
    missing = [name for name in names if name not in params]
    if missing:
        raise MismatchError(
            f"the state has the sets of {', '.join(missing)}, but params only "
            f"{', '.join(params)}: pass the params that belong to the state, or the state that "
            "init(params) returns"
        )
    shapes = {name: tuple(params[name].shape) for name in names}
    size = sum(math.prod(shape) for shape in shapes.values())
    if size < support.backward_size:
        raise MismatchError(
            f"{key} has {size} entries in params, but |B| = {support.backward_size} in the state: "
            "pass the params that belong to the state, or the state that init(params) returns"
        )
    return shapes


def _ranked(shapes: Mapping[str, Shape], support: Support) -> RankedTensors:
    """Reconstruct the ranked tensors from shapes and a support; their density is not known."""
    return RankedTensors(
        shapes,
        support.forward,
        support.backward,
        density=1.0,
        blocks=support.blocks,
        group_size=support.group_size,
    )


def map_dictionaries(visit: Visit, state: Any, fresh: Any, keys: set[str]) -> Any:
    """Apply `visit` to the entries of every dictionary in a state that has exactly these keys.

    The parameters of the inner rule are a dictionary with `keys`. Its state mirrors them in
    dictionaries with the same keys, nested in tuples, lists and other dictionaries.
    """
    if isinstance(state, dict):
        if state.keys() == keys:
            return {
                key: visit(key, entry, fresh[key]) if hasattr(entry, "shape") else entry
                for key, entry in state.items()
            }
        return {key: map_dictionaries(visit, state[key], fresh[key], keys) for key in state}
    if isinstance(state, (tuple, list)):
        fields = [
            map_dictionaries(visit, entry, initial, keys)
            for entry, initial in zip(state, fresh, strict=True)
        ]
        return type(state)(*fields) if hasattr(state, "_fields") else type(state)(fields)
    return state


def count_bytes(array: Array) -> int:
    size = 1
    for length in array.shape:
        size *= length
    dtype = array.dtype
    xp = array_namespace(array)
    if xp.isdtype(dtype, "bool"):
        return size
    info = xp.iinfo(dtype) if xp.isdtype(dtype, "integral") else xp.finfo(dtype)
    return size * int(info.bits) // 8 * (2 if xp.isdtype(dtype, "complex floating") else 1)
