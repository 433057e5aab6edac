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
    """

    magnitude: float
    surplus: int


class Candidates(NamedTuple):
    """Entries that may belong to B.

    Attributes
    ----------
    indices, values
        Flat indices and weights.
    source
        Position that each had in the old B, -1 for those that were outside; int32.
    """

    indices: Vector
    values: Vector
    source: Vector


class Division(NamedTuple):
    """Candidates in their new order, in four parts: A, B∖A, those outside B, those below the bound.

    Attributes
    ----------
    inside
        A and B∖A; indices ascend within each.
    outside
        The others; indices of those that reach the bound ascend.
    sizes
        Lengths of the four parts.
    """

    inside: Candidates
    outside: Candidates
    sizes: tuple[int, ...]


def find_thresholds(
    lists: Sequence[Vector],
    counts: Sequence[int],
    /,
    *,
    brackets: Sequence[tuple[float, float]] | None = None,
) -> tuple[list[Threshold], int]:
    """Find the `count`-th largest magnitude of all entries of some vectors, for several counts."""
    magnitudes = np.abs(np.concatenate(lists))
    thresholds = []
    for count in counts:
        position = magnitudes.size - count
        threshold = np.partition(magnitudes, position)[position]
        surplus = int(np.count_nonzero(magnitudes >= threshold)) - count
        thresholds.append(Threshold(float(threshold), surplus))
    return thresholds, magnitudes.size - int(np.count_nonzero(np.isfinite(magnitudes)))


def collect(flat: Vector, bound: float, /) -> tuple[Vector, Vector]:
    """Ascending indices of the entries of `flat` (n,) of magnitude `bound` or more, and these."""
    indices = np.flatnonzero(np.abs(flat) >= flat.dtype.type(bound))
    return indices.astype(np.int32), flat.take(indices)


def put(flat: Vector, indices: Vector, values: Vector, /) -> None:
    """Write `values` (k,) into `flat` at `indices` (k,)."""
    flat[indices] = values


def migrate(entry: Vector, source: Vector, survives: Vector, fresh: Vector, out: Vector, /) -> None:
    """Write ``where(survives, entry[source], fresh)`` into `out`."""
    out[:] = np.where(survives, entry.take(source), fresh)


def divide(
    active: tuple[Vector, Vector],
    exploring: tuple[Vector, Vector],
    reserve: tuple[Vector, Vector],
    /,
    *,
    size: int,
    forward: float,
    backward: float,
    bound: float,
    ties: tuple[Vector, Vector] | None = None,
) -> Division:
    """Divide the candidates for B into the next A, B∖A and reserve."""
    parts = active, exploring, reserve
    indices, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    inside = active[0].size + exploring[0].size
    source = np.arange(indices.size, dtype=np.int32)
    source[inside:] = -1
    order = np.argsort(indices, kind="stable")  # which merges what ascends
    indices, values, source = indices[order], values[order], source[order]
    magnitudes = np.abs(values)
    limits = (magnitudes.dtype.type(limit) for limit in (forward, backward, bound))
    below = [magnitudes < limit for limit in limits]
    for flags, tied in zip(below, ties or (), strict=False):
        flags[np.searchsorted(indices, tied)] = True
    number = np.sum(below, axis=0, dtype=np.int8)
    order = np.argsort(number, kind="stable")
    sizes = np.bincount(number, minlength=4)
    halves = np.split(order, [sizes[:2].sum()])
    inside_b, outside_b = (Candidates(indices[half], values[half], source[half]) for half in halves)
    return Division(inside_b, outside_b, tuple(sizes.tolist()))
