"""Reservoirs: where the weights outside B are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from topkast._errors import MismatchError
from topkast.backends._compiled import function
from topkast.reservoirs._file import FileBase
from topkast.reservoirs._initial import Generated

Vector = np.ndarray[Any, Any]
Run = tuple[Vector, Vector]  # ascending flat indices, and the weights there

_GROWTH = 4  # a run is at least this many times as long as the next


class Reservoir(ABC):
    """The weights of one tensor, or of tensors ranked as one, outside B.

    What it holds for entries of B is out of date: B's own values are kept beside it.

    Attributes
    ----------
    kind
        The option of :func:`topkast.wrap_optimizer`.
    size
        Number of weights.
    """

    kind: str
    size: int

    @abstractmethod
    def read(self, start: int, stop: int) -> Vector:
        """The weights of a range of flat indices, as a new array in host memory."""

    def view(self, start: int, stop: int) -> Vector:
        """The weights of a range of flat indices, to be read at once, and never written to.

        They may be the reservoir's own memory, or a new array, as by default.
        """
        return self.read(start, stop)

    @abstractmethod
    def take(self, indices: Vector) -> Vector:
        """The weights at flat indices (k,), in host memory."""

    @abstractmethod
    def write(self, indices: Vector, weights: Vector, inside: Iterable[Vector] = ()) -> None:
        """Keep the weights (k,) of entries that left B, at distinct flat indices in any order.

        `inside` are the indices that are in B now, in ascending vectors, which are computed only if
        they are read: what is held for these may be dropped.
        """

    @abstractmethod
    def copy(self) -> Reservoir:
        """A reservoir with the same weights, which changes independently."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes in memory."""

    @property
    def disk_bytes(self) -> int:
        """Bytes on a disk."""
        return 0

    def discard(self, replacement: Reservoir | None = None) -> None:  # noqa: B027
        """Remove what this object created outside of memory, unless its `replacement` uses it."""


class ArrayReservoir(Reservoir):
    """All weights as one NumPy array, which the reservoir writes to.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.reservoirs import ArrayReservoir
    >>> reservoir = ArrayReservoir(np.asarray([0.5, -0.25, 1.0]))
    >>> reservoir.write(np.asarray([1]), np.asarray([0.75]))
    >>> reservoir.read(0, 2)
    array([0.5 , 0.75])
    """

    kind = "host"

    def __init__(self, array: Vector) -> None:
        self.array, self.size = array, array.size

    def read(self, start: int, stop: int) -> Vector:
        return self.array[start:stop].copy()

    def view(self, start: int, stop: int) -> Vector:
        return np.ascontiguousarray(self.array[start:stop])

    def take(self, indices: Vector) -> Vector:
        return self.array.take(indices)

    def write(self, indices: Vector, weights: Vector, inside: Iterable[Vector] = ()) -> None:
        suits = self.array.dtype == weights.dtype and weights.dtype in (np.float32, np.float64)
        contiguous = all(one.flags.c_contiguous for one in (self.array, indices, weights))
        if suits and contiguous and indices.dtype == np.int32:
            function("put", indices.size)(self.array, indices, weights, ascending=False)
        else:
            self.array[indices] = weights

    def copy(self) -> ArrayReservoir:
        return type(self)(self.array.copy())

    @property
    def nbytes(self) -> int:
        return self.array.nbytes


class Zeros:
    """The weights outside B of a method that forgets what leaves B.

    Examples
    --------
    >>> from topkast.reservoirs import Zeros
    >>> Zeros(10**12, "float32").read(5, 7)
    array([0., 0.], dtype=float32)
    """

    nbytes: ClassVar[int] = 0

    def __init__(self, size: int, dtype: str) -> None:
        self.size, self.dtype = size, dtype

    def read(self, start: int, stop: int) -> Vector:
        return np.zeros(stop - start, dtype=self.dtype)

    def take(self, indices: Vector) -> Vector:
        return np.zeros(len(indices), dtype=self.dtype)

    def describe(self) -> dict[str, Any]:
        return {"size": self.size, "dtype": self.dtype}


