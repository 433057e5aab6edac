"""Whether optax transformations of the Adam family have ages, whatever they are built from."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast

OPTIONS: Any = {"fwd": 0.9, "bwd": 0.8, "refresh_every": 3}
MASK = {"hidden": {"w": True, "b": False}, "head": {"w": True, "b": False}}
LABELS = {"hidden": {"w": "adam", "b": "sgd"}, "head": {"w": "sgd", "b": "sgd"}}


def make_params() -> Any:
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "hidden": {"w": jax.random.normal(keys[0], (20, 30)) / 4, "b": jnp.zeros(30)},
        "head": {"w": jax.random.normal(keys[1], (30, 5)) / 4, "b": jnp.zeros(5)},
    }


def gradient(number: int) -> Any:
    generator = np.random.default_rng(number)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.standard_normal(leaf.shape), jnp.float32), make_params()
    )


def train(tx: Any, updates: int = 12) -> Any:
    params = make_params()
    state, step = tx.init(params), jax.jit(tx.update)
    for number in range(updates):
        displacements, state = step(gradient(number), state, params)
        params = optax.apply_updates(params, displacements)
    return params


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.adamw(1e-2, mask=MASK), {"hidden.w", "head.w"}),
        (optax.inject_hyperparams(optax.adamw, static_args="mask")(1e-2, mask=MASK), None),
        (optax.masked(optax.adam(1e-2), MASK), None),
        (
            optax.multi_transform({"adam": optax.adam(1e-2), "sgd": optax.sgd(0.1)}, LABELS),
            {"hidden.w"},
        ),
    ],
    ids=["mask of the decay", "injected", "masked", "labels"],
)
def test_transformations_for_one_tree_have_ages(tx: Any, expected: set[str] | None) -> None:
    """Trees of masks and labels fit the user's tree, and no other one."""
    state = topkast.wrap_optimizer(tx, **OPTIONS).init(make_params())
    assert set(state.ages) == (expected or {"hidden.w", "head.w"})


def test_a_mask_as_a_tree_trains_as_a_function_does() -> None:
    def is_matrix(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)

    tree = topkast.wrap_optimizer(optax.adamw(1e-2, mask=MASK), **OPTIONS)
    function = topkast.wrap_optimizer(optax.adamw(1e-2, mask=is_matrix), **OPTIONS)
    jax.tree.map(np.testing.assert_array_equal, train(tree), train(function))


@pytest.mark.parametrize(
    "schedule",
    [
        optax.cosine_decay_schedule(1e-2, 100),  # is 0 after 100 updates
        optax.cosine_decay_schedule(1e-2, 220),
        optax.exponential_decay(1e-2, 100, 0.5),
        optax.linear_schedule(0.0, 1e-2, 50),
        optax.join_schedules([optax.constant_schedule(0.0), optax.constant_schedule(1e-2)], [50]),
    ],
    ids=["short", "cosine", "exponential", "warmup", "late"],
)
@pytest.mark.parametrize("injected", [False, True])
def test_schedules_do_not_change_who_has_ages(schedule: Any, injected: bool) -> None:
    """A learning rate that changes during the trial looks like a bias correction."""
    for build, names in ((optax.adam, ["w"]), (optax.rmsprop, [])):
        factory = optax.inject_hyperparams(build) if injected else build
        tx = topkast.wrap_optimizer(factory(schedule), **OPTIONS, probe=False)
        assert list(tx.init({"w": make_params()["hidden"]["w"]}).ages) == names


@pytest.mark.parametrize("halfway", [110, 50])
def test_schedules_of_rules_do_not_change_who_has_ages(halfway: int) -> None:
    weights = np.asarray(make_params()["hidden"]["w"])
    for lr in (1e-2, lambda step: 1e-2 * 0.5 ** (step / halfway), lambda step: 0.0 * step + 1e-2):
        tx = topkast.wrap_optimizer(topkast.Adam(lr), **OPTIONS)
        assert list(tx.init({"w": weights}).ages) == ["w"]


def test_hyperparameters_around_the_wrapper_train_as_inside() -> None:
    """The learning rate is traced there, so that no trial can read it."""

    def build(learning_rate: Any) -> Any:
        return topkast.wrap_optimizer(optax.adam(learning_rate), **OPTIONS)

    around = train(optax.inject_hyperparams(build)(1e-2))
    jax.tree.map(
        lambda left, right: np.testing.assert_allclose(left, right, atol=1e-6),
        around,
        train(build(1e-2)),
    )


def test_a_traced_learning_rate_keeps_the_sign_of_the_penalty() -> None:
    """A trial with another learning rate must not be taken for one that ascends."""
    weights = {"w": make_params()["hidden"]["w"]}
    grads = jax.tree.map(jnp.zeros_like, weights)

    def train_once(learning_rate: Any) -> Any:
        tx = topkast.wrap_optimizer(optax.adam(learning_rate), **OPTIONS, penalty=1.0)
        return tx.step(grads, tx.init(weights), weights)[0]

    np.testing.assert_allclose(jax.jit(train_once)(1e-2)["w"], train_once(1e-2)["w"], atol=1e-6)


def test_traced_betas_are_not_guessed() -> None:
    weights = {"w": make_params()["hidden"]["w"]}

    def init(beta: Any) -> Any:
        return topkast.wrap_optimizer(optax.adam(1e-2, b2=beta), **OPTIONS).init(weights)

    assert jax.jit(init)(0.99).ages == {}


@pytest.mark.parametrize("options", [{}, {"probe": False}], ids=str)
def test_a_learning_rate_that_is_injected_later(options: Any) -> None:
    """It is 0 at first, as before a warmup by hand, and the rest is as if it had been set."""

    def start(rate: float) -> Any:
        inner = optax.inject_hyperparams(optax.adam)(learning_rate=rate)
        return topkast.wrap_optimizer(inner, **OPTIONS, **options).init(make_params())

    state, expected = start(0.0), start(1e-2)
    assert set(state.ages) == {"hidden.w", "head.w"}
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    leaves = [
        jnp.full_like(leaf, 1e-2) if "learning_rate" in jax.tree_util.keystr(path) else leaf
        for path, leaf in paths
    ]
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_a_learning_rate_of_zero_that_nothing_changes_is_refused() -> None:
    tx = topkast.wrap_optimizer(optax.adam(0.0), **OPTIONS)
    with pytest.raises(topkast.UnsupportedOptimizerError, match="cannot take a plain step"):
        tx.init(make_params())
