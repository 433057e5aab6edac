"""Selection inside XLA, where values cannot be inspected: bit patterns, packed bits, fixed shapes.

Only JAX arrays load this module. A subset of n indices is packed into words of 32 bits: packing a
comparison costs one pass over memory, and counting, ranking and enumerating then work on n/32
words. Shapes never depend on data, so that everything can be traced, batched and sharded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from topkast.backends._base import Array, ThresholdFinder
from topkast.selection._random import Key, random_words

T = TypeVar("T")

_WORD = 32
_FEW = 1024  # number of ties up to which only the ties are processed


@functools.partial(jax.jit, static_argnums=(3, 4))
def largest_flags(
    keys: Array,
    count: int | Array,
    indices: Array,
    ties: Key,
    find_threshold: ThresholdFinder | None,
) -> Array:
    """Flags (n,) of the `count` largest of integers (n,) of at least -1.

    Equal integers rank by the words of their `indices` (n,), which are distinct; the largest comes
    first. `find_threshold` finds the k-th largest of the integers.
    """
    if find_threshold is None:
        threshold = _kth_largest(_pad(keys, -2), count)
    else:
        threshold = find_threshold(keys, count)
    above, equal = keys > threshold, keys == threshold
    remaining, tie_count = count - jnp.sum(above), jnp.sum(equal)

    def choose_among_few(equal: Array) -> Array:
        positions = true_indices(equal, _FEW)
        is_tie = jnp.arange(_FEW) < tie_count
        kept = _largest_words(indices[jnp.where(is_tie, positions, 0)], is_tie, remaining, ties)
        return equal.at[jnp.where(is_tie, positions, equal.shape[0])].set(kept, mode="drop")

    def choose_among_many(equal: Array) -> Array:
        return _largest_words(indices, equal, remaining, ties)

    has_surplus = tie_count > remaining
    if keys.shape[0] <= 4 * _FEW:
        return above | cond(has_surplus, choose_among_many, equal)
    # A few weights are equal by chance, and many are equal in a constant tensor.
    is_few = tie_count <= _FEW
    equal = cond(has_surplus & is_few, choose_among_few, equal)
    return above | cond(has_surplus & ~is_few, choose_among_many, equal)


def _largest_words(indices: Array, among: Array, count: Array, ties: Key) -> Array:
    """Flags (k,) of the `count` largest words of indices (k,), out of those flagged by `among`."""
    words = lax.bitcast_convert_type(random_words(indices, ties), jnp.uint32)

    def set_bit(bit: Array, threshold: Array) -> Array:
        raised = threshold | (jnp.uint32(1 << 31) >> bit.astype(jnp.uint32))
        return jnp.where(jnp.sum(among & (words >= raised)) >= count, raised, threshold)

    return among & (words >= lax.fori_loop(0, 32, set_bit, jnp.uint32(0)))


@functools.partial(jax.jit, static_argnums=1)
def true_indices(mask: Array, count: int) -> Array:
    """Ascending indices (count,) of the `count` true entries of a mask (n,)."""
    words = _pack(_pad(mask, False))
    ends = jnp.cumsum(_count_bits(words))
    # The word of each output: its number rises by one where the outputs of a word end.
    steps = jnp.zeros(count, jnp.int32).at[ends].add(1, mode="drop", indices_are_sorted=True)
    word = jnp.cumsum(steps)
    bits = words[word]
    rank = jnp.arange(count, dtype=jnp.int32) - (ends[word] - _count_bits(bits))
    dtype = jnp.asarray(0).dtype
    return word.astype(dtype) * _WORD + _bit_position(bits, rank).astype(dtype)


def flagged_first(entries: Array, flags: Array, count: int) -> Array:
    """Move the `count` flagged entries (k,) to the front, and keep the order otherwise."""
    # Without the barrier, XLA would compute the flags again at each use.
    flags = lax.optimization_barrier(flags)
    ranks = jnp.cumsum(flags, dtype=jnp.int32)
    positions = jnp.arange(flags.shape[0], dtype=jnp.int32)
    targets = jnp.where(flags, ranks - 1, count + positions - ranks)
    return (
        jnp.zeros_like(entries)
        .at[targets]
        .set(entries, unique_indices=True, mode="promise_in_bounds")
    )


def replicated_beside(array: Array) -> Any:
    """The device of an array, or a sharding that replicates over the devices of a sharded one."""
    if isinstance(array.sharding, NamedSharding):
        return NamedSharding(array.sharding.mesh, PartitionSpec())
    return array.device


def unsharded(array: Array) -> Array:
    """`array`, gathered on all devices if axes of its mesh are explicit.

    JAX derives no shardings on these: a selection, whose sums run over all devices, has none.
    """
    mesh = jax.typeof(array).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec()))


def cond(due: Array, change: Callable[..., T], state: T, *operands: Any) -> T:
    """``change(state, *operands) if due else state``; both have equal shapes and dtypes.

    A loop that runs at most once. Unlike ``lax.cond``, it leaves unchanged arrays in place in
    memory, and under ``vmap`` it is skipped if `due` is false in the whole batch. Loops cannot be
    differentiated in reverse mode, so that the derivative uses a ``lax.cond``.
    """
    # `change` may close over traced values, such as a learning rate; these become arguments.
    change, closed_over = jax.closure_convert(change, state, *operands)

    @jax.custom_jvp
    def looped(due: Array, state: T, *operands: Any) -> T:
        def body(carry: tuple[Array, T]) -> tuple[Array, T]:
            return jnp.zeros_like(carry[0]), change(carry[1], *operands)

        return lax.while_loop(lambda carry: carry[0], body, (due, state))[1]

    @looped.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        def branched(due: Array, state: T, *operands: Any) -> T:
            return lax.cond(due, change, lambda state, *_: state, state, *operands)  # type: ignore[no-any-return]

        return jax.jvp(branched, primals, tangents)

    return looped(due, state, *operands, *closed_over)


def _kth_largest(keys: Array, count: int | Array) -> Array:
    """The k-th largest of integers, bit by bit: the largest t of at least -1 that k keys reach."""
    bits = 8 * keys.dtype.itemsize - 1

    def is_reached(threshold: Array) -> Array:
        return jnp.sum(_count_bits(_pack(keys >= threshold))) >= count

    def set_bit(step: Array, threshold: Array) -> Array:
        bit = jnp.left_shift(jnp.asarray(1, keys.dtype), (bits - 1 - step).astype(keys.dtype))
        raised = threshold | bit
        return jnp.where(is_reached(raised), raised, threshold)

    threshold = lax.fori_loop(0, bits, set_bit, jnp.asarray(0, keys.dtype))
    return jnp.where(is_reached(threshold), threshold, jnp.asarray(-1, keys.dtype))


def _pad(flat: Array, fill: int | bool) -> Array:
    missing = -flat.shape[0] % _WORD
    return jnp.pad(flat, (0, missing), constant_values=fill) if missing else flat


def _pack(mask: Array) -> Array:
    """Pack a mask (n,) into words (n/32,): entry i becomes bit i % 32 of word i // 32."""
    bits = jnp.uint32(1) << jnp.arange(_WORD, dtype=jnp.uint32)
    return jnp.sum(jnp.where(mask.reshape(-1, _WORD), bits, 0), axis=1, dtype=jnp.uint32)


def _count_bits(words: Array) -> Array:
    """Number of set bits of each word; int32."""
    return lax.population_count(words).astype(jnp.int32)


def _bit_position(words: Array, rank: Array) -> Array:
    """Position of set bit number `rank` in each word, both counted from the lowest bit; int32."""
    position = jnp.zeros_like(rank)
    for half in (16, 8, 4, 2, 1):
        below = _count_bits(words & jnp.uint32((1 << half) - 1))
        is_higher = rank >= below
        rank = jnp.where(is_higher, rank - below, rank)
        words = jnp.where(is_higher, words >> half, words)
        position = jnp.where(is_higher, position + half, position)
    return position
