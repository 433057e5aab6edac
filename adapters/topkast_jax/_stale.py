"""Detection of weights that changed after a refresh, and of states of other sets.

If the updates of the wrapped transformation are changed before they are applied, A and B belong to
other weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from topkast import Support, TopKASTState
from topkast.adapter import TopKASTTransform, cond, is_due, is_traced, possibly_true
from topkast_jax._state import CheckedState, checksum_sets, warn_if_stale

Arrays = dict[str, jax.Array]


def compare_at_refreshes(
    transform: TopKASTTransform,
    interval: int,
    state: CheckedState,
    next_state: TopKASTState,
    weights: Arrays,
    next_weights: Arrays,
) -> CheckedState:
    """Add the checksum of the weights after a refresh, and count a stale refresh, to `next_state`.

    All tensors are refreshed together every `interval` updates. An update leads from `state` and
    `weights` to `next_state` and `next_weights`.
    """

    def compare(
        stale_refreshes: jax.Array, values: Arrays, weights_checksum: jax.Array
    ) -> jax.Array:
        differs = (checksum(values, state.supports, weights) != weights_checksum).astype(jnp.int32)
        warn_if_stale(differs)
        return stale_refreshes + differs

    def update_checksum(
        _: jax.Array, supports: Mapping[str, Support], next_weights: Arrays
    ) -> jax.Array:
        return checksum(transform.compact(next_weights, supports), supports, weights)

    stale_refreshes, weights_checksum = state.stale_refreshes, state.weights_checksum
    due = is_due(interval, state.updates)
    if possibly_true(due):
        # The update gathers the same values: XLA gathers them once.
        values = transform.compact(weights, state.supports)
        stale_refreshes = cond(due, compare, stale_refreshes, values, weights_checksum)
    due = is_due(interval, next_state.updates)
    weights_checksum = cond(
        due, update_checksum, weights_checksum, next_state.supports, next_weights
    )
    sets_checksum = state.sets_checksum
    if is_traced(sets_checksum):  # nothing can be raised
        expected = jnp.uint32(checksum_sets(state.supports, weights))
        stale_refreshes += (sets_checksum != expected).astype(jnp.int32)
        sets_checksum = expected
    else:
        state.check_sets(weights)
    return CheckedState(next_state, weights_checksum, stale_refreshes, sets_checksum)


def checksum(compact: Arrays, supports: Mapping[str, Support], weights: Arrays) -> jax.Array:
    """Sum a hash of position and bits over B, modulo 2**32: the order of the sum does not matter.

    Names and shapes are hashed too, so that transposed tensors are detected.
    """
    shapes = str([(name, tuple(leaf.shape)) for name, leaf in sorted(weights.items())])
    total = jnp.asarray(zlib.crc32(shapes.encode()), jnp.uint32)
    for key in supports:
        values = compact[key].reshape(-1)
        components = (values.real, values.imag) if jnp.iscomplexobj(values) else (values,)
        for component in components:
            unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
            component = jnp.where(component == 0, 0, component)  # -0, subnormals XLA may flush
            bits = jax.lax.bitcast_convert_type(component, unsigned[component.dtype.itemsize])
            if bits.dtype.itemsize == 8:
                bits ^= bits >> 32
            position = jnp.arange(component.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
            hashed = (bits.astype(jnp.uint32) ^ position) * jnp.uint32(0x85EBCA6B)
            hashed = (hashed ^ (hashed >> 15)) * jnp.uint32(0xC2B2AE35)
            total += jnp.sum(hashed ^ (hashed >> 13), dtype=jnp.uint32)
    return total
