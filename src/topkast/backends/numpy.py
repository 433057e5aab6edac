"""NumPy: host memory, processed in chunks that fit into caches."""

from __future__ import annotations

from typing import Any

import numpy as np

from topkast.backends import _host
from topkast.backends._base import Backend, Ranks

Vector = np.ndarray[Any, Any]


class NumPyBackend(Backend):
    """See :class:`topkast.backends.Backend`."""

    def host(self, array: Vector) -> Vector:
        return array.astype(np.float32) if array.dtype.itemsize <= 2 else array

    def take(self, flat: Vector, indices: Vector) -> Vector:
        return flat.take(_as_intp(indices))

    def scatter(self, values: Vector, indices: Vector, size: int, fill: float) -> Vector:
        base = np.full((size,), fill, dtype=values.dtype)
        base[_as_intp(indices)] = values
        return base

    def put(self, flat: Vector, indices: Vector, values: Vector) -> Vector:
        copy = flat.copy()
        copy[_as_intp(indices)] = values
        return copy

    def true_indices(self, mask: Vector, count: int) -> Vector:
        return np.flatnonzero(mask)

    def largest_first(self, flat: Vector, forward: int, backward: int, ranks: Ranks) -> Vector:
        return _host.largest_first(flat, forward, backward, ranks)

    def largest_flags(self, flat: Vector, count: int, ranks: Ranks) -> Vector:
        return _host.largest_flags(flat, count, ranks)

    def positions(
        self, old: Vector, old_split: int, new: Vector, new_split: int, size: int | None
    ) -> tuple[Vector, Vector]:
        return _host.common_positions(old, old_split, new, new_split)


def _as_intp(indices: Vector) -> Vector:
    """Convert indices at once: NumPy converts narrower ones in small pieces, which is slower."""
    return indices.astype(np.intp, copy=False)


BACKEND = NumPyBackend()
