"""Runs that were saved by Orbax or Flax continue bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
    from flax import serialization

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
