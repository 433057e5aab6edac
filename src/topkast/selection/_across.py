"""The sets of a tensor whose weights are spread over processes, chosen by counts alone.

Each process ranks the weights that it holds. The processes add up histograms of the bits of
magnitudes, from the highest bits to the lowest, until the thresholds of A and B are known exactly.
Among equal magnitudes the ranks of ties are thresholds in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from array_api_compat import array_namespace

from topkast._errors import NonFiniteError
from topkast._primitives import Array, device
from topkast.selection._random import Ranks
from topkast.selection._support import Support

# Places of a weight. A place of A or of B∖A is true.
OUTSIDE, EXPLORING, ACTIVE = 0, 1, 2

_WIDTH = 11  # bits of a key that one histogram resolves
_RANK_BITS = 32

# Adds up a vector of integers over all processes.
Total = Callable[[Array], Array]
# Indices and weights (k,) that a process holds outside B, in pieces.
Pieces = Callable[[], Iterable[tuple[Array, Array]]]


class Chosen(NamedTuple):
    """The outcome of :func:`choose_across` for the weights of one process.

    Attributes
    ----------
    places
        The new place of each given entry of B: 0 outside B, 1 in B∖A, 2 in A; int8.
    entrants
        Flat indices of weights outside B that enter it; int64.
    entrant_places
        Their places; int8.
    """

    places: Array
    entrants: Array
    entrant_places: Array


def choose_across(
    values: Array,
    indices: Array,
    outside: Pieces,
    counts: tuple[int, int],
    ranks: Ranks,
    total: Total,
) -> Chosen:
    r"""Choose the largest magnitudes of a tensor, of which each process holds a part.

    The sets are those of :func:`topkast.select` on the whole tensor. All processes call this
    function at the same time; only counts pass between them.

    Parameters
    ----------
    values, indices
        Weights on the present B that this process holds, and their flat indices (k,).
    outside
        Called twice: yields indices and weights outside B that this process holds. Together, all
        processes hold each weight once.
    counts
        The numbers \|A\| and \|B\| to choose.
    ranks
        The ranks of equal magnitudes, by flat index.
    total
        Adds up a vector of int64 over all processes.

    Raises
    ------
    NonFiniteError
        In all processes, if one of them holds NaN or infinity.

    Examples
    --------
    One process that holds all of four weights, of which B was {0, 3}:

    >>> import numpy as np
    >>> from topkast.selection._across import choose_across
    >>> from topkast.selection._random import Ranks, make_key
    >>> ranks = Ranks(make_key(0, "w", "ties"))
    >>> values, others = np.asarray([0.1, -0.9]), np.asarray([0.3, 0.2])
    >>> chosen = choose_across(
    ...     values, np.asarray([0, 3]), lambda: [(np.asarray([1, 2]), others)], (1, 2), ranks,
    ...     lambda counts: counts)
    >>> chosen.places, chosen.entrants, chosen.entrant_places
    (array([0, 2], dtype=int8), array([1]), array([1], dtype=int8))
    """
    xp = array_namespace(values)
    keys, indices = magnitude_keys(values), xp.astype(indices, xp.int64)
    bits = xp.finfo(values.dtype).bits - 1
    forward, backward = counts
    histogram = _first_histogram(keys, bits)
    for _, weights in outside():
        histogram = histogram + _first_histogram(magnitude_keys(weights), bits)
    histogram = total(histogram)
    size, bad_count = int(xp.sum(histogram[:-1])), int(histogram[-1])
    if bad_count:
        raise NonFiniteError(f"{bad_count} of {size} entries are NaN or infinite")
    if not backward:
        nothing = xp.zeros_like(indices[:0])
        return Chosen(xp.astype(indices * 0, xp.int8), nothing, xp.astype(nothing, xp.int8))
    histogram = histogram[:-1]
    floor = _find_digit(histogram, backward)[0] << (bits - _WIDTH)
    found_keys, found_indices = [keys], [indices]
    for piece_indices, weights in outside():
        piece = magnitude_keys(weights)
        is_large = piece >= floor
        found_keys.append(piece[is_large])
        found_indices.append(xp.astype(piece_indices[is_large], xp.int64))
    keys, indices = xp.concat(found_keys), xp.concat(found_indices)
    in_backward, in_forward = (
        _flag_largest(keys, indices, count, bits, ranks, total, histogram)
        for count in (backward, forward)
    )
    places = xp.astype(in_backward, xp.int8) + xp.astype(in_forward, xp.int8)
    first = values.shape[0]
    enters = in_backward[first:]
    return Chosen(places[:first], indices[first:][enters], places[first:][enters])


def change_sets(old: Support, indices: Array, places: Array) -> Support:
    """The sets after the weights at `indices` (k,), in any order, have got new `places` (k,).

    Examples
    --------
    >>> import numpy as np, topkast
    >>> from topkast.adapter import change_sets
    >>> old = topkast.Support.of(np.asarray([2, 7]), np.asarray([4]))
    >>> new = change_sets(old, np.asarray([7, 5]), np.asarray([0, 2]))
    >>> new.active, new.exploring
    (array([2, 5]), array([4]))
    """
    xp = array_namespace(old.indices)
    indices = xp.astype(indices, old.indices.dtype)
    order = xp.argsort(indices)
    indices, places = xp.take(indices, order), xp.take(places, order)
    return Support.of(
        *(
            _merge(_without(units, indices), indices[places == place])
            for units, place in ((old.active, ACTIVE), (old.exploring, EXPLORING))
        )
    )


def magnitude_keys(weights: Array) -> Array:
    """Integers in the order of magnitudes: the bits of floats (k,) without their signs; int64."""
    xp = array_namespace(weights)
    integer = xp.int64 if xp.finfo(weights.dtype).bits == 64 else xp.int32
    mask = xp.asarray(xp.iinfo(integer).max, dtype=integer, device=device(weights))
    return xp.astype(weights.view(integer) & mask, xp.int64)


def _first_histogram(keys: Array, bits: int) -> Array:
    """Counts of keys by their highest bits, and at the end of those of NaN and infinity."""
    xp = array_namespace(keys)
    infinity = xp.asarray([xp.inf], dtype=xp.float64 if bits == 63 else xp.float32)
    bad = xp.reshape(xp.count_nonzero(keys >= int(magnitude_keys(infinity)[0])), (1,))
    counts = xp.bincount(keys >> (bits - _WIDTH), minlength=1 << _WIDTH)
    return xp.concat([counts, xp.astype(bad, counts.dtype)])


def _find_digit(histogram: Array, count: int) -> tuple[int, int, int]:
    """The digit of the `count`-th largest key, its place among keys of this digit, their number."""
    xp = array_namespace(histogram)
    at_least = xp.flip(xp.cumulative_sum(xp.flip(histogram)))  # keys with this digit or a larger
    digit = int(xp.count_nonzero(at_least >= count)) - 1
    number = int(histogram[digit])
    return digit, count - (int(at_least[digit]) - number), number


def _find_threshold(
    keys: Array, count: int, bits: int, total: Total, first: Array | None = None
) -> tuple[int, int, int]:
    """The `count`-th largest key of all processes, its place among equal ones, their number.

    `first` is the histogram of the highest bits, if it is known.
    """
    xp = array_namespace(keys)
    prefix, number, shift = 0, 0, bits
    while shift:
        width = min(_WIDTH, shift)
        shift -= width
        if first is not None:
            histogram, first = first, None
        else:
            digits = keys[keys >> (shift + width) == prefix] >> shift
            counts = xp.bincount(digits & ((1 << width) - 1), minlength=1 << width)
            histogram = total(counts)
        digit, count, number = _find_digit(histogram, count)
        prefix = prefix << width | digit
    return prefix, count, number


def _flag_largest(
    keys: Array,
    indices: Array,
    count: int,
    bits: int,
    ranks: Ranks,
    total: Total,
    first: Array,
) -> Array:
    """Flags (k,) of the keys among the `count` largest of all processes."""
    threshold, remaining, number = _find_threshold(keys, count, bits, total, first)
    if remaining == number:
        return keys >= threshold
    flags, is_equal = keys > threshold, keys == threshold
    tie_ranks = ranks(indices[is_equal])
    lowest, _, _ = _find_threshold(tie_ranks, remaining, _RANK_BITS, total)
    flags[is_equal] = tie_ranks >= lowest
    return flags


def _without(units: Array, removed: Array) -> Array:
    """Ascending `units` without those in the ascending `removed`."""
    if not removed.shape[0]:
        return units
    xp = array_namespace(units)
    positions = xp.searchsorted(removed, units)
    last = xp.full_like(positions, removed.shape[0] - 1)
    return units[xp.take(removed, xp.minimum(positions, last)) != units]


def _merge(units: Array, others: Array) -> Array:
    """Two ascending vectors without common entries as one."""
    xp = array_namespace(units)
    merged = xp.concat([units, others])
    for these, those in ((units, others), (others, units)):
        numbers = xp.arange(these.shape[0], dtype=xp.int64, device=device(these))
        merged[numbers + xp.searchsorted(those, these)] = these
    return merged
