"""The state of a wrapped update rule: what it shows, and the forward view of weights under it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from array_api_compat import array_namespace, is_jax_array

from topkast._compact import forward_view, gather, scatter
from topkast._errors import MismatchError
from topkast._inspect import Inspection, count_true, find_state
from topkast._plan import Block, members
from topkast._primitives import Array, where
from topkast._selection import Support

Arrays = dict[str, Array]
Visit = Callable[[str, Array, Array], Any]  # key, an entry of the state, what it was at first


class TopKASTState(NamedTuple):
    """State of a wrapped update rule.

    Attributes
    ----------
    updates
        Number of updates so far; 0-d int32.
    supports
        The sets, by the name of the tensor.
    changed
        Entries that the last refresh made active, by the name of the tensor; int32 of shape (1,).
    inner
        State of the inner rule, whose arrays cover B alone.
    """

    updates: Array
    supports: dict[str, Support]
    changed: Arrays
    inner: Any

    def __topkast_inspect__(self, params: Arrays | None) -> Inspection:
        if params is None:
            raise MismatchError("a functional state does not hold the weights: pass params too")
        held: dict[str, int] = dict.fromkeys({*params, *self.supports}, 0)

        def count(key: str, entry: Array, _: Array) -> Array:
            held[key] += count_bytes(entry)
            return entry

        keys = {*self.supports, *params} - {
            name for key in self.supports for name in members(key, params) if name != key
        }
        map_dictionaries(count, self.inner, self.inner, keys)
        return inspection(self, params, held)

    def __topkast_forward__(self, params: Mapping[str, Array]) -> Arrays:
        return forward_views(params, self.supports)


def inspection(state: Any, params: Arrays, held: Mapping[str, int]) -> Inspection:
    """What a functional state shows; `held` are the bytes of its inner state, by key."""
    blocks, total = {}, dict(held)
    for key, support in state.supports.items():
        shapes = {name: tuple(params[name].shape) for name in members(key, params)}
        forward = count_true(support.active)
        blocks[key] = Block(shapes, forward, support.indices.shape[0], 1.0)
        total[key] += count_bytes(support.indices) + count_bytes(support.active)
    return Inspection(int(state.updates), params, blocks, state.supports, state.changed, total)


def forward_params(params: Mapping[str, Array], state: TopKASTState, /) -> Arrays:
    """The forward view α of every tensor: what the model is to be evaluated at.

    Parameters
    ----------
    params
        θ, by name.
    state
        State of the wrapped rule, or of what is around it.

    Returns
    -------
    dict of str to array
        Sparsified tensors with zeros outside A; dense ones as they are.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.75, bwd=0.5)
    >>> params = {"w": np.asarray([[0.1, -0.9], [0.5, 0.3]])}
    >>> topkast.forward_params(params, tx.init(params))["w"]
    array([[ 0. , -0.9],
           [ 0. ,  0. ]])
    """
    views: Arrays = find_state(state).__topkast_forward__(params)
    return views


def forward_views(params: Mapping[str, Array], supports: Mapping[str, Support]) -> Arrays:
    """:func:`forward_params`, for parameters by name."""
    views = dict(params)
    for key, support in supports.items():
        shapes = {name: tuple(params[name].shape) for name in members(key, params)}
        block = Block(shapes, 0, support.indices.shape[0], 1.0)
        if is_jax_array(support.active):
            # Where parameters are spread over devices, XLA puts what is chosen from them there.
            active = block.unflatten(
                scatter(support.active, support, shape=(block.size,), fill=False)
            )
            views |= {name: where(active[name], params[name], 0.0) for name in shapes}
        else:
            values = gather(block.flatten(params), support)
            views |= block.unflatten(forward_view(values, support, shape=(block.size,)))
    return views


def map_dictionaries(visit: Visit, state: Any, fresh: Any, keys: set[str]) -> Any:
    """Apply `visit` wherever a state mirrors the compact parameters.

    A rule is given a dictionary with the keys `keys`, so that what it keeps per parameter is a
    dictionary with those keys, however deep in tuples and dictionaries of its own.
    """
    if isinstance(state, dict):
        if state.keys() == keys:
            return {
                key: visit(key, entry, fresh[key]) if hasattr(entry, "shape") else entry
                for key, entry in state.items()
            }
        return {key: map_dictionaries(visit, state[key], fresh[key], keys) for key in state}
    if isinstance(state, (tuple, list)):
        parts = [
            map_dictionaries(visit, part, initial, keys)
            for part, initial in zip(state, fresh, strict=True)
        ]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
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
