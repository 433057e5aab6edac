"""Top-KAST as a pure transform of updates: the training loop for named arrays.

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
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

from topkast._age import grow, scale_young, settled_ages
from topkast._errors import MismatchError
from topkast._options import Options
from topkast._primitives import Array, cond, possibly_true
from topkast._step import Step, is_due
from topkast._tensors import RankedTensors
from topkast.backends import backend_of
from topkast.functional._arrays import (
    advance_momenta,
    apply_updates,
    forget_all,
    increment,
    to_compact,
    zero_count,
)
from topkast.functional._checks import check_compatible, check_gradients, check_plan, check_weights
from topkast.functional._plan import Plan, TensorInfo, make_plan
from topkast.functional._state import Arrays, TopKASTState
from topkast.functional._wrapped_rule import UpdateRule, WrappedRule
from topkast.selection._compact import scatter
from topkast.selection._support import Support

_MAX_COUNT = (1 << 31) - 1  # updates: they are counted in int32


class TopKASTTransform:
    """A wrapped update rule for plain arrays, with optax's ``init`` and ``update``.

    Made by :func:`topkast.wrap_optimizer` from :class:`topkast.SGD`, :class:`topkast.Adam` or
    :class:`topkast.AdamW`. Parameters are a flat ``dict[str, array]`` of one array library. The
    caller holds θ and differentiates the loss at its :func:`topkast.forward_params`.

    ``update`` selects from the weights that its updates lead to, so that it must be the outermost
    transform: if its updates are changed afterwards, A and B belong to other weights.
    """

    def __init__(
        self, inner: UpdateRule, options: Options, rule: WrappedRule | None = None
    ) -> None:
        options.check_functional()
        self.inner = inner
        self.options = options
        self._rule = WrappedRule(inner) if rule is None else rule
        self._plans: dict[Any, Plan] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r}, {self.options!r})"

    def init(self, params: Mapping[str, Array], /) -> TopKASTState:
        """Choose the first sets, and initialise the inner rule on B.

        Raises :class:`topkast.UnsupportedTensorError` for weights that are not floating-point,
        :class:`topkast.NonFiniteError` for NaN or infinity, and :class:`topkast.OptionError` if
        nothing is left to sparsify.
        """
        plan = self.plan(params)
        supports = {
            ranked.key: ranked.select(ranked.flatten(params), plan.options[ranked.key])
            for ranked in plan.tensors
        }
        return TopKASTState(
            zero_count(params),
            supports,
            {ranked.key: ranked.no_change(supports[ranked.key].indices) for ranked in plan.tensors},
            {
                ranked.key: settled_ages(ranked.backward_size, supports[ranked.key].indices)
                for ranked in plan.tensors
                if plan.traits[ranked.key].betas is not None
            },
            self.inner.init(to_compact(plan, params, supports)),
            {
                ranked.key: array_namespace(flat).zeros_like(flat)
                for ranked in plan.tensors
                if "momentum" in plan.method(ranked).needs
                for flat in [ranked.flatten(params)]
            },
        )

    def update(
        self,
        grads: Mapping[str, Array],
        state: TopKASTState,
        params: Mapping[str, Array] | None = None,
        /,
        **extra: Any,
    ) -> tuple[Arrays, TopKASTState]:
        """Compute updates for θ from the gradient at the forward view; refresh if it is due.

        `params` is θ. Add the updates with :func:`topkast.apply_updates`. Outside B they are -0.0,
        the only number whose addition changes no bit. Further keyword arguments are passed to the
        inner rule.

        >>> import numpy as np, topkast
        >>> tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.75, bwd=0.5, penalty=0.0)
        >>> params = {"w": np.asarray([[4.0, 3.0], [2.0, 1.0]])}
        >>> updates, state = tx.update({"w": np.ones((2, 2))}, tx.init(params), params)
        >>> updates["w"]
        array([[-0.1, -0.1],
               [-0. , -0. ]])

        Raises :class:`topkast.MismatchError` if the names or shapes of `grads` and `params` are
        not those of ``init``, or a gradient is no float.
        """
        if params is None:
            raise MismatchError("update needs params: update(grads, state, params)")
        advance = self._advance(grads, state, params, extra)
        displacements = advance.displacements
        updates = {name: displacements[name] for name in params if name in displacements}
        for ranked in advance.plan.tensors:
            support = state.supports[ranked.key]
            flat = scatter(displacements[ranked.key], support, shape=(ranked.size,), fill=-0.0)
            updates |= ranked.unflatten(flat)
        updates = {name: updates[name] for name in params}
        plan = advance.plan
        next_state = self._refresh_if_due(
            plan, advance.next_state, lambda: apply_updates(params, updates), grads
        )
        updates = forget_all(plan, advance.next_state, next_state, updates, negated=params)
        return updates, next_state

    def step(
        self,
        grads: Mapping[str, Array],
        state: TopKASTState,
        params: Mapping[str, Array],
        /,
        **extra: Any,
    ) -> tuple[Arrays, TopKASTState]:
        """Compute the next θ and state: :meth:`update` and :func:`topkast.apply_updates` in one.

        This is faster, because it writes the values on B into a copy of θ and never forms updates
        as large as θ. Inside ``jax.jit`` with `params` and `state` donated, it makes no copy.

        >>> import numpy as np, topkast
        >>> tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.75, bwd=0.5, penalty=0.0)
        >>> params = {"w": np.asarray([[4.0, 3.0], [2.0, 1.0]])}
        >>> params, state = tx.step({"w": np.ones((2, 2))}, tx.init(params), params)
        >>> params["w"]
        array([[3.9, 2.9],
               [2. , 1. ]])

        Raises as :meth:`update`.
        """
        backend = backend_of(next(iter(params.values()), None))
        if backend.fuses(self.inner) and not extra and self.options.power == 1:
            plan = self.check(grads, params, state)
            steps = plan.decide(state.updates)
            weights, inner, ages = backend.step(self.inner, plan, steps, grads, state, params)
            next_state = state._replace(updates=increment(state.updates), inner=inner, ages=ages)
            return self._finish_step(plan, next_state, weights, grads)
        advance = self._advance(grads, state, params, extra)
        compact = apply_updates(advance.values, advance.displacements)
        weights = {name: compact[name] for name in params if name in compact}
        for ranked in advance.plan.tensors:
            support = state.supports[ranked.key]
            weights |= self.write(ranked, params, support, compact[ranked.key])
        weights = {name: weights[name] for name in params}
        return self._finish_step(advance.plan, advance.next_state, weights, grads)

    def _finish_step(
        self, plan: Plan, state: TopKASTState, weights: Arrays, grads: Mapping[str, Array]
    ) -> tuple[Arrays, TopKASTState]:
        """Refresh if it is due, and set the weights to zero that methods forget."""
        next_state = self._refresh_if_due(plan, state, lambda: weights, grads)
        weights = forget_all(plan, state, next_state, weights)
        return weights, next_state

    def _advance(
        self,
        grads: Mapping[str, Array],
        state: TopKASTState,
        params: Mapping[str, Array],
        extra: Mapping[str, Any],
    ) -> _Advance:
        """Update the compact parameters and the state, without a refresh."""
        plan = self.check(grads, params, state)
        values = self.read(plan, params, state.supports)
        gradients = self.read(plan, grads, state.supports)
        steps = plan.decide(state.updates)
        for key, step in steps.items():
            gradients[key] = step.add_penalty(gradients[key], values[key], state.supports[key])
        base = values
        if self.options.power != 1:
            base = values | {key: step.to_base(values[key]) for key, step in steps.items()}
            gradients |= {key: step.chain(gradients[key], base[key]) for key, step in steps.items()}
        displacements, inner = self.inner.update(gradients, state.inner, base, **extra)
        displacements = dict(displacements)
        updates = increment(state.updates)
        displacements, inner = self._scale_young(plan, steps, state, updates, displacements, inner)
        if self.options.power != 1:
            for key, step in steps.items():
                new = step.to_weights(base[key] + displacements[key], base[key], values[key])
                displacements[key] = new - values[key]
        for key, step in steps.items():
            displacements[key] = step.restrict(displacements[key], state.supports[key])
        ages = {key: grow(age) for key, age in state.ages.items()}
        next_state = state._replace(updates=updates, inner=inner, ages=ages)
        return _Advance(plan, values, displacements, next_state)

    def _scale_young(
        self,
        plan: Plan,
        steps: Mapping[str, Step],
        state: TopKASTState,
        updates: Array,
        displacements: Arrays,
        inner: Any,
    ) -> tuple[Arrays, Any]:
        """Scale young entries of the displacements, and of tensor copies in the inner state."""
        for key, ages in state.ages.items():
            betas = steps[key].betas
            if betas is not None:
                displacements[key] = scale_young(displacements[key], ages, updates, betas)
        if not plan.copies or not state.ages:
            return displacements, inner
        numbers = iter(range(_MAX_COUNT))

        def scale(key: str, entry: Array, before: Array) -> Array:
            if next(numbers) not in plan.copies or key not in state.ages:
                return entry
            betas = steps[key].betas
            assert betas is not None
            return before + scale_young(entry - before, state.ages[key], updates, betas)

        inner = self._rule.map_entries(scale, inner, state.inner, displacements.keys())
        return displacements, inner

    def compact(self, arrays: Mapping[str, Array], supports: Mapping[str, Support]) -> Arrays:
        """Convert arrays like the parameters to the inner rule's: values on B, and dense arrays."""
        return self.read(self.plan(arrays), arrays, supports)

    def read(
        self, plan: Plan, arrays: Mapping[str, Array], supports: Mapping[str, Support]
    ) -> Arrays:
        """:meth:`compact` under a plan; an adapter may read otherwise."""
        return to_compact(plan, arrays, supports)

    def write(
        self, ranked: RankedTensors, params: Mapping[str, Array], support: Support, values: Array
    ) -> Arrays:
        """The members of ranked tensors with `values` on B; an adapter may write otherwise."""
        flat = ranked.flatten(params)
        values = array_namespace(flat).reshape(values, (-1,))
        return ranked.unflatten(backend_of(flat).put(flat, support.entries, values))

    def check_finite(self, params: Mapping[str, Array]) -> None:
        """Raise :class:`topkast.NonFiniteError` for NaN or infinity in a sparsified tensor."""
        for ranked in self.plan(params).tensors:
            ranked.check_finite(params)

    def check(
        self, grads: Mapping[str, Array], params: Mapping[str, Array], state: TopKASTState
    ) -> Plan:
        """Raise :class:`topkast.MismatchError` unless these belong together; return the plan."""
        check_gradients(grads, params)
        plan = self.plan(params)
        check_plan(plan, state)
        return plan

    def plan(self, params: Mapping[str, Array]) -> Plan:
        """Return the plan for parameters of these shapes; it is made once and cached."""
        if not params:
            raise MismatchError("params is empty")
        check_weights(params)
        check_compatible(params)
        # JAX sorts dictionaries inside compiled functions: the first order decides in which order
        # tensors are ranked as one.
        signature = frozenset(
            (name, tuple(array.shape), str(array.dtype)) for name, array in params.items()
        )
        if signature not in self._plans:
            tensors = {
                name: TensorInfo(tuple(array.shape), array.dtype) for name, array in params.items()
            }
            self._plans[signature] = make_plan(tensors, self.options, self._rule)
        return self._plans[signature]

    def _refresh_if_due(
        self,
        plan: Plan,
        state: TopKASTState,
        get_weights: Callable[[], Arrays],
        grads: Mapping[str, Array],
    ) -> TopKASTState:
        """Choose new sets from the weights that `get_weights` returns, for tensors that are due.

        `grads` are read by methods that need the gradient outside B.
        """
        if state.momenta:
            state = state._replace(momenta=advance_momenta(plan, state.momenta, grads))
        refreshing = [ranked for ranked in plan.tensors if plan.method(ranked).refreshes]
        intervals = {plan.options[ranked.key].refresh_every for ranked in refreshing}
        for interval in sorted(intervals):
            due = is_due(interval, state.updates)
            if possibly_true(due):
                tensors = [
                    ranked
                    for ranked in refreshing
                    if plan.options[ranked.key].refresh_every == interval
                ]

                def refresh(
                    state: TopKASTState,
                    params: Arrays,
                    gradients: Arrays,
                    tensors: list[RankedTensors] = tensors,
                ) -> TopKASTState:
                    return self._refresh(plan, tensors, state, params, gradients)

                gradients = {
                    name: grads[name]
                    for ranked in tensors
                    if "gradient" in plan.method(ranked).needs
                    for name in ranked.shapes
                }
                state = cond(due, refresh, state, get_weights(), gradients)
        return state

    def _refresh(
        self,
        plan: Plan,
        tensors: list[RankedTensors],
        state: TopKASTState,
        params: Arrays,
        gradients: Arrays,
    ) -> TopKASTState:
        """Choose new sets for `tensors`, and migrate ages and the inner rule's state."""
        refreshes = {
            ranked.key: ranked.refresh(
                ranked.flatten(params),
                state.supports[ranked.key],
                plan.options[ranked.key],
                state.updates,
                gradient=(
                    ranked.flatten(gradients)
                    if {*ranked.shapes} <= {*gradients}
                    else state.momenta.get(ranked.key)
                ),
            )
            for ranked in tensors
        }
        supports = state.supports | {key: refresh.support for key, refresh in refreshes.items()}
        params = forget_all(plan, state, state._replace(supports=supports), params)
        # Entries that enter B start as the rule initialises them, which is not always zero.
        fresh = self.inner.init(self.read(plan, params, supports))
        shapes = {ranked.key: ranked.compact_shape for ranked in tensors}

        def migrate(key: str, entry: Array, initial: Array) -> Array:
            if key not in shapes or tuple(entry.shape) != shapes[key]:
                return entry
            return refreshes[key].migration.apply(entry, initial)

        return state._replace(
            supports=supports,
            entered_active=state.entered_active
            | {key: refresh.entered_active for key, refresh in refreshes.items()},
            ages=state.ages
            | {
                key: refresh.migration.apply(state.ages[key])
                for key, refresh in refreshes.items()
                if key in state.ages
            },
            inner=self._rule.map_entries(migrate, state.inner, fresh, plan.keys(params)),
        )


@dataclass
class _Advance:
    """One update: the inner rule's parameters, their displacements, and the next state."""

    plan: Plan
    values: Arrays
    displacements: Arrays
    next_state: TopKASTState
