"""Exact selection of the k largest magnitudes of an array in host memory, in two streaming reads.

NumPy's ``partition`` of the whole array moves every entry several times. Here a sample brackets
the threshold. The first pass, in cache-sized chunks, counts the magnitudes above the bracket and
partitions only those inside; the second pass collects the magnitudes that reach the threshold.
Sampling affects speed, never the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from topkast._errors import NonFiniteError
from topkast.backends import _candidates
from topkast.backends._compiled import function

Vector: TypeAlias = np.ndarray[Any, Any]
Ranks: TypeAlias = Callable[[Vector], Vector]  # from positions to ranks among equal magnitudes

_CHUNK = 1 << 16  # entries: a chunk's magnitudes and flags fit into a core's second-level cache
_SAMPLE = 1 << 15  # entries
_WINDOW = 1 << 18  # entries: an int32 table of this length fits into a core's second-level cache
_BRACKET_WIDTH = 4.0  # half-width of the bracket, in standard deviations of a sampled quantile


def largest_on_host(vector: Vector, count: int, ranks: Ranks) -> tuple[Vector, Vector]:
    """Ascending indices of the `count` largest magnitudes of `vector` (n,), and the magnitudes.

    Equal magnitudes rank by ``ranks(indices)``, which are distinct; the largest comes first. Raises
    :class:`NonFiniteError` if an entry is NaN or infinite.
    """
    threshold, surplus = _threshold(vector, count)
    indices = np.empty(count + surplus, dtype=np.int32 if vector.size < 1 << 31 else np.int64)
    magnitudes = np.empty(count + surplus, dtype=vector.dtype)
    filled = 0
    for start, chunk in _magnitudes(vector):
        selected = np.flatnonzero(chunk >= threshold)
        stop = filled + selected.size
        magnitudes[filled:stop] = chunk.take(selected)
        np.add(selected, start, out=indices[filled:stop], casting="same_kind")
        filled = stop
    if surplus:
        is_kept = np.ones(magnitudes.size, dtype=np.bool_)
        equal = np.flatnonzero(magnitudes == threshold)
        is_kept[equal[_smallest(ranks(indices[equal]), surplus)]] = False
        indices, magnitudes = indices.compress(is_kept), magnitudes.compress(is_kept)
    return indices, magnitudes


def largest_first(vector: Vector, forward: int, backward: int, ranks: Ranks) -> Vector:
    """Indices of the `backward` largest magnitudes, with those of the `forward` largest first.

    Both groups ascend. Ties rank as in :func:`largest_on_host`.
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
        in_forward = chunk.compress(flags)
        others = chunk.compress(np.logical_not(flags, out=flags))
        out[active : active + in_forward.size] = in_forward
        out[exploring : exploring + others.size] = others
        active, exploring = active + in_forward.size, exploring + others.size
    return out


def largest_flags(vector: Vector, count: int, ranks: Ranks) -> Vector:
    """Flags (n,) of the magnitudes that :func:`largest_on_host` selects."""
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


def migrate(
    moves: Sequence[tuple[Vector, Vector]],
    source: Vector,
    survives: Vector,
    outs: Sequence[Vector] | None = None,
) -> Sequence[Vector]:
    """Entries (k,) at the positions `source`; `fresh`, 0-d or (k,), where not `survives`.

    They are written into `outs`, if these are given.
    """
    if outs is None:
        outs = [np.empty(source.size, dtype=flat.dtype) for flat, _ in moves]
    triples = [
        (flat, fresh.reshape(-1), out) for (flat, fresh), out in zip(moves, outs, strict=True)
    ]
    use = function("migrate", source.size)
    vectors = [source, survives, *(vector for triple in triples for vector in triple)]
    contiguous = all(vector.flags.c_contiguous for vector in vectors)
    has_words = all(flat.dtype.itemsize in (2, 4, 8) for flat, _ in moves)
    if not (contiguous and has_words and source.dtype == np.int32):
        use = _candidates.migrate
    use(source, survives, *triples)
    return outs


