"""The k largest magnitudes of an array in host memory: exact, in two streaming reads of it.

NumPy's ``partition`` of the whole array moves every entry several times. Here a sample brackets
the threshold; one pass in cache-sized chunks counts what lies above the bracket and keeps what
lies inside, so that only that is partitioned; a second pass collects what reaches the threshold.
Sampling decides speed, never the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from topkast._errors import NonFiniteError

Vector: TypeAlias = np.ndarray[Any, Any]
Ranks: TypeAlias = Callable[[Vector], Vector]  # of entries with equal magnitudes, by position

_CHUNK = 1 << 16  # entries: a chunk's magnitudes and flags stay in a core's second-level cache
_SAMPLE = 1 << 15  # entries
_WINDOW = 1 << 18  # entries, of which a table of int32 stays in a core's second-level cache
_SPREAD = 4.0  # half-width of the bracket, in standard deviations of a sampled quantile


def largest_on_host(vector: Vector, count: int, ranks: Ranks) -> tuple[Vector, Vector]:
    """Ascending indices of the `count` largest magnitudes of `vector` (n,), and those magnitudes.

    Equal ones rank by ``ranks(indices)``, which all differ, the largest first. Raises
    :class:`NonFiniteError` where an entry is NaN or infinite.
    """
    threshold, surplus = _threshold(vector, count)
    indices = np.empty(count + surplus, dtype=np.int32 if vector.size < 1 << 31 else np.int64)
    magnitudes = np.empty(count + surplus, dtype=vector.dtype)
    filled = 0
    for start, chunk in _magnitudes(vector):
        reached = np.flatnonzero(chunk >= threshold)
        stop = filled + reached.size
        magnitudes[filled:stop] = chunk.take(reached)
        np.add(reached, start, out=indices[filled:stop], casting="same_kind")
        filled = stop
    if surplus:
        keep = np.ones(magnitudes.size, dtype=np.bool_)
        equal = np.flatnonzero(magnitudes == threshold)
        keep[equal[_smallest(ranks(indices[equal]), surplus)]] = False
        indices, magnitudes = indices.compress(keep), magnitudes.compress(keep)
    return indices, magnitudes


def largest_first(vector: Vector, forward: int, backward: int, ranks: Ranks) -> Vector:
    """Indices of the `backward` largest magnitudes, ranked as above: the `forward` largest first.

    Both parts ascend.
    """
    indices, magnitudes = largest_on_host(vector, backward, ranks)
    threshold, surplus = _threshold(magnitudes, forward)
    dropped = np.zeros(0, dtype=np.intp)
    if surplus:
        equal = np.flatnonzero(magnitudes == threshold)
        dropped = np.sort(equal[_smallest(ranks(indices[equal]), surplus)])
    out = np.empty_like(indices)
    active, exploring = 0, forward
    for start in range(0, backward, _CHUNK):
        chunk = indices[start : start + _CHUNK]
        flags = magnitudes[start : start + _CHUNK] >= threshold
        first, last = np.searchsorted(dropped, (start, start + _CHUNK))
        flags[dropped[first:last] - start] = False
        chosen = chunk.compress(flags)
        rest = chunk.compress(np.logical_not(flags, out=flags))
        out[active : active + chosen.size] = chosen
        out[exploring : exploring + rest.size] = rest
        active, exploring = active + chosen.size, exploring + rest.size
    return out


def largest_flags(vector: Vector, count: int, ranks: Ranks) -> Vector:
    """Flags (n,) of the `count` largest magnitudes of `vector` (n,), ranked as above."""
    threshold, surplus = _threshold(vector, count)
    magnitudes = np.abs(vector)
    flags = np.asarray(magnitudes >= threshold)
    if surplus:
        equal = np.flatnonzero(magnitudes == threshold)
        flags[equal[_smallest(ranks(equal), surplus)]] = False
    return flags


def _smallest(ranks: Vector, count: int) -> Vector:
    """Positions of the `count` smallest ranks."""
    return np.argpartition(ranks, count - 1)[:count]


def common_positions(
    old: Vector, old_split: int, new: Vector, new_split: int
) -> tuple[Vector, Vector]:
    """Where each of the indices `new` (k,) is in `old` (k,), int32, and flags of those that are.

    Both are two ascending parts, of which the second begins at the split. Window by window of the
    tensor the places of `old` are noted in a table, which a cache holds.
    """
    source = np.zeros(new.size, dtype=np.int32)
    largest = max((int(part.max(initial=-1)) for part in (old, new)), default=-1)
    starts = np.arange(0, largest + _WINDOW, _WINDOW)
    noted, wanted = (
        [(first, first + np.searchsorted(part, starts.astype(part.dtype))) for first, part in parts]
        for parts in (_parts(old, old_split), _parts(new, new_split))
    )
    table = np.empty(_WINDOW, dtype=np.int32)
    for window, start in enumerate(starts[:-1].tolist()):
        table.fill(-1)
        for _, edges in noted:
            first, last = edges[window : window + 2]
            table[(old[first:last] - start).astype(np.intp)] = np.arange(first, last)
        for _, edges in wanted:
            first, last = edges[window : window + 2]
            source[first:last] = table.take(new[first:last] - start)
    survives = source >= 0
    return np.maximum(source, 0, out=source), survives


def _parts(indices: Vector, split: int) -> list[tuple[int, Vector]]:
    return [(0, indices[:split]), (split, indices[split:])]


def _threshold(vector: Vector, count: int) -> tuple[Any, int]:
    """The `count`-th largest magnitude, and how many more than `count` reach it."""
    above, inside = _split(vector, *_bracket(vector, count))
    rank = count - above
    if not 1 <= rank <= inside.size:  # the sample misled: look at everything
        above, inside = _split(vector, -1.0, math.inf)
        rank = count
    place = inside.size - rank
    inside.partition(place)
    threshold = inside[place]
    return threshold, int(np.count_nonzero(inside >= threshold)) - rank


def _bracket(vector: Vector, count: int) -> tuple[float, float]:
    """Bounds that hold the `count`-th largest magnitude, most likely, and few others."""
    if vector.size <= 2 * _SAMPLE:
        return -1.0, math.inf
    sample = np.abs(vector[:: vector.size // _SAMPLE])
    share = count / vector.size
    rank = sample.size * (1 - share)
    margin = _SPREAD * math.sqrt(sample.size * share * (1 - share)) + 1
    first, last = int(rank - margin), int(rank + margin) + 1
    ends = [min(max(end, 0), sample.size - 1) for end in (first, last)]
    sample.partition(ends)
    low = float(sample[ends[0]]) if first >= 0 else -1.0
    high = float(sample[ends[1]]) if last < sample.size else math.inf
    return low, high


def _split(vector: Vector, low: float, high: float) -> tuple[int, Vector]:
    """How many magnitudes exceed `high`, and those in [low, high]."""
    above, inside = 0, []
    for _, chunk in _magnitudes(vector):
        if not chunk.max() < math.inf:
            bad = int(np.count_nonzero(~np.isfinite(vector)))
            raise NonFiniteError(f"{bad} of {vector.size} entries are NaN or infinite")
        too_high = chunk > high
        above += int(np.count_nonzero(too_high))
        inside.append(chunk.compress((chunk >= low) ^ too_high))
    return above, np.concatenate(inside)


def _magnitudes(vector: Vector) -> Iterator[tuple[int, Vector]]:
    """Magnitudes of consecutive chunks, each with its first index, in a buffer that is reused."""
    buffer = np.empty(min(_CHUNK, vector.size), dtype=vector.dtype)
    for start in range(0, vector.size, _CHUNK):
        chunk = vector[start : start + _CHUNK]
        yield start, np.abs(chunk, out=buffer[: chunk.size])
