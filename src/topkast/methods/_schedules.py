"""How counts change over training: exact integers, the same in every library."""

from __future__ import annotations

import functools
import math
from numbers import Integral, Real
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from topkast._errors import OptionError
from topkast._method import View
from topkast._primitives import Array, asarray_like, is_traced
from topkast.selection._distribution import exact_fraction, kept_count


def drop_count(view: View, size: int, fraction: float, until: int | None) -> Array | int:
    """Number of `size` units that are dropped now: ``floor(f · size)``.

    f is `fraction`, or falls from it to 0 along half a cosine until the update `until`.
    """
    if until is None:
        return math.floor(exact_fraction(fraction) * size)
    counts, draw = _cosine_counts(size, fraction, until), view.draw
    if not is_traced(draw):
        return counts[min(int(draw), until)]
    assert not isinstance(draw, int)
    table = asarray_like(np.asarray(counts, dtype=np.int32), draw)
    last = asarray_like(np.asarray(until), draw, draw.dtype)
    return table[array_namespace(draw).minimum(draw, last)]


@functools.lru_cache(maxsize=64)
def _cosine_counts(size: int, fraction: float, until: int) -> list[int]:
    """The count at each update from 0 to `until`."""
    counts = [
        math.floor(size * fraction / 2 * (1 + math.cos(math.pi * update / until)))
        for update in range(until)
    ]
    return [*counts, 0]


def cubic_count(view: View, start: int, end: int, initial: float) -> int:
    """|A| of a sparsity that rises from `initial` at the update `start` to its last value at `end`.

    s(t) = s_end + (s_start − s_end) (1 − (t − start) / (end − start))³.
    """
    size, update = view.weights.shape[0], int(view.draw)
    if update >= end:
        return view.forward
    progress = max(update - start, 0) / (end - start)
    final = 1 - view.forward / size
    sparsity = final + (initial - final) * (1 - progress) ** 3
    return max(kept_count(size, 1 - exact_fraction(sparsity)), view.forward)


def linear_count(view: View, end: int, initial: float) -> int:
    """|A| that falls linearly to its last value at the update `end`, from sparsity `initial`."""
    update, first = int(view.draw), kept_count(view.weights.shape[0], 1 - exact_fraction(initial))
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
