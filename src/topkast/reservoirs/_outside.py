"""The largest weights outside B, wherever the weights are kept."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from topkast._progress import CHUNK, chunks
from topkast.backends._compiled import function
from topkast.reservoirs._reservoir import Reservoir

if TYPE_CHECKING:
    from topkast.selection._support import Support

Vector = np.ndarray[Any, Any]

_SAMPLE, _RUN = 1 << 16, 1 << 5  # entries of a sample, and of a run of consecutive ones
_SPREAD = 4.0  # standard deviations of a sampled quantile, by which the bound is lowered
_WHOLE = 4  # times the entries that are wanted: as many are taken without a bound


class Largest(NamedTuple):
    """Indices (r,) and values (r,) of what reaches a magnitude, and this bound."""

    indices: Vector
    values: Vector
    bound: float


def largest_outside(
    reservoir: Reservoir, support: Support, count: int, *, name: str = ""
) -> Largest | None:
    """Collect a few more than the `count` largest entries outside B, and all that are as large.

    Returns None if entries of magnitude zero would be among them, unless there are few entries
    outside B: then these are all taken, and the bound is 0.
    """
    others = reservoir.size - support.backward
    takes_all = count >= others
    bound = 0.0 if takes_all else _estimate_bound(reservoir, support, count)
    if not bound:  # magnitudes of zero, or nearly all entries outside are wanted
        if others > _WHOLE * count:
            return None
        takes_all = True
    dtype = support.indices.dtype
    starts = np.append(np.arange(0, reservoir.size, CHUNK), reservoir.size).astype(dtype)
    runs = support.active, support.exploring
    edges = [np.searchsorted(run, starts) for run in runs]
    parts = [(np.zeros(0, dtype), reservoir.read(0, 0))]
    for number, (start, stop) in enumerate(chunks(reservoir.size, f"{name}: reading all weights")):
        weights = reservoir.view(start, stop)
        inside = [
            (run[edge[number] : edge[number + 1]] - dtype.type(start)).astype(np.int32, copy=False)
            for run, edge in zip(runs, edges, strict=True)
        ]
        if takes_all:
            outside = np.ones(weights.size, dtype=np.bool_)
            for positions in inside:
                outside[positions] = False
            found = np.flatnonzero(outside)
            kept = weights[found]
        else:
            collect = function("collect", weights.size)
            found, kept = collect(weights, bound, without=inside)
        parts.append((found.astype(dtype, copy=False) + dtype.type(start), kept))
    indices, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Largest(indices, values, bound)


def _estimate_bound(reservoir: Reservoir, support: Support, count: int) -> float:
    """A magnitude that most likely more than `count` entries outside B reach, from a sample."""
    dtype = support.indices.dtype
    step = _RUN * max(1, reservoir.size // _SAMPLE)
    firsts = np.arange(0, reservoir.size - _RUN + 1, step, dtype=dtype)
    indices = firsts[:, None] + np.arange(_RUN, dtype=dtype)
    sample = np.abs(reservoir.take(indices.ravel()))
    for run in (support.active, support.exploring):
        starts = np.searchsorted(run, firsts)
        lengths = np.searchsorted(run, firsts + dtype.type(_RUN)) - starts
        number = np.repeat(np.arange(len(firsts)), lengths)  # of the sampled run of each entry
        positions = np.arange(len(number)) + (starts - np.cumsum(lengths) + lengths)[number]
        sample[number * _RUN + (run[positions] - firsts[number])] = 0
    share = count / reservoir.size
    margin = _SPREAD * math.sqrt(sample.size * share * (1 - share)) + 1
    rank = min(sample.size - 1, int(sample.size * share + margin))
    place = sample.size - 1 - rank
    sample.partition(place)
    return float(sample[place])
