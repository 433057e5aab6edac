"""Top-KAST as a pure transform of updates: the loop of the method, once, for named arrays.

        ┌───────────── refresh, every N updates ─────────────┐
θ ──select──► Support                                        │
│               │                                            │
└─gather──► θ_B ──forward_view──► α ──model──► loss          │
             ▲                                  │            │
    inner rule ◄── + exploration gradient ◄── ∂L/∂α on B     │
             └──────────────── updates ──────────────────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from array_api_compat import array_namespace, device

from topkast._compact import forward_view, gather, move, scatter
from topkast._errors import MismatchError, UnsupportedTensorError
from topkast._exploration import exploration_gradient
from topkast._inspect import Inspection, count_true
from topkast._options import Options, check_patterns, kept_dense
from topkast._plan import Block, members, plan
from topkast._primitives import Array, cond
from topkast._selection import Support

Arrays = dict[str, Array]


class UpdateRule(Protocol):
    """What can be wrapped: optax's two functions, on a dictionary of arrays."""

    def init(self, params: Any, /) -> Any: ...

    def update(self, updates: Any, state: Any, params: Any = None, /) -> tuple[Any, Any]: ...


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
        blocks = {}
        for key, support in self.supports.items():
            shapes = {name: tuple(params[name].shape) for name in members(key, params)}
            forward = count_true(support.active)
            blocks[key] = Block(shapes, forward, support.indices.shape[0], 1.0)
        held: dict[str, int] = dict.fromkeys(params, 0)
        for key, support in self.supports.items():
            held[key] = _bytes(support.indices) + _bytes(support.active)
        _map_entries(lambda key, entry, _: _count(held, key, entry), self.inner, self.inner, held)
        return Inspection(int(self.updates), params, blocks, self.supports, self.changed, held)


