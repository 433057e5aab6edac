"""How counts change over training: exact integers, the same in every library."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from topkast._errors import OptionError
from topkast._method import View
from topkast._primitives import Array, asarray_like, is_traced
from topkast.selection._distribution import exact_fraction, kept_count

_SCALE = 10**12


def drop_count(
    view: View, size: int, fraction: float, until: int | None, *, regrow: bool = True
) -> Array | int:
    """Number of `size` units that are dropped now: ``floor(f · size)``.

    f is `fraction`, or falls from it to 0 along half a cosine until the update `until`. Unless
    units that are dropped may grow at once (`regrow`), no more are dropped than are outside A.
    """
    limit = size if regrow else min(size, view.weights.shape[0] - view.forward)
    if until is None:
        return min(math.floor(exact_fraction(fraction) * size), limit)
    draw = view.draw
    if not is_traced(draw):
        return min(_cosine_count(size, exact_fraction(fraction), int(draw), until), limit)
    assert not isinstance(draw, int)
    table = asarray_like(np.minimum(_cosine_counts(size, fraction, until), limit), draw)
    last = asarray_like(np.asarray(until), draw, draw.dtype)
    return table[array_namespace(draw).minimum(draw, last)]


@functools.lru_cache(maxsize=64)
def _cosine_counts(size: int, fraction: float, until: int) -> np.ndarray[Any, Any]:
    """The count at each update from 0 to `until`; int32."""
    exact = exact_fraction(fraction)
    counts = (_cosine_count(size, exact, update, until) for update in range(until + 1))
    return np.fromiter(counts, np.int32, until + 1)


def _cosine_count(size: int, fraction: Fraction, update: int, until: int) -> int:
    """The count at an update. The cosine has 12 digits, so that a half is exactly a half."""
    if update >= until:
        return 0
    cosine = round(_SCALE * math.cos(math.pi * update / until))
    return size * fraction.numerator * (_SCALE + cosine) // (2 * _SCALE * fraction.denominator)


def updates_of(view: View, method: object) -> int:
    """The number of updates so far, of a method whose counts depend on it.

    Raises :class:`OptionError` inside ``jax.jit``, where shapes are fixed.
    """
    if is_traced(view.draw):
        raise OptionError(
            f"{type(method).__name__} changes the number of weights in A, but the shapes of JAX's "
            "arrays are fixed inside jax.jit: call the update of the transform outside of it"
        )
    return int(view.draw)


def cubic_count(view: View, update: int, start: int, end: int, initial: float) -> int:
    """|A| of a sparsity that rises from `initial` at the update `start` to its last value at `end`.

    s(t) = s_end + (s_start − s_end) (1 − (t − start) / (end − start))³.
    """
    size = view.weights.shape[0]
    if update >= end:
        return view.forward
    progress = Fraction(max(update - start, 0), end - start)
    final = 1 - Fraction(view.forward, size)
    sparsity = final + (exact_fraction(initial) - final) * (1 - progress) ** 3
    return max(kept_count(size, 1 - sparsity), view.forward)


def linear_count(view: View, update: int, end: int, initial: float) -> int:
    """|A| that falls linearly to its last value at the update `end`, from sparsity `initial`."""
    first = kept_count(view.weights.shape[0], 1 - exact_fraction(initial))
    if update >= end or first < view.forward:
        return view.forward
    return view.forward + (first - view.forward) * (end - update) // end


def check_share(name: str, share: Any) -> None:
    """Raise :class:`OptionError` unless this is a number in [0, 1]."""
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= float(share) <= 1:
        raise OptionError(f"{name} is a share and must lie in [0, 1], got {share!r}")


def check_updates(name: str, count: Any, *, least: int = 1, optional: bool = False) -> None:
    """Raise :class:`OptionError` unless this is an integer of at least `least`."""
    if count is None and optional:
        return
    if isinstance(count, bool) or not isinstance(count, Integral) or int(count) < least:
        raise OptionError(
            f"{name} is a number of updates and must be an integer of at least {least}"
            f"{' or None' if optional else ''}, got {count!r}"
        )
