"""The largest magnitudes among candidates, and how sets change: what NumPy does without kernels.

The functions and their results are those of :mod:`topkast.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Vector = np.ndarray[Any, Any]


class Threshold(NamedTuple):
    """The smallest of the largest magnitudes.

    Attributes
    ----------
    magnitude
        Of the last entry that is counted.
    surplus
        Number of entries with this magnitude that are too many.
    equal
        The positions of all entries with this magnitude, in any order, if some are too many;
        otherwise none.
    """

    magnitude: float
    surplus: int
    equal: Vector


class Division(NamedTuple):
    r"""Candidates for B in their new order: A, B∖A, those outside B, those below the bound.

    Attributes
    ----------
    indices, values
        Flat indices, which ascend within each part, and weights.
    source
        Position that each had in the old B, 0 for those that were outside; int32.
    survives
        Whether each was in the old B.
    sizes
        Lengths of the four parts.
    entered
        Number of entries of the next A that were not in the old A.
    """

    indices: Vector
    values: Vector
    source: Vector
    survives: Vector
    sizes: tuple[int, ...]
    entered: int


def find_thresholds(
    lists: Sequence[Vector],
    counts: Sequence[int],
    /,
    *,
    brackets: Sequence[tuple[float, float]] | None = None,
) -> tuple[list[Threshold], int]:
    """Find the `count`-th largest magnitude of all entries of some vectors, for several counts.

    Positions are those of the vectors one after the other.
    """
    magnitudes = np.abs(np.concatenate(lists))
    thresholds = [threshold_among(magnitudes, count) for count in counts]
    return thresholds, magnitudes.size - int(np.count_nonzero(np.isfinite(magnitudes)))


def threshold_among(magnitudes: Vector, count: int, positions: Vector | None = None) -> Threshold:
    """The `count`-th largest of some magnitudes, whose positions are their numbers by default."""
    place = magnitudes.size - count
    threshold = np.partition(magnitudes, place)[place]
    surplus = int(np.count_nonzero(magnitudes >= threshold)) - count
    equal = np.flatnonzero(magnitudes == threshold) if surplus else np.zeros(0, dtype=np.int64)
    if positions is not None:
        equal = positions.take(equal)
    return Threshold(float(threshold), surplus, equal)


def collect(
    flat: Vector,
    bound: float,
    limit: float | None = None,
    /,
    *,
    indices: Vector | None = None,
    without: Sequence[Vector] = (),
) -> tuple[Vector, Vector]:
    """Indices of the entries of `flat` (n,) of magnitude `bound` or more, and these."""
    magnitudes = np.abs(flat)
    inside = magnitudes >= flat.dtype.type(bound)
    if limit is not None:
        inside &= magnitudes <= flat.dtype.type(limit)
    for positions in without:
        inside[positions] = False
    found = np.flatnonzero(inside)
    return found.astype(np.int32) if indices is None else indices.take(found), flat.take(found)


def put(flat: Vector, indices: Vector, values: Vector, /, *, ascending: bool = True) -> None:
    """Write `values` (k,) into `flat` at `indices` (k,), in any order."""
    flat[indices] = values


def migrate(source: Vector, survives: Vector, /, *moves: tuple[Vector, Vector, Vector]) -> None:
    """Write ``where(survives, entry[source], fresh)`` into `out`, for each (entry, fresh, out)."""
    for entry, fresh, out in moves:
        out[:] = np.where(survives, entry.take(source), fresh)


def divide(
    inside: tuple[Vector, Vector],
    reserve: tuple[Vector, Vector],
    /,
    *,
    split: int,
    size: int,
    forward: float,
    backward: float,
    bound: float,
    ties: tuple[Vector, Vector] | None = None,
) -> Division:
    """Divide the candidates for B into the next A, B∖A and reserve."""
    lists = zip(inside, reserve, strict=True)
    indices, values = (np.concatenate(arrays) for arrays in lists)
    survives = np.arange(indices.size) < inside[0].size
    source = np.where(survives, np.arange(indices.size, dtype=np.int32), np.int32(0))
    order = np.argsort(indices, kind="stable")  # which merges what ascends
    indices, values, source, survives = (
        array[order] for array in (indices, values, source, survives)
    )
    magnitudes = np.abs(values)
    limits = (magnitudes.dtype.type(limit) for limit in (forward, backward, bound))
    below = [magnitudes < limit for limit in limits]
    for flags, tied in zip(below, ties or (), strict=False):
        flags[np.searchsorted(indices, tied)] = True
    number = np.sum(below, axis=0, dtype=np.int8)
    order = np.argsort(number, kind="stable")
    sizes = tuple(np.bincount(number, minlength=4).tolist())
    columns = (array[order] for array in (indices, values, source, survives))
    indices, values, source, survives = columns
    stays = survives[: sizes[0]] & (source[: sizes[0]] < split)
    entered = sizes[0] - int(np.count_nonzero(stays))
    return Division(indices, values, source, survives, sizes, entered)