class TopKASTTransform:
    """A wrapped update rule for plain arrays, with optax's ``init`` and ``update``.

    Made by :func:`topkast.wrap_optimizer` from :class:`topkast.SGD`, :class:`topkast.Adam` or
    :class:`topkast.AdamW`. Parameters are a flat ``dict[str, array]`` of one array library. The
    caller holds θ; differentiate the loss at :func:`topkast.forward_params` of it.

    Since ``update`` selects from the weights that result from its updates, it must be the
    outermost transform: change its updates afterwards, and A and B are those of other weights.
    """

    def __init__(self, inner: UpdateRule, options: Options) -> None:
        self.inner = inner
        self.options = options

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r}, {self.options!r})"

    def init(self, params: Mapping[str, Array], /) -> TopKASTState:
        """Choose the first sets, and initialise the inner rule on B.

        Raises :class:`topkast.UnsupportedTensorError` for weights that are not floating-point,
        and :class:`topkast.NonFiniteError` for NaN or infinity in one.
        """
        blocks = self._plan(params)
        supports = {
            block.key: block.select(block.flatten(params), self.options) for block in blocks
        }
        some = next(iter(params.values()))
        return TopKASTState(
            array_namespace(some).zeros((), dtype=array_namespace(some).int32, device=device(some)),
            supports,
            {block.key: block.no_change(supports[block.key].indices) for block in blocks},
            self.inner.init(_compact(blocks, params, supports)),
        )

    def update(
        self,
        grads: Mapping[str, Array],
        state: TopKASTState,
        params: Mapping[str, Array] | None = None,
        /,
        **extra: Any,
    ) -> tuple[Arrays, TopKASTState]:
        """Updates for θ from the gradient at the forward view; new sets when a refresh is due.

        `params` is θ. Add the result with :func:`topkast.apply_updates`. Outside B the updates
        are -0.0, the one number that changes no bit of what it is added to.

        Raises :class:`topkast.MismatchError` if the names, shapes or dtypes of `grads` and
        `params` are not those of ``init``.
        """
        if params is None:
            raise MismatchError("update needs params: update(grads, state, params)")
        _check_same(grads, params)
        blocks = self._plan(params)
        _check_plan(blocks, state)
        values = _compact(blocks, params, state.supports)
        slopes = _compact(blocks, grads, state.supports)
        live = {}
        for block in blocks:
            key, support = block.key, state.supports[block.key]
            slopes[key] = slopes[key] + exploration_gradient(
                values[key],
                support,
                penalty=self.options.penalty,
                density=block.density,
                kind=self.options.penalty_kind,
            )
            if self.options.explore_until is not None:
                exploring = state.updates < self.options.explore_until
                live[key] = array_namespace(values[key]).reshape(
                    support.active | exploring, block.compact_shape
                )
                slopes[key] = _where(live[key], slopes[key], 0.0)
        steps, inner = self.inner.update(slopes, state.inner, values, **extra)
        updates = {name: steps[name] for name in params if name in steps}
        for block in blocks:
            key, support = block.key, state.supports[block.key]
            step = _where(live[key], steps[key], -0.0) if key in live else steps[key]
            flat = scatter(step, support, shape=(block.size,), fill=-0.0)
            updates |= block.unflatten(flat)
        updates = {name: updates[name] for name in params}
        state = state._replace(updates=_increment(state.updates), inner=inner)
        return updates, self._refresh_if_due(blocks, apply_updates(params, updates), state)

    def _plan(self, params: Mapping[str, Array]) -> list[Block]:
        if not params:
            raise MismatchError("params is empty")
        for name, array in params.items():
            if not array_namespace(array).isdtype(
                array.dtype, ("real floating", "complex floating")
            ):
                raise UnsupportedTensorError(f"{name}: weights must be floats, got {array.dtype}")
        check_patterns(params, self.options.dense)
        dense = kept_dense(params, self.options.dense)
        shapes = {name: tuple(params[name].shape) for name in params if name not in dense}
        return plan(shapes, self.options)

    def _refresh_if_due(
        self, blocks: list[Block], params: Arrays, state: TopKASTState
    ) -> TopKASTState:
        def refresh(state: TopKASTState) -> TopKASTState:
            outcome = {
                block.key: block.refresh(
                    block.flatten(params), state.supports[block.key], self.options, state.updates
                )
                for block in blocks
            }
            supports = {key: new.support for key, new in outcome.items()}
            # What the rule would have initialised: zeros nearly always, and right otherwise.
            fresh = self.inner.init(_compact(blocks, params, supports))

            def carry(key: str, entry: Array, initial: Array) -> Array:
                block = next((block for block in blocks if block.key == key), None)
                if block is None or tuple(entry.shape) != block.compact_shape:
                    return entry
                return move(entry, outcome[key].migration, initial)

            keys = {*outcome, *(name for name in params if name not in _members(blocks))}
            return TopKASTState(
                state.updates,
                supports,
                {key: new.changed for key, new in outcome.items()},
                _map_entries(carry, state.inner, fresh, keys),
            )

        if not blocks:
            return state
        due = state.updates % self.options.refresh_every == 0
        return cond(due, refresh, lambda same: same, state)


def apply_updates(params: Mapping[str, Array], updates: Mapping[str, Array], /) -> Arrays:
    """The parameters with the updates added, in the dtype of the parameters.

    Parameters
    ----------
    params, updates
        Arrays by name, of equal shapes.

    Returns
    -------
    dict of str to array

    Examples
    --------
    >>> import numpy as np, topkast
    >>> topkast.apply_updates({"w": np.asarray([1.0, 2.0])}, {"w": np.asarray([0.5, -0.0])})
    {'w': array([1.5, 2. ])}
    """
    return {
        name: array_namespace(param).astype(param + updates[name], param.dtype)
        for name, param in params.items()
    }


