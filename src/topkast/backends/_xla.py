"""Selection inside XLA, where nothing can be looked at: bit patterns, packed bits, fixed shapes.

Imported for JAX arrays alone. A set of indices among n is held as words of 32 bits: packing a
comparison costs one pass over memory, and counting, ranking and enumerating are then done on
n/32 words. Shapes never depend on data, so that all of this can be traced, batched and sharded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from topkast.backends._base import Array
from topkast.selection._random import Key, random_words

T = TypeVar("T")

_WORD = 32
_FEW = 1024  # equal magnitudes that are looked at by themselves


@functools.partial(jax.jit, static_argnums=(1, 3))
def largest_flags(keys: Array, count: int, indices: Array, ties: Key) -> Array:
    """Flags (n,) of the `count` largest of integers (n,) of at least -1.

    Equal ones rank by the words of their `indices` (n,), which all differ, the largest first.
    """
    threshold = _kth_largest(_pad(keys, -2), count)
    above, equal = keys > threshold, keys == threshold
    wanted, ties_found = count - jnp.sum(above), jnp.sum(equal)

    def choose_among_few(equal: Array) -> Array:
        found = true_indices(equal, _FEW)
        inside = jnp.arange(_FEW) < ties_found
        kept = _largest_words(indices[jnp.where(inside, found, 0)], inside, wanted, ties)
        return equal.at[jnp.where(inside, found, equal.shape[0])].set(kept, mode="drop")

    def choose_among_many(equal: Array) -> Array:
        return _largest_words(indices, equal, wanted, ties)

    due = ties_found > wanted
    if keys.shape[0] <= 4 * _FEW:
        return above | cond(due, choose_among_many, equal)
    # A few weights are equal by chance; many are where a tensor is constant.
    few = ties_found <= _FEW
    equal = cond(due & few, choose_among_few, equal)
    return above | cond(due & ~few, choose_among_many, equal)


def _largest_words(indices: Array, among: Array, count: Array, ties: Key) -> Array:
    """Flags (k,) of the `count` largest words of indices (k,), `among` some of them."""
    words = lax.bitcast_convert_type(random_words(indices, ties), jnp.uint32)

    def set_bit(bit: Array, threshold: Array) -> Array:
        raised = threshold | (jnp.uint32(1 << 31) >> bit.astype(jnp.uint32))
        return jnp.where(jnp.sum(among & (words >= raised)) >= count, raised, threshold)

    return among & (words >= lax.fori_loop(0, 32, set_bit, jnp.uint32(0)))


@functools.partial(jax.jit, static_argnums=1)
def true_indices(mask: Array, count: int) -> Array:
    """Ascending indices (count,) of the `count` true entries of a mask (n,)."""
    words = _pack(_pad(mask, False))
    ends = jnp.cumsum(_count(words))
    # The word of each index: one up wherever a word's share of the indices ends.
    steps = jnp.zeros(count, jnp.int32).at[ends].add(1, mode="drop", indices_are_sorted=True)
    word = jnp.cumsum(steps)
    bits = words[word]
    place = jnp.arange(count, dtype=jnp.int32) - (ends[word] - _count(bits))
    dtype = jnp.asarray(0).dtype
    return word.astype(dtype) * _WORD + _place_of_bit(bits, place).astype(dtype)


def flagged_first(entries: Array, flags: Array, count: int) -> Array:
    """Entries (k,) in their order, the `count` of them that are flagged (k,) first."""
    # Once: the flags would be computed anew wherever they are used.
    flags = lax.optimization_barrier(flags)
    ranks = jnp.cumsum(flags, dtype=jnp.int32)
    places = jnp.arange(flags.shape[0], dtype=jnp.int32)
    targets = jnp.where(flags, ranks - 1, count + places - ranks)
    return (
        jnp.zeros_like(entries)
        .at[targets]
        .set(entries, unique_indices=True, mode="promise_in_bounds")
    )


def replicated_beside(array: Array) -> Any:
    """The device of an array, or the same on each of the devices that it is spread over."""
    if isinstance(array.sharding, NamedSharding):
        return NamedSharding(array.sharding.mesh, PartitionSpec())
    return array.device


def cond(due: Array, change: Callable[..., T], state: T, *operands: Any) -> T:
    """``change(state, *operands) if due else state``, of equal shapes and dtypes.

    A loop of one turn or none. Unlike ``lax.cond``, it lets what does not change stay where it is
    in memory, and under ``vmap`` it is skipped where none of a batch is due. Differentiated, which
    loops cannot be in reverse mode, it is a ``lax.cond``.
    """
    # What `change` closes over may be traced too, a learning rate for one: then it must be passed.
    change, closed_over = jax.closure_convert(change, state, *operands)

    @jax.custom_jvp
    def looped(due: Array, state: T, *operands: Any) -> T:
        def turn(carry: tuple[Array, T]) -> tuple[Array, T]:
            return jnp.zeros_like(carry[0]), change(carry[1], *operands)

        return lax.while_loop(lambda carry: carry[0], turn, (due, state))[1]

    @looped.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        def branched(due: Array, state: T, *operands: Any) -> T:
            return lax.cond(due, change, lambda state, *_: state, state, *operands)  # type: ignore[no-any-return]

        return jax.jvp(branched, primals, tangents)

    return looped(due, state, *operands, *closed_over)


def _kth_largest(keys: Array, count: int | Array) -> Array:
    """The k-th largest of integers, bit by bit: the largest t of at least -1 that k keys reach."""
    bits = 8 * keys.dtype.itemsize - 1

    def reached(threshold: Array) -> Array:
        return jnp.sum(_count(_pack(keys >= threshold))) >= count

    def set_bit(place: Array, threshold: Array) -> Array:
        bit = jnp.left_shift(jnp.asarray(1, keys.dtype), (bits - 1 - place).astype(keys.dtype))
        raised = threshold | bit
        return jnp.where(reached(raised), raised, threshold)

    threshold = lax.fori_loop(0, bits, set_bit, jnp.asarray(0, keys.dtype))
    return jnp.where(reached(threshold), threshold, jnp.asarray(-1, keys.dtype))


def _pad(flat: Array, fill: int | bool) -> Array:
    missing = -flat.shape[0] % _WORD
    return jnp.pad(flat, (0, missing), constant_values=fill) if missing else flat


def _pack(mask: Array) -> Array:
    """Words (n/32,) of a mask (n,): entry i is bit i % 32 of word i // 32."""
    bits = jnp.uint32(1) << jnp.arange(_WORD, dtype=jnp.uint32)
    return jnp.sum(jnp.where(mask.reshape(-1, _WORD), bits, 0), axis=1, dtype=jnp.uint32)


def _count(words: Array) -> Array:
    """How many bits of each word are set; int32."""
    return lax.population_count(words).astype(jnp.int32)


def _place_of_bit(words: Array, rank: Array) -> Array:
    """Where in each word its set bit number `rank`, from 0 and from the lowest, is; int32."""
    place = jnp.zeros_like(rank)
    for half in (16, 8, 4, 2, 1):
        below = _count(words & jnp.uint32((1 << half) - 1))
        higher = rank >= below
        rank = jnp.where(higher, rank - below, rank)
        words = jnp.where(higher, words >> half, words)
        place = jnp.where(higher, place + half, place)
    return place
