"""The core's transform where some tensors have sparse execution."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from topkast import MismatchError, Support, TopKASTState, UnsupportedTensorError
from topkast.adapter import (
    Plan,
    RankedTensors,
    TopKASTTransform,
    cond,
    is_due,
    possibly_true,
    threshold_finder,
)
from topkast_jax.sparse._structure import Layouts, read_values, write_values
from topkast_jax.sparse._targets import like, target

Arrays = dict[str, jax.Array]


class SparseTransform(TopKASTTransform):
    r"""A transform that gets the gradients of some tensors on B, of shape (1, …, \|B\|).

    The kernels read the values of these tensors on B from θ and write them back.

    Parameters
    ----------
    base
        The transform for masked execution, which shares its plans.
    sparse
        Names of the tensors with sparse execution.
    """

    def __init__(self, base: TopKASTTransform, sparse: Collection[str]) -> None:
        super().__init__(base.inner, base.options, base._rule)
        self._plans = base._plans
        self._sparse = frozenset(sparse)

    def check(
        self, grads: Mapping[str, Any], params: Mapping[str, Any], state: TopKASTState
    ) -> Plan:
        """See :meth:`topkast.adapter.TopKASTTransform.check`."""
        for name in self._sparse & grads.keys() & params.keys():
            expected = _compact_shape(state.supports[name], params[name])
            if grads[name].shape != expected:
                raise MismatchError(
                    f"{name} has sparse execution, so its gradient has the shape {expected}, got "
                    f"{grads[name].shape}: differentiate with respect to "
                    "topkast.forward_params(params, state) of this state"
                )
        # The base class compares the shapes of gradients with those of the weights.
        like_weights = self._sparse & params.keys()
        dense = {name: params[name] if name in like_weights else grads[name] for name in grads}
        plan = super().check(dense, params, state)
        for ranked in plan.tensors:
            method = plan.method(ranked)
            if ranked.key in self._sparse and {"gradient", "momentum"} & {*method.needs}:
                raise UnsupportedTensorError(
                    f"{ranked.key}: {type(method).__name__} needs the gradient outside B, which "
                    "sparse execution never computes: leave the tensor masked, by `only` of "
                    "topkast_jax.sparsify"
                )
        return plan

    def read(
        self, plan: Plan, arrays: Mapping[str, Any], supports: Mapping[str, Support]
    ) -> dict[str, Any]:
        """See :meth:`topkast.adapter.TopKASTTransform.read`."""
        others = [ranked for ranked in plan.tensors if ranked.key not in self._sparse]
        outside = {name: array for name, array in arrays.items() if name not in self._sparse}
        compact = super().read(
            Plan(others, plan.options, plan.traits, plan.copies), outside, supports
        )
        for name in self._sparse:
            compact[name] = values_of(arrays[name], supports[name])
        return compact

    def _refresh_if_due(self, *arguments: Any) -> TopKASTState:
        """The base class's, with thresholds found by a kernel."""
        token = threshold_finder.set(find_threshold)
        try:
            return super()._refresh_if_due(*arguments)
        finally:
            threshold_finder.reset(token)

    def write(
        self, ranked: RankedTensors, params: Mapping[str, Any], support: Support, values: Any
    ) -> dict[str, Any]:
        """See :meth:`topkast.adapter.TopKASTTransform.write`."""
        if ranked.key not in self._sparse:
            return super().write(ranked, params, support, values)
        weight = params[ranked.key]
        written = write_values(support.forward, support.indices, weight, values)
        return {ranked.key: written}


def find_threshold(keys: jax.Array, count: Any) -> jax.Array:
    """The k-th largest of int32 keys (n,)."""
    count = jnp.reshape(jnp.asarray(count, jnp.int32), 1)
    find = target("topkast_kth_largest", like((1,), jnp.int32))
    threshold: jax.Array = find(keys, count)
    return threshold[0]


def values_of(array: Any, support: Support) -> jax.Array:
    r"""The values of a matrix on B, (1, \|B\|); an array that holds them already is returned."""
    if array.shape == _compact_shape(support, array):
        return array  # type: ignore[no-any-return]
    return read_values(support.forward, support.indices, array)


def _compact_shape(support: Support, weight: Any) -> tuple[int, ...]:
    return (*(1,) * (weight.ndim - 1), support.backward)


def rebuild_layouts(
    plan: Plan, layouts: Mapping[str, Layouts], state: TopKASTState
) -> dict[str, Layouts]:
    """The layouts after an update: built again for the tensors that were just refreshed."""
    rebuilt = dict(layouts)
    refreshing = [ranked for ranked in plan.tensors if plan.method(ranked).refreshes]
    for interval in sorted({plan.options[ranked.key].refresh_every for ranked in refreshing}):
        due = is_due(interval, state.updates)
        names = [
            ranked.key
            for ranked in refreshing
            if ranked.key in layouts and plan.options[ranked.key].refresh_every == interval
        ]
        if names and possibly_true(due):
            old = {name: rebuilt[name] for name in names}
            supports = {name: state.supports[name] for name in names}
            rebuilt |= cond(due, _rebuild, old, supports)
    return rebuilt


def _rebuild(old: dict[str, Layouts], supports: dict[str, Support]) -> dict[str, Layouts]:
    return {name: layouts.rebuild(supports[name]) for name, layouts in old.items()}
