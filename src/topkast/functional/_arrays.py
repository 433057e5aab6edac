"""Arrays by name: their compact form, updates added to them, and what methods forget."""

from __future__ import annotations

from collections.abc import Mapping

from array_api_compat import array_namespace

from topkast._errors import MismatchError
from topkast._primitives import Array, cond, take
from topkast._step import is_due
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

    Raises
    ------
    MismatchError
        If names or shapes differ.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> topkast.apply_updates({"w": np.asarray([1.0, 2.0])}, {"w": np.asarray([0.5, -0.0])})
    {'w': array([1.5, 2. ])}
    """
    if params.keys() != updates.keys():
        raise MismatchError(
            f"params and updates must have the same names, but {sorted(params.keys() ^ updates)} "
            "are in one alone"
        )
    for name, param in params.items():
        shapes = tuple(param.shape), tuple(updates[name].shape)
        if shapes[0] != shapes[1]:  # the sum might have a third one
            raise MismatchError(
                f"{name}: the update has the shape {shapes[1]}, but the parameter {shapes[0]}"
            )
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


def forget_all(
    plan: Plan,
    before: TopKASTState,
    after: TopKASTState,
    arrays: Mapping[str, Array],
    *,
    negated: Mapping[str, Array] | None = None,
) -> Arrays:
    """Set weights to zero that methods forget: after a refresh, all but what stays.

    What stays is in A, and was in B, or in A if B∖A rests. `arrays` are the weights, or updates of
    weights, which become `negated` weights.
    """
    remembered = dict(arrays)
    for ranked in plan.forgetting:
        flat = ranked.flatten({name: arrays[name] for name in ranked.shapes})
        fill = array_namespace(flat).zeros_like(flat)
        if negated is not None:
            fill = -ranked.flatten({name: negated[name] for name in ranked.shapes})
            fill = array_namespace(fill).astype(fill, flat.dtype)
        due = is_due(plan.options[ranked.key].refresh_every, after.updates)
        sets = before.supports[ranked.key], after.supports[ranked.key]
        change = _forget if plan.explores(ranked) else _forget_exploring
        remembered |= ranked.unflatten(cond(due, change, flat, fill, *sets))
    return remembered


def _forget(flat: Array, fill: Array, old: Support, new: Support) -> Array:
    """`fill` (n,) with the entries of `flat` (n,) that were in B and are in A."""
    return _keep(flat, fill, old.entries, new)


def _forget_exploring(flat: Array, fill: Array, old: Support, new: Support) -> Array:
    """`fill` (n,) with the entries of `flat` (n,) that were and are in A."""
    return _keep(flat, fill, old.active_entries, new)


def _keep(flat: Array, fill: Array, trained: Array, new: Support) -> Array:
    backend, active = backend_of(flat), new.active_entries
    kept = backend.put(fill, trained, take(flat, trained))
    return backend.put(fill, active, take(kept, active))


def advance_momenta(plan: Plan, momenta: Arrays, grads: Mapping[str, Array]) -> Arrays:
    """Running means of the gradients (n,) after a step, by key."""
    advanced = {}
    for ranked in plan.tensors:
        if ranked.key in momenta:
            kept, mean = plan.method(ranked).momentum, momenta[ranked.key]
            gradient = array_namespace(mean).astype(ranked.flatten(grads), mean.dtype)
            advanced[ranked.key] = kept * mean + (1 - kept) * gradient
    return advanced


def zero_count(params: Mapping[str, Array]) -> Array:
    first = next(iter(params.values()))
    return backend_of(first).zero_count(first)


def increment(count: Array) -> Array:
    """Increment a count, and saturate at the largest integer instead of turning negative."""
    xp = array_namespace(count)
    return xp.where(count < xp.iinfo(count.dtype).max, count + 1, count)
