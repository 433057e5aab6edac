"""optax, Flax, Equinox and checkpoints as users combine them."""

from __future__ import annotations

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import topkast
from topkast.testing import assert_same_support

OPTIONS: dict[str, Any] = {"fwd": 0.9, "bwd": 0.7, "refresh_every": 2}


def make_params() -> dict[str, Any]:
    first, second = jax.random.split(jax.random.key(0))
    return {
        "body": {"w": jax.random.normal(first, (8, 12)), "b": jnp.zeros(12)},
        "head": {"w": jax.random.normal(second, (12, 10)), "b": jnp.zeros(10)},
    }


def wrap(inner: Any = None, **options: Any) -> Any:
    inner = optax.adam(0.01) if inner is None else inner
    return topkast.wrap_optimizer(inner, **OPTIONS | options)


class TestSeveralWrappedStates:
    """``optax.partition`` with two wrapped transformations."""

    def make(self) -> tuple[Any, Any, Any]:
        params = make_params()
        tx = optax.partition(
            {"sparse": wrap(fwd=0.9), "denser": wrap(fwd=0.5, bwd=0.25), "plain": optax.sgd(0.1)},
            {
                "body": {"w": "sparse", "b": "plain"},
                "head": {"w": "denser", "b": "plain"},
            },
        )
        return tx, tx.init(params), params

    def test_inspectors_cover_all_states(self) -> None:
        _, state, params = self.make()
        masks = topkast.masks(state, params)
        assert {name: int(mask.forward.sum()) for name, mask in masks.items()} == {
            "body.w": 10,
            "head.w": 60,
        }
        alpha = topkast.forward_params(params, state)
        assert int((alpha["body"]["w"] != 0).sum()) == 10
        assert int((alpha["head"]["w"] != 0).sum()) == 60
        summary = topkast.summary(state, params)
        assert {row.name for row in summary.tensors} == {"body.w", "body.b", "head.w", "head.b"}
        assert topkast.dense_params(state, params).keys() == {row.name for row in summary.tensors}

    def test_it_trains(self) -> None:
        tx, state, params = self.make()

        @jax.jit
        def train(params: Any, state: Any) -> Any:
            grads = jax.grad(
                lambda alpha: sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(alpha))
            )(topkast.forward_params(params, state))
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(5):
            params, state = train(params, state)
        assert int((topkast.forward_params(params, state)["head"]["w"] != 0).sum()) == 60


class TestInspectedObjects:
    def test_a_training_state_of_flax(self) -> None:
        params = make_params()
        create: Any = TrainState.create
        state = create(apply_fn=lambda: None, params=params, tx=wrap())
        state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))
        assert topkast.summary(state, state.params).updates == 1
        assert int((topkast.forward_params(state.params, state)["body"]["w"] != 0).sum()) == 10

    def test_an_optimizer_of_nnx(self) -> None:
        model = nnx.Linear(8, 12, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, wrap(), wrt=nnx.Param)
        params = nnx.state(model, nnx.Param)
        assert int(topkast.masks(optimizer, params)["kernel"].forward.sum()) == 10
        assert topkast.summary(optimizer, params).tensors[1].forward == 10
        alpha: Any = topkast.forward_params(params, optimizer)
        assert int((alpha["kernel"].get_value() != 0).sum()) == 10

    def test_an_optimizer_of_nnx_inside_jit(self) -> None:
        """Its Variables hold tracers there, which nobody can compare."""
        model = nnx.Linear(8, 12, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, wrap(), wrt=nnx.Param)

        @nnx.jit
        def view(model: Any, optimizer: Any) -> Any:
            return topkast.forward_params(nnx.state(model, nnx.Param), optimizer.opt_state)

        assert int((view(model, optimizer)["kernel"].get_value() != 0).sum()) == 10

    def test_errors_say_which_state_to_pass(self) -> None:
        params, tx = make_params(), wrap()
        state = tx.init(params)
        restored = {"updates": 0, "supports": {}}
        batch = jax.vmap(lambda _: tx.init(params))(jnp.arange(3))
        for wrong, message in (
            (tx, r"this is the transformation: pass the state"),
            (restored, "restore it into the state"),
            (({"opt": restored},), "restore it into the state"),
            (batch, r"batch of 3.*leaf\[0\]"),
            ({"a": 1}, "it contains no such state"),
        ):
            for inspector in (topkast.masks, topkast.summary, topkast.dense_params):
                with pytest.raises(topkast.MismatchError, match=message):
                    inspector(wrong, params)
        with pytest.raises(topkast.MismatchError, match="needs the state that init returned"):
            tx.update(params, restored, params)
        member = jax.tree.map(lambda leaf: leaf[0], batch)
        assert topkast.summary(member, params).updates == int(state.updates)

    def test_an_optimizer_of_torch(self) -> None:
        import torch

        opt = topkast.wrap_optimizer(
            torch.optim.SGD(torch.nn.Linear(9, 9).parameters(), 0.1), fwd=0.5, bwd=0.5
        )
        with pytest.raises(topkast.MismatchError, match="holds the forward view already"):
            topkast.forward_params({}, opt)


