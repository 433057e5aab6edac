"""Selection of the forward set A and the backward set B by magnitude."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from array_api_compat import array_namespace

from topkast._errors import NonFiniteError, OptionError, UnsupportedTensorError
from topkast._method import View
from topkast._options import (
    Explore,
    check_block,
    check_block_score,
    check_pattern_block,
    check_sparsities,
)
from topkast._primitives import Array, asarray_like, device, flatten, is_traced, take
from topkast.backends import backend_of
from topkast.selection._distribution import exact_fraction, kept_count
from topkast.selection._groups import (
    check_pattern,
    group_size_of,
    pattern_densities,
    places_in_groups,
)
from topkast.selection._random import BITS, Ranks, make_key, random_draws
from topkast.selection._support import Support, index_dtype_for
from topkast.selection._units import Blocks, BlockScore, blocks_of, modulus, unit_scores

_CHUNK = 1 << 16  # words that are drawn at a time


def select(
    params: Array,
    /,
    *,
    fwd: float,
    bwd: float,
    explore: Explore = "magnitude",
    block: tuple[int, int] | None = None,
    block_score: BlockScore = "sum",
    pattern: tuple[int, int] | None = None,
    seed: int = 0,
    name: str = "",
) -> Support:
    r"""Choose A and B as the largest magnitudes of a tensor, with exact counts.

    .. math:: A = \mathrm{TopK}(|\theta|, D), \quad B = \mathrm{TopK}(|\theta|, D + M),
       \quad D = 1 - \mathtt{fwd}, \quad D + M = 1 - \mathtt{bwd}

    :math:`|A| = \max(1, n - \lfloor \mathtt{fwd} \cdot n \rfloor)` and likewise for B. Equal
    magnitudes rank by a hash of (`seed`, `name`, flat index), which is different for each entry.
    Both sets are unique, nested and the same in every library. In a constant tensor they are
    random subsets, spread over all rows.

    Parameters
    ----------
    params
        A tensor of any shape and real or complex floating dtype; n is its size. A JAX array that
        is sharded over explicit axes of a mesh is gathered on every device.
    fwd, bwd
        Forward and backward sparsity, ``0 <= bwd <= fwd < 1``.
    explore
        ``"magnitude"``; or ``"random"``, which draws B∖A uniformly from all entries outside A.
    block
        Rows and columns of a unit: the sets consist of whole blocks of the tensor as a matrix
        (first axis × all others), and n is the number of blocks. None: single weights.
    block_score
        The score by which blocks are ranked: the ``"sum"`` or ``"max"`` of their magnitudes.
    pattern
        ``(n, m)``: A is the n largest of each group of m consecutive weights in a row of the
        tensor as a matrix (first axis × all others); ``fwd`` must be ``1 - n / m``. B holds the
        ``(1 - bwd) * m`` largest of each group, a whole number. None: no pattern.
    seed
        Seed of the hash and of the random draw.
    name
        Name of the tensor: tensors of equal size but different names break ties differently.

    Returns
    -------
    Support
        The sets, in the library and on the device of `params`.

    Raises
    ------
    OptionError
        If a sparsity is out of range, if `block` is not two positive integers or does not divide
        the matrix, if `block_score` or `explore` is unknown, or if `pattern` does not fit the
        sparsities or the rows, or is combined with `block`.
    NonFiniteError
        If an entry is NaN or infinite. Inside ``jax.jit``, where values cannot be inspected, NaN
        ranks last instead, and the counts stay exact.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> theta = np.asarray([[0.1, -0.9, 0.5, 0.0], [0.3, 0.2, -0.7, 0.25]])
    >>> support = topkast.select(theta, fwd=0.75, bwd=0.5)
    >>> support.active, support.exploring
    (array([1, 6], dtype=int32), array([2, 4], dtype=int32))

    In blocks of 2 × 1, the third of the four has the largest sum of magnitudes, then the second:

    >>> support = topkast.select(theta, fwd=0.75, bwd=0.5, block=(2, 1))
    >>> support.active, support.exploring
    (array([2], dtype=int32), array([1], dtype=int32))
    >>> support.entries
    array([2, 6, 1, 5], dtype=int32)

    One of each two neighbours in a row:

    >>> support = topkast.select(theta, fwd=0.5, bwd=0.5, pattern=(1, 2))
    >>> support.active
    array([1, 2, 4, 6], dtype=int32)

    References
    ----------
    Top-KAST, sections 2.1 and 2.2; table 1 for the random choice.
    """
    check_sparsities(fwd, bwd)
    check_block_score(block_score)
    if explore not in ("magnitude", "random"):
        raise OptionError(f"explore must be 'magnitude' or 'random', got {explore!r}")
    flat = flatten(params)
    shape, block, pattern = tuple(params.shape), check_block(block), check_pattern(pattern)
    blocks = blocks_of(name or "params", shape, block)
    group_size = group_size_of(name or "params", shape, pattern)
    if pattern is None:
        densities = 1 - exact_fraction(fwd), 1 - exact_fraction(bwd)
    else:
        check_pattern_block(pattern, block)
        densities = pattern_densities(pattern, fwd, bwd)
    with ranked_units(flat, blocks, block_score) as scores:
        forward, backward = (kept_count(scores.shape[0], density) for density in densities)
        view = View(scores, forward, backward, seed, name, group_size=group_size)
        support = choose_by_magnitude(view, backward if explore == "magnitude" else forward)
    return support.in_blocks(blocks).in_groups(group_size)


@contextmanager
def ranked_units(flat: Array, blocks: Blocks | None, score: BlockScore) -> Iterator[Array]:
    """Yield the values that rank the units of a tensor (n,): its weights, or scores of blocks.

    A :class:`NonFiniteError` raised in the context counts weights, not blocks.
    """
    if blocks is None:
        yield flat
        return
    check_size(flat)
    try:
        yield unit_scores(flat, blocks, score)
    except NonFiniteError:
        check_finite(flat)
        raise


def choose_by_magnitude(view: View, count: int) -> Support:
    """Choose the `count` largest units, which include A, and draw the rest of B at random.

    In groups, it chooses equally many of each: `count` is rounded down to a multiple of the groups.
    """
    flat = view.weights
    if array_namespace(flat).isdtype(flat.dtype, "complex floating"):
        flat = modulus(flat)
    if count == view.backward:
        return _prefer_host(_take_largest, flat, view)
    return _prefer_host(lambda flat, view: _draw_exploring(flat, view, count), flat, view)


def choose_at_random(view: View) -> Support:
    """Draw both sets uniformly."""
    return _prefer_host(_draw_both, view.weights, view)


def _prefer_host(choose: Callable[[Array, View], Support], flat: Array, view: View) -> Support:
    """Choose the sets with NumPy if it can read the weights in place."""
    xp = array_namespace(flat)
    check_size(flat)
    dtype = index_dtype_for(xp, flat.shape[0])
    if view.backward == 0:
        return Support(xp.zeros(0, dtype=dtype, device=device(flat)), 0)
    host = backend_of(flat).host(flat)
    support = choose(flat if host is None else host, view)
    if host is None:
        return support.narrowed(flat.shape[0])
    return Support(asarray_like(support.indices, flat, dtype), support.forward)


def check_size(flat: Array) -> None:
    """Raise :class:`UnsupportedTensorError` for a vector too long for the library's indices."""
    xp = array_namespace(flat)
    dtype = backend_of(flat).index_dtype(flat)
    if flat.shape[0] > min(int(xp.iinfo(dtype).max), 1 << 32):
        raise UnsupportedTensorError(
            f"a tensor of {flat.shape[0]} entries is too large for indices of {dtype} (at most "
            "2**32 entries; in JAX, enable 64 bits)"
        )


