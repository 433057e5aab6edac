"""Units of a set replaced by others: some are dropped, and as many are grown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from topkast._method import View
from topkast._primitives import Array, asarray_like, device, is_traced, take, where
from topkast.backends import backend_of
from topkast.selection._random import BITS, Ranks, make_key
from topkast.selection._select import check_finite, check_size, draw_words
from topkast.selection._support import Support, index_dtype_for
from topkast.selection._units import modulus


def magnitudes(vector: Array) -> Array:
    """Magnitudes of real or complex numbers, of float16 as float32."""
    xp = array_namespace(vector)
    if xp.isdtype(vector.dtype, "complex floating"):
        return modulus(vector)
    # float16 has too few magnitudes between zero and the smallest normal one.
    is_narrow = float(xp.finfo(vector.dtype).smallest_normal) > 1e-30
    return xp.abs(xp.astype(vector, xp.float32) if is_narrow else vector)


def choose_on_host(choose: Callable[[View], Support], view: View) -> Support:
    """Choose the sets with NumPy if it can read the arrays in place."""
    xp = array_namespace(view.weights)
    check_size(view.weights)
    backend, dtype = backend_of(view.weights), index_dtype_for(xp, view.weights.shape[0])
    weights = backend.host(view.weights)
    if weights is None:
        return choose(view).narrowed(view.weights.shape[0])
    arrays = {"weights": weights, "values": view.values, "gradient": view.gradient}
    for name in ("values", "gradient"):
        if hasattr(arrays[name], "dtype"):
            arrays[name] = backend_of(arrays[name]).host(arrays[name])
    support = view.support
    if support is not None:
        indices = backend_of(support.indices).host(support.indices)
        support = Support(indices, support.forward, support.blocks)
    chosen = choose(replace(view, support=support, **arrays))
    return Support(asarray_like(chosen.indices, view.weights, dtype), chosen.forward)


def keep_largest(view: View, scores: Array, count: Array | int) -> Array:
    """Flags (k,) of the `count` units of A with the largest scores (k,), which are not negative.

    Equal scores rank by the hash of the units, as in :func:`topkast.select`. `count` may be traced.
    """
    assert view.support is not None
    xp, size = array_namespace(scores), scores.shape[0]
    if not is_traced(count):
        count = int(count)
        if count in (0, size):
            return xp.full((size,), bool(count), dtype=xp.bool, device=device(scores))
    ties = Ranks(make_key(view.seed, view.name, "ties"), view.first)
    return backend_of(scores).largest_flags(scores, count, ties.at(view.support.active))


def grow_at_random(
    view: View,
    kept: Array,
    *,
    regrow: bool = False,
    counts: Mapping[tuple[int, int], int] | None = None,
) -> Support:
    """Replace the units of A that are not `kept` (k,) by units drawn uniformly from the others.

    `regrow` tells whether units that are dropped now may be drawn too. `counts` are the numbers of
    units to draw from ranges of indices; None: from all.
    """
    words = draw_words(view.weights, view) + 1  # 0 is below all words
    mark = (1 << BITS) + 1
    marked = _mark(view, words, kept, mark, regrow)
    if counts is not None:
        marked = _draw_counts(view, marked, mark, counts)
    return _take_largest(view, marked)


def _draw_counts(
    view: View, words: Array, mark: int, counts: Mapping[tuple[int, int], int]
) -> Array:
    """Give `mark` to the units with the largest words in each range, and 0 to the others."""
    xp, backend = array_namespace(words), backend_of(words)
    chosen = []
    for (start, stop), count in counts.items():
        own = words[start:stop]
        total = int(xp.count_nonzero(own == mark)) + count
        ties = Ranks(make_key(view.seed, view.name, "ties"), start)
        flags = xp.zeros_like(own, dtype=xp.bool)
        if total:
            flags = backend.largest_flags(own, total, ties)
        chosen.append(where(flags, xp.full_like(own, mark), 0))
    return xp.concat(chosen)


def grow_by_gradient(
    view: View,
    kept: Array,
    *,
    regrow: bool,
    among: Array | None = None,
) -> Support:
    """Replace the units of A that are not `kept` (k,) by those with the largest gradients.

    `among` (n,) flags the units that may be grown; None: all.
    """
    gradient: Any = view.gradient
    if hasattr(gradient, "blocks"):
        return _grow_from_blocks(view, kept, gradient.blocks(), regrow=regrow, among=among)
    check_finite(gradient)
    scores = magnitudes(gradient)
    xp = array_namespace(scores)
    info = xp.finfo(scores.dtype)
    # Below those of kept units, and above those of units that may not be grown.
    scores = xp.clip(scores, info.smallest_normal, info.max / 2)
    if among is not None:
        scores = where(among, scores, 0.0)
    return _take_largest(view, _mark(view, scores, kept, info.max, regrow))


def _grow_from_blocks(
    view: View,
    kept: Array,
    blocks: Iterator[tuple[int, Array]],
    *,
    regrow: bool,
    among: Array | None,
) -> Support:
    """:func:`grow_by_gradient` from pieces of the gradient, of which none but the last is held.

    `blocks` are first indices and gradients (entries,). What is chosen is the same.
    """
    assert view.support is not None
    active = view.support.active
    xp = array_namespace(active)
    stays, dropped = active[kept], active[~kept]
    count = view.forward - stays.shape[0]
    if not count:
        return Support(stays, view.forward)
    ties = Ranks(make_key(view.seed, view.name, "ties"), view.first)
    scores: Any = None
    indices: Any = None
    for first, block in blocks:
        gradient: Any = backend_of(block).host(block) if isinstance(active, np.ndarray) else block
        stop = first + gradient.shape[0]
        check_finite(gradient)
        info = xp.finfo(gradient.dtype)
        own = xp.clip(xp.abs(gradient), info.smallest_normal, info.max / 2)
        if among is not None:
            own = where(among[first:stop], own, 0.0)
        for units, mark in ((stays, -1.0), (dropped, 0.0)):  # stays: below all that may be grown
            if mark or not regrow:
                own[units[(units >= first) & (units < stop)] - first] = mark
        full = scores is not None and scores.shape[0] == count
        found = xp.nonzero(own >= (xp.min(scores) if full else 0.0))[0]
        new = xp.astype(found, active.dtype) + first
        scores = own[found] if scores is None else xp.concat([scores, own[found]])
        indices = new if indices is None else xp.concat([indices, new])
        assert scores is not None
        assert indices is not None
        if scores.shape[0] > count:
            largest = backend_of(scores).largest_flags(scores, count, ties.at(indices))
            scores, indices = scores[largest], indices[largest]
    return Support(xp.sort(xp.concat([stays, indices])), view.forward)


def sample_outside(view: View, count: int) -> Array:
    """Flags (n,) of `count` units outside A, drawn uniformly; all of them if these are fewer."""
    assert view.support is not None
    words, active = draw_words(view.weights, view) + 1, view.support.active
    zeros = array_namespace(words).zeros_like(take(words, active))
    words = backend_of(words).put(words, active, zeros)
    ties = Ranks(make_key(view.seed, view.name, "ties"), view.first)
    count = min(count, view.weights.shape[0] - view.forward)
    return backend_of(words).largest_flags(words, max(count, 1), ties)


def _mark(view: View, scores: Array, kept: Array, mark: float, regrow: bool) -> Array:
    """Replace the scores (n,) of kept units by `mark`, and of dropped ones by 0 unless `regrow`."""
    assert view.support is not None
    active = view.support.active
    own = take(scores, active)
    if not regrow:
        own = array_namespace(own).zeros_like(own)
    return backend_of(scores).put(scores, active, where(~kept, own, mark))


def _take_largest(view: View, scores: Array) -> Support:
    """The sets A = B of the largest scores (n,)."""
    backend, count = backend_of(scores), view.forward
    ties = Ranks(make_key(view.seed, view.name, "ties"), view.first)
    flags = backend.largest_flags(scores, count, ties)
    return Support(backend.true_indices(flags, count), count)


def split_by_magnitude(view: View, count: int) -> Support:
    """The sets of all units, of which the `count` largest weights are A."""
    return choose_on_host(lambda view: _split(view, magnitudes(view.weights), count), view)


def split_all(view: View, active: Array) -> Support:
    """The sets of all units, of which those at the indices `active` are A."""
    scores = backend_of(view.weights).scatter(
        array_namespace(active).ones_like(active), active, view.weights.shape[0], 0
    )
    return _split(view, scores, active.shape[0])


def _split(view: View, scores: Array, count: int) -> Support:
    xp, backend = array_namespace(scores), backend_of(scores)
    ties = Ranks(make_key(view.seed, view.name, "ties"), view.first)
    flags = backend.largest_flags(scores, count, ties)
    units = xp.arange(scores.shape[0], dtype=backend.index_dtype(scores), device=device(scores))
    return Support(backend.flagged_first(units, flags, count), count)
