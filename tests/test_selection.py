"""Selection on every array library, one law for each test (design, section 4)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from libraries import LIBRARIES, Library

import topkast
from topkast import Masks, Support
from topkast.backends.torch import TorchBackend
from topkast.reference import top_k
from topkast.selection._distribution import exact_fraction, kept_count
from topkast.selection._select import check_size
from topkast.testing import (
    assert_counts,
    assert_forward_view,
    assert_magnitude_order,
    assert_nested,
    assert_same_support,
    assert_tie_order,
    sparsities,
    to_numpy,
    weights,
)

Tensor = np.ndarray[Any, Any]


def choose(library: Library, theta: Tensor, fwd: float, bwd: float, **options: Any) -> Support:
    run = library.compile(lambda array: topkast.select(array, fwd=fwd, bwd=bwd, **options))
    support: Support = run(library.asarray(theta))
    return support


def masks(support: Support, theta: Tensor) -> Masks:
    backward = np.zeros(theta.size, dtype=bool)
    forward = np.zeros(theta.size, dtype=bool)
    backward[to_numpy(support.indices)] = True
    forward[to_numpy(support.active)] = True
    return Masks(forward.reshape(theta.shape), backward.reshape(theta.shape))


@given(theta=weights(), pair=sparsities())
def test_counts_are_exact(library: Library, theta: Tensor, pair: tuple[float, float]) -> None:
    assert_counts(masks(choose(library, theta, *pair), theta), fwd=pair[0], bwd=pair[1])


@given(theta=weights(), pair=sparsities())
def test_forward_set_is_in_backward_set(
    library: Library, theta: Tensor, pair: tuple[float, float]
) -> None:
    assert_nested(masks(choose(library, theta, *pair), theta))


@given(theta=weights(), pair=sparsities())
def test_kept_magnitudes_are_the_largest(
    library: Library, theta: Tensor, pair: tuple[float, float]
) -> None:
    for mask in masks(choose(library, theta, *pair), theta):
        assert_magnitude_order(theta, mask)


@given(theta=weights(), pair=sparsities())
def test_ties_rank_by_hash(library: Library, theta: Tensor, pair: tuple[float, float]) -> None:
    for mask in masks(choose(library, theta, *pair), theta):
        assert_tie_order(theta, mask)


@given(theta=weights(), pair=sparsities())
def test_indices_ascend(library: Library, theta: Tensor, pair: tuple[float, float]) -> None:
    support = choose(library, theta, *pair)
    for indices in (support.active, support.exploring):
        assert (np.diff(to_numpy(indices)) > 0).all()
    assert to_numpy(support.indices).dtype == np.int32


@given(theta=weights(), pair=sparsities())
def test_sets_equal_the_reference(
    any_library: Library, theta: Tensor, pair: tuple[float, float]
) -> None:
    selected = masks(choose(any_library, theta, *pair), theta)
    for mask, sparsity in zip(selected, pair, strict=True):
        np.testing.assert_array_equal(mask, top_k(theta, sparsity))


@given(theta=weights(dtype=np.float64), pair=sparsities())
def test_float64_sets_equal_the_reference(
    library: Library, x64: None, theta: Tensor, pair: tuple[float, float]
) -> None:
    selected = masks(choose(library, theta, *pair), theta)
    for mask, sparsity in zip(selected, pair, strict=True):
        np.testing.assert_array_equal(mask, top_k(theta, sparsity))


@given(theta=weights(), pair=sparsities(), seed=st.integers(0, 2**32 - 1))
def test_signs_do_not_matter(
    library: Library, theta: Tensor, pair: tuple[float, float], seed: int
) -> None:
    signs = np.random.default_rng(seed).choice([-1, 1], theta.shape).astype(theta.dtype)
    assert_same_support(choose(library, theta, *pair), choose(library, theta * signs, *pair))


@given(theta=weights(), pair=sparsities(), power=st.integers(-20, 20))
def test_powers_of_two_do_not_matter(
    library: Library, theta: Tensor, pair: tuple[float, float], power: int
) -> None:
    # Scaling must be exact: it must not overflow, nor lose bits to subnormals.
    theta = np.where(np.abs(theta) > 1e30, 1, np.where(np.abs(theta) < 1e-30, 0, theta))
    theta = theta.astype(np.float32)
    scaled = np.ldexp(theta, power)
    assert_same_support(choose(library, theta, *pair), choose(library, scaled, *pair))


@given(size=st.integers(1, 60), pair=sparsities(), seed=st.integers(0, 2**32 - 1))
def test_permuting_different_magnitudes_permutes_the_sets(
    library: Library, size: int, pair: tuple[float, float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    theta = rng.permutation(np.arange(1, size + 1, dtype=np.float32))
    order = rng.permutation(size)
    plain = masks(choose(library, theta, *pair), theta)
    permuted = masks(choose(library, theta[order], *pair), theta)
    for mask, other in zip(plain, permuted, strict=True):
        np.testing.assert_array_equal(mask[order], other)


@given(theta=weights(), pair=sparsities())
def test_selecting_from_kept_weights_changes_nothing(
    library: Library, theta: Tensor, pair: tuple[float, float]
) -> None:
    support = choose(library, theta, *pair)
    kept = np.where(masks(support, theta).backward, theta, 0).astype(theta.dtype)
    # If a kept magnitude is 0, it ties with the zeros outside B.
    if np.all(kept[masks(support, theta).backward] != 0):
        assert_same_support(support, choose(library, kept, *pair))
    assert_same_support(support, choose(library, theta, *pair))


@given(theta=weights(min_size=1), pair=sparsities())
def test_forward_view_has_the_bits_of_the_weights(
    library: Library, theta: Tensor, pair: tuple[float, float]
) -> None:
    def view(array: Any) -> Any:
        support = topkast.select(array, fwd=pair[0], bwd=pair[1])
        values = topkast.gather(array, support)
        return topkast.forward_view(values, support, shape=theta.shape)

    alpha = library.compile(view)(library.asarray(theta))
    assert_forward_view(theta, alpha, masks(choose(library, theta, *pair), theta).forward)


@given(theta=weights(), pair=sparsities(), seed=st.integers(0, 2**70))
def test_random_exploration_is_the_same_in_every_library(
    library: Library, theta: Tensor, pair: tuple[float, float], seed: int
) -> None:
    options: dict[str, Any] = {"explore": "random", "seed": seed}
    support = choose(library, theta, *pair, **options)
    assert_same_support(choose(LIBRARIES[0], theta, *pair, **options), support)
    selected = masks(support, theta)
    assert_counts(selected, fwd=pair[0], bwd=pair[1])
    assert_nested(selected)
    np.testing.assert_array_equal(selected.forward, top_k(theta, pair[0], seed=seed))


def test_random_exploration_covers_the_reservoir_evenly() -> None:
    theta = np.linspace(1, 2, 200, dtype=np.float32)
    drawn = np.zeros(200)
    for seed in range(150):
        drawn += masks(
            choose(LIBRARIES[0], theta, 0.9, 0.5, explore="random", seed=seed), theta
        ).backward
    outside = drawn[:180]  # A is the last 20; each other entry is drawn with probability 80 / 180
    assert abs(outside.mean() / 150 - 80 / 180) < 1e-9
    assert outside.min() > 150 * 80 / 180 - 5 * np.sqrt(150 * 80 / 180)
    assert outside.max() < 150 * 80 / 180 + 5 * np.sqrt(150 * 80 / 180)


@pytest.mark.parametrize("block", [None, (2, 2)])
def test_more_entries_than_the_hash_tells_apart_are_refused(block: Any) -> None:
    theta = np.broadcast_to(np.float32(1), (1 << 17, 1 << 16))  # one number in memory
    with pytest.raises(topkast.UnsupportedTensorError, match=r"8589934592 entries .* 2\*\*32"):
        topkast.select(theta, fwd=0.9, bwd=0.8, block=block)
    check_size(np.broadcast_to(np.float32(1), (1 << 32,)))


def test_messages_name_the_tensor() -> None:
    theta = np.ones((4, 6))
    for name, subject in (("layer.weight", "layer.weight"), ("", "params")):
        with pytest.raises(topkast.OptionError, match=rf"^{subject}: block=\(2, 4\) does not"):
            topkast.select(theta, fwd=0.9, bwd=0.8, block=(2, 4), name=name)
        with pytest.raises(topkast.OptionError, match=rf"^{subject}: pattern=\(2, 4\) needs"):
            topkast.select(theta, fwd=0.5, bwd=0.5, pattern=(2, 4), name=name)


def test_counts_of_large_tensors_do_not_round() -> None:
    # Here k is off by two in float32, and by one in double arithmetic (jaxpruner).
    assert kept_count(100_000_007, 1 - exact_fraction(0.9)) == 10_000_001
    assert kept_count(10**15 + 1, 1 - exact_fraction(0.7)) == 3 * 10**14 + 1
    assert kept_count(1000, 1 - exact_fraction(0.58)) == 420
    assert exact_fraction(0.9) == Fraction(9, 10)
    assert exact_fraction(float(np.float32(0.5))) == Fraction(1, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_weight_is_an_error(any_library: Library, bad: float) -> None:
    theta = np.ones(10, dtype=np.float32)
    theta[[3, 7]] = bad
    if any_library.traces:
        if np.isnan(bad):  # traced values cannot be inspected: NaN ranks last, counts stay exact
            support = choose(any_library, theta, 0.8, 0.5)
            assert len(support.indices) == 5
            assert not {3, 7} & set(to_numpy(support.indices).tolist())
        return
    with pytest.raises(topkast.NonFiniteError, match="2 of 10 entries are NaN or infinite"):
        choose(any_library, theta, 0.8, 0.5)


def test_nan_ranks_last_even_when_it_must_be_taken() -> None:
    library = next(library for library in LIBRARIES if library.traces)
    theta = np.full(6, np.nan, dtype=np.float32)
    theta[4] = -0.0
    support = choose(library, theta, 0.9, 0.5)
    assert support.backward == 3
    assert to_numpy(support.active).tolist() == [4]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str) -> None:
    # Exact in both formats, with many ties.
    theta = (np.random.default_rng(0).integers(-100, 100, 1000) / 4).astype(np.float32)
    expected = choose(LIBRARIES[0], theta, 0.9, 0.8)
    torch_theta = torch.asarray(theta).to(getattr(torch, dtype))
    assert_same_support(expected, topkast.select(torch_theta, fwd=0.9, bwd=0.8))
    runs: list[Any] = [lambda function: function, jax.jit]
    for run in runs:
        select = run(lambda array: topkast.select(array, fwd=0.9, bwd=0.8))
        assert_same_support(expected, select(jnp.asarray(theta, dtype=dtype)))


def test_complex_weights_rank_by_modulus(any_library: Library) -> None:
    theta = np.asarray([3 + 4j, 4.9, -6j, 0, 1 + 1j], dtype=np.complex64)
    support = choose(any_library, theta, 0.6, 0.4)
    assert to_numpy(support.active).tolist() == [0, 2]
    assert to_numpy(support.exploring).tolist() == [1]


def test_large_tensor_with_few_distinct_magnitudes(rng: np.random.Generator) -> None:
    # The tensor is larger than the host's sample, and ties fill the bracket.
    theta = rng.integers(-3, 4, 300_000).astype(np.float32)
    for fwd, bwd in [(0.9, 0.8), (0.5, 0.0), (0.999, 0.3)]:
        selected = masks(choose(LIBRARIES[0], theta, fwd, bwd), theta)
        np.testing.assert_array_equal(selected.forward, top_k(theta, fwd))
        np.testing.assert_array_equal(selected.backward, top_k(theta, bwd))


def test_misleading_sample_changes_nothing(rng: np.random.Generator) -> None:
    # Every sampled entry is tiny, so the bracket is far below the threshold.
    theta = rng.standard_normal(400_000).astype(np.float32)
    for stride in range(2, 20):
        theta[::stride] *= 1e-3
    selected = masks(choose(LIBRARIES[0], theta, 0.9, 0.8), theta)
    np.testing.assert_array_equal(selected.forward, top_k(theta, 0.9))
    np.testing.assert_array_equal(selected.backward, top_k(theta, 0.8))


@pytest.mark.parametrize("distribution", ["normal", "rounded", "zeros"])
@pytest.mark.parametrize("explore", ["magnitude", "random"])
def test_tensors_outside_host_memory(
    distribution: str, explore: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator, PyTorch selects by its own functions."""
    vector = rng.standard_normal(5000).astype(np.float32)
    if distribution == "rounded":
        vector = np.round(vector)
    elif distribution == "zeros":
        vector[rng.random(5000) < 0.95] = -0.0
    expected = topkast.select(vector, fwd=0.9, bwd=0.8, explore=explore)
    monkeypatch.setattr(TorchBackend, "host", lambda self, array: None)
    support = topkast.select(torch.asarray(vector), fwd=0.9, bwd=0.8, explore=explore)
    assert_same_support(support, expected)