class Joined:
    """The weights of several tensors that are ranked as one, one after the other."""

    def __init__(self, bases: Sequence[Any]) -> None:
        self.bases = tuple(bases)
        self._ends = np.cumsum([base.size for base in bases])
        self.size, self.dtype = int(self._ends[-1]), bases[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(base.nbytes for base in self.bases)

    def read(self, start: int, stop: int) -> Vector:
        parts, first = [], 0
        for base in self.bases:
            inside = max(start - first, 0), min(stop - first, base.size)
            if inside[0] < inside[1]:
                parts.append(base.read(*inside))
            first += base.size
        return np.concatenate(parts) if parts else np.zeros(0, self.dtype)

    def take(self, indices: Vector) -> Vector:
        out = np.empty(len(indices), self.dtype)
        numbers = np.searchsorted(self._ends, indices, "right")
        for number, base in enumerate(self.bases):
            chosen = numbers == number
            out[chosen] = base.take(indices[chosen] - (self._ends[number] - base.size))
        return out


class LayeredReservoir(Reservoir):
    """Weights at the start, which are not kept in memory, and those of entries that left B since.

    Parameters
    ----------
    kind
        ``"seeded"``, ``"disk"`` or ``"none"``.
    bases
        The weights at the start, tensor by tensor.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.reservoirs import Generated, Init, LayeredReservoir
    >>> weights = Generated("layer.weight", 0, Init("uniform", 0.1), size=10**12)
    >>> reservoir = LayeredReservoir("seeded", [weights])
    >>> reservoir.write(np.asarray([11]), np.asarray([0.5], dtype=np.float32))
    >>> reservoir.read(10, 12), reservoir.nbytes
    (array([-0.04337406,  0.5       ], dtype=float32), 12)
    """

    def __init__(self, kind: str, bases: Sequence[Any], changes: Run | None = None) -> None:
        self.kind, self.bases = kind, tuple(bases)
        self._base: Any = self.bases[0] if len(self.bases) == 1 else Joined(self.bases)
        self.size = self._base.size
        self.dtype = np.dtype(self._base.dtype)
        # Oldest first, each much longer than the next. Of equal indices the last counts.
        self._runs: tuple[Run, ...] = (changes,) if changes is not None and len(changes[0]) else ()

    def read(self, start: int, stop: int) -> Vector:
        weights: Vector = self._base.read(start, stop)
        for indices, changed in self._runs:
            first, last = np.searchsorted(indices, np.asarray([start, stop], indices.dtype))
            weights[indices[first:last] - start] = changed[first:last]
        return weights

    def take(self, indices: Vector) -> Vector:
        weights: Vector = self._base.take(indices)
        for known, changed in self._runs:
            positions = np.searchsorted(known, indices.astype(known.dtype, copy=False))
            positions = np.minimum(positions, len(known) - 1)
            found = known[positions] == indices
            weights[found] = changed[positions[found]]
        return weights

    def write(self, indices: Vector, weights: Vector, inside: Iterable[Vector] = ()) -> None:
        if self.kind == "none" or not len(indices):
            return
        order = np.argsort(indices, kind="stable")
        runs = [*self._runs, (indices[order], weights[order])]
        while len(runs) > 1 and len(runs[-2][0]) < _GROWTH * len(runs[-1][0]):
            runs[-2:] = [_merge(runs[-2], runs[-1])]
            if len(runs) == 1:
                runs = [_drop(runs[0], inside)]
        self._runs = tuple(runs)

    def changes(self) -> Run:
        """Ascending flat indices of the entries that left B, and their weights."""
        none = np.zeros(0, np.int64), np.zeros(0, self.dtype)
        runs = self._runs or (none,)
        merged = runs[0]
        for run in runs[1:]:
            merged = _merge(merged, run)
        return merged

    def describe(self) -> dict[str, Any]:
        """What a checkpoint holds besides the changes: numbers and strings."""
        return {"kind": self.kind, "bases": [base.describe() for base in self.bases]}

    @classmethod
    def from_description(
        cls, saved: Mapping[str, Any], changes: Run, folder: Any = None
    ) -> LayeredReservoir:
        """The inverse of :meth:`describe` and :meth:`changes`; `folder` is looked into for files.

        Raises
        ------
        MismatchError
            If the kind is not known.
        ReservoirError
            If a file is missing or damaged, or belongs elsewhere.
        """
        kind = saved["kind"]
        makers: dict[str, Any] = {
            "seeded": Generated.from_description,
            "disk": lambda described: FileBase.from_description(described, folder),
            "none": lambda described: Zeros(**described),
        }
        if kind not in makers:
            raise MismatchError(f"a reservoir of kind {kind!r} is not known: {', '.join(makers)}")
        return cls(kind, [makers[kind](base) for base in saved["bases"]], changes)

    def copy(self) -> LayeredReservoir:
        copied = type(self)(self.kind, self.bases)
        copied._runs = self._runs  # which no method writes to
        return copied

    @property
    def nbytes(self) -> int:
        changes = sum(array.nbytes for run in self._runs for array in run)
        return int(self._base.nbytes) + changes

    @property
    def disk_bytes(self) -> int:
        return sum(getattr(base, "disk_bytes", 0) for base in self.bases)

    def discard(self, replacement: Reservoir | None = None) -> None:
        for base in self.bases:
            if isinstance(base, FileBase):
                base.discard(getattr(replacement, "bases", ()))


def _drop(run: Run, inside: Iterable[Vector]) -> Run:
    """Drop the entries of a run that are in B."""
    indices, weights = run
    is_outside = np.ones(len(indices), dtype=np.bool_)
    for known in inside:
        if len(known):
            places = np.minimum(np.searchsorted(known, indices), len(known) - 1)
            is_outside &= known[places] != indices
    return indices[is_outside], weights[is_outside]


def _merge(older: Run, newer: Run) -> Run:
    """Merge two runs; of equal indices, the newer one counts."""
    indices, weights = (np.concatenate(pair) for pair in zip(older, newer, strict=True))
    order = np.argsort(indices, kind="stable")
    indices, weights = indices[order], weights[order]
    is_last = np.append(indices[1:] != indices[:-1], True)
    return indices[is_last], weights[is_last]
