"""A run saved with Orbax and restored in a new process continues bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import resume
from jax_training import assert_equal


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
