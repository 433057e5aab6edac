"""Arrays by name: their compact form, updates added to them, and what methods forget."""

from __future__ import annotations

from collections.abc import Mapping

from array_api_compat import array_namespace

from topkast._primitives import Array, cond, take
from topkast._step import is_due
from topkast._tensors import RankedTensors
from topkast.backends import backend_of
from topkast.functional._plan import Plan
from topkast.functional._state import Arrays, TopKASTState
from topkast.selection._compact import gather
from topkast.selection._support import Support


def apply_updates(params: Mapping[str, Array], updates: Mapping[str, Array], /) -> Arrays:
    """Add updates to parameters, in the dtype of the parameters.

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


def to_compact(plan: Plan, arrays: Mapping[str, Array], supports: Mapping[str, Support]) -> Arrays:
    """Convert arrays to those of the inner rule: dense tensors unchanged, the others on B."""
    inside = plan.inside
    compact = {name: array for name, array in arrays.items() if name not in inside}
    for ranked in plan.tensors:
        values = gather(ranked.flatten(arrays), supports[ranked.key])
        compact[ranked.key] = array_namespace(values).reshape(values, ranked.compact_shape)
    return compact


def forget(
    plan: Plan,
    ranked: RankedTensors,
    before: TopKASTState,
    after: TopKASTState,
    flat: Array,
    fill: Array,
) -> Array:
    """Write `fill` (n,) to all of `flat` (n,) but what stays, after a refresh.

    What stays is in A, and was in B, or in A if B∖A rests. `flat` keeps its dtype.
    """
    backend, explores = backend_of(flat), plan.explores(ranked)
    fill = array_namespace(flat).astype(fill, flat.dtype)

    def forget(flat: Array, fill: Array, old: Support, new: Support) -> Array:
        active = new.entries[: new.forward_size]
        trained = old.entries if explores else old.active_entries
        kept = backend.put(fill, trained, take(flat, trained))
        return backend.put(fill, active, take(kept, active))

    due = is_due(plan.options[ranked.key].refresh_every, after.updates)
    sets = before.supports[ranked.key], after.supports[ranked.key]
    return cond(due, forget, flat, fill, *sets)


def zero_count(params: Mapping[str, Array]) -> Array:
    first = next(iter(params.values()))
    return backend_of(first).zero_count(first)


def increment(count: Array) -> Array:
    """Increment a count, and saturate at the largest integer instead of turning negative."""
    xp = array_namespace(count)
    return xp.where(count < xp.iinfo(count.dtype).max, count + 1, count)
