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
from topkast.kernels.refresh import _thresholds

THREADS = [1, 2, 5]


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


@given(vector=vectors(), data=st.data())
def test_thresholds_are_order_statistics(vector: Array, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, vector.size), min_size=1, max_size=3))
    cut = data.draw(st.integers(0, vector.size))
    threads = data.draw(st.sampled_from(THREADS))
    found, not_finite = find_thresholds([vector[:cut], vector[cut:]], counts, threads=threads)
    assert not_finite == 0
    expected, _ = _candidates.find_thresholds([vector], counts)
    assert [tuple(one) for one in found] == [tuple(one) for one in expected]
    descending = np.sort(np.abs(vector))[::-1]
    assert [one.magnitude for one in found] == [float(descending[count - 1]) for count in counts]


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
        assert found == find_thresholds(lists, counts)


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
    if limit >= bound:
        found, expected_here = (
            collect(vector, bound, limit),
            _candidates.collect(vector, bound, limit),
        )
        for one, other in zip(found, expected_here, strict=True):
            np.testing.assert_array_equal(one, other)
        assert np.all(np.abs(found[1]) <= vector.dtype.type(limit))


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
