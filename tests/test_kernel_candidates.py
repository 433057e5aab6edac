"""Kernels of a refresh: thresholds, candidates, migration and displacements of young entries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_problems import DTYPES, Array

from topkast.backends import _candidates
from topkast.backends._threads import default_threads
from topkast.kernels import collect, divide, find_thresholds, migrate, scale_displacement
from topkast.kernels._columns import _count_row_by_entry, _count_row_in_lanes
from topkast.kernels.refresh import _brackets, _divide, _magnitudes, _migrate, _thresholds
from topkast.kernels.runtime._lanes import HAS_LANES

THREADS = [1, 2, 5]
needs_lanes = pytest.mark.skipif(not HAS_LANES, reason="numba compiles without AVX2 here")


@pytest.fixture(params=[pytest.param("lanes", marks=needs_lanes), "plain"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels in lanes, of AVX-512 or AVX2, or those for other processors."""
    if request.param == "plain":
        plain = _divide._divide_single, _divide._divide_double
        monkeypatch.setattr(_divide, "_KERNELS", plain)
        monkeypatch.setattr(_migrate, "_migrate", _migrate._migrate_entries)
        monkeypatch.setattr(_brackets, "_BRACKET", _brackets._bracket_single)
        monkeypatch.setattr(_magnitudes, "_COLLECT_SINGLE", _magnitudes._collect_single)


@st.composite
def vectors(draw: st.DrawFn) -> Array:
    """Floats of one or several chunks, among them zeros, subnormals and equal magnitudes."""
    size = draw(st.sampled_from([1, 2, 100, 32_768, 70_001]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    dtype: Any = draw(st.sampled_from(DTYPES))
    vector = rng.standard_normal(size).astype(dtype)
    special = np.asarray([0.0, -0.0, 1.0, -1.0, np.finfo(dtype).smallest_subnormal, 1e30], dtype)
    replaced = rng.random(size) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    vector[replaced] = rng.choice(special, np.count_nonzero(replaced))
    return vector


def contents(found: tuple[list[Any], int]) -> Any:
    """What was found for several counts, in a form that can be compared."""
    thresholds, not_finite = found
    return not_finite, [(*one[:2], np.sort(one.equal).tolist()) for one in thresholds]


@given(vector=vectors(), data=st.data())
def test_thresholds_are_order_statistics(vector: Array, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, vector.size), min_size=1, max_size=3))
    cut = data.draw(st.integers(0, vector.size))
    threads = data.draw(st.sampled_from(THREADS))
    found = find_thresholds([vector[:cut], vector[cut:]], counts, threads=threads)
    assert contents(found) == contents(_candidates.find_thresholds([vector], counts))
    assert found[1] == 0
    magnitudes = np.abs(vector)
    descending = np.sort(magnitudes)[::-1]
    for one, count in zip(found[0], counts, strict=True):
        assert one.magnitude == float(descending[count - 1])
        assert one.surplus == np.count_nonzero(magnitudes >= one.magnitude) - count
        equal = np.flatnonzero((magnitudes == one.magnitude) & (one.surplus > 0))
        np.testing.assert_array_equal(np.sort(one.equal), equal)


