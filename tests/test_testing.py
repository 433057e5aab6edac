"""Each assertion catches a mask that breaks only its law."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import find, given
from libraries import Library

import topkast
from topkast import Masks, Support, testing

THETA = np.asarray([[0.1, -0.9, 0.5], [0.5, 0.0, -0.7]], dtype=np.float32)
GOOD = Masks(  # the hash prefers the second of the two entries 0.5
    np.asarray([[False, True, False], [False, False, True]]),
    np.asarray([[False, True, False], [True, False, True]]),
)
PAIR: dict[str, Any] = {"fwd": 0.7, "bwd": 0.5}


def changed(mask: np.ndarray[Any, Any], *flips: tuple[int, int]) -> np.ndarray[Any, Any]:
    mask = mask.copy()
    for position in flips:
        mask[position] ^= True
    return mask


def test_good_masks_pass(library: Library) -> None:
    testing.assert_masks(library.asarray(THETA), Masks(*map(library.asarray, GOOD)), **PAIR)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (GOOD._replace(forward=changed(GOOD.forward, (0, 1))), r"\|A\| is 1, expected 2 of 6"),
        (GOOD._replace(backward=changed(GOOD.backward, (1, 1))), r"\|B\| is 4, expected 3 of 6"),
        (GOOD._replace(backward=changed(GOOD.backward, (0, 1), (0, 2))), "A has 1 entries outside"),
        (
            Masks(changed(GOOD.forward, (1, 2), (1, 0)), GOOD.backward),
            "kept a magnitude of 0.5 and dropped one of 0.699",
        ),
        (
            GOOD._replace(backward=changed(GOOD.backward, (0, 2), (1, 0))),
            "kept a tie and dropped one with a larger hash",
        ),
    ],
)
def test_broken_law_is_named(library: Library, masks: Masks, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.assert_masks(library.asarray(THETA), Masks(*map(library.asarray, masks)), **PAIR)


def test_forward_view_is_compared_by_bits() -> None:
    alpha = np.where(GOOD.forward, THETA, np.float32(0))
    testing.assert_forward_view(THETA, alpha, GOOD.forward)
    for wrong, message in [
        (np.where(GOOD.forward, THETA, np.float32(-0.0)), "not [+]0 outside A"),
        (np.where(GOOD.forward, -THETA, np.float32(0)), "differs from the weights on A"),
        (alpha.astype(np.float64), "the view is float64"),
    ]:
        with pytest.raises(AssertionError, match=message):
            testing.assert_forward_view(THETA, wrong, GOOD.forward)


def test_moved_reservoir_is_caught_even_by_the_sign_of_zero() -> None:
    testing.assert_reservoir_unchanged(THETA, np.where(GOOD.backward, 7, THETA), GOOD.backward)
    for position, value in (((0, 0), 0.2), ((1, 1), -0.0)):
        after = THETA.copy()
        after[position] = value
        with pytest.raises(AssertionError, match="of 3 weights outside B have moved"):
            testing.assert_reservoir_unchanged(THETA, after, GOOD.backward)


def test_survivors() -> None:
    old, new = (Support(np.asarray(i), 0) for i in ([0, 2, 5], [2, 3, 5]))
    before = np.asarray([1.0, 2.0, 3.0])
    testing.assert_survivors_unchanged(before, np.asarray([2.0, 0.0, 3.0]), old, new)
    with pytest.raises(AssertionError, match="an entry changed while it was in B"):
        testing.assert_survivors_unchanged(before, np.asarray([3.0, 0.0, 2.0]), old, new)
    with pytest.raises(AssertionError, match=r"an entry did not enter B as 0\.0"):
        testing.assert_survivors_unchanged(before, np.asarray([2.0, 1.0, 3.0]), old, new)


def test_same_support() -> None:
    support = topkast.select(THETA, **PAIR)
    testing.assert_same_support(support, support)
    with pytest.raises(AssertionError, match="A differs"):
        testing.assert_same_support(support, Support(support.indices, support.forward - 1))
    with pytest.raises(AssertionError, match="A differs"):
        testing.assert_same_support(support, Support(support.indices + 1, support.forward))


@given(pair=testing.sparsities())
def test_sparsities_are_valid(pair: tuple[float, float]) -> None:
    topkast.select(THETA, fwd=pair[0], bwd=pair[1])


@pytest.mark.parametrize(
    "trait",
    [
        lambda theta: theta.size == 0,
        lambda theta: theta.size == 1,
        lambda theta: theta.ndim == 2 and theta.size > 4,
        lambda theta: len(np.unique(np.abs(theta))) < theta.size > 2,
        lambda theta: bool(np.any((theta == 0) & np.signbit(theta))),
        lambda theta: bool(np.any((theta != 0) & (np.abs(theta) < np.finfo(theta.dtype).tiny))),
        lambda theta: bool(np.abs(theta).max(initial=0) > 1e30),
    ],
    ids=["empty", "single", "matrix", "ties", "negative zero", "subnormal", "huge"],
)
def test_weights_include_every_hard_case(trait: Any) -> None:
    assert trait(find(testing.weights(), trait))


@pytest.mark.parametrize("strategy", [testing.weights, testing.sparsities])
def test_a_missing_hypothesis_is_named(strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'topkast\[testing\]'") as caught:
        strategy()
    assert caught.value.name == "hypothesis"


NUMBERS: dict[str, Any] = {
    "counts": lambda masks: testing.assert_counts(masks, **PAIR),
    "nested": testing.assert_nested,
    "order": lambda masks: testing.assert_magnitude_order(THETA, masks.forward),
    "ties": lambda masks: testing.assert_tie_order(THETA, masks.forward),
    "masks": lambda masks: testing.assert_masks(THETA, masks, **PAIR),
    "view": lambda masks: testing.assert_forward_view(THETA, THETA * masks.forward, masks.forward),
    "reservoir": lambda masks: testing.assert_reservoir_unchanged(THETA, THETA, masks.backward),
}


@pytest.mark.parametrize("assertion", NUMBERS)
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float32])
def test_masks_of_numbers_are_refused(assertion: str, dtype: Any) -> None:
    """NumPy takes them for indices, so that wrong weights would pass."""
    masks = Masks(*(mask.astype(dtype) for mask in GOOD))
    with pytest.raises(topkast.MismatchError, match=r"expected booleans: mask != 0"):
        NUMBERS[assertion](masks)


def test_other_shapes_are_refused_where_numpy_would_broadcast() -> None:
    row = GOOD.forward[:1]
    checks: list[Callable[[], None]] = [
        lambda: testing.assert_nested(Masks(row, GOOD.backward)),
        lambda: testing.assert_magnitude_order(THETA, GOOD.forward.T),
        lambda: testing.assert_tie_order(THETA, GOOD.forward.T),
        lambda: testing.assert_forward_view(THETA, THETA[:1], GOOD.forward),
        lambda: testing.assert_forward_view(THETA, THETA, row),
        lambda: testing.assert_reservoir_unchanged(THETA, THETA[:1], GOOD.backward),
        lambda: testing.assert_reservoir_unchanged(THETA, THETA, row),
    ]
    for check in checks:
        with pytest.raises(topkast.MismatchError, match="got shape"):
            check()
    with pytest.raises(AssertionError, match="were float32, and are float64"):
        testing.assert_reservoir_unchanged(THETA, THETA.astype(np.float64), GOOD.backward)


def test_survivors_need_one_value_for_each_entry_of_b() -> None:
    old, new = (Support(np.asarray(i), 0) for i in ([0, 2, 5], [2, 3, 5]))
    before, after = np.asarray([1.0, 2.0, 3.0]), np.asarray([2.0, 0.0, 3.0])
    for first, second, name in (
        (before, after[:2], "after, on the new B"),
        (np.append(before, 7.0), after, "before, on the old B"),
    ):
        with pytest.raises(topkast.MismatchError, match=f"values {name}: got shape"):
            testing.assert_survivors_unchanged(first, second, old, new)
