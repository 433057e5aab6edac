"""The optax adapter keeps the invariants and optax's conventions, with and without ``jax.jit``."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax_training import (
    Pytree,
    assert_close,
    assert_equal,
    avals,
    inner_state,
    inputs_of,
    loss,
    make_params,
    make_step,
    run,
    wrap,
)

import topkast
from topkast.testing import assert_forward_view, assert_masks, assert_reservoir_unchanged


@pytest.mark.slow  # each example is compiled
class TestInvariants:
    """The invariants of section 4 of the design, under jit."""

    @settings(max_examples=settings().max_examples // 5)
    @given(
        fwd=st.sampled_from([0.5, 0.9, 0.98]),
        slack=st.sampled_from([0.0, 0.5, 1.0]),
        inner=st.sampled_from(["sgd", "adamw", "lion"]),
        seed=st.integers(0, 1000),
    )
    def test_a_run_keeps_the_invariants(
        self, fwd: float, slack: float, inner: str, seed: int
    ) -> None:
        bwd = round(fwd * (1 - slack), 3)
        tx = wrap(getattr(optax, inner)(1e-2), fwd=fwd, bwd=bwd)
        step = jax.jit(make_step(tx))
        params = make_params(seed)
        state = jax.jit(tx.init)(params)
        for number in range(4):
            before, masks = topkast.dense_params(state, params), topkast.masks(state, params)
            alpha = topkast.forward_params(params, state)
            for (name, theta), view in zip(before.items(), jax.tree.leaves(alpha), strict=True):
                if name in masks:
                    if number in (0, 3):  # A and B were chosen from these weights
                        assert_masks(theta, masks[name], fwd=fwd, bwd=bwd)
                    assert_forward_view(theta, view, masks[name].forward)
            for key, support in state.supports.items():
                path = key.split(".")
                entries = [
                    leaf
                    for leaf_path, leaf in jax.tree.leaves_with_path(state.inner)
                    if jax.tree_util.keystr(leaf_path, simple=True, separator=".").split(".")[
                        -len(path) :
                    ]
                    == path
                ]
                assert len(entries) == {"sgd": 0, "adamw": 2, "lion": 1}[inner]
                assert all(entry.shape == (1, support.indices.size) for entry in entries)
            params, state = step(params, state, inputs_of(number))
            after = topkast.dense_params(state, params)
            for name, mask in masks.items():
                assert_reservoir_unchanged(before[name], after[name], mask.backward)

    def test_fwd_0_bwd_0_penalty_0_is_the_plain_transformation(self) -> None:
        inner = optax.adamw(1e-2)
        plain, wrapped = make_params(), make_params()
        tx = wrap(inner, fwd=0.0, bwd=0.0, penalty=0.0)
        plain_state, state = inner.init(plain), tx.init(wrapped)
        for number in range(5):
            grads = jax.grad(loss)(plain, inputs_of(number))
            updates, plain_state = inner.update(grads, plain_state, plain)
            plain = optax.apply_updates(plain, updates)
            grads = jax.grad(loss)(topkast.forward_params(wrapped, state), inputs_of(number))
            updates, state = tx.update(grads, state, wrapped)
            wrapped = optax.apply_updates(wrapped, updates)
        assert_equal(wrapped, plain)


class TestCompiled:
    def test_eager_and_jit_choose_the_same(self) -> None:
        params, state = run(wrap(), make_params())
        eager_params, eager = run(wrap(), make_params(), jit=False)
        assert_equal(eager.supports, state.supports)
        assert_close(eager_params, params, 1e-5)

    def test_nothing_is_compiled_twice(self) -> None:
        tx, params = wrap(), make_params()
        step: Any = jax.jit(make_step(tx))
        state = tx.init(params)
        for number in range(7):  # two refreshes
            params, state = step(params, state, inputs_of(number))
        assert step._cache_size() == 1

    def test_types_are_fixed_from_init_on(self) -> None:
        tx, params = wrap(), make_params()
        state = tx.init(params)
        _, later = run(tx, params)
        assert avals(later) == avals(state)
        assert avals(jax.jit(tx.init)(params)) == avals(state)

    def test_scan(self) -> None:
        tx = wrap()
        step = make_step(tx)

        @jax.jit
        def train(params: Pytree, state: Any) -> Any:
            inputs = jnp.stack([inputs_of(number) for number in range(7)])
            body = lambda carry, x: (step(*carry, x), None)  # noqa: E731
            return jax.lax.scan(body, (params, state), inputs)[0]

        params = make_params()
        trained, state = train(params, tx.init(params))
        expected, expected_state = run(tx, params)
        assert_equal(state.supports, expected_state.supports)
        assert_close(trained, expected)

    def test_cond(self) -> None:
        tx, params = wrap(), make_params()
        state = tx.init(params)
        grads = jax.grad(loss)(params, inputs_of(0))

        @jax.jit
        def update_if(flag: jax.Array, params: Pytree, state: Any) -> Any:
            def update(params: Pytree, state: Any) -> Any:
                updates, state = tx.update(grads, state, params)
                return optax.apply_updates(params, updates), state

            return jax.lax.cond(flag, update, lambda *unchanged: unchanged, params, state)

        assert_equal(update_if(jnp.asarray(False), params, state), (params, state))
        _, updated = update_if(jnp.asarray(True), params, state)
        assert updated.updates == 1

    @pytest.mark.slow
    def test_vmap_over_seeds(self) -> None:
        tx = wrap()
        initial = [make_params(seed) for seed in range(3)]
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *initial)
        state = jax.vmap(tx.init)(params)
        step = jax.jit(jax.vmap(make_step(tx), in_axes=(0, 0, None)))
        for number in range(7):
            params, state = step(params, state, inputs_of(number))
        for seed, seed_params in enumerate(initial):
            expected, expected_state = run(tx, seed_params)
            supports = jax.tree.map(lambda leaf, seed=seed: leaf[seed], state.supports)
            assert_equal(supports, expected_state.supports)
            assert_close(jax.tree.map(lambda leaf, seed=seed: leaf[seed], params), expected)

    @pytest.mark.slow
    def test_members_of_a_batch_are_refreshed_at_their_own_counts(self) -> None:
        tx, params = wrap(refresh_every=2), make_params()
        first = tx.init(params)
        updated, second = run(tx, params, 1)  # weights that changed after the first selection
        both = (first, params), (second, updated)
        states, weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
        grads = jax.grad(loss)(params, inputs_of(0))
        _, batch = jax.vmap(functools.partial(tx.update, grads))(states, weights)
        assert not batch.stale_refreshes.any()
        for index, (state, member_params) in enumerate(both):
            _, alone = tx.update(grads, state, member_params)
            supports = jax.tree.map(lambda leaf, index=index: leaf[index], batch.supports)
            assert_equal(supports, alone.supports)

    @pytest.mark.slow
    def test_updates_can_be_differentiated(self) -> None:
        """The loss after two updates has a derivative with respect to the learning rate."""
        params = make_params()

        def final_loss(rate: jax.Array) -> jax.Array:
            tx = topkast.wrap_optimizer(optax.sgd(rate), fwd=0.9, bwd=0.7, refresh_every=1)
            step, trained, state = jax.jit(make_step(tx)), params, tx.init(params)
            for number in range(2):
                trained, state = step(trained, state, inputs_of(number))
            return loss(trained, inputs_of(9))

        derivative = jax.grad(final_loss)(0.01)
        np.testing.assert_allclose(jax.jvp(final_loss, (0.01,), (1.0,))[1], derivative, rtol=1e-5)
        difference = (final_loss(jnp.float32(0.0101)) - final_loss(jnp.float32(0.0099))) / 0.0002
        np.testing.assert_allclose(derivative, difference, rtol=0.05)
        assert abs(derivative) > 0

    def test_params_and_state_can_be_donated(self) -> None:
        keeping = optax.GradientTransformation(
            lambda params: params,  # the adapter must pass it a copy
            lambda updates, state, params=None: (updates, state),
        )
        inner = optax.chain(keeping, optax.sgd(0.1))
        tx, params = wrap(inner), make_params()
        expected, _ = run(tx, params)
        step = jax.jit(make_step(tx), donate_argnums=(0, 1))
        params, state = jax.tree.map(jnp.copy, params), tx.init(params)
        for number in range(7):
            params, state = step(params, state, inputs_of(number))
        assert_close(params, expected)

    def test_no_nan_is_chosen_while_there_is_a_number(self) -> None:
        tx, params = wrap(), make_params()
        params["head"]["w"] = params["head"]["w"].at[:3].set(jnp.nan)
        state = jax.jit(tx.init)(params)
        support = state.supports["head.w"]
        assert support.indices.shape == (20,)
        assert not jnp.isnan(params["head"]["w"].ravel()[support.indices]).any()
        with pytest.raises(topkast.NonFiniteError, match=r"head\.w: 12 of 64"):
            tx.init(params)


def test_a_name_that_is_the_suffix_of_another_is_not_confused_with_it() -> None:
    theta = [jax.random.normal(jax.random.key(seed), (12, 20)) for seed in range(2)]

    def train(make: Callable[[list[Any]], Pytree], take: Callable[[Pytree], Any]) -> Any:
        tx = wrap(refresh_every=1)
        step = jax.jit(tx.step)
        params = make(theta)
        state = tx.init(params)
        for number in range(4):
            gradients = [jax.random.normal(jax.random.key(9 + number), (12, 20))] * 2
            params, state = step(make(gradients), state, params)
        return take(params)

    trained = train(
        lambda pair: {"w": pair[0], "a": {"w": pair[1]}}, lambda tree: [tree["w"], tree["a"]["w"]]
    )
    expected = train(lambda pair: {"b": pair[0], "c": pair[1]}, lambda tree: [tree["b"], tree["c"]])
    assert_equal(trained, expected)


class TestStep:
    """``step`` equals ``update`` and ``apply_updates``."""

    @pytest.mark.parametrize(
        ("dtype", "distribution"),
        [
            (jnp.float32, "uniform"),
            (jnp.bfloat16, "global"),
            pytest.param(jnp.float32, "global", marks=pytest.mark.slow),
            pytest.param(jnp.bfloat16, "uniform", marks=pytest.mark.slow),
            pytest.param(jnp.float16, "uniform", marks=pytest.mark.slow),
            pytest.param(jnp.float16, "global", marks=pytest.mark.slow),
        ],
    )
    def test_step(self, distribution: str, dtype: Any) -> None:
        tx = wrap(distribution=distribution, refresh_every=2)
        params = make_params(dtype=dtype)
        expected, expected_state = run(tx, params, 5)

        @jax.jit
        def train(params: Pytree, state: Any, inputs: jax.Array) -> Any:
            grads = jax.grad(loss)(topkast.forward_params(params, state), inputs)
            return tx.step(grads, state, params)

        state = tx.init(params)
        for number in range(5):
            params, state = train(params, state, inputs_of(number))
        assert_equal(state.supports, expected_state.supports)
        assert_close(params, expected, 1e-6 if dtype == jnp.float32 else 1e-2)

    def test_other_leaves_stay(self) -> None:
        params = {"w": make_params()["head"]["w"], "count": jnp.arange(3), "no": None}
        tx = wrap()
        updated, _ = tx.step({"w": params["w"], "count": None, "no": None}, tx.init(params), params)
        assert_equal(updated["count"], params["count"])
        assert updated["no"] is None


class TestConventions:
    def test_it_is_a_transformation_with_extra_args(self) -> None:
        tx = wrap()
        assert isinstance(tx, optax.GradientTransformationExtraArgs)
        init, update = tx
        assert init(make_params()).updates == 0
        assert callable(update)

    def test_unexpected_extra_args_are_ignored(self) -> None:
        tx, params = wrap(), make_params()
        grads = jax.tree.map(jnp.ones_like, params)
        plain, _ = tx.update(grads, tx.init(params), params)
        updates, _ = tx.update(grads, tx.init(params), params, value=1.0, unexpected="ignored")
        assert_equal(updates, plain)

    def test_extra_args_reach_the_inner_transformation(self) -> None:
        received = {}

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            received.update(extra)
            return updates, state

        inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
        tx, params = wrap(inner), make_params()
        state = tx.init(params)
        tx.update(params, state, params, value=2.0, grad=params)
        assert received["value"] == 2.0
        assert received["grad"]["head"]["w"].shape == (1, 20)  # on B, as the gradient is
        assert received["grad"]["body"][0]["b"].shape == (20,)

    @pytest.mark.parametrize("name", ["updates", "supports", "entered_active", "inner", "mu", "nu"])
    def test_tree_get_finds_the_state_by_name(self, name: str) -> None:
        params = make_params()
        state = optax.chain(optax.clip(1.0), wrap()).init(params)
        assert optax.tree.get(state, name) is not None
        assert optax.tree.get(state, "mu")["head"]["w"].shape == (1, 20)

    @pytest.mark.parametrize(
        "dtype", [jnp.float32, jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)]
    )
    def test_dtypes_are_kept(self, dtype: Any) -> None:
        tx, params = wrap(optax.sgd(0.1, momentum=0.9)), make_params(dtype=dtype)
        state = tx.init(params)
        update = jax.jit(tx.update)
        for number in range(4):
            grads = jax.grad(loss)(topkast.forward_params(params, state), inputs_of(0, dtype))
            updates, state = update(grads, state, params)
            assert avals(updates) == avals(params), number
            params = optax.apply_updates(params, updates)
        masks = topkast.masks(state, params)
        for name, theta in topkast.dense_params(state, params).items():
            assert theta.dtype == dtype
            if name in masks:
                expected = topkast.select(np.asarray(theta, np.float32), fwd=0.9, bwd=0.7)
                assert masks[name].backward.sum() == expected.indices.size

    def test_selection_in_half_precision_is_exact(self) -> None:
        for dtype in (jnp.bfloat16, jnp.float16):
            theta = jax.random.normal(jax.random.key(3), (64, 65)).astype(dtype)  # full of ties
            support = jax.jit(lambda theta: topkast.select(theta, fwd=0.9, bwd=0.8))(theta)
            expected = topkast.select(np.asarray(theta, np.float64), fwd=0.9, bwd=0.8)
            assert_equal(support, expected)

    def test_the_count_does_not_overflow(self) -> None:
        tx, params = wrap(), make_params()
        last = jnp.asarray(2**31 - 1, jnp.int32)
        state = tx.init(params)
        state = state._replace(core=state.core._replace(updates=last))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", topkast.WeightsMovedWarning)
            _, state = jax.jit(tx.update)(params, state, params)
        assert state.updates == last

    def test_repr_names_the_inner_transformation(self) -> None:
        assert "scale_by_adam" in repr(wrap())
        assert "fwd=0.9" in repr(wrap())


class TestOutermost:
    """Changing the updates before they are applied raises a warning."""

    def test_changed_updates_warn(self) -> None:
        tx = optax.chain(wrap(), optax.scale(0.5))
        with pytest.warns(topkast.WeightsMovedWarning, match=r"must be the outermost"):
            run(tx, make_params(), 5, jit=False)

    def test_compiled_functions_count_and_inspectors_warn(self) -> None:
        tx = optax.chain(wrap(), optax.scale(0.5))
        params, state = run(tx, make_params(), 5)
        assert inner_state(state).stale_refreshes == 1
        for inspector in (topkast.summary, topkast.masks, topkast.dense_params):
            with pytest.warns(topkast.WeightsMovedWarning):
                inspector(state, params)

    def test_weights_changed_by_hand_warn(self) -> None:
        tx = wrap(bwd=0.5)
        params, state = run(tx, {"w": jnp.ones((32, 64)), **make_params()}, 3)  # |B| of 1024
        for change in (lambda w: 2 * w, jnp.negative, lambda w: w[::-1]):
            changed = jax.tree.map(change, params)
            with pytest.warns(topkast.WeightsMovedWarning, match="call init again"):
                tx.update(changed, state, changed)

    @pytest.mark.parametrize(
        ("dtype", "distribution"),
        [
            (jnp.float32, "uniform"),
            (jnp.bfloat16, "global"),
            pytest.param(jnp.float32, "global", marks=pytest.mark.slow),
            pytest.param(jnp.bfloat16, "uniform", marks=pytest.mark.slow),
        ],
    )
    @pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
    def test_proper_use_is_silent(self, distribution: str, dtype: Any, jit: bool) -> None:
        params = make_params(dtype=dtype)
        params["head"]["w"] = params["head"]["w"].at[0].set(-0.0)
        tx = wrap(distribution=distribution, refresh_every=1)
        _, state = run(tx, params, 5, jit=jit)  # a warning would be an error
        assert state.stale_refreshes == 0
