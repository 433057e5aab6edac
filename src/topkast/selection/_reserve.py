"""The next sets from few candidates: the entries of B, and a reserve of the largest ones outside.

Weights outside B do not change between refreshes. The next B therefore consists of entries of the
present B and of entries outside that are large enough. The reserve holds all of these down to a
bound: every other entry is smaller. If the smallest magnitude of the next B reaches the bound, the
next B is exact, and only candidates were read. Otherwise the reserve is filled again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from topkast.backends._compiled import function

if TYPE_CHECKING:
    from topkast.reservoirs._outside import Largest

Vector = np.ndarray[Any, Any]
Entries: TypeAlias = tuple[Vector, Vector]  # their indices and weights

_MIN_RESERVE = 1 << 10  # entries
_FIRST_SHARE, _MAX_SHARE = 1 / 8, 1 / 2  # of |B|
_LEVELS = 4  # of a reserve, of as many entries each
_MIN_LEVELED = 1 << 15  # entries of a reserve with several levels
_SAMPLE = 1 << 12  # entries from which the bounds of levels are estimated


class Rest(NamedTuple):
    """The levels of a reserve below its present one: they are read when that is exhausted.

    Attributes
    ----------
    levels
        Indices and weights of the entries of each level, the largest first.
    bounds
        The bound of each level; the last one is that of all entries.
    later
        Indices and weights of entries that left B since the present level was taken.
    """

    levels: tuple[Entries, ...]
    bounds: tuple[float, ...]
    later: Entries

    @classmethod
    def divide(cls, entries: Entries, bounds: Sequence[float]) -> Rest:
        """Divide all entries into levels by descending bounds."""
        levels, limit = [], None
        for bound in bounds:
            levels.append(_collect(entries, bound, limit))
            limit = _below(bound, entries[1])
        nothing = entries[0][:0], entries[1][:0]
        return cls(tuple(levels), tuple(bounds), nothing)

    def take(self) -> tuple[Entries, Rest | None]:
        """The entries of the next level, and the rest, or None after the last one."""
        (level, *levels), (bound, *bounds) = self.levels, self.bounds
        entries = _join(level, _collect(self.later, bound))
        if not bounds:
            return entries, None
        later = _collect(self.later, bounds[-1], _below(bound, level[1]))
        return entries, Rest(tuple(levels), tuple(bounds), later)

    @property
    def size(self) -> int:
        """Number of entries."""
        return sum(int(indices.size) for indices, _ in (*self.levels, self.later))

    @property
    def nbytes(self) -> int:
        """Bytes of indices and values."""
        return sum(array.nbytes for entries in (*self.levels, self.later) for array in entries)


class Reserve(NamedTuple):
    """The largest entries outside B.

    Attributes
    ----------
    indices
        Flat indices (r,), in no order.
    values
        Their weights (r,).
    bound
        Every other entry outside B has a smaller magnitude; 0 if there are no others.
    rest
        The entries of smaller magnitudes that are known; None: no others are.
    """

    indices: Vector
    values: Vector
    bound: float
    rest: Rest | None = None

    @classmethod
    def fill(cls, largest: Largest) -> Reserve:
        """The reserve of what was found outside B, of which a large one has several levels."""
        indices, values, bound = largest
        if indices.size < _MIN_LEVELED or not bound:
            return cls(indices, values, bound)
        sample = np.sort(np.abs(values[:: max(indices.size // _SAMPLE, 1)]))
        places = (len(sample) * np.arange(1, _LEVELS)) // _LEVELS
        bounds = sorted({bound, *sample[places].tolist()}, reverse=True)
        rest = Rest.divide((indices, values), bounds)
        return cls(indices[:0], values[:0], math.inf, rest).deepen()

    def deepen(self) -> Reserve:
        """The reserve with its next level, whose entries are smaller."""
        assert self.rest is not None
        entries, rest = self.rest.take()
        return Reserve(*_join((self.indices, self.values), entries), self.rest.bounds[0], rest)

    def reach(self, magnitude: float) -> Reserve:
        """The reserve with all levels that hold entries of this magnitude."""
        reserve = self
        while reserve.rest is not None and reserve.bound > magnitude:
            reserve = reserve.deepen()
        return reserve

    def exchange(self, smallest: float, joined: Entries) -> Reserve:
        """Remove the entries of this magnitude or a larger one, and add others, which left B."""
        entries = self.indices, self.values
        if smallest:
            present = _collect(entries, self.bound, _below(smallest, self.values))
        else:
            present = entries[0][:0], entries[1][:0]
        rest = self.rest
        if rest is not None:
            is_near = np.abs(joined[1]) >= joined[1].dtype.type(self.bound)
            later: Entries = (joined[0][~is_near], joined[1][~is_near])
            joined = joined[0][is_near], joined[1][is_near]
            rest = rest._replace(later=_join(rest.later, later))
        return Reserve(*_join(present, joined), self.bound, rest)

    @property
    def size(self) -> int:
        """Number of entries, without those of the rest."""
        return int(self.indices.size)

    @property
    def floor(self) -> float:
        """The bound of all levels."""
        return self.bound if self.rest is None else self.rest.bounds[-1]

    @property
    def total(self) -> int:
        """Number of entries of all levels."""
        return self.size + (0 if self.rest is None else self.rest.size)

    @property
    def nbytes(self) -> int:
        """Bytes of indices and values."""
        rest = 0 if self.rest is None else self.rest.nbytes
        return self.indices.nbytes + self.values.nbytes + rest


def reserve_size(size: int, backward: int, loss: float | None) -> int:
    r"""Entries of a reserve for a tensor of `size` weights and \|B\| entries, after a refresh."""
    wanted = _FIRST_SHARE * backward if loss is None else 2 * math.sqrt(size * loss)
    return max(_MIN_RESERVE, int(min(wanted, _MAX_SHARE * backward)))


def _collect(entries: Entries, bound: float, limit: float | None = None) -> Entries:
    """The entries of magnitude `bound` or more, and of `limit` or less."""
    indices, values = entries
    kept: Entries = function("collect", values.size)(values, bound, limit, indices=indices)
    return kept


def _join(first: Entries, second: Entries) -> Entries:
    """Entries of two vectors as one."""
    if not second[0].size:
        return first
    indices, values = (np.concatenate(arrays) for arrays in zip(first, second, strict=True))
    return indices, values


def _below(bound: float, values: Vector) -> float:
    """The largest magnitude below a bound, in the precision of `values`."""
    dtype = values.dtype.type
    with np.errstate(under="ignore"):  # of a subnormal number
        return float(np.nextafter(dtype(bound), dtype(0)))
