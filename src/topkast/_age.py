r"""Age: how long an entry has been in B, and what follows for its displacement under Adam.

Adam divides by bias corrections that belong to the number of steps. An entry that enters B late has
fresh moments under an old count, and would move up to 6.6 learning rates a step. Scaled by

.. math:: \frac{\kappa(\text{age})}{\kappa(t)}, \quad
   \kappa(k) = \frac{\sqrt{1 - \beta_2^k}}{1 - \beta_1^k},

it moves as Adam moves a new parameter.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from array_api_compat import array_namespace, is_jax_array

from topkast._primitives import Array, device
from topkast.backends import backend_of

Betas: TypeAlias = tuple[float, float]

_TABLES: dict[Any, Array] = {}
_MOST_TABLES = 32
SETTLED = (1 << 15) - 1  # the age, int16, of entries whose displacement is not scaled


def settled_ages(count: int, beside: Array) -> Array:
    """Ages of entries (count,) that are in B from the start, for arrays like `beside`; int16."""
    xp = array_namespace(beside)
    return xp.full((count,), SETTLED, dtype=xp.int16, device=device(beside))


def grow(ages: Array) -> Array:
    """Ages after one more update; int16."""
    xp = array_namespace(ages)
    return xp.where(ages < SETTLED, ages + 1, ages)


def young_limit(betas: Betas) -> int:
    """The age from which on κ is 1 to within 5e-5, and nothing is scaled."""
    slowest = max(betas)
    return min(SETTLED, math.ceil(10 / (1 - slowest)))


def corrections(betas: Betas) -> np.ndarray[Any, Any]:
    """κ(k) for k from 0, whose value is never used, to :func:`young_limit`; float64."""
    return np.asarray(kappa(np.arange(young_limit(betas) + 1, dtype=np.float64), betas))


def _table(ages: Array, betas: Betas, dtype: Any) -> Array:
    """:func:`corrections` where `ages` are: once for each device, as a copy from the host waits."""
    xp, place = array_namespace(ages), device(ages)
    if is_jax_array(ages):  # which puts it into the compiled program
        return xp.asarray(corrections(betas), dtype=dtype, device=place)
    key = xp.__name__, str(place), betas, str(dtype)  # CuPy's devices cannot be keys
    if key not in _TABLES:
        if len(_TABLES) >= _MOST_TABLES:
            _TABLES.clear()
        _TABLES[key] = xp.asarray(corrections(betas), dtype=dtype, device=place)
    return _TABLES[key]


def kappa(counts: Array, betas: Betas) -> Array:
    """κ of some numbers of steps, of at least 1 each; floats of any shape."""
    xp = array_namespace(counts)
    counts = xp.where(counts < 1, xp.ones_like(counts), counts)
    mean, square = (
        -xp.expm1(counts * math.log(beta)) if beta else xp.ones_like(counts) for beta in betas
    )
    return xp.sqrt(square) / mean


def scale_young(steps: Array, ages: Array, updates: Array, betas: Betas) -> Array:
    """Displacements on B, those of young entries scaled; settled ones keep their bits.

    `ages` (|B|,) are those before this update, `updates` (0-d) is their number with this one.
    """
    xp = array_namespace(steps)
    real = xp.float32 if xp.finfo(steps.dtype).bits <= 32 else xp.float64
    limit = young_limit(betas)
    young = ages < limit
    # Looked up: two exponentials for each entry would take longer than the whole update.
    table = _table(ages, betas, real)
    counts = xp.where(
        young, xp.astype(ages, xp.int32) + 1, xp.full_like(ages, limit, dtype=xp.int32)
    )
    factors = backend_of(table).lookup(table, counts) / kappa(xp.astype(updates, real), betas)
    shape = steps.shape
    factors = xp.astype(xp.reshape(factors, shape), steps.dtype)
    return xp.where(xp.reshape(young, shape), steps * factors, steps)
