"""The functional transform over named arrays."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import Library, host

import topkast
from topkast.testing import (
    assert_forward_view,
    assert_masks,
    assert_reservoir_unchanged,
    assert_same_support,
    to_numpy,
)

Arrays = dict[str, Any]


def make(library: Library, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    theta = rng.standard_normal((9, 8)).astype(np.float32)
    theta[0, :4] = [0.0, -0.0, 1e-40, -1e-42]  # careless arithmetic would change these bits
    weights = {"w": theta, "b": np.zeros(8, dtype=np.float32), "v": theta[1:5].copy()}
    return {name: library.asarray(array) for name, array in weights.items()}


def grads_like(library: Library, params: Arrays, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        name: library.asarray(rng.standard_normal(array.shape).astype(np.float32))
        for name, array in params.items()
    }


RULES = [
    topkast.SGD(0.1, momentum=0.9, weight_decay=0.1),
    topkast.Adam(0.01),
    topkast.AdamW(0.01, weight_decay=0.5),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@given(steps=st.integers(1, 4), seed=st.integers(0, 100))
def test_reservoir_is_bit_identical_between_refreshes(
    library: Library, rule: Any, steps: int, seed: int
) -> None:
    tx = topkast.wrap_optimizer(rule, fwd=0.9, bwd=0.7, penalty=0.1, refresh_every=100)
    params = make(library)
    state = tx.init(params)
    masks, before = topkast.masks(state, params), host(params)
    for step in range(steps):
        updates, state = tx.update(grads_like(library, params, seed + step), state, params)
        params = topkast.apply_updates(params, updates)
    for name, mask in masks.items():
        if library.name.startswith("jax"):
            # XLA flushes subnormal floats to zero, with their sign, in every addition.
            zero = np.copysign(np.float32(0), before[name])
            before[name] = np.where(np.abs(before[name]) < 1e-38, zero, before[name])
        assert_reservoir_unchanged(before[name], params[name], mask.backward)


def test_refresh_happens_on_the_result_of_the_update(library: Library) -> None:
    tx = topkast.wrap_optimizer(topkast.SGD(0.3), fwd=0.9, bwd=0.7, refresh_every=3)
    params = make(library)
    state = tx.init(params)
    initial = topkast.masks(state, params)
    for step in range(1, 7):
        updates, state = tx.update(grads_like(library, params, step), state, params)
        params = topkast.apply_updates(params, updates)
        if step % 3 == 0:
            for name, mask in topkast.masks(state, params).items():
                assert_masks(params[name], mask, fwd=0.9, bwd=0.7)
        elif step < 3:
            for name, mask in topkast.masks(state, params).items():
                np.testing.assert_array_equal(to_numpy(mask[0]), to_numpy(initial[name][0]))
    assert any(row.mask_change > 0 for row in topkast.summary(state, params).tensors)
    alpha = topkast.forward_params(params, state)
    for name, mask in topkast.masks(state, params).items():
        assert_forward_view(params[name], alpha[name], mask.forward)
    np.testing.assert_array_equal(to_numpy(alpha["b"]), to_numpy(params["b"]))


def test_state_covers_the_backward_set(library: Library) -> None:
    tx = topkast.wrap_optimizer(topkast.Adam(), fwd=0.9, bwd=0.7)
    params = make(library)
    state = tx.init(params)
    shapes = {name: tuple(entry.shape) for name, entry in state.inner.mean.items()}
    assert shapes == {"b": (8,), "w": (1, 22), "v": (1, 10)}  # 72 - 50 and 32 - 22


def test_global_distribution_shares_one_vector(library: Library) -> None:
    tx = topkast.wrap_optimizer(
        topkast.Adam(0.1), fwd=0.9, bwd=0.7, distribution="global", refresh_every=1
    )
    params = make(library)
    state = tx.init(params)
    assert {n: tuple(m.shape) for n, m in state.inner.mean.items()} == {
        "b": (8,),
        "w + v": (1, 32),
    }
    for step in range(3):
        updates, state = tx.update(grads_like(library, params, step), state, params)
        params = topkast.apply_updates(params, updates)
        masks = topkast.masks(state, params)
        assert sum(int(to_numpy(mask.forward).sum()) for mask in masks.values()) == 11
        ranked = np.concatenate([np.abs(to_numpy(params[name])).ravel() for name in "wv"])
        inside = np.concatenate([to_numpy(masks[name].backward).ravel() for name in "wv"])
        assert ranked[inside].min() >= ranked[~inside].max()


def test_exploration_stops(library: Library) -> None:
    tx = topkast.wrap_optimizer(
        topkast.AdamW(0.1), fwd=0.9, bwd=0.5, explore_until=2, refresh_every=100
    )
    params = make(library)
    state = tx.init(params)
    for step in range(4):
        before, mask = host(params)["w"], topkast.masks(state, params)["w"]
        updates, state = tx.update(grads_like(library, params, step), state, params)
        params = topkast.apply_updates(params, updates)
        exploring = to_numpy(mask.backward) & ~to_numpy(mask.forward)
        moved = before[exploring] != to_numpy(params["w"])[exploring]
        assert moved.all() if step < 2 else not moved.any()


class Nested(NamedTuple):
    """A rule's state of unusual structure: dictionaries in tuples in lists."""

    entries: list[Any]
    count: Any