def common_positions(
    old: Vector, old_split: int, new: Vector, new_split: int
) -> tuple[Vector, Vector]:
    """Positions in `old` (k,) of the indices `new` (k,), int32, and flags of those in `old`.

    Both vectors consist of two ascending runs, the second of which begins at the split. For each
    window of the tensor, a table that fits into a cache maps indices to positions in `old`.
    """
    source = np.zeros(new.size, dtype=np.int32)
    largest = max((int(indices.max(initial=-1)) for indices in (old, new)), default=-1)
    starts = np.arange(0, largest + _WINDOW, _WINDOW)
    old_edges, new_edges = (
        [first + np.searchsorted(run, starts.astype(run.dtype)) for first, run in runs]
        for runs in (_runs(old, old_split), _runs(new, new_split))
    )
    table = np.empty(_WINDOW, dtype=np.int32)
    for window, start in enumerate(starts[:-1].tolist()):
        table.fill(-1)
        for edges in old_edges:
            first, last = edges[window : window + 2]
            table[(old[first:last] - start).astype(np.intp)] = np.arange(first, last)
        for edges in new_edges:
            first, last = edges[window : window + 2]
            source[first:last] = table.take(new[first:last] - start)
    survives = source >= 0
    return np.maximum(source, 0, out=source), survives


def _runs(indices: Vector, split: int) -> list[tuple[int, Vector]]:
    return [(0, indices[:split]), (split, indices[split:])]


def _threshold(vector: Vector, count: int) -> tuple[Any, int]:
    """The `count`-th largest magnitude, and the number of entries beyond `count` that reach it."""
    above, inside = _split(vector, *_bracket(vector, count))
    rank = count - above
    if not 1 <= rank <= inside.size:  # the sampled bracket missed the threshold
        above, inside = _split(vector, -1.0, math.inf)
        rank = count
    position = inside.size - rank
    inside.partition(position)
    threshold = inside[position]
    return threshold, int(np.count_nonzero(inside >= threshold)) - rank


def _bracket(vector: Vector, count: int) -> tuple[float, float]:
    """Bounds that most likely contain the `count`-th largest magnitude and few others."""
    if vector.size <= 2 * _SAMPLE:
        return -1.0, math.inf
    sample = np.abs(vector[:: vector.size // _SAMPLE])
    share = count / vector.size
    rank = sample.size * (1 - share)
    margin = _BRACKET_WIDTH * math.sqrt(sample.size * share * (1 - share)) + 1
    first, last = int(rank - margin), int(rank + margin) + 1
    ends = [min(max(end, 0), sample.size - 1) for end in (first, last)]
    sample.partition(ends)
    low = float(sample[ends[0]]) if first >= 0 else -1.0
    high = float(sample[ends[1]]) if last < sample.size else math.inf
    return low, high


def _split(vector: Vector, low: float, high: float) -> tuple[int, Vector]:
    """Number of magnitudes above `high`, and the magnitudes in [low, high]."""
    above, inside = 0, []
    for _, chunk in _magnitudes(vector):
        if not chunk.max() < math.inf:
            bad_count = int(np.count_nonzero(~np.isfinite(vector)))
            raise NonFiniteError(f"{bad_count} of {vector.size} entries are NaN or infinite")
        is_above = chunk > high
        above += int(np.count_nonzero(is_above))
        inside.append(chunk.compress((chunk >= low) ^ is_above))
    return above, np.concatenate(inside)


def _magnitudes(vector: Vector) -> Iterator[tuple[int, Vector]]:
    """Yield the first index and the magnitudes of each chunk, in a buffer that is reused."""
    buffer = np.empty(min(_CHUNK, vector.size), dtype=vector.dtype)
    for start in range(0, vector.size, _CHUNK):
        chunk = vector[start : start + _CHUNK]
        yield start, np.abs(chunk, out=buffer[: chunk.size])
