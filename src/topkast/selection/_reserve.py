"""The next sets from few candidates: the entries of B, and a reserve of the largest ones outside.

Outside B weights do not change. All that can be in the next B are therefore the entries of the
present one and those outside that are large enough. The reserve holds the latter down to a bound:
every other entry is smaller. While the smallest magnitude of the next B reaches the bound, that B
is exact, and nothing but candidates was looked at. Else the reserve is filled anew.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
from typing import Any, NamedTuple

import numpy as np

from topkast._errors import NonFiniteError
from topkast.selection import _candidates
from topkast.selection._random import Ranks
from topkast.selection._support import Migration, Support

Vector = np.ndarray[Any, Any]

_FEW = 1 << 14  # candidates, for which starting a kernel costs more than it saves
_SAMPLE = 1 << 15  # entries
_SPREAD = 4.0  # standard deviations of a sampled quantile, by which a bound is set lower


class Reserve(NamedTuple):
    """The largest entries outside B.

    Attributes
    ----------
    indices
        Ascending flat indices (r,).
    values
        Their weights (r,).
    bound
        Every other entry outside B has a smaller magnitude; 0 where there are no others.
    """

    indices: Vector
    values: Vector
    bound: float


class Exchange(NamedTuple):
    """Outcome of a choice among candidates.

    Attributes
    ----------
    support, migration
        The next sets, and where their entries were in the present B.
    values
        Weights on the next B (|B|,).
    reserve
        The largest entries outside the next B.
    left
        Indices and weights of those that left B.
    """

    support: Support
    migration: Migration
    values: Vector
    reserve: Reserve
    left: tuple[Vector, Vector]


def exchange(
    support: Support, values: Vector, reserve: Reserve, size: int, ranks: Ranks
) -> Exchange | None:
    """The next sets of a tensor of some size: the largest magnitudes, in the same numbers.

    Returns None if an entry that is no candidate might belong to them.

    Parameters
    ----------
    support
        The present sets, of single weights, whose indices are a NumPy array.
    values
        Weights on B (|B|,).
    reserve
        Of the present sets.
    size
        Number of entries of the tensor.
    ranks
        Of equal magnitudes.

    Raises
    ------
    NonFiniteError
        If a weight on B is NaN or infinite.
    """
    use = _functions(values.size + reserve.values.size)
    split = support.forward
    parts = [
        (support.indices[:split], values[:split]),
        (support.indices[split:], values[split:]),
        (reserve.indices, reserve.values),
    ]
    vectors = [vector for _, vector in parts]
    bad = use.count_not_finite(vectors)
    if bad:
        raise NonFiniteError(f"{bad} of {size} entries are NaN or infinite")
    counts = support.forward, support.backward
    forward, backward = (use.find_threshold(vectors, count) for count in counts)
    if backward.magnitude < reserve.bound:
        return None
    ties = None
    if forward.surplus or backward.surplus:
        ties = _ties(parts, forward, ranks), _ties(parts, backward, ranks)
    division = use.divide(
        *parts,
        size=size,
        forward=forward.magnitude,
        backward=backward.magnitude,
        bound=reserve.bound,
        ties=ties,
    )
    inside, outside = sum(division.sizes[:2]), sum(division.sizes[:3])
    source = division.source[:inside]
    survives = source >= 0
    left = np.flatnonzero(division.source[inside:] >= 0) + inside
    return Exchange(
        Support(division.indices[:inside], support.forward),
        Migration(np.maximum(source, 0), survives),
        division.values[:inside],
        Reserve(
            division.indices[inside:outside].copy(),
            division.values[inside:outside].copy(),
            reserve.bound,
        ),
        (division.indices[left], division.values[left]),
    )


def fill_reserve(flat: Vector, support: Support, count: int) -> Reserve | None:
    """The `count` largest entries outside B, about; None where too many magnitudes are equal.

    `flat` (n,) are the weights, with zeros on B.
    """
    if count >= flat.size - support.backward:
        outside = np.ones(flat.size, dtype=np.bool_)
        outside[support.indices] = False
        indices = np.flatnonzero(outside).astype(support.indices.dtype)
        return Reserve(indices, flat[indices], 0.0)
    sample = np.abs(flat[:: max(1, flat.size // _SAMPLE)])
    share = count / flat.size
    margin = _SPREAD * math.sqrt(sample.size * share * (1 - share)) + 1
    rank = min(sample.size - 1, int(sample.size * share + margin))
    place = sample.size - 1 - rank
    bound = float(np.partition(sample, place)[place])
    if not bound:
        return None
    return Reserve(*_functions(flat.size).collect(flat, bound), bound)


def _ties(
    parts: list[tuple[Vector, Vector]], threshold: _candidates.Threshold, ranks: Ranks
) -> Vector:
    """Ascending indices of the entries at a threshold that are too many: those that rank last."""
    if not threshold.surplus:
        return np.zeros(0, dtype=np.int64)
    equal = np.concatenate(
        [
            indices[np.abs(values) == values.dtype.type(threshold.magnitude)]
            for indices, values in parts
        ]
    )
    last = np.argpartition(ranks(equal), threshold.surplus - 1)[: threshold.surplus]
    return np.sort(equal[last]).astype(np.int64)


def _functions(size: int) -> Any:
    """The module that works on so many entries."""
    if size < _FEW or not has_numba():
        return _candidates
    return importlib.import_module("topkast.kernels")


@functools.cache
def has_numba() -> bool:
    """Whether kernels can be compiled."""
    disabled = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
    return not disabled and importlib.util.find_spec("numba") is not None
