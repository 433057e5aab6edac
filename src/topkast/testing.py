"""Hypothesis strategies and assertions for the invariants of sparse masks, yours included.

Arrays may belong to any library. A mask is a boolean array of its tensor's shape, from any source.
The strategies need ``pip install 'topkast[testing]'``.

Examples
--------
>>> import numpy as np, topkast
>>> from topkast.testing import assert_masks
>>> theta = np.asarray([[0.1, -0.9], [0.5, 0.3]])
>>> mine = topkast.Masks(forward=np.abs(theta) > 0.6, backward=np.abs(theta) > 0.4)
>>> assert_masks(theta, mine, fwd=0.75, bwd=0.5)
>>> assert_masks(theta, mine._replace(backward=np.abs(theta) < 0.2), fwd=0.75, bwd=0.5)
Traceback (most recent call last):
    ...
AssertionError: |B| is 1, expected 2 of 4 entries at sparsity 0.5
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from array_api_compat import is_cupy_array

from topkast._adapters import name_extra
from topkast._errors import MismatchError
from topkast._inspect import Masks
from topkast._primitives import Array
from topkast.selection._distribution import exact_fraction, kept_count
from topkast.selection._groups import group_size_of, pattern_densities
from topkast.selection._random import make_key, ranks
from topkast.selection._support import Support
from topkast.selection._units import BlockScore, blocks_of, unit_scores

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

HostArray = np.ndarray[Any, Any]
Block: TypeAlias = tuple[int, int] | None
Pattern: TypeAlias = tuple[int, int] | None

__all__ = [
    "assert_counts",
    "assert_forward_view",
    "assert_magnitude_order",
    "assert_masks",
    "assert_nested",
    "assert_reservoir_unchanged",
    "assert_same_support",
    "assert_survivors_unchanged",
    "assert_tie_order",
    "sparsities",
    "to_numpy",
    "weights",
]


def _need_hypothesis() -> None:
    try:
        import hypothesis  # noqa: F401
    except ModuleNotFoundError as error:
        what = "the strategies of topkast.testing need"
        raise name_extra(error, what, "testing", "hypothesis") from None


def sparsities() -> SearchStrategy[tuple[float, float]]:
    """Draw pairs (fwd, bwd) with ``0 <= bwd <= fwd < 1``, including the limits."""
    _need_hypothesis()
    from hypothesis import strategies as st

    typical = st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.999])
    sparsity = typical | st.floats(0, 1, exclude_max=True, width=32)
    return st.tuples(sparsity, sparsity).map(lambda pair: (max(pair), min(pair)))


def weights(
    *, min_size: int = 0, max_size: int = 60, dtype: Any = np.float32
) -> SearchStrategy[HostArray]:
    """Draw tensors of 1 or 2 dimensions, with ties, signed zeros, subnormals and huge ratios.

    Parameters
    ----------
    min_size, max_size
        Limits of the number of entries.
    dtype
        ``float32`` or ``float64``.
    """
    _need_hypothesis()
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as stnp

    info = np.finfo(dtype)
    tied = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, float(info.smallest_subnormal), float(info.tiny) / 2]
    wide = st.floats(-1e6, 1e6, width=info.bits)  # type: ignore[arg-type]
    entries = st.sampled_from([*tied, float(info.max), -1e-30]) | wide
    vectors = st.tuples(st.integers(0, max_size))
    matrices = st.tuples(st.integers(0, 8), st.integers(0, max_size // 8))
    shapes = st.one_of(vectors, matrices).filter(
        lambda shape: min_size <= int(np.prod(shape)) <= max_size
    )
    return shapes.flatmap(lambda shape: stnp.arrays(dtype, shape, elements=entries))


def assert_masks(
    theta: Array,
    masks: Masks,
    *,
    fwd: float,
    bwd: float,
    block: Block = None,
    block_score: BlockScore = "sum",
    pattern: Pattern = None,
    seed: int = 0,
    name: str = "",
) -> None:
    """Assert all laws of A and B chosen by magnitude: counts, nesting, order and ties.

    Parameters
    ----------
    theta
        The weights from which the masks were chosen.
    masks
        Boolean arrays of the shape of `theta`.
    fwd, bwd
        Forward and backward sparsity.
    block, block_score, pattern, seed, name
        As for :func:`assert_tie_order`.

    Raises
    ------
    AssertionError
        If a law is broken; the message names it.
    OptionError
        If `block` does not divide the matrix.
    MismatchError
        If a mask has numbers instead of booleans, or another shape than `theta`.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> from topkast.testing import assert_masks
    >>> theta = np.asarray([[0.1, -0.9, 0.2, 0.1], [0.5, 0.3, 0.0, 0.6]])
    >>> tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.75, bwd=0.5, block=(2, 1))
    >>> masks = topkast.masks(tx.init({"w": theta}), {"w": theta})["w"]
    >>> assert_masks(theta, masks, fwd=0.75, bwd=0.5, block=(2, 1), name="w")
    """
    units: dict[str, Any] = {"block": block, "block_score": block_score, "pattern": pattern}
    assert_counts(masks, fwd=fwd, bwd=bwd, block=block, pattern=pattern)
    assert_nested(masks)
    for mask in masks:
        assert_magnitude_order(theta, mask, **units)
        assert_tie_order(theta, mask, **units, seed=seed, name=name)


def assert_counts(
    masks: Masks, *, fwd: float, bwd: float, block: Block = None, pattern: Pattern = None
) -> None:
    """Assert that ``|A| = max(1, n - floor(fwd * n))``, and likewise ``|B|``, exactly.

    With `block`, n is the number of blocks of the tensor as a matrix (first axis × all others), and
    A and B must consist of whole blocks. With `pattern`, ``(n, m)``, each group of m consecutive
    weights in a row must hold n of A and ``(1 - bwd) * m`` of B.

    >>> import numpy as np, topkast.testing
    >>> mask = np.asarray([True, False, False, False])
    >>> topkast.testing.assert_counts(topkast.Masks(mask, mask), fwd=0.75, bwd=0.75)
    """
    densities = 1 - exact_fraction(fwd), 1 - exact_fraction(bwd)
    if pattern is not None:
        densities = pattern_densities(pattern, fwd, bwd)
    for name, mask, sparsity, density in zip("AB", masks, (fwd, bwd), densities, strict=True):
        flags = _unit_flags(mask, block, name)
        group_size = group_size_of(name, to_numpy(mask).shape, pattern)
        if group_size is not None:
            counts, each = flags.reshape(-1, group_size).sum(axis=1), int(density * group_size)
            wrong = np.flatnonzero(counts != each)
            assert not len(wrong), (
                f"group {wrong[0]} has {counts[wrong[0]]} weights of {name}, expected {each} of "
                f"{group_size}; {len(wrong)} groups differ"
            )
        count, size = int(flags.sum()), flags.size
        expected = kept_count(size, density)
        units = "entries" if block is None else "blocks"
        assert count == expected, (
            f"|{name}| is {count}, expected {expected} of {size} {units} at sparsity {sparsity}"
        )


def assert_nested(masks: Masks) -> None:
    """Assert that A is a subset of B."""
    forward = _flags(masks.forward, "A")
    outside = forward & ~_flags(masks.backward, "B", forward.shape)
    assert not outside.any(), f"A has {int(outside.sum())} entries outside B"


def assert_magnitude_order(
    theta: Array,
    mask: Array,
    *,
    block: Block = None,
    block_score: BlockScore = "sum",
    pattern: Pattern = None,
) -> None:
    """Assert that no dropped magnitude, or score of a block, exceeds a kept one.

    With `pattern`, only weights of one group are compared.

    >>> import numpy as np, topkast.testing
    >>> topkast.testing.assert_magnitude_order(np.asarray([1.0, -3.0]), np.asarray([False, True]))
    """
    _flags(mask, "the mask", tuple(theta.shape))
    all_scores, flags = _unit_scores(theta, block, block_score), _unit_flags(mask, block)
    for group in _groups(flags, mask, pattern):
        scores, kept = all_scores[group], flags[group]
        if kept.any() and not kept.all():
            smallest_kept, largest_dropped = scores[kept].min(), scores[~kept].max()
            assert smallest_kept >= largest_dropped, (
                f"kept a magnitude of {smallest_kept} and dropped one of {largest_dropped}"
            )


def assert_tie_order(
    theta: Array,
    mask: Array,
    *,
    block: Block = None,
    block_score: BlockScore = "sum",
    pattern: Pattern = None,
    seed: int = 0,
    name: str = "",
) -> None:
    """Assert that ties are broken by the hash of (seed, name, flat index), the largest kept first.

    `block`, `block_score`, `pattern` and `seed` are the options of :func:`topkast.wrap_optimizer`,
    and `name` is the tensor's; or all are the arguments of :func:`topkast.select`. With `block`,
    scores and block numbers replace magnitudes and indices. With `pattern`, ties are those within a
    group.

    >>> import numpy as np, topkast.testing
    >>> support = topkast.select(np.ones(4), fwd=0.75, bwd=0.5, seed=3)
    >>> mask = np.isin(np.arange(4), support.active)
    >>> topkast.testing.assert_tie_order(np.ones(4), mask, seed=3)
    """
    _flags(mask, "the mask", tuple(theta.shape))
    scores, kept = _unit_scores(theta, block, block_score), _unit_flags(mask, block)
    for group in _groups(kept, mask, pattern):
        if not kept[group].any():
            continue
        ties = group[scores[group] == scores[group][kept[group]].min()]
        by_rank = kept[ties[np.argsort(-ranks(ties, make_key(seed, name, "ties")))]]
        assert not np.any(by_rank[1:] & ~by_rank[:-1]), (
            "kept a tie and dropped one with a larger hash: pass the `seed` and `name` with which "
            "the mask was chosen"
        )


def assert_forward_view(theta: Array, alpha: Array, forward: Array) -> None:
    """Assert that α is θ on A, with the same bits, and +0 elsewhere.

    >>> import numpy as np, topkast.testing
    >>> theta, alpha = np.asarray([2.0, 1.0]), np.asarray([2.0, 0.0])
    >>> topkast.testing.assert_forward_view(theta, alpha, np.asarray([True, False]))
    """
    dense, view = to_numpy(theta), to_numpy(alpha)
    mask = _flags(forward, "A", dense.shape)
    _check_shape("the view", view, dense.shape)
    assert view.dtype == dense.dtype, f"the view is {view.dtype}, the weights are {dense.dtype}"
    assert _bits(view[mask]) == _bits(dense[mask]), "the view differs from the weights on A"
    zeros = np.zeros_like(dense[~mask])
    assert _bits(view[~mask]) == _bits(zeros), "the view is not +0 outside A"


def assert_reservoir_unchanged(before: Array, after: Array, backward: Array) -> None:
    """Assert that θ has the same bits before and after, outside B.

    >>> import numpy as np, topkast.testing
    >>> before, after = np.asarray([2.0, 1.0]), np.asarray([2.5, 1.0])
    >>> topkast.testing.assert_reservoir_unchanged(before, after, np.asarray([True, False]))
    """
    first, second = to_numpy(before), to_numpy(after)
    outside = ~_flags(backward, "B", first.shape)
    _check_shape("the weights after", second, first.shape)
    assert first.dtype == second.dtype, f"the weights were {first.dtype}, and are {second.dtype}"
    moved = int((_bytes_of(first[outside]) != _bytes_of(second[outside])).any(axis=1).sum())
    assert not moved, f"{moved} of {outside.sum()} weights outside B have moved"


def assert_survivors_unchanged(
    before: Array, after: Array, old: Support, new: Support, *, fresh: Array | float = 0.0
) -> None:
    """Assert that entries that stay in B keep their bits, and that entries that enter are `fresh`.

    `fresh` is a number, or an array like `after`.

    >>> import numpy as np, topkast.testing
    >>> old, new = (topkast.Support(np.asarray(ids), 1) for ids in ([0, 4], [4, 7]))
    >>> before, after = np.asarray([1.0, 2.0]), np.asarray([2.0, 0.0])
    >>> topkast.testing.assert_survivors_unchanged(before, after, old, new)
    """
    first, second = to_numpy(before).ravel(), to_numpy(after).ravel()
    old_entries, new_entries = to_numpy(old.entries), to_numpy(new.entries)
    _check_shape("the values before, on the old B", first, old_entries.shape)
    _check_shape("the values after, on the new B", second, new_entries.shape)
    assert first.dtype == second.dtype, f"the values were {first.dtype}, and are {second.dtype}"
    _, in_old, in_new = np.intersect1d(old_entries, new_entries, return_indices=True)
    assert _bits(second[in_new]) == _bits(first[in_old]), "an entry changed while it was in B"
    entered = np.ones(second.size, dtype=bool)
    entered[in_new] = False
    initial = fresh if isinstance(fresh, (int, float)) else to_numpy(fresh).ravel()
    expected = np.broadcast_to(initial, second.shape).astype(second.dtype)[entered]
    assert _bits(second[entered]) == _bits(expected), f"an entry did not enter B as {fresh}"


def assert_same_support(first: Support, second: Support) -> None:
    """Assert equal sets A and B in the same units; the libraries may differ.

    >>> import numpy as np, topkast.testing
    >>> first = topkast.Support(np.asarray([0, 4]), 1)
    >>> topkast.testing.assert_same_support(first, topkast.Support(np.asarray([0, 4]), 1))
    """
    assert first.blocks == second.blocks, f"the units are {first.blocks} and {second.blocks}"
    sizes = first.group_size, second.group_size
    assert sizes[0] == sizes[1], f"the sizes of groups are {sizes[0]} and {sizes[1]}"
    pairs = {"A": (first.active, second.active), "B∖A": (first.exploring, second.exploring)}
    for name, (left, right) in pairs.items():
        assert np.array_equal(to_numpy(left), to_numpy(right)), f"{name} differs"


def _unit_scores(theta: Array, block: Block, block_score: BlockScore) -> HostArray:
    """Magnitudes of weights or scores of blocks (n,), by which units rank."""
    host = to_numpy(theta)
    blocks = blocks_of("theta", host.shape, block)
    flat = host.ravel()
    return np.abs(flat) if blocks is None else np.asarray(unit_scores(flat, blocks, block_score))


def _unit_flags(mask: Array, block: Block, name: str = "the mask") -> HostArray:
    """Flags (n,) of the units of a tensor that are in a mask."""
    host = _flags(mask, name)
    blocks = blocks_of("mask", host.shape, block)
    if blocks is None:
        return host.ravel()
    units = np.arange(blocks.count)
    kept = host.ravel()[blocks.entries(units)].reshape(blocks.count, blocks.size)
    partial = int((kept.any(axis=1) & ~kept.all(axis=1)).sum())
    assert not partial, f"{name} has parts of {partial} blocks of {blocks.rows} × {blocks.columns}"
    return np.asarray(kept.all(axis=1))


def _groups(flags: HostArray, mask: Array, pattern: Pattern) -> list[HostArray]:
    """Numbers of the units (n,) that are ranked together: those of each group, or all."""
    group_size = group_size_of("the mask", to_numpy(mask).shape, pattern)
    numbers = np.arange(flags.size)
    return [numbers] if group_size is None else list(numbers.reshape(-1, group_size))


def to_numpy(array: Array) -> HostArray:
    """Convert an array of any library to NumPy."""
    if is_cupy_array(array):
        return np.asarray(array.get())
    if hasattr(array, "detach"):  # PyTorch
        array = array.detach().cpu().resolve_conj()
        if str(array.dtype) == "torch.bfloat16":  # NumPy lacks it; float32 holds it exactly
            array = array.float()
    try:
        return np.asarray(array)
    except TypeError:  # the library supports only the standard's exchange protocol
        return np.from_dlpack(array)


def _flags(mask: Array, name: str, shape: tuple[int, ...] | None = None) -> HostArray:
    """A mask in NumPy; raises :class:`topkast.MismatchError` unless it has booleans, and a shape.

    Numbers would be taken for indices.
    """
    host = to_numpy(mask)
    if host.dtype != np.bool_:
        raise MismatchError(f"{name} is an array of {host.dtype}, expected booleans: mask != 0")
    if shape is not None:
        _check_shape(name, host, shape)
    return host


def _check_shape(name: str, array: HostArray, shape: tuple[int, ...]) -> None:
    """Raise :class:`topkast.MismatchError` for another shape: NumPy might broadcast it."""
    if array.shape != tuple(shape):
        raise MismatchError(f"{name}: got shape {array.shape}, expected {tuple(shape)}")


def _bytes_of(array: HostArray) -> HostArray:
    """The bytes of the entries (n, bytes)."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).reshape(len(flat), flat.dtype.itemsize)


def _bits(array: HostArray) -> bytes:
    return np.ascontiguousarray(array).tobytes()
