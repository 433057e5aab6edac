"""The option `pattern`: in every framework, A and B have exact counts in each group of weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_trajectories
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from libraries import LIBRARIES, Library, host
from rules import RULES
from test_trajectories import assert_same, by_reference, by_torch, by_transform, changes
from torch import nn

import topkast
from topkast import Masks, Support
from topkast.methods import Method, Mixed, Random, Static, TopKAST
from topkast.reference import top_k
from topkast.testing import assert_counts, assert_masks, assert_same_support, to_numpy

Tensor = np.ndarray[Any, Any]
Pattern = tuple[int, int]
NUMPY, TORCH, JITTED = (
    next(library for library in LIBRARIES if library.name == name)
    for name in ("numpy", "torch", "jax-jit")
)
TWO_OF_FOUR: dict[str, Any] = {"fwd": 0.5, "bwd": 0.25, "pattern": (2, 4)}
METHODS: list[Method] = [TopKAST(), Random(), Mixed(0.5), Static()]


@st.composite
def matrices_and_patterns(draw: st.DrawFn) -> tuple[Tensor, Pattern, float, float]:
    """Matrices with ties, zeros and subnormals; a pattern that fits them, fwd and bwd."""
    size = draw(st.integers(1, 7))
    kept = draw(st.integers(1, size))
    backward = draw(st.integers(kept, size))
    shape = draw(st.integers(0, 4)), size * draw(st.integers(1, 4))
    tied = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1e-30, 1e-42])
    entries = tied | st.floats(-1e6, 1e6, width=32)
    theta = draw(stnp.arrays(np.float32, shape, elements=entries))
    return theta, (kept, size), 1 - kept / size, 1 - backward / size


def masks_of(support: Support, theta: Tensor) -> Masks:
    flags = np.zeros((2, theta.size), dtype=bool)
    flags[0, to_numpy(support.active)] = True
    flags[1, to_numpy(support.indices)] = True
    return Masks(*flags.reshape(2, *theta.shape))


def group_counts(mask: Any, size: int) -> set[int]:
    """The different numbers of true entries in groups of `size` consecutive ones."""
    return set(to_numpy(mask).reshape(-1, size).sum(axis=1).tolist())


# One choice --------------------------------------------------------------------------------------


def test_two_of_four_by_hand(any_library: Library) -> None:
    theta = np.asarray([[1, -4, 2, 3, 0, -1, 0.5, 2], [9, 8, 7, 6, -5, 1, -6, 2]], np.float32)
    choose = any_library.compile(lambda array: topkast.select(array, **TWO_OF_FOUR))
    support = choose(any_library.asarray(theta))
    assert to_numpy(support.active).tolist() == [1, 3, 5, 7, 8, 9, 12, 14]
    assert to_numpy(support.exploring).tolist() == [2, 6, 10, 15]
    assert (support.forward, support.backward, support.group_size) == (8, 12, 4)


def test_rows_are_the_first_axis_and_groups_do_not_cross_them() -> None:
    theta = np.arange(24.0).reshape(2, 3, 4) + 1
    support = topkast.select(theta, fwd=5 / 6, bwd=0.5, pattern=(1, 6))
    assert support.active.tolist() == [5, 11, 17, 23]
    assert support.exploring.tolist() == [3, 4, 9, 10, 15, 16, 21, 22]


@given(problem=matrices_and_patterns())
def test_laws(library: Library, problem: tuple[Tensor, Pattern, float, float]) -> None:
    """Exact counts by group, nested sets, the largest of each group, ties broken by hash."""
    theta, pattern, fwd, bwd = problem
    options: dict[str, Any] = {"fwd": fwd, "bwd": bwd, "pattern": pattern, "name": "w"}
    support = topkast.select(library.asarray(theta), **options)
    masks = masks_of(support, theta)
    assert_masks(theta, masks, **options)
    support.check(theta.size, "it")
    for mask, sparsity in zip(masks, (fwd, bwd), strict=True):
        np.testing.assert_array_equal(mask, top_k(theta, sparsity, pattern=pattern, name="w"))
    assert_same_support(support, topkast.select(theta, **options))


@given(problem=matrices_and_patterns(), seed=st.integers(0, 9))
def test_random_exploration_keeps_the_counts(
    library: Library, problem: tuple[Tensor, Pattern, float, float], seed: int
) -> None:
    theta, pattern, fwd, bwd = problem
    options: dict[str, Any] = {"fwd": fwd, "bwd": bwd, "pattern": pattern, "seed": seed}
    support = topkast.select(library.asarray(theta), explore="random", **options)
    masks = masks_of(support, theta)
    assert_counts(masks, fwd=fwd, bwd=bwd, pattern=pattern)
    np.testing.assert_array_equal(masks.forward, top_k(theta, fwd, pattern=pattern, seed=seed))
    support.check(theta.size, "it")
    assert_same_support(support, topkast.select(theta, explore="random", **options))


@pytest.mark.parametrize("explore", ["magnitude", "random"])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 10), (7, 40)], ids=str)
def test_sets_are_the_same_in_every_library(
    any_library: Library, rng: np.random.Generator, pattern: Pattern, explore: Any
) -> None:
    theta = rng.standard_normal((30, 40)).astype(np.float32)
    theta[:10] = np.round(theta[:10])  # ties
    kept, size = pattern
    options: dict[str, Any] = {"fwd": 1 - kept / size, "bwd": 1 - (kept + 1) / size}
    options |= {"pattern": pattern, "explore": explore, "seed": 3}
    choose = any_library.compile(lambda array: topkast.select(array, **options))
    expected = topkast.select(theta, **options)
    assert_same_support(choose(any_library.asarray(theta)), expected)
    assert group_counts(masks_of(expected, theta).forward, size) == {kept}
    assert group_counts(masks_of(expected, theta).backward, size) == {kept + 1}


@pytest.mark.parametrize("size", [127, 128, 129, 33_000])
@pytest.mark.parametrize("library", [NUMPY, TORCH], ids=str)
def test_large_groups(library: Library, rng: np.random.Generator, size: int) -> None:
    """Places in a group are counted in integers that hold the size of the group."""
    theta = rng.permutation(size).astype(np.float32)[None, :]
    dropped = 3
    sparsity = dropped / size
    support = topkast.select(
        library.asarray(theta), fwd=sparsity, bwd=sparsity, pattern=(size - dropped, size)
    )
    np.testing.assert_array_equal(support.indices, np.flatnonzero(theta[0] >= dropped))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_groups_are_chosen_as_layers_are(method: Method, rng: np.random.Generator) -> None:
    """The groups of a tensor are the layers of a stacked one, whose ranking knows no pattern."""
    theta = np.round(rng.standard_normal((6, 20)), 1).astype(np.float32)
    options: dict[str, Any] = {"fwd": 0.8, "bwd": 0.4, "method": method, "seed": 5}
    by_pattern = topkast.wrap_optimizer(topkast.SGD(0.1), pattern=(1, 5), **options)
    by_layer = topkast.wrap_optimizer(topkast.SGD(0.1), stacked="w", dense=False, **options)
    first = by_pattern.init({"w": theta}).supports["w"]
    second = by_layer.init({"w": theta.reshape(24, 5)}).supports["w"]
    np.testing.assert_array_equal(first.indices, second.indices)
    assert (first.forward, first.backward) == (24, 72)
    params = {"w": nn.Parameter(torch.from_numpy(theta.copy()))}
    inner = torch.optim.SGD(params.items(), 0.1)
    opt = topkast.wrap_optimizer(inner, pattern=(1, 5), **options)
    tx = topkast.wrap_optimizer(optax.sgd(0.1), pattern=(1, 5), **options)
    state = jax.jit(tx.init)({"w": jnp.asarray(theta)})
    for supports in (opt.__topkast_inspect__().supports, state.supports):
        assert_same_support(supports["w"], first)


def test_draws_are_uniform_in_a_group() -> None:
    theta = np.asarray([[9.0, 1, 2, 3, 1, 9, 0, 0]])
    drawn: Counter[int] = Counter()
    for seed in range(600):
        support = topkast.select(
            theta, fwd=0.75, bwd=0.5, pattern=(1, 4), explore="random", seed=seed
        )
        assert support.active.tolist() == [0, 5]
        drawn.update(support.exploring.tolist())
    assert set(drawn) == {1, 2, 3, 4, 6, 7}
    assert max(abs(count - 200) for count in drawn.values()) < 60  # five standard deviations


def test_equal_weights_are_spread() -> None:
    support = topkast.select(np.ones((64, 64)), **TWO_OF_FOUR)
    counts = np.bincount(support.active % 4, minlength=4)
    assert counts.sum() == 2048
    assert max(abs(counts - 512)) < 100


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(any_library: Library, bad: float) -> None:
    theta = np.ones((2, 8), np.float32)
    theta[0, 3] = bad
    choose = any_library.compile(lambda array: topkast.select(array, **TWO_OF_FOUR))
    if any_library.traces:
        support = choose(any_library.asarray(theta))
        assert group_counts(masks_of(support, theta).forward, 4) == {2}
        assert (3 in to_numpy(support.indices)) == np.isinf(bad)  # NaN ranks last
        return
    with pytest.raises(topkast.NonFiniteError, match="1 of 16 entries are NaN or infinite"):
        choose(any_library.asarray(theta))


def test_other_dtypes() -> None:
    theta = np.asarray([[3, 1, -4, 2]], np.float32)
    half: list[Any] = [
        torch.asarray(theta).to(torch.bfloat16),
        torch.asarray(theta).half(),
        jnp.asarray(theta, dtype=jnp.bfloat16),
        theta.astype(np.float16),
        theta.astype(np.complex64) * 1j,
        theta.astype(np.float64),
    ]
    for array in half:
        support = topkast.select(array, **TWO_OF_FOUR)
        assert to_numpy(support.indices).tolist() == [0, 2, 3]
    choose = jax.jit(lambda array: topkast.select(array, **TWO_OF_FOUR))
    assert choose(half[2]).indices.tolist() == [0, 2, 3]


def test_sparsities_with_no_finite_digits() -> None:
    theta = np.arange(300.0).reshape(5, 60) + 1
    for fwd, bwd in ((2 / 3, 1 / 3), (1 - 1 / 3, 1 - 2 / 3), (0.6666666667, 0.3333333333)):
        support = topkast.select(theta, fwd=fwd, bwd=bwd, pattern=(1, 3))
        assert (support.forward, support.backward) == (100, 200)
        tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=fwd, bwd=bwd, pattern=(1, 3))
        assert_same_support(tx.init({"w": theta}).supports["w"], support)


# Training ----------------------------------------------------------------------------------------


def wider_problem(dtype: Any) -> Any:
    """As `test_trajectories.problem`, with rows of 8 and 4 weights."""
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((50, 12)).astype(dtype)
    targets = rng.standard_normal((50, 4)).astype(dtype)
    theta = {
        "first": (rng.standard_normal((12, 8)) / 3).astype(dtype),
        "second": (rng.standard_normal((8, 4)) / 3).astype(dtype),
    }

    def gradient(alpha: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = np.tanh(inputs @ alpha["first"])
        error = (hidden @ alpha["second"] - targets) / len(inputs)
        back = error @ alpha["second"].T * (1 - hidden**2)
        return {"first": inputs.T @ back, "second": hidden.T @ error}

    return theta, gradient


def assert_exact(trajectory: Any, pattern: Pattern, bwd: float) -> None:
    for masks, theta in trajectory:
        for name in theta:
            assert_counts(masks[name], fwd=1 - pattern[0] / pattern[1], bwd=bwd, pattern=pattern)
            assert not (masks[name].forward & ~masks[name].backward).any()


class TestTrajectories:
    OPTIONS = TWO_OF_FOUR | {"penalty": 1e-2}

    @pytest.fixture(autouse=True)
    def _problem(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(test_trajectories, "problem", wider_problem)

    @pytest.mark.parametrize("library", LIBRARIES[:4], ids=str)
    def test_library_follows_the_reference(self, library: Library) -> None:
        expected = by_reference("adamw-decay", self.OPTIONS, np.float64)
        assert changes(expected) > 0
        inner = RULES["adamw-decay"].arrays()
        actual = by_transform(library, inner, self.OPTIONS, np.float64)
        assert_same(expected, actual)
        assert_exact(actual, (2, 4), 0.25)

    @pytest.mark.parametrize("rule", ["sgd-momentum", "adamw-decay"])
    def test_torch_follows_the_reference(self, rule: str) -> None:
        expected = by_reference(rule, self.OPTIONS, np.float64)
        assert_same(expected, by_torch(rule, self.OPTIONS, np.float64))

    def test_optax_follows_the_reference(self, x64: None) -> None:
        expected = by_reference("adamw-decay", self.OPTIONS, np.float64)
        inner = RULES["adamw-decay"].optax()
        actual = by_transform(JITTED, inner, self.OPTIONS, np.float64, fused=True)
        assert_same(expected, actual)
        assert_exact(actual, (2, 4), 0.25)

    def test_random_exploration_agrees_between_libraries(self) -> None:
        options = self.OPTIONS | {"explore": "random", "explore_until": 40}
        expected = by_torch("adamw-decay", options, np.float64)
        assert_exact(expected, (2, 4), 0.25)
        for library in (NUMPY, TORCH):
            actual = by_transform(library, RULES["adamw-decay"].arrays(), options, np.float64)
            assert_same(expected, actual)


def test_under_scan() -> None:
    tx = topkast.wrap_optimizer(optax.adam(0.05), **TWO_OF_FOUR, refresh_every=2)
    params = {"w": jax.random.normal(jax.random.key(0), (8, 12))}

    def body(carry: Any, _: None) -> Any:
        params, state = carry
        grads = jax.tree.map(lambda a: a - 0.1, topkast.forward_params(params, state))
        return tx.step(grads, state, params), None

    train = jax.jit(lambda carry: jax.lax.scan(body, carry, None, length=4)[0])
    moved, state = train((params, tx.init(params)))
    assert_masks(moved["w"], topkast.masks(state, moved)["w"], **TWO_OF_FOUR, name="w")


@pytest.mark.slow
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
def test_sharded_over_devices() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    tx = topkast.wrap_optimizer(optax.adam(0.05), **TWO_OF_FOUR, refresh_every=2)
    step, theta = jax.jit(tx.step), jax.random.normal(jax.random.key(0), (32, 12))
    results = []
    for weights in (theta, jax.device_put(theta, rows)):
        params = {"w": weights}
        state = tx.init(params)
        for _ in range(3):
            params, state = step({"w": params["w"] - 0.1}, state, params)
        results.append((params, state))
    (alone, first), (sharded, second) = results
    np.testing.assert_allclose(alone["w"], sharded["w"], rtol=1e-6)
    assert_same_support(first.supports["w"], second.supports["w"])


@pytest.mark.parametrize("library", [NUMPY, TORCH, JITTED], ids=str)
def test_stacked(library: Library, rng: np.random.Generator) -> None:
    theta = rng.standard_normal((3, 8, 12)).astype(np.float32)
    tx = topkast.wrap_optimizer(topkast.AdamW(0.1), **TWO_OF_FOUR, stacked="w", refresh_every=2)
    params = {"w": library.asarray(theta)}
    state, step = library.compile(tx.init)(params), library.compile(tx.step)
    for _ in range(4):
        params, state = step({"w": params["w"] * 0.5}, state, params)
        if int(state.updates) % 2 == 0:
            masks, weights = host(topkast.masks(state, params)["w"]), host(params["w"])
            flat = Masks(*(mask.reshape(24, 12) for mask in masks))
            assert_masks(weights.reshape(24, 12), flat, **TWO_OF_FOUR, name="w")
    options: dict[str, Any] = {"fwd": 0.5, "bwd": 0.5, "pattern": (4, 8), "stacked": "w"}
    other = topkast.wrap_optimizer(topkast.SGD(0.1), **options)
    with pytest.raises(topkast.OptionError, match=r"have 12 .* of each layer"):
        other.init({"w": theta})
