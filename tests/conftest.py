"""One fixture over all array libraries: no function of the core is tested on one alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# So many devices are made of one processor; what does not ask for the others uses the first.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# What JAX compiled is kept on disk, so that a worker can let go of it in memory. Each worker has
# a folder to itself: JAX does not write these files in one piece.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(
        Path(__file__).parents[1]
        / ".pytest_cache"
        / "jax"
        / os.environ.get("PYTEST_XDIST_WORKER", "alone")
    ),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import gc
import resource
import signal
from collections.abc import Iterator
from typing import Any

import jax
import memory
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from libraries import LIBRARIES, Library

settings.register_profile(
    "fast",
    deadline=None,
    max_examples=20,
    derandomize="CI" in os.environ,  # as Hypothesis itself does: a red build can be repeated
    # The fixtures are libraries: they hold no state that an example could change.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("fast"), max_examples=50)
# For mutation testing: that an example fails says enough, and to simplify it takes minutes.
settings.register_profile(
    "unsimplified", settings.get_profile("fast"), phases=[Phase.explicit, Phase.generate]
)
PROFILE = os.environ.get("TOPKAST_HYPOTHESIS_PROFILE", "fast")
settings.load_profile(PROFILE)

# Each example is compiled anew inside jit. Where one test shows that it gives what the others
# give, the laws that follow from it are checked inside jit in the thorough session alone.
EAGER = LIBRARIES if PROFILE == "thorough" else [one for one in LIBRARIES if not one.traces]

torch.set_num_threads(1)
# What a shell starts in the background ignores interruptions, which some tests send.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


ECOSYSTEM = Path(__file__).parent / "ecosystem"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What needs other people's libraries is collected if the command line names it alone."""
    if collection_path != ECOSYSTEM:
        return None
    named = (Path(argument.partition("::")[0]).resolve() for argument in config.args)
    return None if any(ECOSYSTEM in (path, *path.parents) for path in named) else True


def compiles_kernels(item: pytest.Item) -> bool:
    """Whether a test is one of those that compile the most kernels."""
    path = item.path.relative_to(Path(__file__).parents[1]).as_posix()
    return "kernel" in path or "sparse" in path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Of two workers, one starts with the first half: it compiles the kernels for both.
    items.sort(key=lambda item: not compiles_kernels(item))
    if PROFILE != "thorough":
        slow = pytest.mark.skip(reason="takes long: nox -s property runs it")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(slow)


SHARED = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _only_own_objects() -> None:
    """Hide the objects of earlier tests from searches through all objects.

    Optimizers make such searches, and the many objects of a session would make them take most of
    the time of a test. What this test makes is found, by the garbage collector too.
    """
    gc.freeze()


def pytest_runtest_teardown() -> None:
    memory.release()


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # pytest collects all garbage now, and reports what then raises
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # of a worker of pytest-xdist
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        output["peak"] = peak * (1 if sys.platform == "darwin" else 1024)


PEAKS: list[int] = []


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    PEAKS.append(getattr(node, "workeroutput", {}).get("peak", 0))  # 0: it crashed


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if PEAKS:
        largest = max(PEAKS) / 1e9
        terminalreporter.write_line(f"peak memory of a test worker: {largest:.2f} GB")


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
    monkeypatch.setattr("topkast_torch.sparse._products.has_numba", lambda: chosen == "compiled")
    return chosen
