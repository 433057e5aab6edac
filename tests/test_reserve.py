"""Incremental selection: the sets are those that are chosen from all weights."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import topkast
import topkast.adapter
from topkast import _progress
from topkast.adapter import IncrementalSelection, Migration, choose_first, choose_next
from topkast.backends import _candidates, _compiled
from topkast.reservoirs import ArrayReservoir, _outside
from topkast.reservoirs._outside import Largest, largest_outside
from topkast.selection import _incremental, _reserve
from topkast.selection._incremental import BlockScores
from topkast.selection._random import Ranks, make_key
from topkast.selection._ranking import Ranking, rank
from topkast.selection._reserve import Reserve, reserve_size
from topkast.selection._units import unit_scores
from topkast.testing import assert_same_support

Array = Any

SEED, NAME = 3, "layer.weight"
RANKS = Ranks(make_key(SEED, NAME, "ties"))
PAIRS = [(0.9, 0.8), (0.98, 0.9), (0.5, 0.5), (0.75, 0.0), (0.999, 0.99)]


def select(theta: Array, pair: tuple[float, float]) -> topkast.Support:
    """The sets that are chosen from all weights."""
    return topkast.select(theta, fwd=pair[0], bwd=pair[1], seed=SEED, name=NAME)


@st.composite
def updates(draw: st.DrawFn, values: Array, bound: float) -> Array:
    """Other values on B: small and large steps, equal magnitudes, zeros, and the bound itself."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(
        st.sampled_from(["none", "small", "large", "shrink", "round", "zeros", "signs", "bound"])
    )
    noise = rng.standard_normal(values.size)
    chosen = rng.random(values.size) < draw(st.sampled_from([0.01, 0.5, 1.0]))
    changed = {
        "none": values,
        "small": values * (1 + 0.02 * noise),
        "large": values + noise,
        "shrink": values * 0.5,
        "round": np.round(values, 1),
        "zeros": np.zeros_like(values),
        "signs": -values,
        "bound": np.full_like(values, bound) * np.sign(noise),
    }[kind]
    return np.where(chosen, changed, values).astype(values.dtype)


