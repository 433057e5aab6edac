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
from typing import Any, Protocol

from array_api_compat import array_namespace, is_jax_array

from topkast._compact import gather, move, scatter
from topkast._errors import MismatchError, UnsupportedTensorError
from topkast._exploration import exploration_gradient
from topkast._options import Options, check_patterns, kept_dense
from topkast._plan import Block, plan
from topkast._primitives import (
    Array,
    counter,
    device,
    fast_paths,
    is_traced,
    may_hold,
    put,
    when,
    where,
)
from topkast._selection import Support
from topkast._state import Arrays, TopKASTState, Visit, map_dictionaries


class UpdateRule(Protocol):
    """What can be wrapped: optax's two functions, on a dictionary of arrays.

    A rule whose state keeps entries per parameter elsewhere than in dictionaries with the keys of
    the parameters has a third function, ``map_entries(visit, state, fresh)``, which returns the
    state with ``visit(key, entry, initial)`` in the place of each such entry; `fresh` is a state
    as ``init`` returns it.
    """

    def init(self, params: Any, /) -> Any: ...

    def update(self, updates: Any, state: Any, params: Any = None, /) -> tuple[Any, Any]: ...


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
            counter(some),
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

        >>> import numpy as np, topkast
        >>> tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.75, bwd=0.5, penalty=0.0)
        >>> params = {"w": np.asarray([[4.0, 3.0], [2.0, 1.0]])}
        >>> updates, state = tx.update({"w": np.ones((2, 2))}, tx.init(params), params)
        >>> updates["w"]
        array([[-0.1, -0.1],
               [-0. , -0. ]])

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
        return updates, self._refresh_if_due(blocks, state, lambda: apply_updates(params, updates))

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

        >>> import numpy as np, topkast
        >>> tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.75, bwd=0.5, penalty=0.0)
        >>> params = {"w": np.asarray([[4.0, 3.0], [2.0, 1.0]])}
        >>> params, state = tx.step({"w": np.ones((2, 2))}, tx.init(params), params)
        >>> params["w"]
        array([[3.9, 2.9],
               [2. , 1. ]])

        Raises as :meth:`update`.
        """
        paths = fast_paths(next(iter(params.values()))) if params and not extra else None
        if paths is not None:
            blocks = self.check(grads, params, state)
            outcome = paths.step(self.inner, blocks, grads, state, params, self.options)
            if outcome is not None:
                found, inner = outcome
                state = state._replace(updates=_increment(state.updates), inner=inner)
                return found, self._refresh_if_due(blocks, state, lambda: found)
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
        return moved, self._refresh_if_due(blocks, state, lambda: moved)

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
                if not is_traced(exploring):
                    exploring = bool(exploring)
                live[key] = array_namespace(values[key]).reshape(
                    support.active | exploring, block.compact_shape
                )
                slopes[key] = where(live[key], slopes[key], 0.0)
        steps, inner = self.inner.update(slopes, state.inner, values, **extra)
        steps = {
            key: where(live[key], step, -0.0) if key in live else step
            for key, step in steps.items()
        }
        return blocks, values, steps, inner

    def compact(self, arrays: Mapping[str, Array], supports: Mapping[str, Support]) -> Arrays:
        """What the inner rule sees of arrays like the parameters: those on B, and dense ones."""
        return _compact(self._plan(arrays), arrays, supports)

    def check_finite(self, params: Mapping[str, Array]) -> None:
        """Raise :class:`topkast.NonFiniteError` for NaN or infinity in what is sparsified."""
        for block in self._plan(params):
            block.check_finite(params)

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
            paths = fast_paths(array)
            if paths is not None:
                paths.check(name, array)
        _check_together(params)
        check_patterns(params, self.options.dense)
        dense = kept_dense(params, self.options.dense)
        shapes = {name: tuple(params[name].shape) for name in params if name not in dense}
        return plan(shapes, self.options)

    def _refresh_if_due(
        self, blocks: list[Block], state: TopKASTState, moved: Callable[[], Arrays]
    ) -> TopKASTState:
        """`state`, or the one with sets chosen from the weights that `moved` returns."""

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

        due = state.updates % self.options.refresh_every == 0
        if not blocks or not may_hold(due):
            return state
        return when(due, refresh, state, moved())


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
    return map_dictionaries(visit, state, fresh, keys)


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
        _check_together({name: param, f"the gradient of {name}": grad})
        if tuple(grad.shape) != tuple(param.shape) or grad.dtype != param.dtype:
            raise MismatchError(
                f"{name}: the gradient is {grad.dtype}{tuple(grad.shape)}, the parameter "
                f"{param.dtype}{tuple(param.shape)}"
            )


def _check_together(arrays: Mapping[str, Array]) -> None:
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


def _check_plan(blocks: list[Block], state: TopKASTState) -> None:
    expected = {block.key: block.backward for block in blocks}
    found = {key: support.indices.shape[0] for key, support in state.supports.items()}
    if expected != found:
        raise MismatchError(
            f"params differ from those given to init: |B| by tensor would be {expected}, "
            f"the state has {found}"
        )
