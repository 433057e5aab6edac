"""Whether the weights of a refresh are those that the one before has chosen from.

Who changes the updates of the wrapped transformation before they are applied moves the weights
elsewhere: A and B would be those of other weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from topkast import Support, TopKASTState
from topkast.adapter import TopKASTTransform, cond, is_due, possibly_true
from topkast_jax._state import CheckedState, warn_if_stale

Arrays = dict[str, jax.Array]


def compare_at_refreshes(
    core: TopKASTTransform,
    interval: int,
    state: CheckedState,
    following: TopKASTState,
    weights: Arrays,
    moved: Arrays,
) -> CheckedState:
    """`following`, with the checksum of the weights after a refresh; counts if they were others.

    `interval` is the number of updates after which the sets of all tensors are chosen, `weights`
    are those before an update and `moved` those after it.
    """

    def compare(stale_refreshes: jax.Array, seen: Arrays, weights_checksum: jax.Array) -> jax.Array:
        differs = (checksum(seen, state.supports, weights) != weights_checksum).astype(jnp.int32)
        warn_if_stale(differs)
        return stale_refreshes + differs

    def remember(_: jax.Array, supports: Mapping[str, Support], moved: Arrays) -> jax.Array:
        return checksum(core.compact(moved, supports), supports, weights)

    stale_refreshes, weights_checksum = state.stale_refreshes, state.weights_checksum
    due = is_due(interval, state.updates)
    if possibly_true(due):
        # The values on B have been taken for the update already: XLA does not do it twice.
        seen = core.compact(weights, state.supports)
        stale_refreshes = cond(due, compare, stale_refreshes, seen, weights_checksum)
    due = is_due(interval, following.updates)
    weights_checksum = cond(due, remember, weights_checksum, following.supports, moved)
    return CheckedState(following, weights_checksum, stale_refreshes)


def checksum(compact: Arrays, supports: Mapping[str, Support], weights: Arrays) -> jax.Array:
    """Sum over B of a hash of position and bits, modulo 2**32: the same in whatever order.

    Of names and shapes too: a state of tensors that were transposed since is noticed.
    """
    shapes = str([(name, tuple(leaf.shape)) for name, leaf in sorted(weights.items())])
    total = jnp.asarray(zlib.crc32(shapes.encode()), jnp.uint32)
    for key in supports:
        values = compact[key].reshape(-1)
        parts = (values.real, values.imag) if jnp.iscomplexobj(values) else (values,)
        for part in parts:
            integer = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
            part = jnp.where(part == 0, 0, part)  # -0 and what XLA may take for 0
            bits = jax.lax.bitcast_convert_type(part, integer[part.dtype.itemsize])
            if bits.dtype.itemsize == 8:
                bits ^= bits >> 32
            position = jnp.arange(part.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
            hashed = (bits.astype(jnp.uint32) ^ position) * jnp.uint32(0x85EBCA6B)
            hashed = (hashed ^ (hashed >> 15)) * jnp.uint32(0xC2B2AE35)
            total += jnp.sum(hashed ^ (hashed >> 13), dtype=jnp.uint32)
    return total
