"""Parameters spread over eight devices: the results of one device, and nothing gathered."""

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

import topkast

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")

ROWS, COLUMNS = P("x", None), P(None, "x")


def make_mesh(kind: AxisType) -> Any:
    return jax.make_mesh((8,), ("x",), axis_types=(kind,))


def make_params() -> Pytree:
    key = jax.random.key(0)
    return {"w": jax.random.normal(key, (64, 80)), "b": jnp.zeros(80)}


def spread(params: Pytree, mesh: Any, spec: P) -> Pytree:
    specs = {"w": spec, "b": P("x") if spec == COLUMNS else P()}
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, specs[name]))
        for name, leaf in params.items()
    }


def gradient(alpha: Pytree) -> Pytree:
    """Of a loss without products: sums over devices would round in another order."""
    return {"w": alpha["w"] - 0.1, "b": alpha["b"] + 0.1}


def make_step(tx: Any, fused: bool = False) -> Any:
    def train(params: Pytree, state: Any) -> Any:
        grads = gradient(topkast.forward_params(params, state))
        if fused:
            return tx.step(grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return train


def run(tx: Any, params: Pytree, init: Any, compile: Any, **how: Any) -> Any:  # noqa: A002
    state, step = init(params), compile(make_step(tx, **how))
    for _ in range(5):
        params, state = step(params, state)
    return params, state


def is_cut(array: jax.Array) -> bool:
    return len({str(shard.index) for shard in array.addressable_shards}) == 8


@pytest.mark.parametrize("spec", [ROWS, COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
class TestSpread:
    @pytest.mark.parametrize(
        "inner",
        [optax.adamw(1e-1), pytest.param(optax.sgd(0.5, 0.9), marks=pytest.mark.slow)],
        ids=["adamw", "sgd"],
    )
    @pytest.mark.parametrize("fused", [False, True], ids=["update", "step"])
    def test_equals_one_device(self, kind: AxisType, spec: P, inner: Any, fused: bool) -> None:
        tx = wrap(inner, fwd=0.9, bwd=0.8, refresh_every=2)
        params = make_params()
        expected, expected_state = run(tx, params, tx.init, jax.jit, fused=fused)
        mesh = make_mesh(kind)
        with jax.set_mesh(mesh):
            found, state = run(tx, spread(params, mesh, spec), tx.init, jax.jit, fused=fused)
        assert_equal(state.supports, expected_state.supports)
        assert_close(found, expected)
        assert_close(state.inner, expected_state.inner)
        assert not np.array_equal(found["w"], params["w"])

    @pytest.mark.slow
    def test_state_is_spread_as_the_parameters_are(self, kind: AxisType, spec: P) -> None:
        tx = wrap(fwd=0.9, bwd=0.8, refresh_every=2)
        mesh = make_mesh(kind)
        with jax.set_mesh(mesh):
            params = spread(make_params(), mesh, spec)
            for state in (tx.init(params), run(tx, params, tx.init, jax.jit)[1]):
                support, moments = state.supports["w"], optax.tree.get(state, "mu")
                for array in (support.indices, moments["w"]):
                    assert is_cut(array)
                assert is_cut(moments["b"]) == is_cut(params["b"])
            moved, state = run(tx, params, tx.init, jax.jit)
            for alpha in (topkast.forward_params, jax.jit(topkast.forward_params)):
                view = alpha(moved, state)
                assert view["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
            assert moved["w"].sharding.is_equivalent_to(params["w"].sharding, 2)

    @pytest.mark.slow
    def test_outside_jit(self, kind: AxisType, spec: P) -> None:
        tx = wrap(fwd=0.9, bwd=0.8, refresh_every=2)
        params, mesh = make_params(), make_mesh(kind)
        expected, expected_state = run(tx, params, tx.init, lambda function: function)
        found, state = run(tx, spread(params, mesh, spec), tx.init, lambda function: function)
        assert_equal(state.supports, expected_state.supports)
        assert_close(found, expected)
        assert is_cut(state.supports["w"].indices)
        masks = topkast.masks(state, found)["w"]
        assert_equal(masks, topkast.masks(expected_state, expected)["w"])
        assert "w" in str(topkast.summary(state, found))

    def test_nan_is_told(self, kind: AxisType, spec: P) -> None:
        params = make_params()
        params["w"] = params["w"].at[3, 3].set(jnp.nan)
        with pytest.raises(topkast.NonFiniteError, match="w: 1 of 5120"):
            wrap().init(spread(params, make_mesh(kind), spec))

    def test_what_stays_dense_needs_no_rank(self, kind: AxisType, spec: P) -> None:
        params = make_params()
        params["b"] = params["b"].at[3].set(jnp.nan)
        assert wrap(bwd=0.8).init(spread(params, make_mesh(kind), spec)).updates == 0


def test_compiled_init_under_automatic_sharding_keeps_whole_copies() -> None:
    """Inside jit nobody can see how the parameters are cut: correct, and not spread."""
    tx, mesh = wrap(fwd=0.9, bwd=0.8), make_mesh(AxisType.Auto)
    params = spread(make_params(), mesh, ROWS)
    state = jax.jit(tx.init)(params)
    assert_equal(state.supports, tx.init(params).supports)


def test_vectors_that_do_not_divide_are_told() -> None:
    mesh = make_mesh(AxisType.Auto)
    params = spread(make_params(), mesh, ROWS)
    with pytest.warns(UserWarning, match=r"w: \|B\| = 1588 does not divide into 8 equal parts"):
        state = wrap(fwd=0.9, bwd=0.69).init(params)
    assert not is_cut(state.supports["w"].indices)


def test_no_step_gathers_anything_as_large_as_a_tensor() -> None:
    """Cut by rows, which are contiguous: only vectors of |B| travel, at a refresh too."""
    tx, mesh = wrap(fwd=0.9, bwd=0.8, refresh_every=2), make_mesh(AxisType.Auto)
    params = spread(make_params(), mesh, ROWS)
    text = jax.jit(make_step(tx)).lower(params, tx.init(params)).compile().as_text()
    assert text is not None
    sent = re.findall(r"= (.*?) (?:all|collective|reduce|ragged)-[\w-]+\(", text)
    shapes = re.findall(r"\w+\[([\d,]+)\]", " ".join(sent))
    sizes = [int(np.prod([int(length) for length in shape.split(",")])) for shape in shapes]
    assert sizes
    assert max(sizes) == 1024  # |B|, of 5120 weights


def test_layouts_that_cannot_be_followed_are_refused() -> None:
    params = make_params()
    one, other = (jax.make_mesh((8,), (name,), axis_types=(AxisType.Auto,)) for name in ("x", "y"))
    mixed = {
        "a": jax.device_put(params["w"], NamedSharding(one, P("x"))),
        "b": jax.device_put(params["w"], NamedSharding(other, P("y"))),
    }
    with pytest.raises(topkast.UnsupportedTensorError, match="must lie on one mesh"):
        wrap().init(mixed)


def test_what_lies_on_no_mesh_is_put_on_it() -> None:
    mesh = make_mesh(AxisType.Auto)
    params = {**spread(make_params(), mesh, ROWS), "scale": np.float32(2), "one": jnp.ones((9, 9))}
    tx = wrap(fwd=0.9, bwd=0.8)
    updates, state = tx.update(params, tx.init(params), params, what="ever", value=1.0)
    assert state.updates == 1
    assert updates["one"].shape == (9, 9)