def _take_largest(values: Array, view: View) -> Support:
    """Take the largest magnitudes of floats, or the largest of integers."""
    ties = Ranks(make_key(view.seed, view.name, "ties"), view.first)
    backend, forward, backward = backend_of(values), view.forward, view.backward
    if view.group_size is None:
        return Support(backend.largest_first(values, forward, backward, ties), forward)
    places = places_in_groups(values, view.group_size, ties)
    groups = values.shape[0] // view.group_size
    indices = backend.true_indices(places < backward // groups, backward)
    return Support.split(indices, take(places, indices) < forward // groups, forward)


def _largest_flags(values: Array, view: View, count: int) -> Array:
    """Flags (n,) of the `count` largest magnitudes of floats, or of integers."""
    ties = Ranks(make_key(view.seed, view.name, "ties"), view.first)
    if view.group_size is None:
        return backend_of(values).largest_flags(values, count, ties)
    places = places_in_groups(values, view.group_size, ties)
    return places < count // (values.shape[0] // view.group_size)


def _draw_exploring(flat: Array, view: View, count: int) -> Support:
    """Take the `count` largest magnitudes, and draw the rest of B by the largest random words."""
    xp, backend = array_namespace(flat), backend_of(flat)
    in_forward = kept = _largest_flags(flat, view, view.forward)
    if count > view.forward:
        kept = _largest_flags(flat, view, count)
    words = draw_words(flat, view)
    above_draws = xp.asarray(1 << BITS, dtype=words.dtype, device=device(words))
    words = xp.where(kept, above_draws, words)
    flags = _largest_flags(words, view, view.backward)
    indices = backend.true_indices(flags, view.backward)
    return Support.split(indices, take(in_forward, indices), view.forward)


def _draw_both(flat: Array, view: View) -> Support:
    """Draw B by the largest random words, and A by the largest among them."""
    return _take_largest(draw_words(flat, view), view)


def draw_words(flat: Array, view: View) -> Array:
    """Draw a random word of 30 bits for each entry (n,); int32."""
    key = make_key(view.seed, view.name, "draws")
    if isinstance(flat, np.ndarray):  # in chunks that stay in a cache
        words = np.empty(flat.shape[0], dtype=np.int32)
        for start in range(0, words.size, _CHUNK):
            positions = np.arange(start, min(start + _CHUNK, words.size)) + view.first
            words[start : start + _CHUNK] = random_draws(positions, key, view.draw)
        return words
    xp = array_namespace(flat)
    dtype = backend_of(flat).index_dtype(flat)
    positions = xp.arange(flat.shape[0], dtype=dtype, device=device(flat))
    return random_draws(positions + view.first, key, view.draw)


def check_finite(array: Array) -> None:
    """Raise :class:`NonFiniteError` for NaN or infinity, unless `array` is traced."""
    if not is_traced(array):
        xp = array_namespace(array)
        count = int(xp.sum(xp.astype(~xp.isfinite(array), xp.int32)))
        if count:
            raise NonFiniteError(f"{count} of {math.prod(array.shape)} entries are NaN or infinite")