class TestEquinox:
    def test_functions_in_a_model_pass_through(self) -> None:
        model: Any = eqx.nn.MLP(8, 3, 12, 2, activation=jax.nn.silu, key=jax.random.key(0))
        tx = wrap()
        state = tx.init(eqx.filter(model, eqx.is_inexact_array))
        alpha = topkast.forward_params(model, state)
        assert int((alpha.layers[0].weight != 0).sum()) == 10
        assert alpha(jnp.ones(8)).shape == (3,)
        assert int(topkast.masks(state, model)["layers.0.weight"].backward.sum()) == 29
        assert topkast.summary(state, model).updates == 0

    def test_biases_of_convolutions_stay_dense(self) -> None:
        layer: Any = eqx.nn.Conv2d(3, 8, 3, key=jax.random.key(0))
        alpha = topkast.forward_params(layer, wrap().init(layer))
        assert int((alpha.bias != 0).sum()) == 8


class TestDtypes:
    def test_gradients_are_promoted_as_optax_does(self) -> None:
        params = make_params()
        for inner in (optax.sgd(0.1, momentum=0.9), optax.adam(0.01)):
            tx, state = wrap(inner, fwd=0.0, bwd=0.0, penalty=0.0), None
            state, plain = tx.init(params), inner.init(params)
            update, plain_update = jax.jit(tx.update), jax.jit(inner.update)
            grads = jax.tree.map(lambda leaf: jnp.ones_like(leaf, jnp.bfloat16) * 0.1, params)
            for _ in range(3):
                updates, state = update(grads, state, params)
                expected, plain = plain_update(grads, plain, params)
                updated, plain_updated = (
                    optax.apply_updates(params, tree) for tree in (updates, expected)
                )
                assert [leaf.dtype for leaf in jax.tree.leaves(updated)] == [
                    leaf.dtype for leaf in jax.tree.leaves(plain_updated)
                ]
                close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
                jax.tree.map(close, updated, plain_updated)
                params = updated

    def test_gradients_wider_than_parameters(self) -> None:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_params())
        tx = wrap()
        state, step = tx.init(params), jax.jit(tx.step)
        for _ in range(3):
            grads = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.float32), params)
            params, state = step(grads, state, params)
        assert params["body"]["w"].dtype == jnp.bfloat16

    def test_a_global_ranking_needs_one_dtype(self) -> None:
        params = make_params()
        for dtype in (jnp.bfloat16, jnp.complex64):
            params["head"]["w"] = params["head"]["w"].astype(dtype)
            with pytest.raises(topkast.OptionError, match="must have one dtype"):
                wrap(distribution="global").init(params)

    def test_a_state_continues_under_x64(self) -> None:
        params, tx = make_params(), wrap()
        state = tx.init(params)
        updates, next_state = tx.update(params, state, params)
        with jax.enable_x64(True):
            wide_updates, wide_state = tx.update(params, state, params)
        for name, support in next_state.supports.items():
            assert_same_support(support, wide_state.supports[name])
            assert wide_state.supports[name].indices.dtype == jnp.int32
        # Under x64 optax computes Adam's bias corrections in 64 bits.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
        jax.tree.map(close, wide_updates, updates)


