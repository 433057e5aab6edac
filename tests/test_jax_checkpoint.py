"""Runs that were saved by Orbax or Flax continue bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import resume
import topkast_jax
from jax_training import assert_equal

import topkast


@pytest.mark.filterwarnings("default:::orbax", "default::DeprecationWarning")
def test_a_new_process_continues_bit_for_bit(tmp_path: Path) -> None:
    tx, params = resume.make()
    state = tx.init(params)
    uninterrupted = resume.train(tx, params, state, range(8))  # refreshes at 3 and 6
    resume.save(tmp_path / "half", *resume.train(tx, params, state, range(4)))
    subprocess.run(
        [sys.executable, resume.__file__, tmp_path / "half", tmp_path / "whole", "4", "8"],
        check=True,
        timeout=120,
        env=os.environ,
    )
    resumed = resume.restore(tmp_path / "whole")
    assert_equal(resumed, uninterrupted)
    assert jax.tree.map(jax.typeof, resumed) == jax.tree.map(jax.typeof, uninterrupted)


@pytest.mark.parametrize("sparse", [False, True])
def test_flax_serialization_restores_bit_for_bit(sparse: bool) -> None:
    """The sets and layouts are dataclasses, which Flax does not know by itself."""
    serialization = pytest.importorskip("flax.serialization")  # not among the lowest versions

    tx, params = resume.make()
    start = tx.init(params)
    if sparse:
        start = topkast_jax.sparsify(params, start)

    def train(run: Any, steps: int) -> Any:
        params, state = run
        for number in range(steps):
            grads = jax.tree.map(
                lambda leaf, number=number: jnp.full_like(leaf, 0.5**number),
                topkast.forward_params(params, state),
            )
            params, state = tx.step(grads, state, params)
        return params, state

    half = train((params, start), 4)
    saved = serialization.to_bytes(half)
    restored = serialization.from_bytes((params, start), saved)
    assert_equal(train(restored, 3), train(half, 3))
    assert_equal(jax.tree.map(jnp.asarray, restored), half)


@pytest.mark.filterwarnings("ignore::topkast.WeightsMovedWarning")  # before the error
@pytest.mark.parametrize(
    ("options", "transpose", "distribution", "sharded"),
    [
        ({"fwd": 0.85}, False, "uniform", False),
        ({"fwd": 0.85}, False, "uniform", True),
        ({}, True, "global", False),
        pytest.param({"fwd": 0.85}, False, "global", False, marks=pytest.mark.slow),
        pytest.param(
            {"overrides": {"v": {"fwd": 0.8}}}, False, "uniform", False, marks=pytest.mark.slow
        ),
        pytest.param({}, True, "uniform", True, marks=pytest.mark.slow),
    ],
)
def test_a_state_restored_into_that_of_other_sets_is_refused(
    options: dict[str, Any], transpose: bool, distribution: str, sharded: bool
) -> None:
    """Every array has the shape of the template's: |A| and the tensors' shapes are no arrays."""

    def wrap(**changed: Any) -> Any:
        common: Any = {"fwd": 0.9, "bwd": 0.8, "refresh_every": 5, "distribution": distribution}
        return topkast.wrap_optimizer(optax.adam(0.1), **common | changed)

    params = {
        name: jax.random.normal(jax.random.key(seed), (8, 20)) for seed, name in enumerate("vw")
    }
    if sharded:
        mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
        params = jax.device_put(params, rows)
    tx, state = wrap(**options), wrap().init(params)
    if transpose:
        params = jax.tree.map(lambda leaf: jnp.reshape(leaf, (20, 8)), params)
    template = tx.init(params)
    restored = jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(state))
    grads = jax.tree.map(jnp.ones_like, params)
    uses: list[Any] = [
        lambda: tx.update(grads, restored, params),
        lambda: tx.step(grads, restored, params),
        lambda: topkast.forward_params(params, restored),
        lambda: topkast.summary(restored, params),
        lambda: topkast.masks(restored, params),
    ]
    for use in uses:
        with pytest.raises(topkast.MismatchError, match="belongs to other tensors or other sets"):
            use()
    _, state = jax.jit(tx.step)(grads, restored, params)  # which cannot raise
    for inspector in (topkast.summary, topkast.masks):
        with pytest.warns(topkast.WeightsMovedWarning, match="saved with other options"):
            inspector(state, params)
    _, state = jax.jit(tx.step)(grads, tx.init(params), params)
    assert not state.stale_refreshes
