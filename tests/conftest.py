"""One fixture over all array libraries: no function of the core is tested on one alone."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# So many devices are made of one processor; what does not ask for the others uses the first.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from libraries import LIBRARIES, Library

settings.register_profile(
    "fast",
    deadline=None,
    max_examples=25,
    derandomize="CI" in os.environ,  # as Hypothesis itself does: a red build can be repeated
    # The fixtures are libraries: they hold no state that an example could change.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("fast"), max_examples=50)
PROFILE = os.environ.get("TOPKAST_HYPOTHESIS_PROFILE", "fast")
settings.load_profile(PROFILE)

# Each example is compiled anew inside jit. Where one test shows that it gives what the others
# give, the laws that follow from it are checked inside jit in the thorough session alone.
EAGER = LIBRARIES if PROFILE == "thorough" else [one for one in LIBRARIES if not one.traces]

torch.set_num_threads(1)

SHARED = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture(params=EAGER, ids=str)
def library(request: pytest.FixtureRequest) -> Library:
    chosen: Library = request.param
    return chosen


@pytest.fixture(params=LIBRARIES, ids=str)
def any_library(request: pytest.FixtureRequest) -> Library:
    """As `library`, and inside ``jax.jit`` in every session."""
    chosen: Library = request.param
    return chosen


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit floats in JAX, which has them switched off."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs the data folder beside the repository")
    return SHARED


@pytest.fixture(params=["compiled", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels, and PyTorch's own sparse products in the place of a missing numba."""
    chosen: str = request.param
    monkeypatch.setattr("topkast_torch._products.has_numba", lambda: chosen == "compiled")
    return chosen
