"""NumPy arrays of every layout train alike; those of other meanings and sizes are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import topkast
from topkast import analysis


class Tagged(np.ndarray[Any, Any]):
    """A subclass without behaviour of its own."""


def read_only(array: Any) -> Any:
    array = array.copy()
    array.flags.writeable = False
    return array


def unaligned(array: Any) -> Any:
    return np.frombuffer(b"0" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "read-only": read_only,
    "Fortran order": np.asfortranarray,
    "negative strides": lambda array: np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1],
    "strided": lambda array: np.repeat(array, 2, axis=1)[:, ::2],
    "unaligned": unaligned,
    "byte-swapped": lambda array: array.astype(array.dtype.newbyteorder()),
    "broadcast": lambda array: np.broadcast_to(array, array.shape),
    "subclass": lambda array: array.view(Tagged),
}
RULES = {
    "sgd": topkast.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": topkast.AdamW(0.01),
}


def train(layout: Callable[[Any], Any], rule: Any, dtype: Any, *, step: bool) -> list[Any]:
    """Weights and forward views of four updates, with two refreshes."""
    rng = np.random.default_rng(0)
    draws = [rng.standard_normal((6, 8)).astype(dtype) for _ in range(5)]
    tx = topkast.wrap_optimizer(rule, fwd=0.75, bwd=0.5, refresh_every=2)
    params = {"w": layout(draws[0])}
    state, course = tx.init(params), []
    given = [(params["w"], draws[0])]
    for draw in draws[1:]:
        grads = {"w": layout(draw)}
        given.append((grads["w"], draw))
        if step:
            params, state = tx.step(grads, state, params)
        else:
            updates, state = tx.update(grads, state, params)
            params = topkast.apply_updates(params, updates)
        course += [np.array(params["w"]), np.array(topkast.forward_params(params, state)["w"])]
    for array, draw in given:
        np.testing.assert_array_equal(array, draw)  # nothing writes into what it was given
    return course


@pytest.mark.parametrize("step", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "complex64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_alike(layout: str, dtype: str, rule: str, step: bool) -> None:
    actual = train(LAYOUTS[layout], RULES[rule], dtype, step=step)
    expected = train(lambda array: array, RULES[rule], dtype, step=step)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_may_be_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((6, 8))
    np.save(tmp_path / "w.npy", weights)
    params = {"w": np.load(tmp_path / "w.npy", mmap_mode="r")}
    tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.75, bwd=0.5)
    params, state = tx.step({"w": np.ones((6, 8))}, tx.init(params), params)
    assert topkast.summary(state, params).tensors[0].forward == 12
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), weights)


@pytest.mark.parametrize("rule", [topkast.SGD(0.1, momentum=0.5), topkast.Adam(betas=(0.0, 0.9))])
def test_numbers_and_vectors_of_one_entry_stay_dense(rule: Any) -> None:
    params = {"w": np.ones((4, 4)), "v": np.ones(1), "s": np.asarray(1.0), "e": np.ones((0, 3))}
    grads = {name: np.ones_like(array) for name, array in params.items()}
    tx = topkast.wrap_optimizer(rule, fwd=0.5, bwd=0.5, penalty=0.0, refresh_every=9)
    state = tx.init(params)
    for _ in range(3):
        params, state = tx.step(grads, state, params)
    assert params["s"].shape == ()
    assert params["s"] == params["v"][0] == params["w"].min()
    rows = {row.name: row for row in topkast.summary(state, params).tensors}
    assert [rows[name].forward for name in "wvse"] == [8, 1, 1, 0]


MASKED = np.ma.masked_array(np.ones((4, 4)), mask=np.eye(4) > 0)
with pytest.warns(PendingDeprecationWarning):
    MATRIX = np.matrix(np.ones((4, 4)))


@pytest.mark.parametrize(
    ("array", "message"),
    [(MASKED, "pass array.filled"), (MATRIX, "pass numpy.asarray")],
    ids=["masked", "matrix"],
)
class TestArraysWithOtherOperations:
    """A masked array takes part with its masked entries in some operations, and not in others."""

    def test_functions(self, array: Any, message: str) -> None:
        support = topkast.select(np.ones((4, 4)), fwd=0.5, bwd=0.5)
        calls: list[Callable[[], Any]] = [
            lambda: topkast.select(array, fwd=0.5, bwd=0.5),
            lambda: topkast.select(array, fwd=0.5, bwd=0.5, block=(2, 2)),
            lambda: topkast.select(array, fwd=0.5, bwd=0.5, pattern=(2, 4)),
            lambda: topkast.gather(array, support),
        ]
        for call in calls:
            with pytest.raises(topkast.UnsupportedTensorError, match=message):
                call()

    def test_training_names_the_array(self, array: Any, message: str) -> None:
        tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.5)
        with pytest.raises(topkast.UnsupportedTensorError, match=f"^w: .*{message}"):
            tx.init({"w": array})
        params = {"w": np.ones((4, 4))}
        state = tx.init(params)
        for call in (tx.update, tx.step):
            with pytest.raises(topkast.UnsupportedTensorError, match=r"^the gradient of w: "):
                call({"w": array}, state, params)


def test_masks_with_masked_entries_are_refused() -> None:
    with pytest.raises(topkast.UnsupportedTensorError, match=r"pass array\.filled"):
        analysis.mask_change(MASKED > 0, np.ones((4, 4), bool))


def test_what_is_no_array_of_floats_is_named() -> None:
    ml_dtypes: Any = pytest.importorskip("ml_dtypes")
    tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.5)
    for array, message in (
        (np.ones((4, 4), ml_dtypes.bfloat16), "w: numpy does not know the dtype bfloat16"),
        ([[1.0, 2.0]], "w: list is not a supported array type"),
        (np.ones((4, 4), int), "w: weights must be floats, got int64"),
        (np.ones((4, 4), object), "w: weights must be floats, got object"),
    ):
        with pytest.raises(topkast.UnsupportedTensorError, match=message):
            tx.init({"w": array})


@pytest.mark.parametrize("block", [None, (2, 1)])
@pytest.mark.parametrize("size", [0, 1, 3, 5, 16])
def test_values_of_other_sizes_are_refused(size: int, block: Any) -> None:
    """All weights are taken for those of B as easily as one that would be broadcast."""
    theta = np.arange(1.0, 17.0).reshape(4, 4)
    support = topkast.select(theta, fwd=0.75, bwd=0.5, block=block)
    values = np.ones(size)
    scale: Any = {"penalty": 0.1, "density": 0.25}
    calls: tuple[Callable[[], Any], ...] = (
        lambda: topkast.scatter(values, support, shape=(4, 4)),
        lambda: topkast.forward_view(values, support, shape=(4, 4)),
        lambda: topkast.exploration_penalty(values, support, **scale),
        lambda: topkast.exploration_gradient(values, support, **scale),
    )
    for call in calls:
        with pytest.raises(topkast.MismatchError, match=r"expected the 8 values .* got an array"):
            call()
    gathered = topkast.gather(theta, support).reshape(2, 4)  # of any shape
    assert topkast.scatter(gathered, support, shape=(4, 4)).sum() == gathered.sum()


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"w": np.ones((3, 1))}, r"w: the update has the shape \(3, 1\), but the parameter \(3,\)"),
        ({"w": np.ones(())}, r"w: the update has the shape \(\), but"),
        ({}, r"\['w'\] are in one alone"),
        ({"w": np.ones(3), "b": np.ones(3)}, r"\['b'\] are in one alone"),
    ],
)
def test_updates_of_other_parameters_are_refused(updates: Any, message: str) -> None:
    with pytest.raises(topkast.MismatchError, match=message):
        topkast.apply_updates({"w": np.ones(3)}, updates)


@pytest.mark.parametrize("explore", ["Random", "rand", "magnitudes", None])
def test_an_unknown_way_to_explore_is_refused(explore: Any) -> None:
    """It was taken for a random choice."""
    with pytest.raises(topkast.OptionError, match="explore must be 'magnitude' or 'random', got"):
        topkast.select(np.ones((4, 4)), fwd=0.5, bwd=0.25, explore=explore)


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999), None])
def test_betas_are_two(betas: Any) -> None:
    with pytest.raises(topkast.OptionError, match="betas must be two numbers"):
        topkast.Adam(betas=betas)
