"""Gather, scatter and migrate, on every array library."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from libraries import Library

import topkast
from topkast import Support
from topkast.testing import assert_survivors_unchanged, sparsities, to_numpy, weights

Tensor = np.ndarray[Any, Any]


@given(theta=weights(min_size=1), pair=sparsities())
def test_scatter_undoes_gather(library: Library, theta: Tensor, pair: tuple[float, float]) -> None:
    def round_trip(array: Any) -> Any:
        support = topkast.select(array, fwd=pair[0], bwd=pair[1])
        values = topkast.gather(array, support)
        return support, values, topkast.scatter(values, support, shape=theta.shape, fill=-7.0)

    support, values, tensor = library.compile(round_trip)(library.asarray(theta))
    inside = np.zeros(theta.size, dtype=bool)
    inside[to_numpy(support.indices)] = True
    assert to_numpy(values).tobytes() == theta.ravel()[to_numpy(support.indices)].tobytes()
    expected = np.where(inside, theta.ravel(), np.float32(-7)).reshape(theta.shape)
    assert to_numpy(tensor).tobytes() == expected.tobytes()


@st.composite
def moves(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """A size, and two sets of indices of equal length."""
    size = draw(st.integers(1, 40))
    count = draw(st.integers(1, size))
    indices = st.lists(st.integers(0, size - 1), min_size=count, max_size=count, unique=True)
    return size, sorted(draw(indices)), sorted(draw(indices))


def make_support(library: Library, indices: list[int], forward: int) -> Support:
    """Make a support with all indices in B, `forward` random ones of them in A."""
    shuffled = np.random.default_rng(forward).permutation(indices).astype(np.int32)
    active, exploring = np.sort(shuffled[:forward]), np.sort(shuffled[forward:])
    return Support(library.asarray(np.concatenate([active, exploring])), forward)


@given(move=moves(), seed=st.integers(0, 1000))
def test_migrate_keeps_the_bits_of_survivors(
    library: Library, move: tuple[int, list[int], list[int]], seed: int
) -> None:
    _, before, after = move
    entry = np.random.default_rng(seed).standard_normal((1, len(before))).astype(np.float32)
    entry[0, 0] = -0.0
    # A is a different fraction of each, so that survivors enter and leave A.
    old, new = (
        make_support(library, indices, forward)
        for indices, forward in ((before, len(before) // 2), (after, len(after) // 3))
    )
    for fresh in (0.0, 2.5):
        run = library.compile(
            lambda entry, old, new, fresh=fresh: topkast.migrate(entry, old, new, fresh=fresh)
        )
        moved = run(library.asarray(entry), old, new)
        assert tuple(moved.shape) == entry.shape
        assert_survivors_unchanged(entry, moved, old, new, fresh=fresh)


def test_kernels_move_what_numpy_moves(library: Library) -> None:
    """Vectors that are long enough for the compiled kernels."""
    rng, size = np.random.default_rng(0), 60_000
    old, new = (
        make_support(library, np.flatnonzero(rng.permutation(size) < size // 2).tolist(), forward)
        for forward in (size // 4, size // 5)
    )
    entry = rng.standard_normal((1, size // 2)).astype(np.float32)
    moved = topkast.migrate(library.asarray(entry), old, new, fresh=2.5)
    assert_survivors_unchanged(entry, moved, old, new, fresh=2.5)


def test_entries_that_enter_can_start_from_an_array(library: Library) -> None:
    old, new = (make_support(library, indices, 0) for indices in ([0, 2, 5], [2, 3, 5]))
    entry = library.asarray(np.asarray([1, 2, 3], dtype=np.float32))
    fresh = library.asarray(np.asarray([7, 8, 9], dtype=np.float32))
    assert to_numpy(topkast.migrate(entry, old, new, fresh=fresh)).tolist() == [2, 8, 3]


def test_migrate_keeps_integers_and_flags(library: Library) -> None:
    old, new = (make_support(library, indices, 2) for indices in ([0, 300], [300, 301]))
    counts = library.asarray(np.asarray([1, 2**31 - 1], dtype=np.int32))
    assert to_numpy(topkast.migrate(counts, old, new)).tolist() == [2**31 - 1, 0]
    flags = library.asarray(np.asarray([False, True]))
    assert to_numpy(topkast.migrate(flags, old, new)).tolist() == [True, False]
