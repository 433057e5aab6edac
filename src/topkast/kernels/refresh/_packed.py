"""What :mod:`topkast.kernels.refresh._parts` does, in lanes: a register of entries at a time.

Each list is split into vectors for the next parts. For each part, most entries come from one list:
those of others are inserted there, at indices that comparisons of whole registers find.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from topkast.kernels.refresh._magnitudes import key_of
from topkast.kernels.refresh._parts import PARTS, entries_between, is_tie
from topkast.kernels.runtime._arguments import array_at
from topkast.kernels.runtime._lanes import (
    EVERY,
    LANE_BYTES,
    LANES,
    add,
    at_least,
    below,
    count,
    equal,
    first_lanes,
    load,
    numbers,
    pack,
    splat,
    store,
    without_sign,
)
from topkast.kernels.runtime._vector import keep

_LIMIT = 1 << 31  # more than the entries of a vector, which is read by address
_LAST = np.int32(np.iinfo(np.int32).max)  # follows the indices of a vector


@njit  # type: ignore[untyped-decorator]
def _without_ties(reached: Any, same: Any, indices: Any, ties: Any, size: Any) -> Any:
    """A mask less the lanes of ties; `same` are the lanes whose key is the threshold."""
    for lane in range(LANES):
        bit = np.uint16(1 << lane)
        if same & bit:
            index = array_at(indices, LANES, np.int32)[lane]
            if is_tie(index, array_at(ties, size, np.int64)):
                reached = np.uint16(reached & ~bit)
    return reached


@njit(inline="always")  # type: ignore[untyped-decorator]
def _find_masks(bits: Any, valid: Any, indices: Any, keys: Any, ties: Any) -> Any:
    """Masks of the lanes that go to each part; arrays, which would be counted, by addresses."""
    key, forward, backward, bound = without_sign(bits), keys[0], keys[1], keys[2]
    forward_ties, forward_size, backward_ties, backward_size = ties
    active, inside = at_least(key, forward) & valid, at_least(key, backward) & valid
    if forward_size:
        same = equal(key, forward) & valid
        if same:
            active = _without_ties(active, same, indices, forward_ties, forward_size)
    if backward_size:
        same = equal(key, backward) & valid
        if same:
            inside = _without_ties(inside, same, indices, backward_ties, backward_size)
    inside, above = active | inside, at_least(key, bound) & valid
    return active, inside & ~active, above & ~inside, valid & ~(above | inside)


@njit  # type: ignore[untyped-decorator]
def _lanes_of(keys: Any) -> Any:
    return splat(np.int32(keys[0])), splat(np.int32(keys[1])), splat(np.int32(keys[2]))


@njit  # type: ignore[untyped-decorator]
def _addresses_of(ties: Any) -> Any:
    return ties[0].ctypes.data, len(ties[0]), ties[1].ctypes.data, len(ties[1])


@njit  # type: ignore[untyped-decorator]
def _count_ties(indices: Any, values: Any, key: Any, ties: Any, unsigned: Any) -> Any:
    """The number of entries of a list with this key that are among the ties."""
    found = 0
    if len(ties) and len(indices):
        for number in range(np.searchsorted(ties, indices[0]), len(ties)):
            if ties[number] > indices[-1]:
                break
            position = np.searchsorted(indices, ties[number])
            if indices[position] == ties[number] and key_of(values[position], unsigned) == key:
                found += 1
    return found


@njit  # type: ignore[untyped-decorator]
def count_packed(
    indices: Any, values: Any, keys: Any, ties: Any, counts: Any, unsigned: Any
) -> None:
    """Count the entries of a list, in one range of the tensor, that go to each part (4,)."""
    forward, backward, bound = _lanes_of(keys)
    address, size = values.ctypes.data, len(values)
    active, inside, above, whole = 0, 0, 0, size - size % LANES
    for first in range(0, whole, LANES):  # processors read ahead of loads without a mask only
        key = without_sign(load(address + LANE_BYTES * first, EVERY))
        active += count(at_least(key, forward))
        inside += count(at_least(key, backward))
        above += count(at_least(key, bound))
    valid = first_lanes(size - whole)
    key = without_sign(load(address + LANE_BYTES * whole, valid))
    active += count(at_least(key, forward) & valid)
    inside += count(at_least(key, backward) & valid)
    above += count(at_least(key, bound) & valid)
    active -= _count_ties(indices, values, keys[0], ties[0], unsigned)
    inside -= _count_ties(indices, values, keys[1], ties[1], unsigned)
    counts[0], counts[1] = active, inside - active
    counts[2], counts[3] = above - inside, size - above


@njit  # type: ignore[untyped-decorator]
def _append(vector: Any, size: Any, mask: Any, index: Any, bits: Any, position: Any) -> Any:
    """Append the lanes of a mask to a vector of candidates; return its next size."""
    indices, values, positions = vector
    offset = LANE_BYTES * size
    store(pack(index, mask), indices + offset, EVERY)
    store(pack(bits, mask), values + offset, EVERY)
    store(pack(position, mask), positions + offset, EVERY)
    return size + count(mask)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _append_block(
    block: Any, valid: Any, positions: Any, keys: Any, ties: Any, vectors: Any, sizes: Any
) -> Any:
    """Append a register of entries, which are at two addresses, to their parts."""
    index, bits = load(block[0], valid), load(block[1], valid)
    masks = _find_masks(bits, valid, block[0], keys, ties)
    zero, one, two, three = sizes
    if masks[0]:
        zero = _append(vectors[0], zero, masks[0], index, bits, positions)
    if masks[1]:
        one = _append(vectors[1], one, masks[1], index, bits, positions)
    if masks[2]:
        two = _append(vectors[2], two, masks[2], index, bits, positions)
    if masks[3]:
        three = _append(vectors[3], three, masks[3], index, bits, positions)
    return zero, one, two, three


@njit  # type: ignore[untyped-decorator]
def _split(
    indices: Any, values: Any, position: Any, keys: Any, ties: Any, vectors: Any, out: Any
) -> None:
    """Split a list into a vector for each part, and write their sizes (4,)."""
    keys_in_lanes, tie_addresses = _lanes_of(keys), _addresses_of(ties)
    positions, step = splat(np.int32(position)), splat(np.int32(0))
    if position >= 0:
        positions, step = add(positions, numbers()), splat(np.int32(LANES))
    # Addresses are unsigned: with a signed number they would become floats.
    index, value = np.int64(indices.ctypes.data), np.int64(values.ctypes.data)
    size = len(values)
    sizes = 0, 0, 0, 0
    for _ in range(size // LANES):
        sizes = _append_block(
            (index, value), EVERY, positions, keys_in_lanes, tie_addresses, vectors, sizes
        )
        index, value = index + LANE_BYTES * LANES, value + LANE_BYTES * LANES
        positions = add(positions, step)
    if size % LANES:
        valid = first_lanes(size % LANES)
        sizes = _append_block(
            (index, value), valid, positions, keys_in_lanes, tie_addresses, vectors, sizes
        )
    end = splat(_LAST)
    for part in range(PARTS):
        out[part] = sizes[part]
        store(end, vectors[part][0] + LANE_BYTES * sizes[part], EVERY)


@njit  # type: ignore[untyped-decorator]
def _merge(stay: Any, enter: Any, move: Any, place: Any, stop: Any, outputs: Any) -> None:
    """Write what stays in a part, enters B, and moves inside of it, from a place of the outputs on.

    All three are vectors of candidates, which end with an index that is larger than all others.
    """
    indices, values, sources, survives = outputs
    new_indices, new_values = (
        array_at(enter[0], _LIMIT, np.int32),
        array_at(enter[1], _LIMIT, np.int32),
    )
    old_indices, old_values = (
        array_at(move[0], _LIMIT, np.int32),
        array_at(move[1], _LIMIT, np.int32),
    )
    old_sources = array_at(move[2], _LIMIT, np.int32)
    first_index, first_value, first_source = stay
    entered, moved, source, target = 0, 0, 0, place
    while True:
        limit = min(new_indices[entered], old_indices[moved])
        limits = splat(limit)
        while True:  # copies a register of entries, and keeps those of smaller indices
            offset, out = LANE_BYTES * source, LANE_BYTES * target
            copied = load(first_index + offset, EVERY)
            kept = below(copied, limits)
            value, origin = load(first_value + offset, EVERY), load(first_source + offset, EVERY)
            if target + LANES <= stop:  # what is too much is written over before `stop` is reached
                store(copied, indices.ctypes.data + out, EVERY)
                store(value, values.ctypes.data + out, EVERY)
                store(origin, sources.ctypes.data + out, EVERY)
            else:
                store(copied, indices.ctypes.data + out, kept)
                store(value, values.ctypes.data + out, kept)
                store(origin, sources.ctypes.data + out, kept)
            source, target = source + count(kept), target + count(kept)
            if kept != EVERY:
                break
        if limit == _LAST:
            break
        indices[target] = limit
        if limit == new_indices[entered]:
            values[target], sources[target], survives[target] = new_values[entered], 0, False
            entered += 1
        else:
            values[target], sources[target] = old_values[moved], old_sources[moved]
            moved += 1
        target += 1


@njit  # type: ignore[untyped-decorator]
def _vector_at(address: Any, capacity: Any) -> Any:
    """Addresses of the indices, values and positions of a vector of candidates."""
    first, row = np.int64(address), LANE_BYTES * capacity
    return first, first + row, first + 2 * row


@njit  # type: ignore[untyped-decorator]
def write_packed(
    lists: Any,
    bounds: Any,
    ranges: Any,
    places: Any,
    keys: Any,
    ties: Any,
    outputs: Any,
    unsigned: Any,
) -> None:
    """Write the candidates of consecutive ranges, part by part: see :func:`write_parts`."""
    most = (bounds[:, :, 1] - bounds[:, :, 0]).max() + LANES
    vectors = np.empty((3 * PARTS, 3, most), dtype=np.int32)
    sizes = np.empty((3, PARTS), dtype=np.int64)
    start, size = np.int64(vectors.ctypes.data), 3 * LANE_BYTES * most
    for number in range(len(bounds)):
        own = bounds[number]
        entries = entries_between(lists, own)
        positions = own[0, 0], len(lists[0][0]) + own[1, 0], np.int64(-1)
        for one in range(3):
            indices, values = entries[one]
            first = start + one * PARTS * size
            parts = (
                _vector_at(first, most),
                _vector_at(first + size, most),
                _vector_at(first + 2 * size, most),
                _vector_at(first + 3 * size, most),
            )
            _split(indices, values, positions[one], keys, ties, parts, sizes[one])
        for part in range(PARTS):
            many = min(part, 1)  # most of A come from A, and most others from B∖A
            stay = _vector_at(start + (many * PARTS + part) * size, most)
            move = _vector_at(start + ((1 - many) * PARTS + part) * size, most)
            enter = _vector_at(start + (2 * PARTS + part) * size, most)
            place, following = places[part], places[part] + sizes[:, part].sum()
            outputs[3][place:following] = True
            _merge(stay, enter, move, place, following, outputs)
            places[part] = following
    keep(vectors)