class TestTraced:
    def test_derivatives_through_training_with_hyperparameters(self) -> None:
        """The loss after training is differentiated by the learning rate, inside jit."""
        params = {"w": jax.random.normal(jax.random.key(1), (4, 5))}

        def final_loss(lr: jax.Array) -> jax.Array:
            tx = topkast.wrap_optimizer(
                optax.inject_hyperparams(optax.sgd)(learning_rate=lr), fwd=0.5, bwd=0.25
            )
            theta, state = params, tx.init(params)
            for _ in range(3):
                grads = jax.grad(lambda alpha: jnp.sum((alpha["w"] - 1) ** 2))(
                    topkast.forward_params(theta, state)
                )
                updates, state = tx.update(grads, state, theta)
                theta = optax.apply_updates(theta, updates)
            return jnp.sum(topkast.forward_params(theta, state)["w"] ** 2)

        eager = jax.grad(final_loss)(0.1)
        assert np.isfinite(eager)
        assert jax.jit(jax.grad(final_loss))(0.1) == pytest.approx(float(eager), rel=1e-5)

    def test_predicates_get_shapes_and_dtypes(self) -> None:
        received: list[Any] = []

        def dense(name: str, tensor: Any) -> bool:
            received.append((tensor.shape, tensor.ndim, str(tensor.dtype)))
            return bool(tensor.shape == (12, 10))

        tx = wrap(dense=dense)
        params = make_params()
        state = jax.jit(tx.init)(params)
        jax.jit(tx.update)(params, state, params)
        assert list(state.supports) == ["body.w"]
        assert set(received) == {((8, 12), 2, "float32"), ((12, 10), 2, "float32")}

    def test_a_summary_needs_arrays(self) -> None:
        params, tx = make_params(), wrap()
        state = tx.init(params)
        with pytest.raises(topkast.MismatchError, match="which a compiled function cannot"):
            jax.jit(lambda state: topkast.summary(state, params).updates)(state)

    def test_huge_intervals(self) -> None:
        params = make_params()
        tx = wrap(refresh_every=2**40, explore_until=2**40)
        _, state = jax.jit(tx.update)(params, tx.init(params), params)
        assert int(state.updates) == 1


@pytest.mark.parametrize("name", ["fwd", "bwd", "refresh_every", "penalty", "power", "seed"])
def test_arrays_in_place_of_options(name: str) -> None:
    """``inject_hyperparams`` makes arrays of all arguments that are not static."""

    def build(learning_rate: Any, option: Any) -> Any:
        return wrap(optax.sgd(learning_rate), **{name: option})

    value = {"fwd": 0.8, "bwd": 0.6, "penalty": 0.1}.get(name, 1)
    with pytest.raises(topkast.OptionError, match=f"^{name} must be a Python number.*static_args"):
        optax.inject_hyperparams(build)(learning_rate=0.1, option=float(value)).init(make_params())
    for array in (np.asarray(value), jnp.asarray(value)):
        with pytest.raises(topkast.OptionError, match=f"^{name} must be a Python number"):
            build(0.1, array)
    tx = optax.inject_hyperparams(build, static_args="option")(learning_rate=0.1, option=value)
    assert topkast.summary(tx.init(make_params()), make_params()).updates == 0


