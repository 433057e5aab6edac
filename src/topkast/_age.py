r"""Age: the number of updates since an entry entered B, and how it scales Adam's displacement.

Adam's bias corrections depend on the number of steps. An entry that enters B late has fresh moments
but an old step count, and would move up to 6.6 learning rates in one step. Scaled by

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
_MAX_TABLES = 32
SETTLED = (1 << 15) - 1  # int16 age of entries whose displacement is never scaled


def settled_ages(count: int, beside: Array) -> Array:
    """Ages (count,) of entries that are in B from the start, in the library of `beside`; int16."""
    xp = array_namespace(beside)
    return xp.full((count,), SETTLED, dtype=xp.int16, device=device(beside))


def grow(ages: Array) -> Array:
    """Increment ages by one update; int16."""
    xp = array_namespace(ages)
    return xp.where(ages < SETTLED, ages + 1, ages)


def young_limit(betas: Betas) -> int:
    """The age at which κ reaches 1 to within 5e-5 and scaling stops."""
    slowest = max(betas)
    return min(SETTLED, math.ceil(10 / (1 - slowest)))


def corrections(betas: Betas) -> np.ndarray[Any, Any]:
    """κ(k) for k from 0 to :func:`young_limit`; float64. The value at 0 is never used."""
    return np.asarray(kappa(np.arange(young_limit(betas) + 1, dtype=np.float64), betas))


def _table(ages: Array, betas: Betas, dtype: Any) -> Array:
    """:func:`corrections` on the device of `ages`, cached: copying from the host synchronises."""
    xp, target = array_namespace(ages), device(ages)
    if is_jax_array(ages):  # the table becomes a constant of the compiled program
        return xp.asarray(corrections(betas), dtype=dtype, device=target)
    key = xp.__name__, str(target), betas, str(dtype)  # CuPy's devices are not hashable
    if key not in _TABLES:
        if len(_TABLES) >= _MAX_TABLES:
            _TABLES.clear()
        _TABLES[key] = xp.asarray(corrections(betas), dtype=dtype, device=target)
    return _TABLES[key]


def kappa(counts: Array, betas: Betas) -> Array:
    """κ of numbers of steps of at least 1; floats of any shape."""
    xp = array_namespace(counts)
    counts = xp.where(counts < 1, xp.ones_like(counts), counts)
    mean, square = (
        -xp.expm1(counts * math.log(beta)) if beta else xp.ones_like(counts) for beta in betas
    )
    return xp.sqrt(square) / mean


def scale_young(steps: Array, ages: Array, updates: Array, betas: Betas) -> Array:
    """Scale the displacements of young entries of B; those of settled entries keep their bits.

    `ages` (|B|,) are taken before this update, and `updates` (0-d) counts it already.
    """
    xp = array_namespace(steps)
    real = xp.float32 if xp.finfo(steps.dtype).bits <= 32 else xp.float64
    limit = young_limit(betas)
    young = ages < limit
    # A table, because two exponentials for each entry would take longer than the whole update.
    table = _table(ages, betas, real)
    counts = xp.where(
        young, xp.astype(ages, xp.int32) + 1, xp.full_like(ages, limit, dtype=xp.int32)
    )
    factors = backend_of(table).lookup(table, counts) / kappa(xp.astype(updates, real), betas)
    shape = steps.shape
    factors = xp.astype(xp.reshape(factors, shape), steps.dtype)
    return xp.where(xp.reshape(young, shape), steps * factors, steps)