def forward_params(params: Mapping[str, Array], state: TopKASTState, /) -> Arrays:
    """The forward view α of every tensor: what the model is to be evaluated at.

    Parameters
    ----------
    params
        θ, by name.
    state
        State of the wrapped rule.

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
    views = dict(params)
    for key, support in state.supports.items():
        shapes = {name: tuple(params[name].shape) for name in members(key, params)}
        block = Block(shapes, 0, support.indices.shape[0], 1.0)
        values = gather(block.flatten(params), support)
        views |= block.unflatten(forward_view(values, support, shape=(block.size,)))
    return views


def _compact(
    blocks: list[Block], arrays: Mapping[str, Array], supports: Mapping[str, Support]
) -> Arrays:
    """What the inner rule sees: dense tensors as they are, the others on B."""
    inside = _members(blocks)
    compact = {name: array for name, array in arrays.items() if name not in inside}
    for block in blocks:
        values = gather(block.flatten(arrays), supports[block.key])
        compact[block.key] = array_namespace(values).reshape(values, block.compact_shape)
    return compact


def _members(blocks: list[Block]) -> set[str]:
    return {name for block in blocks for name in block.shapes}


def _map_entries(
    visit: Callable[[str, Array, Array], Any], state: Any, fresh: Any, keys: Any
) -> Any:
    """Apply `visit(key, entry, initial entry)` wherever a state mirrors the compact parameters.

    A rule is given a dictionary with the keys `keys`, so that what it keeps per parameter is a
    dictionary with those keys, however deep in tuples and dictionaries of its own.
    """
    if isinstance(state, dict):
        if state.keys() == set(keys):
            return {
                key: visit(key, entry, fresh[key]) if hasattr(entry, "shape") else entry
                for key, entry in state.items()
            }
        return {key: _map_entries(visit, state[key], fresh[key], keys) for key in state}
    if isinstance(state, (tuple, list)):
        parts = [
            _map_entries(visit, part, initial, keys)
            for part, initial in zip(state, fresh, strict=True)
        ]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    return state


def _where(flags: Array, array: Array, other: float) -> Array:
    xp = array_namespace(array)
    return xp.where(flags, array, xp.asarray(other, dtype=array.dtype, device=device(array)))


def _increment(count: Array) -> Array:
    """One more, or the same at the end of the integers: a count must not turn negative."""
    xp = array_namespace(count)
    return xp.where(count < xp.iinfo(count.dtype).max, count + 1, count)


def _check_same(grads: Mapping[str, Array], params: Mapping[str, Array]) -> None:
    if grads.keys() != params.keys():
        odd = sorted(grads.keys() ^ params.keys())
        raise MismatchError(f"grads and params have different names: {odd} are in one alone")
    for name, grad in grads.items():
        param = params[name]
        if tuple(grad.shape) != tuple(param.shape) or grad.dtype != param.dtype:
            raise MismatchError(
                f"{name}: the gradient is {grad.dtype}{tuple(grad.shape)}, the parameter "
                f"{param.dtype}{tuple(param.shape)}"
            )


def _check_plan(blocks: list[Block], state: TopKASTState) -> None:
    expected = {block.key: block.backward for block in blocks}
    found = {key: support.indices.shape[0] for key, support in state.supports.items()}
    if expected != found:
        raise MismatchError(
            f"params differ from those given to init: |B| by tensor would be {expected}, "
            f"the state has {found}"
        )


def _bytes(array: Array) -> int:
    size = 1
    for length in array.shape:
        size *= length
    dtype = array.dtype
    xp = array_namespace(array)
    if xp.isdtype(dtype, "bool"):
        return size
    info = xp.iinfo(dtype) if xp.isdtype(dtype, "integral") else xp.finfo(dtype)
    return size * int(info.bits) // 8 * (2 if xp.isdtype(dtype, "complex floating") else 1)


def _count(held: dict[str, int], key: str, entry: Array) -> Array:
    held[key] += _bytes(entry)
    return entry