@given(vector=vectors(), data=st.data())
def test_brackets_change_no_threshold(vector: Array, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, vector.size), min_size=1, max_size=3))
    ends = st.sampled_from([0.0, math.nan, *np.abs(vector[:50]).tolist()])
    # Also brackets that end before they begin, and NaN.
    brackets = [data.draw(st.tuples(ends, ends)) for _ in counts]
    if data.draw(st.booleans()):  # around the thresholds
        expected, _ = find_thresholds([vector], counts)
        share = data.draw(st.sampled_from([0.0, 0.01, 0.5]))
        brackets = [(one.magnitude * (1 - share), one.magnitude * (1 + share)) for one in expected]
    cut = data.draw(st.integers(0, vector.size))
    lists = [vector[:cut], vector[cut:]]
    for threads in THREADS:
        found = find_thresholds(lists, counts, brackets=brackets, threads=threads)
        assert contents(found) == contents(find_thresholds(lists, counts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_brackets_may_hold_most_entries(dtype: Any) -> None:
    """More than there is memory for."""
    vector = np.random.default_rng(0).standard_normal(100_000).astype(dtype)
    expected = find_thresholds([vector], [10_000, 50_000])
    for brackets in ([(0.0, 5.0)] * 2, [(0.0, 5.0), (0.6, 0.7)], [(1.6, 1.7), (0.0, 5.0)]):
        found = find_thresholds([vector], [10_000, 50_000], brackets=brackets)
        assert contents(found) == contents(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [500, 70_001])
def test_right_brackets_take_one_pass(
    dtype: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It also counts what is not finite, at the start, inside, and at the end of a vector."""
    vector = np.random.default_rng(0).standard_normal(size).astype(dtype)
    vector[[0, 5, 100, -2]] = math.nan, -math.inf, math.inf, math.nan
    counts = [size // 10, size // 5]
    finite = np.sort(np.abs(vector))[: size - 2]  # NaN come last
    expected = [float(np.append(finite, [math.inf] * 2)[-count]) for count in counts]
    monkeypatch.setattr(_thresholds, "_count_digits", None)
    brackets = [(0.99 * magnitude, 1.01 * magnitude) for magnitude in expected]
    found, not_finite = find_thresholds([vector], counts, brackets=brackets)
    assert [one.magnitude for one in found] == expected
    assert not_finite == 4


@pytest.mark.parametrize("lanes", [8, 16])
def test_windows_hold_twice_as_many_entries_as_lanes(lanes: int) -> None:
    """The last survivor of a block is just inside of its window, or just outside."""
    for span in range(2 * lanes - 2, 2 * lanes + 2):
        source = np.append(np.arange(lanes - 1), span).astype(np.int32)
        for dtype in ("int16", "float32"):
            entry, out = np.arange(span + 40).astype(dtype), np.empty(lanes, dtype)
            migrate(source, np.ones(lanes, np.bool_), (entry, np.zeros(1, dtype), out))
            np.testing.assert_array_equal(out, entry[source])


def test_another_number_of_threads_moves_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread counts in a row of its own, also if their number is set meanwhile."""
    numbers = []

    def record(kernels: Any, dtype: Any, threads: Any, *others: Any, **values: Any) -> None:
        numbers.append((threads, len(values["digits"])))

    monkeypatch.setattr(_thresholds, "run_kernel", record)
    _thresholds._count_digits([np.ones(9)] * 2, 0, 63, 47, 16, None)
    assert numbers == [(default_threads(), default_threads())] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("brackets", [None, [(0.5, 2.0)], [(1.5, 2.0)]])
def test_nan_and_infinity_are_counted(dtype: Any, brackets: Any) -> None:
    vector = np.ones(40_000, dtype)
    vector[[0, 7, 39_999]] = np.nan, np.inf, -np.inf
    for count in (1, 10):
        lists = [vector[:20], vector[20:]]
        assert find_thresholds(lists, [count], brackets=brackets)[1] == 3


@given(vector=vectors(), data=st.data())
def test_collect_keeps_what_reaches_the_bound(vector: Array, data: st.DataObject) -> None:
    bound = float(np.abs(data.draw(st.sampled_from(vector[:50].tolist()))))
    indices, values = collect(vector, bound, threads=data.draw(st.sampled_from(THREADS)))
    expected = np.flatnonzero(np.abs(vector) >= vector.dtype.type(bound))
    np.testing.assert_array_equal(indices, expected)
    assert indices.dtype == np.int32
    np.testing.assert_array_equal(values.view(np.uint8), vector[expected].view(np.uint8))
    limit = float(np.abs(data.draw(st.sampled_from(vector[:50].tolist()))))
    if limit < bound:
        assert [len(one) for one in collect(vector, bound, limit)] == [0, 0]
    else:
        found, expected_here = (
            collect(vector, bound, limit),
            _candidates.collect(vector, bound, limit),
        )
        for one, other in zip(found, expected_here, strict=True):
            np.testing.assert_array_equal(one, other)
        assert np.all(np.abs(found[1]) <= vector.dtype.type(limit))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@given(vector=vectors(), data=st.data())
def test_collect_finds_the_indices_of_entries(
    dtype: Any, vector: Array, data: st.DataObject
) -> None:
    indices = np.random.default_rng(0).permutation(2 * vector.size)[: vector.size].astype(dtype)
    bound = float(np.abs(data.draw(st.sampled_from(vector[:50].tolist()))))
    limit = data.draw(st.sampled_from([None, 2 * bound, bound / 2]))
    positions, values = collect(vector, bound, limit)
    for use in (collect, _candidates.collect):
        found = use(vector, bound, limit, indices=indices)
        np.testing.assert_array_equal(found[0], indices[positions])
        assert found[0].dtype == dtype
        np.testing.assert_array_equal(found[1], values)


@given(vector=vectors(), data=st.data())
def test_collect_leaves_entries_out(vector: Array, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    share = data.draw(st.sampled_from([0.0, 0.2, 1.0]))
    is_left_out = rng.random(vector.size) < share
    labels = rng.integers(0, data.draw(st.integers(1, 3)), vector.size)
    without = [
        np.flatnonzero(is_left_out & (labels == label)).astype(np.int32)
        for label in range(labels.max() + 1)
    ]
    bound = data.draw(st.sampled_from([float(np.finfo(vector.dtype).smallest_subnormal), 0.5]))
    limit = data.draw(st.sampled_from([None, 1.0]))
    kept, before = vector.copy(), vector.copy()
    kept[is_left_out] = 0
    for use in (collect, _candidates.collect):
        found = use(vector, bound, limit, without=without)
        for one, other in zip(found, use(kept, bound, limit), strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
        np.testing.assert_array_equal(vector.view(np.uint8), before.view(np.uint8))


@given(vector=vectors(), data=st.data())
def test_divide_agrees_with_numpy(vector: Array, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    labels = rng.choice(
        4,
        vector.size,
        p=data.draw(
            st.sampled_from([(0.2, 0.3, 0.3, 0.2), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0)])
        ),
    )
    lists = [np.flatnonzero(labels == label).astype(np.int32) for label in range(3)]
    parts = [(indices, vector[indices]) for indices in lists]
    candidates = np.concatenate([values for _, values in parts])
    if not candidates.size:
        return
    ordered = np.sort(np.abs(candidates))[::-1]
    ranks = sorted(data.draw(st.lists(st.integers(0, candidates.size - 1), min_size=3, max_size=3)))
    forward, backward, bound = (float(ordered[rank]) for rank in ranks)
    # Of equal magnitudes, those with the lowest ranks are not in A, and fewer of them not in B.
    shuffled = rng.permutation(np.concatenate(lists))
    magnitudes = np.abs(vector[shuffled])
    ties: Any = tuple(
        np.sort(equal[: len(equal) // share]).astype(np.int64)
        for equal, share in (
            (shuffled[magnitudes == forward], 2),
            (shuffled[magnitudes == backward], 4),
        )
    )
    spread = data.draw(st.sampled_from([1, 200]))  # few candidates among many weights, or many
    lists = [spread * indices for indices in lists]
    parts = [(indices, values) for indices, (_, values) in zip(lists, parts, strict=True)]
    ties = tuple(spread * tied for tied in ties)
    limits: Any = {
        "size": spread * vector.size,
        "forward": forward,
        "backward": backward,
        "bound": bound,
    }
    inside = np.concatenate(lists[:2]), np.concatenate([values for _, values in parts[:2]])
    for tied in (None, ties):
        expected = _candidates.divide(inside, parts[2], split=len(lists[0]), **limits, ties=tied)
        threads = data.draw(st.sampled_from(THREADS))
        found = divide(inside, parts[2], split=len(lists[0]), **limits, ties=tied, threads=threads)
        check_equal(found, expected)


def test_candidates_in_one_corner_of_a_large_tensor() -> None:
    """More than are divided in vectors, whose memory follows the longest list of a range."""
    rng = np.random.default_rng(0)
    split, count = _divide._MAX_PACKED + 1, _divide._MAX_PACKED + 1_000
    order = rng.permutation(count + 5).astype(np.int32)
    indices = np.concatenate([np.sort(order[:split]), np.sort(order[split:count])])
    inside = indices, rng.standard_normal(count).astype(np.float32)
    reserve = np.sort(order[count:]), np.full(5, 0.7, np.float32)
    limits: Any = {"split": split, "size": 2**31 - 1, "forward": 1.0, "backward": 0.6, "bound": 0.5}
    check_equal(divide(inside, reserve, **limits), _candidates.divide(inside, reserve, **limits))


def check_equal(found: Any, expected: Any) -> None:
    """Check two divisions of the same candidates."""
    assert found.sizes == expected.sizes
    pairs = zip(found[:4], expected[:4], strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


@pytest.mark.parametrize("dtype", ["int16", "float16", "int32", "float32", "int64", "float64"])
@pytest.mark.parametrize("size", [0, 1, 5, 40_000])
def test_migrate_agrees_with_numpy(dtype: str, size: int) -> None:
    rng = np.random.default_rng(size)
    entry, other = rng.integers(-9, 9, size + 3).astype(dtype), rng.standard_normal(size + 5)
    source = rng.integers(0, size + 3, size).astype(np.int32)
    survives = rng.random(size) < 0.7
    for fresh in (np.asarray([5], dtype), rng.integers(-9, 9, size).astype(dtype)):
        if len(fresh) not in (1, size):
            continue
        out, other_out = np.zeros(size, dtype), np.zeros(size)
        # Vectors of other lengths and dtypes are moved in the same call.
        migrate(source, survives, (entry, fresh, out), (other, np.full(1, 7.0), other_out))
        np.testing.assert_array_equal(out, np.where(survives, entry[source], fresh))
        np.testing.assert_array_equal(other_out, np.where(survives, other[source], 7))


@given(data=st.data())
def test_entries_that_were_neighbours_are_migrated(data: st.DataObject) -> None:
    """Sources ascend, but for some that moved between A and B∖A, and skip what left."""
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    size = data.draw(st.sampled_from([1, 15, 16, 31, 50, 20_000]))
    left, entered, moved = (
        data.draw(st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.9, 1.0])) for _ in range(3)
    )
    stays = np.flatnonzero(rng.random(size) >= left)
    source = np.repeat(stays, 1 + (rng.random(len(stays)) < entered)).astype(np.int32)
    survives = np.ones(len(source), np.bool_)
    survives[1:] = source[1:] != source[:-1]
    elsewhere = survives & (rng.random(len(source)) < moved)
    source[elsewhere] = rng.integers(0, size, np.count_nonzero(elsewhere))
    source[~survives] = data.draw(st.sampled_from([0, size - 1]))
    # Of another length each: a window of 32 entries reaches beyond the end of some.
    entries = [
        rng.integers(-99, 99, size + more).astype(dtype)
        for more, dtype in ((0, "int16"), (0, "float32"), (1, "float32"), (40, "float64"))
    ]
    for several in (False, True):
        count = len(source) if several else min(len(source), 1)
        moves = [
            (
                entry,
                rng.integers(-9, 9, count).astype(entry.dtype),
                np.empty(len(source), entry.dtype),
            )
            for entry in entries
        ]
        if not count:
            return
        migrate(source, survives, *moves, threads=data.draw(st.sampled_from(THREADS)))
        for entry, fresh, out in moves:
            np.testing.assert_array_equal(out, np.where(survives, entry[source], fresh))


def count_by_panel(columns: Array, width: int, panel: int) -> tuple[Array, Array]:
    """Number of columns in each panel, and the first of these columns' positions."""
    numbers = columns // panel
    panels = np.arange(-(-width // panel))
    counts = np.bincount(numbers, minlength=len(panels))
    return counts, np.where(counts > 0, np.searchsorted(numbers, panels), 0)


@pytest.mark.parametrize(
    "count_row", [pytest.param(_count_row_in_lanes, marks=needs_lanes), _count_row_by_entry]
)
@given(data=st.data())
def test_the_entries_of_a_row_are_counted_by_panel(count_row: Any, data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([1, 7, 300, 5_000]))
    panel = data.draw(st.integers(1, width))
    chosen = data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    columns = np.flatnonzero(np.random.default_rng(width).random(width) < chosen)
    before, after = (data.draw(st.sampled_from([0, 3, 40])) for _ in range(2))
    row = data.draw(st.integers(0, 3))
    others = np.zeros(before), row * width + columns, np.zeros(after)
    flat = np.concatenate(others).astype(np.int32)
    panels = np.zeros((2, -(-width // panel)), np.int32)

    def is_valid(columns: Array) -> bool:
        stop = before + number
        arguments = columns, before, stop, row * width, (width, panel)
        return int(count_row(*arguments, (panels[0], panels[1]))) == stop

    number = len(columns)
    assert is_valid(flat)
    counts, starts = count_by_panel(columns, width, panel)
    np.testing.assert_array_equal(panels[0], counts)
    np.testing.assert_array_equal(panels[1], np.where(counts > 0, starts + before, 0))
    if number:  # an entry that does not ascend, or lies outside of the row
        place = before + data.draw(st.integers(0, number - 1))
        for wrong in (-1, row * width - 1, row * width + width, *flat[place - 1 : place]):
            damaged = flat.copy()
            damaged[place] = wrong
            if not (wrong == flat[place - 1] and place == before):
                assert not is_valid(damaged)


@pytest.mark.parametrize("dtype", DTYPES)
def test_displacements_are_scaled_by_age(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    before, values = rng.standard_normal((2, 40_000)).astype(dtype)
    ages = rng.integers(0, 9, 40_000).astype(np.int16)
    ages[:7] = (1 << 15) - 1
    factors = np.asarray([0.1, 0.3, 0.5, 1.0, 0.7, 1.0], dtype)
    share = factors[np.minimum(ages.astype(int) + 2, 5)]
    expected = np.where(share == 1, values, before + (values - before) * share)
    scale_displacement(values, before, ages, factors, since=2)
    np.testing.assert_array_equal(values, expected)


def test_ages_out_of_range_read_no_other_memory() -> None:
    values, before = np.full(4, 3.0), np.ones(4)
    ages = np.asarray([-(1 << 15), -2, 0, (1 << 15) - 1], np.int16)
    scale_displacement(values, before, ages, np.asarray([0.0, 0.5, 1.0]), since=1)
    np.testing.assert_array_equal(values, [1, 1, 2, 3])
    scale_displacement(values, before, ages, np.asarray([0.0, 0.5]), since=1 << 40)
    np.testing.assert_array_equal(values, [1, 1, 1.5, 2])
    for factors, since in (([1.0], -1), ([], 0)):
        with pytest.raises(ValueError, match="since must not be negative"):
            scale_displacement(values, before, ages, np.asarray(factors), since=since)


def test_bad_input_is_refused() -> None:
    indices, values = np.asarray([0, 4], np.int32), np.ones(2)
    part = (indices, values)
    wrong: list[Any] = [
        (indices.astype(np.int64), values),
        (indices, values.astype(np.float16)),
        (indices, values[:1]),
        (indices, np.ones((2, 2))[:, 0]),
    ]
    for bad in wrong:
        for pair in ((bad, part), (part, bad)):
            with pytest.raises((TypeError, ValueError), match="candidates"):
                divide(*pair, split=1, size=9, forward=1.0, backward=1.0, bound=0.0)
    limits: Any = {"forward": 1.0, "backward": 1.0, "bound": 0.0}
    empty = (indices[:0], values[:0])
    for split in (-1, 3):
        with pytest.raises(ValueError, match=r"split must lie in \[0, 2\]"):
            divide(part, empty, split=split, size=9, **limits)
    for split, pair in [(0, (part, empty)), (2, (part, empty)), (0, (empty, part))]:
        with pytest.raises(ValueError, match=r"must ascend in \[0, 4\), got 0 to 4"):
            divide(*pair, split=split, size=4, **limits)
    with pytest.raises(TypeError, match="float32 or float64"):
        find_thresholds([values.astype(np.float16)], [1])
    with pytest.raises(ValueError, match="count"):
        find_thresholds([values], [3])
    with pytest.raises(TypeError, match="float32 or float64"):
        collect(indices, 1.0)
    with pytest.raises(TypeError, match="indices must be int32 or int64, got int16"):
        collect(values, 1.0, indices=indices.astype(np.int16))
    for wrong_indices in (indices[:1], np.zeros(4, np.int32)[::2]):
        with pytest.raises(ValueError, match=r"indices must be contiguous \(2,\)"):
            collect(values, 1.0, indices=wrong_indices)
    for wrong_positions in (indices.astype(np.int64), np.zeros(4, np.int32)[::2]):
        with pytest.raises(TypeError, match="positions of `without` must be contiguous"):
            collect(values, 1.0, without=[wrong_positions])
    with pytest.raises(ValueError, match="bound must be above 0"):
        collect(values, 0.0, without=[indices])
    for outside in ([0, 2], [-1, 0], [1, 0]):
        with pytest.raises(ValueError, match=r"must ascend in \[0, 2\), got"):
            collect(values, 1.0, without=[np.asarray(outside, np.int32)])
    stays, zero = np.ones(2, bool), np.zeros(1)
    with pytest.raises(TypeError, match="2, 4 or 8 bytes"):
        migrate(indices, stays, (stays, stays[:1], stays))
    with pytest.raises(TypeError, match="2, 4 or 8 bytes"):
        migrate(indices, stays, (values, zero.astype(np.float32), values))
    with pytest.raises(TypeError, match="int32"):
        migrate(indices.astype(np.int64), stays, (values, zero, values))
    with pytest.raises(ValueError, match="must have 2 entries"):
        migrate(indices, stays[:1], (values, zero, values))
    with pytest.raises(ValueError, match="must have 2 entries"):
        migrate(indices, stays, (values, zero, values), (values, zero, np.ones(3)))
    with pytest.raises(ValueError, match="contiguous vector"):
        migrate(indices, stays, (values, zero, np.ones((2, 2))[:, 0]))
    with pytest.raises(ValueError, match=r"out must be a contiguous vector, got shape \(2,\)"):
        migrate(indices, stays, (values, zero, np.ones(4)[::2]))
    out = np.zeros(2)
    migrate(np.zeros(2, np.int32), ~stays, (np.ones(0), np.asarray([3.0, 4.0]), out))
    assert out.tolist() == [3.0, 4.0]  # of an empty vector nothing survives
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        migrate(indices, stays, (values, zero, out))
    with pytest.raises(ValueError, match="values is read-only"):
        scale_displacement(out, values, np.zeros(2, np.int16), zero, since=0)
    with pytest.raises(ValueError, match="ages must be contiguous int16"):
        scale_displacement(values, values, np.zeros(2, np.int32), np.ones(1), since=0)