class Unusual:
    """Keeps the last gradient and the initial parameters, as schedule-free optimizers do."""

    def init(self, params: Arrays) -> Nested:
        zeros = {name: 0 * array for name, array in params.items()}
        return Nested([(dict(params), {"deep": zeros})], 3)

    def update(self, grads: Arrays, state: Nested, params: Any = None) -> tuple[Arrays, Nested]:
        start = state.entries[0][0]
        displacements = {name: -0.3 * grad for name, grad in grads.items()}
        return displacements, Nested([(start, {"deep": grads})], 3)


def test_state_of_any_nesting_is_migrated(library: Library) -> None:
    tx = topkast.TopKASTTransform(
        Unusual(), topkast._options.Options(fwd=0.9, bwd=0.7, refresh_every=2)
    )
    params = make(library)
    state = tx.init(params)
    for step in range(2):
        old, last = state.supports["w"], state.inner.entries[0][0]["w"]
        updates, state = tx.update(grads_like(library, params, step), state, params)
        params = topkast.apply_updates(params, updates)
    before, after = map(to_numpy, (old.indices, state.supports["w"].indices))
    start = to_numpy(state.inner.entries[0][0]["w"]).ravel()
    entered = ~np.isin(after, before)
    assert entered.any()
    # Entries that entered start from the current weight, as the rule initialises them.
    np.testing.assert_array_equal(start[entered], to_numpy(params["w"]).ravel()[after][entered])
    old_positions = [int(np.flatnonzero(before == index)[0]) for index in after[~entered]]
    np.testing.assert_array_equal(start[~entered], to_numpy(last).ravel()[old_positions])
    assert state.inner.count == 3


def test_state_is_stable_under_jit_and_scan() -> None:
    tx = topkast.wrap_optimizer(topkast.AdamW(0.01), fwd=0.9, bwd=0.7, refresh_every=2)
    library = Library("jax", jax.numpy.asarray)
    params = make(library)
    state = tx.init(params)
    grads = grads_like(library, params, 1)
    traces = []

    # The options of users: with few optimisations, loops round sums and products differently.
    options = {"xla_backend_optimization_level": "3", "xla_cpu_use_fusion_emitters": True}
    changed = [name for name in options if name in os.environ["XLA_FLAGS"]]  # newer XLA lacks some
    compiled = functools.partial(
        jax.jit, compiler_options={name: options[name] for name in changed}
    )

    def step(carry: Any, _: Any) -> Any:
        traces.append(1)
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (topkast.apply_updates(params, updates), state), None

    scan = compiled(lambda carry: jax.lax.scan(step, carry, length=5)[0])
    scanned, scanned_state = scan((params, state))
    looped, once = (params, state), compiled(step)
    for _ in range(5):
        looped, _ = once(looped, None)
    assert len(traces) <= 2
    types = [
        ([(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)], jax.tree.structure(tree))
        for tree in (state, looped[1])
    ]
    assert types[0] == types[1]
    for name in params:
        np.testing.assert_array_equal(scanned[name], looped[0][name])
    assert int(scanned_state.updates) == 5