@pytest.fixture(params=["kernels", "numpy"], autouse=True)
def functions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for tensors of any size, or NumPy's functions in the place of missing ones.

    Small reserves too have several levels.
    """
    monkeypatch.setattr(_reserve, "_MIN_LEVELED", 8)
    monkeypatch.setattr(_compiled, "_MIN_ENTRIES", dict.fromkeys(_compiled._MIN_ENTRIES, 0))
    monkeypatch.setattr(_compiled, "has_numba", lambda: request.param == "kernels")


@given(data=st.data(), pair=st.sampled_from(PAIRS), dtype=st.sampled_from(["float32", "float64"]))
def test_the_sets_are_those_of_a_full_selection(
    data: st.DataObject, pair: tuple[float, float], dtype: str
) -> None:
    size = data.draw(st.sampled_from([1, 2, 30, 1_100, 5_000]))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    theta = rng.standard_normal(size).astype(dtype)
    if data.draw(st.booleans()):
        theta = np.round(theta, 1)  # many equal magnitudes
    support = select(theta, pair)
    selection = IncrementalSelection()
    for _ in range(5):
        bound = 0.5 if selection.reserve is None else selection.reserve.bound
        values = data.draw(updates(theta[support.indices], bound))
        theta[support.indices] = values
        expected = select(theta, pair)
        before = theta.copy()
        outcome = selection.choose(support, values, ArrayReservoir(theta), RANKS)
        if outcome is None:  # many zeros: the caller chooses from all weights
            assert np.count_nonzero(theta) < size
            support, selection = expected, IncrementalSelection()
            continue
        chosen, selection = outcome
        np.testing.assert_array_equal(chosen.support.indices, expected.indices)
        assert chosen.support.indices.dtype == expected.indices.dtype
        np.testing.assert_array_equal(chosen.values, theta[expected.indices])
        assert_migrates(chosen.migration, support, expected, size)
        assert_left(chosen.left, support, expected, theta)
        assert_reserve(chosen.reserve, expected, theta)
        np.testing.assert_array_equal(before, theta)
        support = chosen.support


@given(
    data=st.data(),
    pair=st.sampled_from(PAIRS),
    dtype=st.sampled_from(["float32", "float64"]),
    block=st.sampled_from([(2, 1), (4, 1), (3, 1), (1, 5), (2, 3), (3, 5)]),
    score=st.sampled_from(["sum", "max"]),
)
def test_the_sets_of_blocks_are_those_of_a_full_selection(
    data: st.DataObject, pair: tuple[float, float], dtype: str, block: Any, score: Any
) -> None:
    shape = data.draw(st.sampled_from([(12, 15), (12, 600), (96, 60)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    theta = rng.standard_normal(shape).astype(dtype)
    if data.draw(st.booleans()):
        theta = np.round(theta, 0)  # many equal scores

    def select_blocks() -> topkast.Support:
        options: Any = {"block": block, "block_score": score, "seed": SEED, "name": NAME}
        return topkast.select(theta, fwd=pair[0], bwd=pair[1], **options)

    flat, support, selection = theta.reshape(-1), select_blocks(), IncrementalSelection()
    for _ in range(4):
        values = data.draw(updates(flat[support.entries], 0.5))
        flat[support.entries] = values
        expected, before = select_blocks(), theta.copy()
        reservoir = ArrayReservoir(flat)
        outcome = choose_next(selection, support, values, reservoir, RANKS, block_score=score)
        if outcome is None:  # many zeros: the caller chooses from all weights
            support, selection = expected, IncrementalSelection()
            continue
        chosen, selection = outcome
        np.testing.assert_array_equal(chosen.support.indices, expected.indices)
        assert (chosen.support.forward, chosen.support.blocks) == (
            expected.forward,
            expected.blocks,
        )
        np.testing.assert_array_equal(chosen.values, flat[expected.entries])
        assert_migrates(chosen.migration, support, expected, theta.size)
        indices, weights = chosen.left
        left = {*support.indices.tolist()} - {*expected.indices.tolist()}
        assert support.blocks is not None
        entries = support.blocks.entries(np.asarray(sorted(left), np.int32))
        np.testing.assert_array_equal(np.sort(indices), np.sort(entries))
        np.testing.assert_array_equal(weights, flat[indices])
        np.testing.assert_array_equal(before, theta)
        support = chosen.support


@pytest.mark.parametrize("block", [None, (2, 3)])
@pytest.mark.parametrize("options", [{}, {"seed": SEED, "name": NAME}], ids=["default", "named"])
def test_the_first_sets_are_those_of_a_full_selection(block: Any, options: Any) -> None:
    theta = np.round(np.random.default_rng(0).standard_normal((40, 60)), 1)  # with ties
    expected = topkast.select(theta, fwd=0.9, bwd=0.8, block=block, **options)
    read = []
    chunks = _progress.chunks

    def record(size: int, what: str) -> Any:
        read.append((size, what))
        return chunks(size, what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_outside, "chunks", record)
        outcome = choose_first(
            ArrayReservoir(theta.reshape(-1)),
            (expected.forward, expected.backward),
            blocks=expected.blocks,
            **options,
        )
    assert outcome is not None
    chosen, selection = outcome
    assert_same_support(chosen.support, expected)
    np.testing.assert_array_equal(chosen.values, topkast.gather(theta, expected))
    assert not chosen.migration.survives.any()
    assert chosen.left[0].size == chosen.left[1].size == selection.age == 0
    size = theta.size if expected.blocks is None else expected.blocks.count
    assert read == [(size, f"{options.get('name', 'a layer')}: reading all weights")]


def test_scores_that_overflow_leave_it_to_a_full_selection() -> None:
    """Where all weights are scaled down; the scores of single blocks could not be compared."""
    theta = np.arange(96, dtype=np.float32).reshape(8, 12)
    support = topkast.select(theta, fwd=0.75, bwd=0.5, block=(2, 2))

    def choose(on_b: float, outside: float) -> Any:
        values = np.full(support.backward_size, on_b, np.float32)
        reservoir = ArrayReservoir(np.full(theta.size, outside, np.float32))
        return choose_next(IncrementalSelection(), support, values, reservoir, RANKS)

    assert choose(2.0, 1.0) is not None
    assert choose(2e38, 1.0) is None
    assert choose(2.0, 2e38) is None
    for weights, count in (((np.inf, 1.0), 48), ((2.0, np.nan), 96)):
        with pytest.raises(topkast.NonFiniteError, match=f"{count} of 96 entries are NaN or inf"):
            choose(*weights)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_thresholds_may_be_expected_beyond_all_numbers(dtype: str) -> None:
    """Predicted from the last three thresholds, the next may exceed the largest number."""
    theta = np.random.default_rng(0).uniform(0.5, 1.0, 5_000).astype(dtype)
    support, selection = select(theta, (0.9, 0.8)), IncrementalSelection()
    largest = float(np.finfo(dtype).max)
    for magnitude in (largest * 1e-4, largest * 1e-2, largest * 0.9, largest * 0.9, 1.0):
        theta[support.indices] = magnitude * np.linspace(0.9, 1.0, support.backward)
        expected = select(theta, (0.9, 0.8))
        values = theta[support.indices]
        outcome = selection.choose(support, values, ArrayReservoir(theta), RANKS)
        assert outcome is not None
        (support, selection) = outcome[0].support, outcome[1]
        np.testing.assert_array_equal(support.indices, expected.indices)


def test_the_reserve_serves_one_score() -> None:
    theta = np.random.default_rng(0).standard_normal((40, 60))
    options: Any = {"fwd": 0.9, "bwd": 0.8, "block": (2, 3), "seed": SEED, "name": NAME}
    support, selection = topkast.select(theta, **options), IncrementalSelection()
    ages = []
    for score in ("sum", "sum", "sum", "max", "max", "sum"):
        expected = topkast.select(theta, block_score=score, **options)
        values, reservoir = topkast.gather(theta, support), ArrayReservoir(theta.reshape(-1))
        outcome = choose_next(selection, support, values, reservoir, RANKS, block_score=score)
        assert outcome is not None
        support, selection = outcome[0].support, outcome[1]
        np.testing.assert_array_equal(support.indices, expected.indices)
        assert selection.block_score == score
        ages.append(selection.age)
    assert ages == [0, 1, 2, 0, 1, 0]  # refreshes since the reserve was filled


class RecordingReservoir(ArrayReservoir):
    """Keeps the numbers of weights that were read at a time."""

    def __init__(self, array: Array) -> None:
        super().__init__(array)
        self.sizes: list[int] = []

    def read(self, start: int, stop: int) -> Array:
        self.sizes.append(stop - start)
        return super().read(start, stop)


@given(data=st.data(), block=st.sampled_from([(2, 1), (3, 1), (1, 4), (3, 4), (1, 1)]))
def test_scores_are_read_in_any_pieces(data: st.DataObject, block: tuple[int, int]) -> None:
    theta = np.random.default_rng(0).standard_normal((12, 20)).astype(np.float32)
    blocks = topkast.Blocks(*block, *theta.shape)
    score: Any = data.draw(st.sampled_from(["sum", "max"]))
    chunk = data.draw(st.sampled_from([1, 50, 1 << 20]))
    expected = unit_scores(theta.reshape(-1), blocks, score)
    ends = st.integers(0, blocks.count)
    start, stop = sorted((data.draw(ends), data.draw(ends)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_incremental, "CHUNK", chunk)
        reservoir = RecordingReservoir(theta.reshape(-1))
        scores = BlockScores(reservoir, blocks, score)
        np.testing.assert_array_equal(scores.read(start, stop), expected[start:stop])
        assert max(reservoir.sizes) <= max(chunk, block[0] * theta.shape[1])
    units = np.asarray(data.draw(st.lists(st.integers(0, blocks.count - 1))), np.int32)
    np.testing.assert_array_equal(scores.take(units), expected[units])
    copied = scores.copy()
    np.testing.assert_array_equal(copied.read(0, blocks.count), expected)
    assert copied.nbytes == theta.nbytes
    with pytest.raises(TypeError, match="write these"):
        scores.write(units, units)


def test_every_range_of_scores_is_read() -> None:
    """Also the middle of a row, which is as far from its start as from its end."""
    theta = np.random.default_rng(0).standard_normal((12, 20))
    blocks = topkast.Blocks(3, 4, *theta.shape)
    expected = unit_scores(theta.reshape(-1), blocks, "sum")
    scores = BlockScores(ArrayReservoir(theta.reshape(-1)), blocks, "sum")
    for start, stop in itertools.combinations_with_replacement(range(blocks.count + 1), 2):
        np.testing.assert_array_equal(scores.read(start, stop), expected[start:stop])


def assert_migrates(
    migration: Migration, old: topkast.Support, new: topkast.Support, size: int
) -> None:
    expected = Migration.between(old, new, size)
    np.testing.assert_array_equal(migration.survives, expected.survives)
    survivors = np.asarray(expected.survives)
    np.testing.assert_array_equal(migration.source[survivors], expected.source[survivors])
    assert migration.source.min(initial=0) >= 0


def assert_left(
    left: tuple[Array, Array], old: topkast.Support, new: topkast.Support, theta: Array
) -> None:
    indices, weights = left
    assert {*indices.tolist()} == {*old.indices.tolist()} - {*new.indices.tolist()}
    np.testing.assert_array_equal(weights, theta[indices])


def assert_reserve(reserve: Reserve, support: topkast.Support, theta: Array) -> None:
    """It holds what is outside B and reaches the bound, and nothing else."""
    outside = np.ones(theta.size, dtype=bool)
    outside[support.indices] = False
    reaches, is_candidate = (
        outside & (np.abs(theta) >= theta.dtype.type(bound))
        for bound in (reserve.bound, reserve.floor)
    )
    expected = np.flatnonzero(reaches)
    assert len(reserve.indices) == len(reserve.values)
    order = np.argsort(reserve.indices)
    np.testing.assert_array_equal(reserve.indices[order], expected)
    np.testing.assert_array_equal(reserve.values[order], theta[expected])
    assert reserve.total == np.count_nonzero(is_candidate)
    if reserve.rest is not None:
        assert_reserve(reserve.deepen(), support, theta)


def reserve_of(theta: Any, support: topkast.Support, count: int) -> Reserve:
    largest = largest_outside(ArrayReservoir(theta), support, count)
    assert largest is not None
    return Reserve(*largest)


def test_a_reserve_that_does_not_reach_far_enough_is_filled_again() -> None:
    theta = np.random.default_rng(0).standard_normal(20_000)
    support = select(theta, (0.9, 0.8))
    values, counts = theta[support.indices], (2_000, 4_000)
    reserve = reserve_of(theta, support, 1_024)
    assert 1_024 <= len(reserve.indices) < 2_048
    arguments: Any = (reserve, theta.size, RANKS, counts)
    assert isinstance(rank(support, values, *arguments), Ranking)
    missing = rank(support, values * 0.7, *arguments)
    assert isinstance(missing, int)
    reaching = np.count_nonzero(np.abs(values * 0.7) >= reserve.bound) + len(reserve.indices)
    assert missing == 4_000 - reaching > 0
    # With the missing entries it is large enough.
    count = len(reserve.indices) + missing
    second = reserve_of(theta, support, count)
    assert count <= len(second.indices) < 1.5 * count
    assert isinstance(rank(support, values * 0.7, second, *arguments[1:]), Ranking)
    selection = IncrementalSelection(reserve)
    outcome = selection.choose(support, values / 2, ArrayReservoir(theta), RANKS)
    assert outcome is not None
    assert outcome[0].reserve.floor < reserve.bound


def test_a_first_reserve_that_is_too_small_is_filled_again() -> None:
    """All of B became zero: the next B is the 4,000 largest weights outside, not 1,024 of them."""
    theta = np.random.default_rng(0).standard_normal(20_000)
    support = select(theta, (0.9, 0.8))
    theta[support.indices] = 0
    fillings = []

    class Counted(ArrayReservoir):
        def view(self, start: int, stop: int) -> Array:
            fillings.append((start, stop))
            assert len(fillings) <= 2, "the second reserve has the entries that the first lacked"
            return super().view(start, stop)

    outcome = IncrementalSelection().choose(
        support, theta[support.indices], Counted(theta), RANKS, name=NAME
    )
    assert outcome is not None
    expected = select(theta, (0.9, 0.8))
    np.testing.assert_array_equal(outcome[0].support.indices, expected.indices)
    assert fillings == [(0, 20_000)] * 2


def test_a_reserve_keeps_what_is_smaller_than_b() -> None:
    reserve = Reserve(np.arange(10, 19), np.arange(1.0, 10.0), 0.5)
    joined = np.asarray([30]), np.asarray([-0.75])
    later = reserve.exchange(5.0, joined)
    assert later.indices.tolist() == [10, 11, 12, 13, 30]
    assert later.values.tolist() == [1, 2, 3, 4, -0.75]
    assert (later.bound, later.size) == (0.5, 5)
    np.testing.assert_array_equal(reserve.values, np.arange(1.0, 10.0))
    with np.errstate(all="raise"):
        tiny = Reserve(np.arange(3), np.asarray([1e-310, 2e-310, 1.0]), 1e-310)
        assert tiny.exchange(2e-310, joined).indices.tolist() == [0, 30]
    # Without a bound, zeros are weights like others.
    nothing = np.zeros(0, np.int64), np.zeros(0)
    whole = Reserve(np.arange(4), np.asarray([0.0, 1, 0, 2]), 0.0)
    assert whole.exchange(1.0, nothing).indices.tolist() == [0, 2]
    assert whole.exchange(0.0, joined).indices.tolist() == [30]


def test_levels_of_a_reserve() -> None:
    """Of four entries each; what leaves B goes to the level of its magnitude."""
    magnitudes = np.arange(16.0, 0.0, -1.0)
    largest = Largest(np.arange(16, dtype=np.int32), magnitudes * (-1) ** np.arange(16), 1.0)
    reserve = Reserve.fill(largest)
    assert (reserve.bound, reserve.floor, reserve.size, reserve.total) == (13.0, 1.0, 4, 16)
    np.testing.assert_array_equal(reserve.values, [16, -15, 14, -13])
    joined = np.arange(20, 25, dtype=np.int32), np.asarray([13.5, -12.5, 9.0, 8.5, 1.0])
    reserve = reserve.exchange(16.0, joined)
    assert (reserve.size, reserve.total) == (4, 20)
    levels = [reserve := reserve.deepen() for _ in range(3)]
    assert [one.bound for one in levels] == [9.0, 5.0, 1.0]
    added = [[20, 21, 22], [20, 21, 22, 23], [20, 21, 22, 23, 24]]
    for number, (one, others) in enumerate(zip(levels, added, strict=True)):
        assert sorted(one.indices.tolist()) == [*range(1, 8 + 4 * number), *others]
    assert reserve.rest is None
    assert Reserve.fill(largest).reach(7.0).bound == 5.0


@pytest.mark.parametrize("count", [700, 2_400, 2_499, 2_500])
def test_of_few_entries_outside_all_are_taken(count: int) -> None:
    """Where a bound for `count` entries and some more would be zero."""
    theta = np.random.default_rng(0).standard_normal(5_000)
    reserve = reserve_of(theta, select(theta, (0.5, 0.5)), count)
    assert count <= len(reserve.indices) <= min(2_500, 2 * count)
    assert (reserve.bound == 0) == (len(reserve.indices) == 2_500)
    sparse = np.where(
        np.arange(5_000) % 50 == 0, theta, 0
    )  # of 4,925 entries outside, 25 are not 0
    assert largest_outside(ArrayReservoir(sparse), select(sparse, (0.99, 0.985)), 600) is None


def test_the_size_of_a_reserve_follows_what_it_loses() -> None:
    size, backward = 400_000, 80_000
    theta = np.random.default_rng(0).standard_normal(size)
    support, selection = select(theta, (0.9, 0.8)), IncrementalSelection()
    filled = []
    for shrink in (1.0, 0.97, 0.98, 0.995, 0.999, 0.999, 0.999, 0.9, 0.8, 0.8):
        theta[support.indices] *= shrink
        age, reserve = selection.age, selection.reserve
        outcome = selection.choose(support, theta[support.indices], ArrayReservoir(theta), RANKS)
        assert outcome is not None
        support, selection = outcome[0].support, outcome[1]
        if selection.age == 0:
            loss = selection.loss
            wanted = backward / 8
            if loss is not None:
                wanted = min(2 * (size * loss) ** 0.5, backward / 2)
            left = len(outcome[0].left[0])  # which the reserve may keep
            assert wanted <= selection.filled <= wanted + left + 8_000  # a sample's deviation
            assert selection.filled == outcome[0].reserve.total
            filled.append(selection.filled)
            if reserve is not None:
                assert loss is not None
                assert loss * (age + 1) > reserve.total
    assert 2 <= len(filled) < 10
    assert max(filled) > 2 * min(filled)
    assert reserve_size(10**6, 10**5, None) == 12_500
    assert reserve_size(10**6, 10**5, 100.0) == 20_000
    assert reserve_size(10**6, 10**5, 10_000.0) == 50_000
    assert reserve_size(10**6, 10, None) == 1_024
    reserve = selection.reserve
    assert reserve is not None
    assert selection.nbytes == reserve.nbytes >= 12 * reserve.total > 0


@pytest.mark.parametrize("counts", [(1, 1), (100, 200), (9_000, 9_500), (20_000, 20_000)])
def test_the_sets_can_change_their_sizes(counts: tuple[int, int]) -> None:
    theta = np.random.default_rng(0).standard_normal(20_000)
    ranks = Ranks(make_key(0, "", "ties"))
    first = topkast.select(theta, fwd=0.7, bwd=0.5)
    values = topkast.gather(theta, first)
    outcome = choose_next(
        IncrementalSelection(), first, values, ArrayReservoir(theta), ranks, counts=counts
    )
    assert outcome is not None
    largest = np.argsort(-np.abs(theta))
    support = outcome[0].support
    assert np.array_equal(support.active, np.sort(largest[: counts[0]]))
    assert np.array_equal(support.exploring, np.sort(largest[counts[0] : counts[1]]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_without_a_rank_are_counted(value: float) -> None:
    theta = np.random.default_rng(0).standard_normal(5_000)
    support = select(theta, (0.9, 0.8))
    values = theta[support.indices].copy()
    values[[3, 800]] = value
    with pytest.raises(topkast.NonFiniteError, match="2 of 5000 entries are NaN or infinite"):
        IncrementalSelection().choose(support, values, ArrayReservoir(theta), RANKS)


def test_zeros_leave_it_to_a_full_selection() -> None:
    theta = np.zeros(10_000)
    theta[:2_000] = 1.0
    support = select(theta, (0.9, 0.8))
    reservoir = ArrayReservoir(theta)
    assert IncrementalSelection().choose(support, theta[support.indices], reservoir, RANKS) is None


def test_a_selection_is_a_value() -> None:
    selection = IncrementalSelection(Reserve(np.arange(3), np.ones(3), 0.5))
    loaded = pickle.loads(pickle.dumps(selection))
    assert dataclasses.astuple(loaded)[1:] == dataclasses.astuple(selection)[1:]
    np.testing.assert_array_equal(loaded.reserve.indices, np.arange(3))


def test_numpy_and_kernels_have_the_same_functions() -> None:
    kernels = pytest.importorskip("topkast.kernels")
    for name in _compiled._MIN_ENTRIES:
        assert callable(getattr(kernels, name))
        assert callable(getattr(_candidates, name, None)) == (name != "generate")
