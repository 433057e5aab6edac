"""Parameters sharded over eight devices give the results of one device; none is gathered."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_training import Pytree, assert_close, assert_equal, wrap
from products import star

import topkast

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")

ROWS, COLUMNS = P("x", None), P(None, "x")


def make_mesh(axis_type: AxisType) -> Any:
    return jax.make_mesh((8,), ("x",), axis_types=(axis_type,))


def make_params() -> Pytree:
    key = jax.random.key(0)
    return {"w": jax.random.normal(key, (64, 80)), "b": jnp.zeros(80)}


def shard(params: Pytree, mesh: Any, spec: P) -> Pytree:
    specs = {"w": spec, "b": P("x") if spec == COLUMNS else P()}
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, specs[name]))
        for name, leaf in params.items()
    }


def gradient(alpha: Pytree) -> Pytree:
    """Gradient of a loss without products, whose sums over devices would round differently."""
    return {"w": alpha["w"] - 0.1, "b": alpha["b"] + 0.1}


def make_step(tx: Any, fused: bool = False) -> Any:
    def train(params: Pytree, state: Any) -> Any:
        grads = gradient(topkast.forward_params(params, state))
        if fused:
            return tx.step(grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return train


def run(tx: Any, params: Pytree, init: Any, compile: Any, **options: Any) -> Any:  # noqa: A002
    state, step = init(params), compile(make_step(tx, **options))
    for _ in range(5):
        params, state = step(params, state)
    return params, state


def is_sharded(array: jax.Array) -> bool:
    return len({str(piece.index) for piece in array.addressable_shards}) == 8


@pytest.mark.parametrize("spec", [ROWS, COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
class TestSharded:
    @pytest.mark.parametrize(
        "inner",
        [optax.adamw(1e-1), pytest.param(optax.sgd(0.5, 0.9), marks=pytest.mark.slow)],
        ids=["adamw", "sgd"],
    )
    @pytest.mark.parametrize("fused", [False, True], ids=["update", "step"])
    def test_equals_one_device(self, axis_type: AxisType, spec: P, inner: Any, fused: bool) -> None:
        tx = wrap(inner, fwd=0.9, bwd=0.8, refresh_every=2)
        params = make_params()
        expected, expected_state = run(tx, params, tx.init, jax.jit, fused=fused)
        mesh = make_mesh(axis_type)
        with jax.set_mesh(mesh):
            trained, state = run(tx, shard(params, mesh, spec), tx.init, jax.jit, fused=fused)
        assert_equal(state.supports, expected_state.supports)
        assert_close(trained, expected)
        assert_close(state.inner, expected_state.inner)
        assert not np.array_equal(trained["w"], params["w"])

    @pytest.mark.slow
    def test_state_is_sharded_as_the_parameters_are(self, axis_type: AxisType, spec: P) -> None:
        tx = wrap(fwd=0.9, bwd=0.8, refresh_every=2)
        mesh = make_mesh(axis_type)
        with jax.set_mesh(mesh):
            params = shard(make_params(), mesh, spec)
            for state in (tx.init(params), run(tx, params, tx.init, jax.jit)[1]):
                support, moments = state.supports["w"], optax.tree.get(state, "mu")
                for array in (support.indices, moments["w"]):
                    assert is_sharded(array)
                assert is_sharded(moments["b"]) == is_sharded(params["b"])
            trained, state = run(tx, params, tx.init, jax.jit)
            for forward_params in (topkast.forward_params, jax.jit(topkast.forward_params)):
                view = forward_params(trained, state)
                assert view["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
            assert trained["w"].sharding.is_equivalent_to(params["w"].sharding, 2)

    @pytest.mark.slow
    def test_outside_jit(self, axis_type: AxisType, spec: P) -> None:
        tx = wrap(fwd=0.9, bwd=0.8, refresh_every=2)
        params, mesh = make_params(), make_mesh(axis_type)
        expected, expected_state = run(tx, params, tx.init, lambda function: function)
        trained, state = run(tx, shard(params, mesh, spec), tx.init, lambda function: function)
        assert_equal(state.supports, expected_state.supports)
        assert_close(trained, expected)
        assert is_sharded(state.supports["w"].indices)
        masks = topkast.masks(state, trained)["w"]
        assert_equal(masks, topkast.masks(expected_state, expected)["w"])
        assert "w" in str(topkast.summary(state, trained))

    def test_nan_is_an_error(self, axis_type: AxisType, spec: P) -> None:
        params = make_params()
        params["w"] = params["w"].at[3, 3].set(jnp.nan)
        with pytest.raises(topkast.NonFiniteError, match="w: 1 of 5120"):
            wrap().init(shard(params, make_mesh(axis_type), spec))

    def test_nan_in_a_dense_tensor_is_no_error(self, axis_type: AxisType, spec: P) -> None:
        params = make_params()
        params["b"] = params["b"].at[3].set(jnp.nan)
        assert wrap(bwd=0.8).init(shard(params, make_mesh(axis_type), spec)).updates == 0


def test_compiled_init_under_automatic_sharding_keeps_whole_copies() -> None:
    """Inside jit the shardings of parameters are unknown, so the state is replicated."""
    tx, mesh = wrap(fwd=0.9, bwd=0.8), make_mesh(AxisType.Auto)
    params = shard(make_params(), mesh, ROWS)
    state = jax.jit(tx.init)(params)
    assert_equal(state.supports, tx.init(params).supports)


def test_vectors_that_do_not_divide_evenly_warn() -> None:
    mesh = make_mesh(AxisType.Auto)
    params = shard(make_params(), mesh, ROWS)
    with pytest.warns(UserWarning, match=r"w: \|B\| = 1588 does not divide into 8 equal parts"):
        state = wrap(fwd=0.9, bwd=0.69).init(params)
    assert not is_sharded(state.supports["w"].indices)


def test_no_step_gathers_anything_as_large_as_a_tensor() -> None:
    """Sharded by rows, which are contiguous, only vectors of |B| are sent, even at a refresh."""
    tx, mesh = wrap(fwd=0.9, bwd=0.8, refresh_every=2), make_mesh(AxisType.Auto)
    params = shard(make_params(), mesh, ROWS)
    text = jax.jit(make_step(tx)).lower(params, tx.init(params)).compile().as_text()
    assert text is not None
    sent = re.findall(r"= (.*?) (?:all|collective|reduce|ragged)-[\w-]+\(", text)
    shapes = re.findall(r"\w+\[([\d,]+)\]", " ".join(sent))
    sizes = [int(np.prod([int(length) for length in shape.split(",")])) for shape in shapes]
    assert sizes
    assert max(sizes) == 1024  # |B|, of 5120 weights


def test_layouts_that_cannot_be_followed_are_refused() -> None:
    params = make_params()
    first, second = (
        jax.make_mesh((8,), (name,), axis_types=(AxisType.Auto,)) for name in ("x", "y")
    )
    mixed = {
        "a": jax.device_put(params["w"], NamedSharding(first, P("x"))),
        "b": jax.device_put(params["w"], NamedSharding(second, P("y"))),
    }
    with pytest.raises(topkast.UnsupportedTensorError, match="must lie on one mesh"):
        wrap().init(mixed)


def test_arrays_on_no_mesh_are_replicated_on_it() -> None:
    mesh = make_mesh(AxisType.Auto)
    params = {**shard(make_params(), mesh, ROWS), "scale": np.float32(2), "extra": jnp.ones((9, 9))}
    tx = wrap(fwd=0.9, bwd=0.8)
    updates, state = tx.update(params, tx.init(params), params, unexpected="ignored", value=1.0)
    assert state.updates == 1
    assert updates["extra"].shape == (9, 9)


SELECTIONS: dict[str, Any] = {
    "magnitude": {"fwd": 0.9, "bwd": 0.8},
    "random": {"fwd": 0.9, "bwd": 0.8, "explore": "random"},
    "block": {"fwd": 0.75, "bwd": 0.5, "block": (2, 4)},
    "pattern": {"fwd": 0.5, "bwd": 0.25, "pattern": (2, 4)},
}


@pytest.mark.parametrize(
    ("options", "spec"), star(SELECTIONS, [P("x", "y"), ROWS, COLUMNS, P(("y", "x"), None)])
)
def test_selection_on_explicit_axes(options: Any, spec: P) -> None:
    """JAX derives no shardings there; the sets and values are those of one device."""
    types = (AxisType.Explicit, AxisType.Explicit)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=types)
    whole = jax.random.normal(jax.random.key(0), (8, 16))
    sharded = jax.device_put(whole, NamedSharding(mesh, spec))
    assert jax.typeof(sharded).sharding.spec == spec

    def choose(params: jax.Array) -> Any:
        support = topkast.select(params, **options)
        values = topkast.gather(params, support)
        return support, values, topkast.scatter(values, support, shape=params.shape)

    expected = choose(whole)
    for function in (choose, jax.jit(choose)):
        assert_equal(function(sharded), expected)
        with jax.set_mesh(mesh):
            assert_equal(function(sharded), expected)


def test_not_a_number_on_explicit_axes() -> None:
    mesh = make_mesh(AxisType.Explicit)
    params = jnp.ones((8, 16)).at[2, 3].set(jnp.nan)
    with pytest.raises(topkast.NonFiniteError, match="1 of 128 entries"):
        topkast.select(jax.device_put(params, NamedSharding(mesh, COLUMNS)), fwd=0.9, bwd=0.8)