class TestLeaves:
    def test_prng_keys(self) -> None:
        params = {"w": jnp.ones((4, 5)), "key": jax.random.key(0)}
        tx = wrap()
        state = tx.init(params)
        grads = {"w": jnp.ones((4, 5)), "key": np.zeros((), jax.dtypes.float0)}
        updated, _ = tx.step(grads, state, params)
        assert updated["key"] is params["key"]
        with pytest.raises(
            topkast.UnsupportedTensorError, match=r"key is a typed PRNG key.*tx\.step"
        ):
            tx.update(grads, state, params)

    @pytest.mark.parametrize("jit", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_a_state_of_numpy_arrays(self, jit: bool) -> None:
        params, tx = make_params(), wrap()
        state = tx.init(params)
        update = jax.jit(tx.update) if jit else tx.update
        expected = update(params, state, params)
        numpy_state = jax.tree.map(np.asarray, state)
        result = update(params, numpy_state, params)
        jax.tree.map(np.testing.assert_array_equal, expected, result)
        jax.tree.map(
            np.testing.assert_array_equal,
            topkast.forward_params(params, state),
            topkast.forward_params(params, numpy_state),
        )

    def test_a_state_of_transposed_tensors_is_refused(self) -> None:
        params, tx = {"w": jax.random.normal(jax.random.key(0), (8, 9))}, wrap()
        state = tx.init(params)
        transposed = {"w": params["w"].T}
        with (
            pytest.warns(topkast.WeightsMovedWarning),
            pytest.raises(topkast.MismatchError, match="belongs to other tensors"),
        ):
            tx.update(transposed, state, transposed)


class TestMapParams:
    def test_tree_map_params_visits_entries_per_parameter(self) -> None:
        params = make_params()
        tx = wrap()
        state = tx.init(params)
        shapes: list[Any] = []

        def record(leaf: Any) -> Any:
            shapes.append(leaf.shape)
            return leaf

        mapped = optax.tree_utils.tree_map_params(tx, record, state)
        jax.tree.map(np.testing.assert_array_equal, mapped, state)
        assert shapes.count((1, 29)) == 2
        assert len(shapes) == 8


class TestNormsOfTensors:
    """Rules that normalise by tensor cannot be used on a joint vector."""

    @pytest.mark.parametrize(
        "inner",
        [
            optax.lamb(0.01),
            pytest.param(optax.lars(0.01), marks=pytest.mark.slow),
            pytest.param(
                optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(0.1)), marks=pytest.mark.slow
            ),
        ],
        ids=["lamb", "lars", "clip_by_block_rms"],
    )
    def test_they_are_refused_under_a_global_ranking(self, inner: Any) -> None:
        wrap(inner).init(make_params())
        with pytest.raises(topkast.UnsupportedOptimizerError, match="distribution='global'"):
            wrap(inner, distribution="global").init(make_params())

    @pytest.mark.parametrize("inner", [optax.adam(0.01), optax.sgd(0.1, momentum=0.9)])
    def test_other_rules_are_not(self, inner: Any) -> None:
        (support,) = wrap(inner, distribution="global").init(make_params()).supports.values()
        assert support.backward > support.forward > 0


class TestProbe:
    @pytest.mark.parametrize(
        ("condition", "shape"),
        [
            (lambda path, leaf: leaf.ndim == 3 and leaf.shape[0] > 1, (4, 5, 6)),
            (lambda path, leaf: leaf.ndim == 2 and leaf.shape[0] > 200, (300, 8)),
            (lambda path, leaf: "odd" in jax.tree_util.keystr(path), (6, 7)),
        ],
        ids=["three dimensions", "long axes", "name"],
    )
    def test_it_uses_tensors_like_the_users(self, condition: Any, shape: Any) -> None:
        def update(updates: Any, state: Any, params: Any = None) -> Any:
            def change(path: Any, leaf: Any) -> Any:
                return -(leaf - leaf.mean(0)) if condition(path, leaf) else -leaf

            return jax.tree.map_with_path(change, updates), state

        tx = wrap(optax.GradientTransformation(lambda params: optax.EmptyState(), update))
        harmless = {"w": jnp.ones((6, 7))}
        tx.init(harmless)
        with pytest.raises(topkast.UnsupportedOptimizerError, match="bag of coordinates"):
            tx.init(harmless | {"odd": jnp.ones(shape)})

    def test_adafactor_with_a_higher_threshold(self) -> None:
        inner = optax.adafactor(0.1, min_dim_size_to_factor=256)
        tx = wrap(inner)
        with pytest.raises(topkast.UnsupportedOptimizerError, match="bag of coordinates"):
            tx.init({"w": jnp.ones((300, 400))})

    def test_the_second_init_does_not_probe(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []
        inner = optax.adam(0.01)

        def update(*arguments: Any, **keywords: Any) -> Any:
            calls.append(arguments)
            return inner.update(*arguments, **keywords)

        tx = wrap(optax.GradientTransformation(inner.init, update))
        tx.init(make_params())
        calls_of_first_init = len(calls)
        assert calls_of_first_init > 0
        tx.init(make_params())
        assert len(calls) == calls_of_first_init


def test_the_penalty_shrinks_weights_whatever_the_sign_of_the_objective() -> None:
    params = make_params()
    for sign in (1.0, -1.0):
        tx = wrap(optax.chain(optax.sgd(0.1), optax.scale(sign)), penalty=1.0)
        state = tx.init(params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zeros, state, params)
        updated = optax.apply_updates(params, updates)
        backward = topkast.masks(state, params)["body.w"].backward
        before, after = (jnp.abs(tree["body"]["w"])[backward] for tree in (params, updated))
        assert (after < before).all()
