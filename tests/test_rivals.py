"""The rivals' choices: by hand on 4 × 4 weights, exact counts, uniform draws, limits, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from libraries import Library
from torch import nn

import topkast
from topkast import OptionError, Support
from topkast.methods import (
    ACDC,
    DNW,
    GSE,
    IHT,
    ITOP,
    SET,
    SMET,
    SNIP,
    GradualPruning,
    GraNet,
    Method,
    RigL,
    Static,
    TopKAST,
    View,
)
from topkast.methods._schedules import cubic_count, drop_count
from topkast.reference import tie_words
from topkast.selection._distribution import exact_fraction, kept_count
from topkast.selection._random import make_key, random_draws
from topkast.testing import assert_same_support, to_numpy

Vector = np.ndarray[Any, Any]

# 4 × 4 weights: A holds eight, the others are zero.
ACTIVE = np.asarray([0, 2, 5, 7, 8, 11, 13, 14], np.int32)
WEIGHTS = np.zeros(16, np.float32)
WEIGHTS[ACTIVE] = [0.9, -0.8, 0.1, -0.7, 0.3, -0.5, 0.6, -0.65]
# The largest are those of weights that stay; then come 8 (dropped at a fourth), 3, 1, 6, 15, …
GRADIENT = np.asarray(
    [50, 7, -60, -8, 0.5, 0.2, 6, 70, 9, -1, 2, -40, 3, 80, 90, 5], dtype=np.float32
)


def view(
    weights: Vector = WEIGHTS,
    active: Vector = ACTIVE,
    gradient: Vector | None = GRADIENT,
    **changes: Any,
) -> View:
    """The view of a method whose B is A."""
    count = len(active)
    support = Support(active, count)
    made = View(weights, count, count, seed=3, name="w", support=support, gradient=gradient)
    return replace(made, values=weights[active], **changes)


def whole(draw: int, *, forward: int = 4, count: int | None = None, **changes: Any) -> View:
    """The view of a method whose B is everything: `count` weights are in A now."""
    active = ACTIVE if count is None else np.argsort(-abs(SPREAD))[:count]
    support = Support.of(np.sort(active), np.setdiff1d(np.arange(16), active))
    weights = changes.pop("weights", WEIGHTS)
    made = View(weights, forward, 16, seed=3, name="w", draw=draw, support=support)
    return replace(made, values=weights[support.indices], gradient=GRADIENT, **changes)


# Distinct magnitudes, the largest at 5, 10, 15, 4, …: 16 (5 i mod 16).
SPREAD = np.asarray([(-1) ** i * ((13 * i + 14) % 16 + 1) / 16 for i in range(16)], np.float32)


def chosen(method: Method, seen: View) -> set[int]:
    support = method.choose(seen)
    assert support.forward == support.backward == seen.forward
    assert (np.diff(support.indices) > 0).all()
    return set(support.indices.tolist())


def words(size: int = 16, draw: int = 0) -> Vector:
    """The random words of all weights."""
    return np.asarray(random_draws(np.arange(size), make_key(3, "w", "draws"), draw))


def largest(scores: Vector, count: int, among: set[int]) -> set[int]:
    """The indices of the largest scores, which differ."""
    order = sorted(among, key=lambda index: -float(scores[index]))
    return set(order[:count])


EVERY = set(range(16))
STAYING = {0, 2, 7, 11, 13, 14}  # if the two smallest of eight are dropped


class TestGolden:
    def test_set(self) -> None:
        grown = largest(words(draw=5), 2, EVERY - STAYING)
        assert chosen(SET(0.25), view(draw=5)) == STAYING | grown

    def test_set_without_regrowth(self) -> None:
        grown = largest(words(draw=5), 2, EVERY - set(ACTIVE.tolist()))
        method = SET(0.25, regrow=False)
        assert chosen(method, view(draw=5)) == STAYING | grown
        assert not grown & {5, 8}

    @pytest.mark.parametrize(
        ("signed", "staying"), [(True, {0, 13, 2, 7}), (False, {0, 2, 7, 14})], ids=str
    )
    def test_signs_drop_separately(self, signed: bool, staying: set[int]) -> None:
        """Of .9, .1, .3, .6 and of -.8, -.7, -.5, -.65, half of each is dropped; or half of all."""
        result = chosen(SET(0.5, signed=signed, regrow=False), view(draw=2))
        assert result & set(ACTIVE.tolist()) == staying

    def test_shares_of_signs_are_rounded_down_separately(self) -> None:
        weights = WEIGHTS.copy()
        weights[13] = -0.6  # three positive, five negative: none and one are dropped
        result = chosen(SET(0.3, signed=True, regrow=False), view(weights))
        assert set(ACTIVE.tolist()) - result == {11}

    def test_zeros_count_as_positive(self) -> None:
        weights = WEIGHTS.copy()
        weights[[0, 13]] = [0.0, -0.0]  # the smallest of four positive ones
        result = chosen(SET(0.5, signed=True, regrow=False), view(weights))
        assert set(ACTIVE.tolist()) - result == {0, 13, 11, 14}

    def test_share_falls_along_a_cosine(self) -> None:
        """At a third of the way, three quarters of the share are left: 3 of 8, rounded down."""
        result = chosen(SET(0.5, until=30, regrow=False), view(draw=10))
        assert set(ACTIVE.tolist()) - result == {5, 8, 11}

    @pytest.mark.parametrize("draw", [30, 31, 1000])
    def test_share_ends(self, draw: int) -> None:
        methods = [SET(0.5, until=30), SMET(until=30), RigL(until=30), GSE(until=30)]
        for method in methods:
            assert chosen(method, view(draw=draw)) == set(ACTIVE.tolist())

    def test_smet(self) -> None:
        result = chosen(SMET(), view())  # a fifth of eight is one
        assert result >= set(ACTIVE.tolist()) - {5}
        assert chosen(SMET(), view()) == chosen(SET(0.2), view())

    def test_rigl_may_grow_what_it_drops(self) -> None:
        assert chosen(RigL(fraction=0.25), view()) == STAYING | {8, 3}

    def test_rigl_without_regrowth(self) -> None:
        assert chosen(RigL(fraction=0.25, regrow=False), view()) == STAYING | {3, 1}

    def test_rigl_halfway(self) -> None:
        """At half of the way, half of the share is left."""
        assert chosen(RigL(until=10, fraction=0.5), view(draw=5)) == STAYING | {8, 3}

    def test_rigl_without_gradient(self) -> None:
        assert chosen(RigL(), view(gradient=None)) == set(ACTIVE.tolist())

    def test_itop(self) -> None:
        """Two of the four that are dropped have the largest gradients, and stay."""
        assert chosen(ITOP(), view()) == {0, 2, 7, 14} | {13, 11, 8, 3}
        assert chosen(ITOP(), view()) == chosen(RigL(fraction=0.5), view())

    def test_gse(self) -> None:
        outside = EVERY - set(ACTIVE.tolist())
        for draw in range(5):
            sample = largest(words(draw=draw), 4, outside)
            grown = largest(abs(GRADIENT), 2, sample)
            method = GSE(fraction=0.25, samples=0.5)
            assert chosen(method, view(draw=draw)) == STAYING | grown

    def test_size_of_a_sample_is_rounded_up(self) -> None:
        outside = EVERY - set(ACTIVE.tolist())
        for draw in range(5):
            sample = largest(words(draw=draw), 3, outside)  # 0.26 · 8 = 2.08
            grown = largest(abs(GRADIENT), 2, sample)
            assert chosen(GSE(fraction=0.25, samples=0.26), view(draw=draw)) == STAYING | grown

    def test_snip(self) -> None:
        """Products of weight and gradient rank."""
        method = SNIP({"w": (GRADIENT * SPREAD).reshape(4, 4)})
        seen = View(SPREAD, 4, 4, seed=3, name="w", shapes={"w": (4, 4)})
        expected = np.argsort(-abs(GRADIENT * SPREAD))[:4]
        assert chosen(method, seen) == set(expected.tolist())

    def test_shuffled_snip_keeps_the_counts_of_tensors(self) -> None:
        """Of sixteen and eight weights ranked as one, five and one are the most sensitive."""
        shapes = {"a": (4, 4), "b": (8,)}
        first, second = np.arange(16.0), np.zeros(8)
        second[3] = 12.5
        methods = [
            SNIP({"a": first.reshape(4, 4), "b": second}, shuffled=flag) for flag in (False, True)
        ]
        seen = View(np.zeros(24), 6, 6, seed=3, name="a + b", shapes=shapes)
        assert chosen(methods[0], seen) == {11, 12, 13, 14, 15, 19}
        shuffled = chosen(methods[1], seen)
        assert sum(index < 16 for index in shuffled) == 5
        assert shuffled != chosen(methods[0], seen)
        assert shuffled != chosen(methods[1], replace(seen, seed=4))

    def test_gradual_pruning(self) -> None:
        """Sparsity 3/4 (1 − (1 − p)³) of 16: 0, 6.94, 10.5, 11.8, 12 are rounded down."""
        method = GradualPruning(start=2, end=6)
        counts = [16, 16, 16, 10, 6, 5, 4, 4]
        for draw, count in enumerate(counts):
            support = method.choose(whole(draw, weights=SPREAD, count=16))
            assert support.forward == count
            expected = np.sort(np.argsort(-abs(SPREAD))[:count])
            np.testing.assert_array_equal(support.active, expected)
            np.testing.assert_array_equal(np.sort(support.indices), np.arange(16))

    def test_gradual_pruning_ends(self) -> None:
        """At `end`, pruned weights may still return; afterwards, they do not."""
        method = GradualPruning(start=2, end=6)
        last = whole(6, weights=SPREAD, count=4)
        moved = replace(last, weights=np.roll(SPREAD, 1), values=np.roll(SPREAD, 1))
        assert set(method.choose(moved).active) != set(method.choose(last).active)
        assert method.choose(replace(moved, draw=7)) is moved.support

    def test_granet(self) -> None:
        """Four of eight stay, of which two are replaced by the largest gradients outside these."""
        method = GraNet(start=0, end=9, fraction=0.5)
        support = method.choose(whole(9))
        assert support.active.tolist() == [0, 2, 13, 14]
        gradient = np.where(np.arange(16) == 13, 0, GRADIENT)
        support = method.choose(replace(whole(9), gradient=gradient))
        assert support.active.tolist() == [0, 2, 7, 14]
        gradient = np.where(np.isin(np.arange(16), (7, 11, 13, 14)), 0, GRADIENT)
        support = method.choose(replace(whole(9), gradient=gradient))
        assert support.active.tolist() == [0, 2, 3, 8]
        assert support.exploring.tolist() == sorted(EVERY - {0, 2, 3, 8})

    def test_granet_between(self) -> None:
        """From 1/2 to 3/4 over four updates, at the first: 0.645, that is 6 of 16."""
        method = GraNet(start=0, end=4, fraction=0.0)
        assert method.choose(whole(1)).active.tolist() == [0, 2, 7, 11, 13, 14]

    def test_granet_begins_with_the_largest(self) -> None:
        seen = View(SPREAD, 4, 16, name="w")
        support = GraNet(start=0, end=4).choose(seen)
        np.testing.assert_array_equal(support.active, np.sort(np.argsort(-abs(SPREAD))[:8]))

    def test_granet_without_gradient(self) -> None:
        """Zeros in A stay before weights that rest: only values on A are ranked."""
        weights = np.where(WEIGHTS == 0, 5.0, WEIGHTS).astype(np.float32)
        seen = replace(whole(9, weights=weights), gradient=None)
        assert GraNet(start=0, end=9).choose(seen).active.tolist() == [0, 2, 7, 14]

    def test_acdc(self) -> None:
        method = ACDC(warm_up=2, sparse=3, dense=1, end=9)
        counts = [method.choose(whole(draw, weights=SPREAD)).forward for draw in range(12)]
        assert counts == [16, 16, 4, 4, 4, 16, 4, 4, 4, 4, 4, 4]

    def test_acdc_keeps_its_sets_in_a_sparse_phase(self) -> None:
        method = ACDC(warm_up=2, sparse=3, dense=1, end=9)
        seen = whole(3, weights=np.roll(SPREAD, 1), count=4)
        assert method.choose(seen) is seen.support

    def test_acdc_without_warm_up(self) -> None:
        assert ACDC(warm_up=0, sparse=3, dense=1, end=9).choose(whole(0)).forward == 4

    def test_dnw(self) -> None:
        support = DNW().choose(View(SPREAD, 4, 16, name="w"))
        np.testing.assert_array_equal(support.active, np.sort(np.argsort(-abs(SPREAD))[:4]))
        assert support.backward == 16

    @pytest.mark.parametrize(
        ("method", "counts"),
        [
            (IHT(end=4), [16, 13, 10, 7, 4, 4]),
            (IHT(end=4, initial=0.5), [8, 7, 6, 5, 4, 4]),
            (IHT(), [4, 4, 4, 4, 4, 4]),
            (IHT(end=4, initial=0.9), [4, 4, 4, 4, 4, 4]),
        ],
        ids=repr,
    )
    def test_iht(self, method: IHT, counts: list[int]) -> None:
        for draw, count in enumerate(counts):
            support = method.choose(whole(draw, weights=SPREAD))
            expected = np.sort(np.argsort(-abs(SPREAD))[:count])
            np.testing.assert_array_equal(support.active, expected)


class TestTies:
    def test_equal_weights_are_dropped_by_hash(self) -> None:
        """The smallest hash is dropped first, as in the choice by magnitude."""
        weights = np.where(WEIGHTS == 0, 0, 0.5).astype(np.float32)
        ranked = sorted(ACTIVE.tolist(), key=lambda index: tie_words(16, 3, "w")[index])
        for method in (SET(0.25, regrow=False), RigL(fraction=0.25, regrow=False)):
            assert set(ACTIVE.tolist()) - chosen(method, view(weights)) == set(ranked[:2])

    @pytest.mark.parametrize("value", [1.0, 0.0])
    def test_equal_gradients_are_grown_by_hash(self, value: float) -> None:
        outside = EVERY - set(ACTIVE.tolist())
        ranked = sorted(outside, key=lambda index: -int(tie_words(16, 3, "w")[index]))
        seen = view(gradient=np.full(16, value, np.float32))
        method = RigL(fraction=0.25, regrow=False)
        assert chosen(method, seen) - set(ACTIVE.tolist()) == set(ranked[:2])

    def test_weights_of_equal_magnitude_and_other_sign(self) -> None:
        weights = np.where(WEIGHTS == 0, 0, np.sign(WEIGHTS)).astype(np.float32)
        result = chosen(SET(0.5, signed=True, regrow=False), view(weights)) & set(ACTIVE.tolist())
        hashes = tie_words(16, 3, "w")
        for sign in (1, -1):
            own = [index for index in ACTIVE.tolist() if weights[index] == sign]
            assert result & set(own) == largest(hashes, 2, set(own))


@dataclass
class Pieces:
    """A gradient in blocks, as sparse layers give it."""

    gradient: Vector
    size: int

    def blocks(self) -> Iterator[tuple[int, Vector]]:
        for start in range(0, len(self.gradient), self.size):
            yield start, self.gradient[start : start + self.size].copy()


GRADIENTS = st.sampled_from([0.0, 1.0, -1.0, 2.0, 1e-42, 3e38]) | st.floats(-10, 10, width=32)


@st.composite
def views(draw: st.DrawFn) -> View:
    """Views with ties, zeros and signs, of methods whose B is A."""
    size = draw(st.integers(1, 40))
    count = draw(st.integers(1, size))
    active = np.sort(draw(st.permutations(range(size)))[:count]).astype(np.int32)
    weights = np.zeros(size, np.float32)
    entries = st.lists(GRADIENTS, min_size=size, max_size=size)
    weights[active] = np.asarray(draw(entries), np.float32)[active]
    gradient = np.asarray(draw(entries), np.float32)
    return view(weights, active, gradient, draw=draw(st.integers(0, 50)))


REWIRING: list[Method] = [
    SET(0.3),
    SET(0.5, signed=True),
    SET(1.0, regrow=False),
    SET(0.5, until=20),
    SMET(until=20),
    RigL(fraction=0.3),
    RigL(fraction=1.0, regrow=False),
    RigL(until=20, fraction=0.7),
    ITOP(until=20),
    GSE(until=20, samples=0.4),
    GSE(fraction=0.9, samples=2.0),
]
SCHEDULED: list[Method] = [
    GradualPruning(start=5, end=30),
    GradualPruning(start=0, end=20, initial=0.5),
    GraNet(start=5, end=30, until=40),
    ACDC(warm_up=3, sparse=5, dense=4, end=25),
    IHT(end=20),
    IHT(end=20, initial=0.3),
]


class TestLaws:
    @pytest.mark.parametrize("method", REWIRING, ids=repr)
    @given(seen=views())
    def test_counts_of_methods_that_replace(self, method: Method, seen: View) -> None:
        support = method.choose(seen)
        indices = support.indices
        assert (support.forward, len(indices)) == (seen.forward, seen.forward)
        assert (np.diff(indices) > 0).all()
        assert ((indices >= 0) & (indices < seen.weights.shape[0])).all()
        assert indices.dtype == np.int32
        # No more are replaced than the share, nor fewer if there is room outside.
        assert seen.support is not None
        entered = len(np.setdiff1d(indices, seen.support.indices))
        settings: Any = method
        share = Fraction(str(settings.fraction))
        assert entered <= share * seen.forward
        if not settings.regrow and settings.until is None and not getattr(method, "signed", False):
            room = seen.weights.shape[0] - seen.forward
            assert entered == min(math.floor(share * seen.forward), room)

    @pytest.mark.parametrize("method", [m for m in REWIRING if isinstance(m, RigL)], ids=repr)
    @given(seen=views(), size=st.integers(1, 50))
    def test_blocks_of_a_gradient_lead_to_the_same(
        self, method: Method, seen: View, size: int
    ) -> None:
        pieces = replace(seen, gradient=Pieces(seen.gradient, size))
        assert_same_support(method.choose(pieces), method.choose(seen))

    @given(seen=views())
    def test_choices_repeat(self, seen: View) -> None:
        for method in REWIRING:
            assert_same_support(method.choose(seen), method.choose(replace(seen)))

    @pytest.mark.parametrize("method", SCHEDULED, ids=repr)
    @given(seen=views(), forward=st.integers(1, 40))
    def test_counts_of_methods_with_schedules(
        self, method: Method, seen: View, forward: int
    ) -> None:
        """From the first choice on, |A| never leaves the range from its last value to all."""
        size = seen.weights.shape[0]
        seen = replace(seen, forward=min(forward, size), backward=size, support=None)
        counts = []
        for draw in range(0, 45, 3):
            support = method.choose(replace(seen, draw=draw))
            np.testing.assert_array_equal(np.sort(support.indices), np.arange(size))
            for entries in (support.active, support.exploring):
                assert (np.diff(entries) > 0).all()
            counts.append(support.forward)
            values = seen.weights[support.indices]
            seen = replace(seen, support=support, values=values)
        assert counts[-1] == seen.forward
        assert all(seen.forward <= count <= size for count in counts)
        if not isinstance(method, ACDC):
            assert counts == sorted(counts, reverse=True)

    @given(
        size=st.integers(1, 10**6),
        fwd=st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99, 0.999]),
        initial=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.8]) | st.floats(0, 1),
        span=st.integers(1, 10**6),
    )
    def test_cubic_schedules_are_exact_at_both_ends(
        self, size: int, fwd: float, initial: float, span: int
    ) -> None:
        forward = kept_count(size, 1 - exact_fraction(fwd))
        seen = View(np.broadcast_to(np.float32(0), (size,)), forward, size)
        first = max(kept_count(size, 1 - exact_fraction(initial)), forward)
        for update, expected in [(0, first), (7, first), (7 + span, forward), (10**9, forward)]:
            assert cubic_count(seen, update, 7, 7 + span, initial) == expected

    @given(percent=st.integers(0, 100), size=st.integers(1, 10**7), until=st.integers(1, 10**6))
    def test_cosines_are_exact_where_they_are_rational(
        self, percent: int, size: int, until: int
    ) -> None:
        """At 0, a third, a half, two thirds and the end of the way."""
        until, share = 6 * until, Fraction(percent, 100)
        for sixths, part in [(0, 1), (2, 0.75), (3, 0.5), (4, 0.25), (6, 0), (9, 0)]:
            seen = View(np.zeros(1), 1, 1, draw=sixths * until // 6)
            expected = math.floor(share * size * Fraction(part))
            assert drop_count(seen, size, percent / 100, until) == expected


class TestUniformDraws:
    """χ² of how often each candidate is grown, and the same for what a sample holds."""

    @staticmethod
    def assert_uniform(counts: Vector, rounds: int, drawn: int) -> None:
        expected = rounds * drawn / len(counts)
        share = 1 - drawn / len(counts)  # draws are without replacement
        statistic = ((counts - expected) ** 2).sum() / (expected * share)
        freedom = len(counts) - 1
        deviation = math.sqrt(2 * freedom)
        assert freedom - 4.5 * deviation < statistic < freedom + 4.5 * deviation

    @pytest.mark.parametrize("regrow", [True, False])
    def test_growth(self, regrow: bool) -> None:
        weights = np.concatenate([np.linspace(1, 2, 20), np.zeros(40)])
        active, rounds = np.arange(20, dtype=np.int32), 3000
        counts = np.zeros(60)
        for draw in range(rounds):
            seen = view(weights, active, None, draw=draw)
            counts[SET(0.25, regrow=regrow).choose(seen).indices] += 1
        assert (counts[5:20] == rounds).all()
        candidates = np.concatenate([counts[:5], counts[20:]])
        if regrow:
            self.assert_uniform(candidates, rounds, 5)
        else:
            assert not candidates[:5].any()
            self.assert_uniform(candidates[5:], rounds, 5)

    def test_samples(self) -> None:
        """With a gradient of 1 everywhere and a sample as small as what is grown, all of it is."""
        weights = np.concatenate([np.linspace(1, 2, 20), np.zeros(40)])
        active, rounds = np.arange(20, dtype=np.int32), 3000
        counts = np.zeros(60)
        for draw in range(rounds):
            seen = view(weights, active, np.ones(60), draw=draw)
            counts[GSE(fraction=0.25, samples=0.25).choose(seen).indices] += 1
        self.assert_uniform(counts[20:], rounds, 5)

    def test_seeds_and_names_draw_otherwise(self) -> None:
        weights = np.concatenate([np.linspace(1, 2, 50), np.zeros(950)])
        seen = view(weights, np.arange(50, dtype=np.int32), None)
        results = {
            frozenset(SET(0.5).choose(replace(seen, **change)).indices.tolist())
            for change in ({}, {"seed": 4}, {"name": "v"}, {"draw": 1})
        }
        assert len(results) == 4


class TestLimits:
    @given(seen=views())
    def test_nothing_is_replaced(self, seen: View) -> None:
        assert seen.support is not None
        for method in (SET(0.0), RigL(fraction=0.0), GSE(fraction=0.0), RigL(until=1)):
            later = replace(seen, draw=seen.draw + 1)
            assert_same_support(method.choose(later), seen.support)

    @given(seen=views())
    def test_everything_is_replaced(self, seen: View) -> None:
        """SET that drops all weights draws a new random set."""
        expected = Static().choose(replace(seen, support=None))
        assert_same_support(SET(1.0).choose(seen), expected)

    @given(seen=views())
    def test_gse_with_all_candidates_is_rigl(self, seen: View) -> None:
        method = GSE(fraction=0.4, samples=100.0)
        assert_same_support(method.choose(seen), RigL(fraction=0.4, regrow=False).choose(seen))

    @given(seen=views())
    def test_dnw_is_topkast(self, seen: View) -> None:
        seen = replace(seen, backward=seen.weights.shape[0], support=None)
        assert_same_support(DNW().choose(seen), TopKAST().choose(seen))
        if seen.forward < seen.backward:
            assert_same_support(IHT().choose(seen), TopKAST().choose(seen))

    def test_defaults(self) -> None:
        assert (ITOP().fraction, ITOP.default_refresh_every) == (0.5, 4000)
        assert (SMET().fraction, GSE().fraction) == (0.2, 0.2)
        rivals: list[Any] = [SET, SMET, RigL, ITOP, GSE, SNIP, GradualPruning, GraNet, ACDC, DNW]
        assert all(method.default_penalty == 0 for method in [*rivals, IHT])


def shapes_of(library: Library, arrays: dict[str, Vector], *, forward: int, backward: int) -> Any:
    """A function from arrays and the number of updates to the indices that a method chooses."""

    def choose(method: Method) -> Callable[[dict[str, Any], Any], Any]:
        def run(given: dict[str, Any], draw: Any) -> Any:
            indices = given.get("indices")
            support = None if indices is None else Support(indices, len(arrays["active"]))
            seen = View(given["weights"], forward, backward, seed=3, name="w", draw=draw)
            seen = replace(
                seen,
                support=support,
                values=given.get("values"),
                gradient=given["gradient"],
                shapes={"w": (30, 20)},
            )
            return method.choose(seen).indices

        compiled: Callable[[dict[str, Any], Any], Any] = library.compile(run)
        return compiled

    return choose


class TestLibraries:
    """Every library chooses the same, with the number of updates traced inside jit."""

    @pytest.fixture
    def arrays(self) -> dict[str, Vector]:
        rng = np.random.default_rng(0)
        weights = rng.standard_normal(600).astype(np.float32).round(1)  # with ties
        active = np.sort(rng.permutation(600)[:120]).astype(np.int32)
        gradient = rng.standard_normal(600).astype(np.float32).round(1)
        return {"weights": weights, "active": active, "gradient": gradient}

    @pytest.mark.parametrize("method", REWIRING, ids=repr)
    def test_methods_that_replace(
        self, any_library: Library, method: Method, arrays: dict[str, Vector]
    ) -> None:
        active, weights = arrays["active"], arrays["weights"]
        given = {"weights": weights, "gradient": arrays["gradient"], "indices": active}
        given["values"] = weights[active]
        converted = {name: any_library.asarray(array) for name, array in given.items()}
        run = shapes_of(any_library, arrays, forward=120, backward=120)(method)
        for draw in (4, 13, 25):
            expected = method.choose(view(weights, active, arrays["gradient"], draw=draw))
            count: Any = draw
            if any_library.name.startswith("jax"):
                count = jnp.asarray(draw, jnp.int32)
            elif any_library.name == "array-api-strict":
                count = array_api_strict.asarray(draw, dtype=array_api_strict.int32)
            indices = to_numpy(run(converted, count))
            np.testing.assert_array_equal(indices, expected.indices)

    @pytest.mark.parametrize("method", SCHEDULED, ids=repr)
    def test_methods_with_schedules(
        self, any_library: Library, method: Method, arrays: dict[str, Vector]
    ) -> None:
        if any_library.traces:
            pytest.skip("their shapes change")
        active, weights = arrays["active"], arrays["weights"]
        support = Support.of(active, np.setdiff1d(np.arange(600, dtype=np.int32), active))
        given = {"weights": weights, "gradient": arrays["gradient"], "indices": support.indices}
        given["values"] = weights[support.indices]
        converted = {name: any_library.asarray(array) for name, array in given.items()}
        run = shapes_of(any_library, arrays, forward=60, backward=600)(method)
        for draw in (0, 4, 13, 22, 60):
            seen = View(weights, 60, 600, seed=3, name="w", draw=draw, support=support)
            seen = replace(seen, values=given["values"], gradient=arrays["gradient"])
            indices = to_numpy(run(converted, draw))
            np.testing.assert_array_equal(indices, method.choose(seen).indices)

    def test_methods_that_choose_once(
        self, any_library: Library, arrays: dict[str, Vector]
    ) -> None:
        sensitivities = arrays["weights"] * arrays["gradient"]
        for shuffled in (False, True):
            if any_library.traces and shuffled:
                continue  # counts per tensor are values
            method, expected = (
                SNIP({"w": convert(sensitivities.reshape(30, 20))}, shuffled)
                for convert in (any_library.asarray, np.asarray)
            )
            converted = {name: any_library.asarray(arrays[name]) for name in arrays}
            run = shapes_of(any_library, arrays, forward=60, backward=60)(method)
            seen = View(arrays["weights"], 60, 60, seed=3, name="w", shapes={"w": (30, 20)})
            np.testing.assert_array_equal(
                to_numpy(run(converted, 0)), expected.choose(seen).indices
            )

    @pytest.mark.parametrize("method", [RigL(fraction=0.5), SET(0.5, signed=True)], ids=repr)
    def test_small_half_precision_numbers_rank(self, method: Method) -> None:
        """Below the smallest normal number of float16, 6e-5, inside jit as outside."""
        gradient = (np.arange(16) * 1e-6).astype(np.float16)
        weights = (WEIGHTS * 5e-5).astype(np.float16)
        expected = method.choose(view(weights.astype(np.float32), ACTIVE, gradient, draw=1))

        def run(weights: Any, values: Any, gradient: Any, indices: Any, draw: Any) -> Any:
            seen = View(weights, 8, 8, seed=3, name="w", draw=draw, support=Support(indices, 8))
            return method.choose(replace(seen, values=values, gradient=gradient)).indices

        arguments: list[Any] = [
            jnp.asarray(a) for a in (weights, weights[ACTIVE], gradient, ACTIVE)
        ]
        functions: list[Any] = [run, jax.jit(run)]
        for function in functions:
            indices = function(*arguments, jnp.asarray(1))
            np.testing.assert_array_equal(indices, expected.indices)

    @pytest.mark.parametrize("convert", [np.asarray, torch.asarray], ids=["numpy", "torch"])
    def test_complex_numbers(self, convert: Any) -> None:
        """They rank by modulus; a share by sign is refused."""
        phases = np.exp(1j * np.arange(16)).astype(np.complex64)
        weights, gradient = WEIGHTS * phases, GRADIENT * phases
        seen = view(weights, ACTIVE, gradient)
        seen = replace(
            seen,
            weights=convert(weights),
            values=convert(weights[ACTIVE]),
            gradient=convert(gradient),
            support=Support(convert(ACTIVE), 8),
        )
        indices = to_numpy(RigL(fraction=0.25).choose(seen).indices)
        assert set(indices.tolist()) == STAYING | {8, 3}
        with pytest.raises(OptionError, match="w has complex weights, which have no sign"):
            SET(signed=True).choose(seen)

    @pytest.mark.parametrize("method", SCHEDULED, ids=repr)
    def test_schedules_are_refused_inside_jit(self, method: Method) -> None:
        def run(draw: Any) -> Any:
            return method.choose(View(jnp.ones(16), 4, 16, draw=draw)).indices

        with pytest.raises(OptionError, match=f"{type(method).__name__} changes the number"):
            jax.jit(run)(0)


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: SET(1.5), r"fraction is a share and must lie in \[0, 1\], got 1.5"),
    (lambda: SET(-0.1), "fraction is a share"),
    (lambda: SET(True), "fraction is a share"),
    (lambda: SET(float("nan")), "fraction is a share"),
    (lambda: SMET("a fifth"), "fraction is a share"),  # type: ignore[arg-type]
    (lambda: SET(until=0), "until is a number of updates .* at least 1 or None, got 0"),
    (lambda: SET(until=2.5), "until is a number of updates"),  # type: ignore[arg-type]
    (lambda: SET(signed=True, until=9), r"SET\(signed=True\) drops a constant share"),
    (lambda: RigL(fraction=2), "fraction is a share"),
    (lambda: RigL(until=True), "until is a number of updates"),
    (lambda: ITOP(fraction=-1), "fraction is a share"),
    (lambda: GSE(samples=0.0), "samples is a multiple of |A| and must be positive, got 0.0"),
    (lambda: GSE(samples=math.inf), "samples is a multiple"),
    (lambda: GSE(samples=True), "samples is a multiple"),
    (lambda: GSE(regrow=True), "GSE samples from the weights outside A alone"),
    (lambda: GSE(fraction=0.5, samples=0.4), "samples must be at least fraction=0.5, got 0.4"),
    (lambda: GradualPruning(start=-1, end=5), "start is a number of updates .* at least 0, got -1"),
    (lambda: GradualPruning(start=0, end=0), "end is a number of updates .* at least 1, got 0"),
    (lambda: GradualPruning(start=5, end=5), "start must lie before end, got 5 and 5"),
    (lambda: GradualPruning(start=0, end=5, initial=1.1), "initial is a share"),
    (lambda: GraNet(start=0, end=5, fraction=1.1), "fraction is a share"),
    (lambda: GraNet(start=0, end=5, until=-3), "until is a number of updates"),
    (lambda: ACDC(warm_up=-1, sparse=1, dense=1, end=5), "warm_up is a number of updates"),
    (lambda: ACDC(warm_up=0, sparse=0, dense=1, end=5), "sparse is a number of updates"),
    (lambda: ACDC(warm_up=0, sparse=1, dense=0, end=5), "dense is a number of updates"),
    (lambda: ACDC(warm_up=0, sparse=1, dense=1, end=0), "end is a number of updates"),
    (lambda: IHT(end=-1), "end is a number of updates"),
    (lambda: IHT(initial=2.0), "initial is a share"),
]


def wrap(method: Method | None, *, fwd: float = 0.9, bwd: float = 0.9, **options: Any) -> Any:
    return topkast.wrap_optimizer(topkast.SGD(0.1), fwd=fwd, bwd=bwd, method=method, **options)


PRUNING: list[Method] = [
    DNW(),
    IHT(),
    GradualPruning(start=0, end=5),
    GraNet(start=0, end=5),
    ACDC(warm_up=0, sparse=1, dense=1, end=5),
]


class TestRefusals:
    @pytest.mark.parametrize(("make", "message"), BAD)
    def test_values(self, make: Callable[[], Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            make()

    @pytest.mark.parametrize("method", [SET(), SMET(), RigL(), ITOP(), GSE(), SNIP({})], ids=repr)
    def test_another_backward_set(self, method: Method) -> None:
        name = type(method).__name__
        with pytest.raises(OptionError, match=f"{name} has one set, .* pass bwd=0.9, .* bwd=0.8"):
            wrap(method, bwd=0.8)

    @pytest.mark.parametrize("method", PRUNING, ids=repr)
    def test_a_sparse_backward_set(self, method: Method) -> None:
        name = type(method).__name__
        with pytest.raises(OptionError, match=f"{name} keeps all weights .* pass bwd=0, got"):
            wrap(method, bwd=0.8)

    @pytest.mark.parametrize("method", [SET(), RigL(), *PRUNING[1:]], ids=repr)
    def test_units_and_layers(self, method: Method) -> None:
        bwd = 0.9 if method.backward == "equal" else 0.0
        with pytest.raises(OptionError, match="chooses single weights: pass block=None"):
            wrap(method, bwd=bwd, block=(2, 2))
        wrap(method, bwd=bwd, block=(1, 1))
        with pytest.raises(OptionError, match="cannot rank the layers of a stacked tensor"):
            wrap(method, bwd=bwd, stacked="w")

    def test_sensitivities(self) -> None:
        params = {"w": np.ones((4, 5)), "v": np.ones((4, 5))}
        good = np.ones((4, 5))
        cases: list[tuple[dict[str, Any], str]] = [
            ({"w": good}, "SNIP got no sensitivities of v, but of w"),
            ({}, "SNIP got no sensitivities of w, but of nothing"),
            ({"w": good, "v": np.ones((5, 4))}, r"v have shape \(5, 4\), but its weights \(4, 5\)"),
            ({"w": good, "v": np.ones(20)}, r"v have shape \(20,\)"),
            ({"w": good, "v": torch.ones(4, 5)}, r"v are a torch\.Tensor, expected .* numpy"),
        ]
        for sensitivities, message in cases:
            for distribution in ("uniform", "global"):
                tx = wrap(SNIP(sensitivities), distribution=distribution)
                with pytest.raises(OptionError, match=message):
                    tx.init(params)
        units: list[tuple[tuple[int, ...], Any]] = [
            ((4, 5), {"block": (2, 5)}),
            ((2, 4, 5), {"stacked": "w"}),
        ]
        for shape, options in units:
            method = SNIP({"w": np.ones(shape)})
            with pytest.raises(OptionError, match="SNIP ranks the single weights"):
                wrap(method, **options).init({"w": np.ones(shape)})

    def test_sensitivities_that_are_not_finite(self) -> None:
        method = SNIP({"w": np.full((4, 5), np.nan)})
        with pytest.raises(topkast.NonFiniteError, match="w: 20 of 20 entries"):
            wrap(method).init({"w": np.ones((4, 5))})

    def test_overrides_that_complete_each_other(self) -> None:
        """The method of one glob fits the sparsities of another; what does not fit is refused."""
        params = {name: np.random.default_rng(0).standard_normal((10, 10)) for name in "ab"}
        for overrides in (
            {"a": {"method": RigL()}, "*": {"bwd": 0.9}},
            {"*": {"bwd": 0.9}, "a": {"method": RigL()}},
        ):
            supports = wrap(None, bwd=0.8, overrides=overrides).init(params).supports
            assert (supports["a"].forward, supports["a"].backward) == (10, 10)
        fits: dict[str, Any] = {"a": {"fwd": 0.5, "bwd": 0.5}, "b": {"penalty": 0.1}}
        assert wrap(RigL(), overrides=fits).init(params).supports["a"].backward == 50
        with pytest.raises(OptionError, match=r"overrides.*RigL has one set"):
            wrap(None, bwd=0.8, overrides={"a": {"method": RigL()}})
        with pytest.raises(OptionError, match=r"overrides.*RigL has one set"):
            wrap(RigL(), overrides={"a": {"bwd": 0.5}})
        bad: dict[str, Any] = {"*": {"fwd": 0.5}, "a": {"method": RigL()}}
        with pytest.raises(OptionError, match=r"overrides of 'a': RigL has one set"):
            wrap(None, bwd=0.4, overrides=bad).init(params)
        with pytest.raises(OptionError, match=r"method must be a topkast\.methods\.Method"):
            wrap(None, overrides={"a": {"method": "rigl"}, "b": {"fwd": 0.95}})

    def test_layers_whose_sets_do_not_fit(self) -> None:
        from topkast_torch import SparseLinear

        for bwd, method, expected in [(0.8, RigL(), 60), (0.8, DNW(), 600), (0.8, SET(), 60)]:
            layer = SparseLinear(20, 30, fwd=0.9, bwd=bwd)
            inner = torch.optim.SGD(layer.named_parameters(), 0.1)
            own = 0.9 if method.backward == "equal" else 0.0
            with pytest.raises(
                OptionError, match=rf"\|A\|, \|B\| = 60, 120, .* \|B\| = {expected}"
            ):
                topkast.wrap_optimizer(inner, fwd=0.9, bwd=own, method=method)

    @pytest.mark.parametrize("method", PRUNING[1:], ids=repr)
    def test_schedules_in_optax(self, method: Method) -> None:
        import optax

        message = f"{type(method).__name__} changes the number of weights in A"
        with pytest.raises(OptionError, match=message):
            topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.9, bwd=0, method=method)
        with pytest.raises(OptionError, match=message):
            topkast.wrap_optimizer(
                optax.sgd(0.1), fwd=0.9, bwd=0, overrides={"w": {"method": method}}
            )

    def test_groups_with_methods_of_their_own(self) -> None:
        """A group's method has its group's sparsities, whatever those of the wrapper are."""
        params = {name: nn.Parameter(torch.randn(12, 10)) for name in ("body", "head")}
        groups: list[Any] = [
            {"params": [("body", params["body"])]},
            {"params": [("head", params["head"])], "method": TopKAST(), "fwd": 0.9, "bwd": 0.5},
        ]
        opt = topkast.wrap_optimizer(
            torch.optim.SGD(groups, 0.1), fwd=0.8, bwd=0.8, method=RigL(), refresh_every=1
        )
        for _ in range(3):
            for param in params.values():
                param.grad = torch.randn(12, 10)
            opt.step()
            opt.load_state_dict(opt.state_dict())
            masks = topkast.masks(opt)
            assert [int(mask.sum()) for mask in masks["body"]] == [24, 24]
            assert [int(mask.sum()) for mask in masks["head"]] == [12, 60]
        opt.param_groups[0]["bwd"] = 0.5
        with pytest.raises(OptionError, match="bwd of a parameter group was changed"):
            opt.step()
