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

from array_api_compat import array_namespace, is_jax_array

from topkast._compact import forward_view, gather, move, scatter
from topkast._errors import MismatchError, UnsupportedTensorError
from topkast._exploration import exploration_gradient
from topkast._inspect import Inspection, count_true, find_state
from topkast._options import Options, check_patterns, kept_dense
from topkast._plan import Block, members, plan
from topkast._primitives import Array, device, put, when
from topkast._selection import Support

Arrays = dict[str, Array]


Visit = Callable[[str, Array, Array], Any]  # key, an entry of the state, what it was at first


class UpdateRule(Protocol):
    """What can be wrapped: optax's two functions, on a dictionary of arrays.

    A rule whose state keeps entries per parameter elsewhere than in dictionaries with the keys of
    the parameters has a third function, ``map_entries(visit, state, fresh)``, which returns the
    state with ``visit(key, entry, initial)`` in the place of each such entry; `fresh` is a state
    as ``init`` returns it.
    """

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
        held: dict[str, int] = dict.fromkeys({*params, *self.supports}, 0)

        def count(key: str, entry: Array, _: Array) -> Array:
            held[key] += count_bytes(entry)
            return entry

        keys = {*self.supports, *params} - {
            name for key in self.supports for name in members(key, params) if name != key
        }
        _map_dictionaries(count, self.inner, self.inner, keys)
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
        are -0.0, the one number that changes no bit of what it is added to. Further keyword
        arguments reach the inner rule.

        Raises :class:`topkast.MismatchError` if the names, shapes or dtypes of `grads` and
        `params` are not those of ``init``.
        """
        if params is None:
            raise MismatchError("update needs params: update(grads, state, params)")
        blocks, _, steps, inner = self._advance(grads, state, params, extra)
        updates = {name: steps[name] for name in params if name in steps}
        for block in blocks:
            flat = scatter(
                steps[block.key], state.supports[block.key], shape=(block.size,), fill=-0.0
            )
            updates |= block.unflatten(flat)
        updates = {name: updates[name] for name in params}
        state = state._replace(updates=_increment(state.updates), inner=inner)
        return updates, self._refresh_if_due(blocks, state, apply_updates(params, updates))

    def step(
        self,
        grads: Mapping[str, Array],
        state: TopKASTState,
        params: Mapping[str, Array],
        /,
        **extra: Any,
    ) -> tuple[Arrays, TopKASTState]:
        """The next θ and state: :meth:`update` and :func:`topkast.apply_updates` in one.

        It writes the values on B into a copy of θ and never forms updates as large as θ, which
        is faster; inside ``jax.jit`` with `params` and `state` donated, there is no copy either.

        Raises as :meth:`update`.
        """
        blocks, values, steps, inner = self._advance(grads, state, params, extra)
        stepped = apply_updates(values, steps)
        moved = {name: stepped[name] for name in params if name in stepped}
        for block in blocks:
            indices = state.supports[block.key].indices
            flat = block.flatten(params)
            flat = put(flat, indices, array_namespace(flat).reshape(stepped[block.key], (-1,)))
            moved |= block.unflatten(flat)
        moved = {name: moved[name] for name in params}
        state = state._replace(updates=_increment(state.updates), inner=inner)
        return moved, self._refresh_if_due(blocks, state, moved)

    def _advance(
        self,
        grads: Mapping[str, Array],
        state: TopKASTState,
        params: Mapping[str, Array],
        extra: Mapping[str, Any],
    ) -> tuple[list[Block], Arrays, Arrays, Any]:
        """Blocks, θ on B, what the inner rule would add to it, and the rule's next state."""
        blocks = self.check(grads, params, state)
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
        steps = {
            key: _where(live[key], step, -0.0) if key in live else step
            for key, step in steps.items()
        }
        return blocks, values, steps, inner

    def compact(self, arrays: Mapping[str, Array], supports: Mapping[str, Support]) -> Arrays:
        """What the inner rule sees of arrays like the parameters: those on B, and dense ones."""
        return _compact(self._plan(arrays), arrays, supports)

    def check(
        self, grads: Mapping[str, Array], params: Mapping[str, Array], state: TopKASTState
    ) -> list[Block]:
        """Raise :class:`topkast.MismatchError` unless these belong together."""
        _check_same(grads, params)
        blocks = self._plan(params)
        _check_plan(blocks, state)
        return blocks

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
        self, blocks: list[Block], state: TopKASTState, params: Arrays
    ) -> TopKASTState:
        def refresh(state: TopKASTState, params: Arrays) -> TopKASTState:
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

            return state._replace(
                supports=supports,
                changed={key: new.changed for key, new in outcome.items()},
                inner=_map_entries(self.inner, carry, state.inner, fresh, _keys(blocks, params)),
            )

        if not blocks:
            return state
        due = state.updates % self.options.refresh_every == 0
        return when(due, refresh, state, params)


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
            views |= {name: _where(active[name], params[name], 0.0) for name in shapes}
        else:
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


def _keys(blocks: list[Block], params: Mapping[str, Array]) -> set[str]:
    """Keys of what :func:`_compact` returns."""
    inside = _members(blocks)
    return {block.key for block in blocks} | {name for name in params if name not in inside}


def _map_entries(rule: UpdateRule, visit: Visit, state: Any, fresh: Any, keys: set[str]) -> Any:
    """Apply `visit` to what a rule keeps per parameter: its own way, or where it is kept by key."""
    if hasattr(rule, "map_entries"):
        return rule.map_entries(visit, state, fresh)
    return _map_dictionaries(visit, state, fresh, keys)


def _map_dictionaries(visit: Visit, state: Any, fresh: Any, keys: set[str]) -> Any:
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
        return {key: _map_dictionaries(visit, state[key], fresh[key], keys) for key in state}
    if isinstance(state, (tuple, list)):
        parts = [
            _map_dictionaries(visit, part, initial, keys)
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