def test_dtypes_are_kept() -> None:
    for dtype in ("float16", "bfloat16", "float32"):
        params = {"w": jax.numpy.ones((6, 6), dtype)}
        tx = topkast.wrap_optimizer(topkast.AdamW(0.1), fwd=0.5, bwd=0.2, refresh_every=1)
        state = tx.init(params)
        updates, state = tx.update(params, state, params)
        assert topkast.apply_updates(params, updates)["w"].dtype == dtype
        assert topkast.forward_params(params, state)["w"].dtype == dtype


def test_misuse_raises_errors(library: Library) -> None:
    tx = topkast.wrap_optimizer(topkast.Adam(), fwd=0.9, bwd=0.7)
    params = make(library)
    state = tx.init(params)
    grads = grads_like(library, params, 0)
    with pytest.raises(topkast.MismatchError, match="update needs params"):
        tx.update(grads, state)
    with pytest.raises(topkast.MismatchError, match=r"\['b'\] are in one alone"):
        tx.update({name: grads[name] for name in "wv"}, state, params)
    with pytest.raises(topkast.MismatchError, match="w: the gradient is"):
        tx.update(grads | {"w": grads["v"]}, state, params)
    integers = library.asarray(np.ones((9, 8), dtype=np.int32))
    with pytest.raises(topkast.MismatchError, match="w: the gradient is"):
        tx.update(grads | {"w": integers}, state, params)
    smaller = {name: params[name] for name in "wb"}
    with pytest.raises(topkast.MismatchError, match="differ from those given to init"):
        tx.update({name: grads[name] for name in "wb"}, state, smaller)
    with pytest.raises(topkast.MismatchError, match="params is empty"):
        tx.init({})
    with pytest.raises(topkast.MismatchError, match="pass params too"):
        topkast.masks(state)
    with pytest.raises(topkast.MismatchError, match="has the sets of v, but params only w, b"):
        topkast.forward_params(smaller, state)
    with pytest.raises(topkast.MismatchError, match="w has 3 entries in params, but"):
        topkast.masks(state, params | {"w": params["w"][0, :3]})
    with pytest.raises(topkast.UnsupportedTensorError, match="n: weights must be floats"):
        tx.init({"n": library.asarray(np.ones((3, 3), dtype=np.int32))})


@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_the_order_of_names_does_not_matter_after_init(library: Library, distribution: Any) -> None:
    """A function that JAX compiles gets dictionaries in the order of their names."""
    tx = topkast.wrap_optimizer(
        topkast.Adam(), fwd=0.9, bwd=0.7, refresh_every=2, distribution=distribution
    )
    first, second = make(library), make(library)
    assert [*first] != sorted(first)
    states = [tx.init(first)] * 2
    for number in range(3):
        grads = grads_like(library, first, number)
        first, states[0] = tx.step(grads, states[0], first)
        second = dict(sorted(second.items()))
        second, states[1] = tx.step(grads, states[1], second)
    for name in first:
        np.testing.assert_array_equal(to_numpy(first[name]), to_numpy(second[name]))
    for key, support in states[0].supports.items():
        assert_same_support(support, states[1].supports[key])


def test_non_finite_weight_is_named(library: Library) -> None:
    params = make(library) | {"w": library.asarray(np.full((2, 2), np.nan, dtype=np.float32))}
    with pytest.raises(topkast.NonFiniteError, match="w: 4 of 4 entries are NaN or infinite"):
        topkast.wrap_optimizer(topkast.Adam(), fwd=0.5, bwd=0.5).init(params)


def test_tensors_of_one_size_draw_different_random_sets(library: Library) -> None:
    tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.5, explore="random")
    array = library.asarray(np.ones((10, 10), dtype=np.float32))
    supports = tx.init({"first": array, "second": array}).supports
    first, second = (to_numpy(supports[name].indices) for name in ("first", "second"))
    assert 10 < len(np.intersect1d(first, second)) < 45
