"""optax's own transformations inside and around the wrapped one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_training import (
    Pytree,
    assert_close,
    assert_equal,
    inner_state,
    inputs_of,
    loss,
    make_params,
    make_step,
    run,
    wrap,
)

import topkast

INSIDE = {
    "chain": optax.chain(optax.clip(0.01), optax.scale_by_adam(), optax.scale(-1e-2)),
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0)),
    "schedule": optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 9)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.linear_schedule(1e-2, 0.0, 10)
    ),
    "decay of matrices": optax.adamw(
        1e-2, weight_decay=0.5, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
    ),
    "lamb": optax.lamb(1e-2),
    "lars": optax.lars(1e-2),
    "schedule_free": optax.contrib.schedule_free(optax.sgd(0.05), 0.05),
    "lion": optax.lion(1e-3),
    "polyak_sgd": optax.polyak_sgd(),
    "reduce_on_plateau": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
}
# The default session runs only these: each of the others is similar to one of them. The state of
# most is that of the chain.
FAST = {"chain", "decay of matrices", "inject_hyperparams", "lamb", "schedule_free"}
FAST_STATES = {"chain", "decay of matrices", "schedule_free"}
NEED_LOSS = {"polyak_sgd", "reduce_on_plateau"}


def train_on_b(inner: Any, params: Pytree, steps: int, *, needs_loss: bool) -> Pytree:
    """Train the entries of a fixed B as if there were no others, and return θ."""
    start = wrap(inner, refresh_every=1000).init(params)
    supports = start.supports
    weights = {"body.0.w": ("body", 0), "body.1.w": ("body", 1), "head.w": ("head",)}
    state = None
    for number in range(steps):
        alpha = topkast.forward_params(params, start)
        value, grads = jax.value_and_grad(loss)(alpha, inputs_of(number))

        def compact(tree: Pytree) -> Pytree:
            tree = jax.tree.map(lambda leaf: leaf, tree)
            for name, path in weights.items():
                layer = tree
                for key in path:
                    layer = layer[key]
                layer["w"] = layer["w"].reshape(1, -1)[:, supports[name].indices]
            return tree

        values = compact(params)
        state = inner.init(values) if state is None else state
        extra = {"value": value} if needs_loss else {}
        updates, state = optax.with_extra_args_support(inner).update(
            compact(grads), state, values, **extra
        )
        updated = optax.apply_updates(values, updates)
        params = jax.tree.map(lambda leaf: leaf, params)
        for name, path in weights.items():
            layer, source = params, updated
            for key in path:
                layer, source = layer[key], source[key]
            flat = layer["w"].reshape(-1).at[supports[name].indices].set(source["w"][0])
            layer["w"] = flat.reshape(layer["w"].shape)
        for layer, source in zip(params["body"], updated["body"], strict=True):
            layer["b"] = source["b"]
    return params


def inside(fast: set[str]) -> pytest.MarkDecorator:
    """All transformations, of which the others are slow."""
    return pytest.mark.parametrize(
        "name",
        [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in INSIDE],
    )


class TestInside:
    @inside(FAST)
    def test_updates_equal_those_of_training_on_b_alone(self, name: str) -> None:
        tx = wrap(INSIDE[name], refresh_every=1000, penalty=0.0)
        params = make_params()
        expected = train_on_b(INSIDE[name], params, 4, needs_loss=name in NEED_LOSS)
        state = tx.init(params)
        for number in range(4):
            value, grads = jax.value_and_grad(loss)(
                topkast.forward_params(params, state), inputs_of(number)
            )
            extra = {"value": value} if name in NEED_LOSS else {}
            updates, state = tx.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
        assert_close(params, expected)
        assert not np.array_equal(params["head"]["w"], make_params()["head"]["w"])

    @inside(FAST_STATES)
    def test_survivors_keep_their_state_and_entrants_start_anew(self, name: str) -> None:
        tx, params = wrap(INSIDE[name], refresh_every=5), make_params()
        extra = {"value": jnp.float32(0.5)} if name in NEED_LOSS else {}
        state = tx.init(params)
        for number in range(4):
            grads = jax.grad(loss)(topkast.forward_params(params, state), inputs_of(number))
            _, state = tx.update(grads, state, params, **extra)
        # The next update ends with a refresh. Other weights take over half of B.
        grown = jax.tree.map(lambda leaf: leaf, params)
        flat = grown["head"]["w"].reshape(-1)
        order = jnp.argsort(-jnp.abs(flat))
        grown["head"]["w"] = flat.at[order[20:30]].set(9.0).reshape(16, 4)
        unrefreshed_tx = wrap(INSIDE[name], refresh_every=1000)
        _, unrefreshed = unrefreshed_tx.update(grads, state, grown, **extra)
        _, refreshed = tx.update(grads, state, grown, **extra)
        old, new = (after.supports["head.w"].indices for after in (unrefreshed, refreshed))
        assert 0 < len(np.setdiff1d(new, old)) < 20
        compact = jax.tree.map(lambda leaf: leaf, params)
        compact["head"]["w"] = grown["head"]["w"].reshape(1, -1)[:, new]
        for index, layer in enumerate(compact["body"]):
            indices = refreshed.supports[f"body.{index}.w"].indices
            layer["w"] = layer["w"].reshape(1, -1)[:, indices]
        fresh = INSIDE[name].init(compact)
        checked = 0
        entries = zip(
            jax.tree.leaves_with_path(unrefreshed.inner),
            jax.tree.leaves(refreshed.inner),
            jax.tree.leaves(fresh),
            strict=True,
        )
        for (path, before), after, initial in entries:
            if "head" in jax.tree_util.keystr(path) and before.shape == (1, 20):
                checked += 1
                for position, index in enumerate(np.asarray(new)):
                    survivor = np.flatnonzero(np.asarray(old) == index)
                    source = before[0, survivor[0]] if survivor.size else initial[0, position]
                    assert after[0, position] == source
        mirrors = [leaf for leaf in jax.tree.leaves(fresh) if jnp.shape(leaf) == (1, 20)]
        assert checked == len(mirrors)
        assert checked > 0 or name in {"clip_by_global_norm", "polyak_sgd"}  # no entries per weight


class TestAround:
    def test_chain_before(self) -> None:
        """A transformation before the wrapped one sees the gradient of all coordinates."""
        params, tx = make_params(), wrap(optax.sgd(0.1), penalty=0.0)
        chained = optax.chain(optax.clip_by_global_norm(0.01), tx)
        grads = jax.grad(loss)(params, inputs_of(0))
        norm = optax.tree.norm(grads)
        assert norm > 0.01
        clipped = jax.tree.map(lambda leaf: leaf * (0.01 / norm), grads)
        updates, _ = chained.update(grads, chained.init(params), params)
        assert_close(updates, tx.update(clipped, tx.init(params), params)[0])

    def test_multi_steps(self) -> None:
        """Micro-batches accumulate to one update; refreshes count updates."""
        params = make_params()
        # Between updates optax adds zeros of either sign: -0 may become 0, which is no change.
        params["head"]["w"] = params["head"]["w"].at[:8].set(-0.0)
        once = wrap(optax.sgd(0.1, momentum=0.9), bwd=0.0)
        many = optax.MultiSteps(once, 2)
        step = jax.jit(make_step(many))
        trained, state = params, many.init(params)
        for number in range(14):
            trained, state = step(trained, state, inputs_of(number // 2))
        expected, expected_state = run(once, params)
        assert inner_state(state).updates == 7
        assert inner_state(state).stale_refreshes == 0
        assert topkast.summary(state, trained).updates == 7
        assert_equal(inner_state(state).supports, expected_state.supports)
        assert_close(trained, expected)

    def test_apply_if_finite(self) -> None:
        """A skipped step changes no weight, no mask and no count."""
        params = make_params()
        tx = optax.apply_if_finite(wrap(), 3)
        update = jax.jit(tx.update)
        state = tx.init(params)
        grads = jax.grad(loss)(params, inputs_of(0))
        bad = {**grads, "head": {"w": grads["head"]["w"].at[0, 0].set(jnp.nan)}}
        for _ in range(2):
            updates, state = update(bad, state, params)
            assert_equal(optax.apply_updates(params, updates), params)
        assert_equal(inner_state(state), wrap().init(params))
        updates, state = update(grads, state, params)
        expected, _ = wrap().update(grads, wrap().init(params), params)
        assert_close(updates, expected)

    def test_inject_hyperparams(self) -> None:
        def make(learning_rate: Any) -> Any:
            return wrap(optax.sgd(learning_rate))

        params = make_params()
        tx = optax.inject_hyperparams(make)(learning_rate=0.1)
        trained, state = run(tx, params)
        expected, _ = run(wrap(optax.sgd(0.1)), params)
        assert_close(trained, expected)
        state.hyperparams["learning_rate"] = jnp.asarray(0.0)
        grads = jax.grad(loss)(trained, inputs_of(0))
        updates, _ = tx.update(grads, state, trained)
        assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(updates))

    def test_masked(self) -> None:
        params = make_params()
        tx = optax.masked(wrap(optax.sgd(0.1)), {"body": True, "head": False})
        state = tx.init(params)
        assert list(inner_state(state).supports) == ["body.0.w", "body.1.w"]
        updates, _ = jax.jit(tx.update)(params, state, params)
        assert_equal(updates["head"], params["head"])  # optax passes masked leaves through
        assert int(jnp.sum(updates["body"][0]["w"] != 0)) == 72

    def test_partition(self) -> None:
        params = make_params()
        tx = optax.partition(
            {"sparse": wrap(optax.adamw(1e-2)), "dense": optax.sgd(0.1)},
            {"body": "sparse", "head": "dense"},
        )
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        assert int(jnp.sum(updates["head"]["w"] != 0)) == 64
        assert int(jnp.sum(updates["body"][1]["w"] != 0)) == 96


class TestRefusals:
    @pytest.mark.parametrize(
        ("inner", "name"),
        [
            (optax.contrib.muon(1e-3), "scale_by_muon"),
            (optax.adafactor(1e-3), "scale_by_factored_rms"),
            (optax.sm3(1e-3), "scale_by_sm3"),
        ],
        ids=["muon", "adafactor", "sm3"],
    )
    def test_rules_that_are_not_elementwise(self, inner: Any, name: str) -> None:
        with pytest.raises(
            topkast.UnsupportedOptimizerError, match=rf"{name}.* does not treat a tensor as a bag"
        ):
            wrap(inner)

    def test_shampoo_like(self) -> None:
        """A preconditioner from the second moments of rows."""

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            def precondition(grad: Any) -> Any:
                if grad.ndim < 2:
                    return grad
                values, vectors = jnp.linalg.eigh(grad @ grad.T + 1e-3 * jnp.eye(len(grad)))
                return vectors @ jnp.diag(values**-0.5) @ vectors.T @ grad

            return jax.tree.map(precondition, updates), state

        inner = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
        with pytest.raises(topkast.UnsupportedOptimizerError, match="bag of coordinates"):
            wrap(optax.chain(inner, optax.scale(-0.1)))

    def test_rules_that_are_probed_on_the_tree_of_the_user(self) -> None:
        """Labels by name need the user's tree, which init gets."""
        inner = optax.partition(
            {"muon": optax.contrib.muon(1e-3), "adam": optax.adam(1e-3)},
            lambda params: {"body": "adam", "head": {"w": "muon"}} if params["head"] else None,
        )
        tx = wrap(inner)
        with pytest.raises(topkast.UnsupportedOptimizerError, match="bag of coordinates"):
            tx.init(make_params())

    def test_rules_that_depend_on_the_path_of_a_tensor(self) -> None:
        """On a bare array the mask is False, so the first probe passes."""

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            return jax.tree.map(lambda grad: grad - grad.mean(0), updates), state

        by_rows = optax.GradientTransformation(lambda params: optax.EmptyState(), update)

        def mask(params: Any) -> Any:
            return jax.tree.map_with_path(
                lambda path, _: "body" in jax.tree_util.keystr(path), params
            )

        tx = wrap(optax.chain(optax.masked(by_rows, mask), optax.scale(-1e-3)))
        with pytest.raises(topkast.UnsupportedOptimizerError, match="bag of coordinates"):
            tx.init(make_params())

    def test_noise_passes_without_the_probe(self) -> None:
        inner = optax.noisy_sgd(0.1, key=0)
        with pytest.raises(topkast.UnsupportedOptimizerError, match="probe=False"):
            wrap(inner)
        _, state = run(wrap(inner, probe=False), make_params(), 4)
        assert state.updates == 4

    def test_line_search(self) -> None:
        tx = wrap(optax.lbfgs())
        with pytest.raises(topkast.UnsupportedOptimizerError, match="value_fn"):
            tx.init(make_params())

    def test_state_that_cannot_be_migrated(self) -> None:
        def init(params: Any) -> Any:
            return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])

        inner = optax.GradientTransformation(
            init, lambda updates, state, params=None: (updates, state)
        )
        with pytest.raises(topkast.UnsupportedOptimizerError, match="belongs to no single tensor"):
            wrap(inner).init(make_params())

    @pytest.mark.parametrize(
        ("inner", "name"),
        [
            (optax.MultiSteps(optax.sgd(0.1), 2), "MultiSteps"),
            (optax.apply_if_finite(optax.sgd(0.1), 2), "apply_if_finite"),
            (optax.chain(optax.apply_every(4), optax.sgd(0.1)), "MultiSteps"),
        ],
    )
    def test_transformations_that_skip_updates_inside(self, inner: Any, name: str) -> None:
        with pytest.raises(
            topkast.UnsupportedOptimizerError,
            match=rf"skips steps.* use optax\.{name}\(topkast\.wrap_optimizer",
        ):
            wrap(inner).init(make_params())

    def test_wrapping_twice(self) -> None:
        with pytest.raises(topkast.UnsupportedOptimizerError, match="wrapped already"):
            wrap(wrap())

    def test_objects_that_are_not_transformations(self) -> None:
        with pytest.raises(topkast.UnsupportedOptimizerError, match="expected an optax"):
            wrap(optax.EmptyState())

    def test_misspelt_pattern(self) -> None:
        with pytest.raises(topkast.OptionError, match=r"dense='haed\.\*' matches none"):
            wrap(dense="haed.*").init(make_params())
