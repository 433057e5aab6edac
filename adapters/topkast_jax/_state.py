"""The state of a wrapped optax transformation, and what it shows."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import tree_flatten_with_path

from topkast import MismatchError, Support, WeightsMovedWarning
from topkast.adapter import Inspection, count_bytes, forward_views, inspection, is_traced
from topkast_jax._rule import find_key
from topkast_jax._sharding import is_explicit, is_spread, layout_of, run
from topkast_jax._tree import as_arrays, flatten_weights

Arrays = dict[str, jax.Array]


class TopKASTState(NamedTuple):
    r"""State of a wrapped optax transformation: arrays alone, of fixed shapes and dtypes.

    Attributes
    ----------
    updates
        Number of updates so far; 0-d int32.
    supports
        The sets, by the name of the tensor.
    entered_active
        Entries that the last refresh made active, by the name of the tensor; int32 of shape (1,).
    ages
        Updates since each entry of B entered it, int16, by the name of the tensor: under
        transformations of the Adam family, whose entrants would move too fast.
    inner
        State of the wrapped transformation, whose entries for a tensor have shape (1, …, \|B\|).
    weights_checksum
        Of the weights on B that the sets were chosen from, and of their shapes; 0-d uint32.
    stale_refreshes
        How often the weights were not those at the update after a refresh; 0-d int32.
    """

    updates: jax.Array
    supports: dict[str, Support]
    entered_active: Arrays
    ages: Arrays
    inner: Any
    weights_checksum: jax.Array
    stale_refreshes: jax.Array

    def __topkast_inspect__(self, params: Any) -> Inspection:
        if params is None:
            raise MismatchError("a functional state does not hold the weights: pass params too")
        self = as_arrays(self)
        self._check_single()
        warn_if_stale(self.stale_refreshes)
        tree, weights = flatten_weights(params, strict=False)
        state = self
        if is_spread(weights) or is_explicit(weights):
            state = state._replace(supports=jax.tree.map(_on_one_device, state.supports))
        nbytes = dict.fromkeys({*weights, *self.supports}, 0)
        for path, entry in tree_flatten_with_path(self.inner)[0]:
            key = find_key(tree.paths, path)
            if key in nbytes:
                nbytes[key] += count_bytes(entry)
        return inspection(state, weights, nbytes)

    def _check_single(self) -> None:
        if jnp.ndim(self.updates):
            raise MismatchError(
                f"the state is a batch of {jnp.shape(self.updates)[0]}, as from jax.vmap: pass one "
                "of them, jax.tree.map(lambda leaf: leaf[0], state), with its params, or use "
                "jax.vmap here too"
            )

    def __topkast_forward__(self, params: Any) -> Any:
        self._check_single()
        tree, weights = flatten_weights(params, strict=False)
        supports = as_arrays(self.supports)

        def view(weights: Arrays, supports: dict[str, Support]) -> Arrays:
            return forward_views(weights, supports)

        if is_spread(weights) or is_explicit(weights):
            views = run(view, layout_of(weights, weights), weights, supports)
        else:
            views = view(weights, supports)
        return tree.rebuild(views | tree.other_leaves(params))


def warn_if_stale(stale_refreshes: jax.Array) -> None:
    """Warn if a count is not zero, where it can be looked at.

    Not by a call back from compiled functions: on a CPU, one can wait for ever for a thread that
    waits for it, and it keeps functions out of JAX's persistent cache of compilations.
    """
    if not is_traced(stale_refreshes) and stale_refreshes > 0:
        warnings.warn(
            "the weights are not those that the last refresh chose A and B from. Were the updates "
            "of the wrapped transformation changed before they were applied, as by "
            "optax.chain(wrapped, other)? It must be the outermost: put the others inside it. "
            "After changing weights yourself, init anew",
            WeightsMovedWarning,
            stacklevel=2,
        )


def _on_one_device(array: jax.Array) -> jax.Array:
    return jnp.asarray(jax.device_get(array))
