"""The state of a wrapped optax transformation, and what it shows."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import tree_flatten_with_path

from topkast import MismatchError, Support, TopKASTState, WeightsMovedWarning
from topkast.adapter import Inspection, count_bytes, forward_views, inspection, is_traced
from topkast_jax._rule import find_key
from topkast_jax._sharding import is_explicit, is_spread, layout_of, run
from topkast_jax._tree import as_arrays, flatten_weights

Arrays = dict[str, jax.Array]


class CheckedState(NamedTuple):
    """State of a wrapped optax transformation: arrays alone, of fixed shapes and dtypes.

    The fields of ``core`` can be read from the state itself: ``state.supports`` is
    ``state.core.supports``.

    Attributes
    ----------
    core
        The state of the method; see :class:`topkast.TopKASTState`. The sets, ages and entries of
        ``core.inner`` belong to the names of the leaves, such as ``"dense.kernel"``.
    weights_checksum
        Checksum of the shapes, and of the weights on B that the sets were chosen from; 0-d uint32.
    stale_refreshes
        Number of refreshes whose weights were changed before the next update; 0-d int32.

    Examples
    --------
    >>> import jax.numpy as jnp, optax, topkast
    >>> tx = topkast.wrap_optimizer(optax.adam(0.1), fwd=0.75, bwd=0.5)
    >>> state = tx.init({"w": jnp.asarray([[4.0, 3.0], [2.0, 1.0]])})
    >>> state.supports["w"].indices
    Array([0, 1], dtype=int32)
    """

    core: TopKASTState
    weights_checksum: jax.Array
    stale_refreshes: jax.Array

    @property
    def updates(self) -> jax.Array:
        """Number of updates; 0-d int32."""
        updates: jax.Array = self.core.updates
        return updates

    @property
    def supports(self) -> dict[str, Support]:
        """The sets A and B, by the name of the tensor."""
        return self.core.supports

    @property
    def entered_active(self) -> Arrays:
        """Number of entries that the last refresh made active, by the name of the tensor."""
        return self.core.entered_active

    @property
    def ages(self) -> Arrays:
        """Updates since each entry of B entered it, by the name of the tensor."""
        return self.core.ages

    @property
    def inner(self) -> Any:
        r"""State of the wrapped transformation, whose entries for a tensor have \|B\| elements."""
        return self.core.inner

    def __topkast_inspect__(self, params: Any) -> Inspection:
        if params is None:
            raise MismatchError("a functional state does not hold the weights: pass params too")
        self = as_arrays(self)
        self._check_single()
        warn_if_stale(self.stale_refreshes)
        tree, weights = flatten_weights(params, strict=False)
        state = self.core
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
