"""Two processes train as one process with as many devices does, to the last bit."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hosts
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import topkast

# Each kind of axes, each way to cut the weight, each way to explore and both periods once.
DEFAULT = ["auto-rows-magnitude-1", "explicit-columns-random-3"]
SLOW = [
    "auto-columns-random-3",
    "explicit-rows-random-3",
    "auto-rows-magnitude-3",
    "auto-columns-magnitude-1",
    "auto-replicated-random-1",
    "auto-replicated-magnitude-3",
    "auto-both-magnitude-1",
    "explicit-columns-magnitude-3",
    "explicit-replicated-random-3",
    "auto-rows-rigl-3",
    "auto-rows-set-3",
]
CASES = [*DEFAULT, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


def run_processes(folder: Path, cases: list[str]) -> None:
    """Run two processes with two devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    count = "--xla_force_host_platform_device_count="
    flags = re.sub(rf"{count}\d+", f"{count}2", os.environ["XLA_FLAGS"])
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, hosts.__file__]
    logs = [folder / f"log_{rank}.txt" for rank in range(2)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            arguments = [str(rank), str(port), str(folder), *cases]
            with log.open("w") as output:
                processes.append(
                    subprocess.Popen([*command, *arguments], env=env, stdout=output, stderr=output)
                )
        end = time.monotonic() + 45 * (len(cases) + 1)
        for process in processes:
            process.wait(max(end - time.monotonic(), 1))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(
        log.read_text()[-4000:] for log in logs
    )


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes left the results of all cases that are selected."""
    selected = [
        str(item.callspec.params["case"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path
        if "case" in item.fixturenames and not item.get_closest_marker("skip")
    ]
    folder = tmp_path_factory.mktemp("hosts")
    run_processes(folder, [*selected, "inspect"])
    return folder


@cache
def train(case: str) -> dict[str, Any]:
    """Train in this process."""
    _, *trained = hosts.train(case, jax.devices())
    return hosts.as_dict(trained)


def load(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    for rank in range(2):
        with np.load(folder / f"{name}_{rank}.npz") as file:
            yield dict(file)


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        assert array.dtype == expected[name].dtype
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(folder: Path, case: str) -> None:
    expected = train(case)
    for actual in load(folder, case):
        assert_same(actual, expected)

    _, _, kind, refresh_every = case.split("-")
    tx, params = hosts.wrap(kind, int(refresh_every)), jax.tree.map(jnp.asarray, hosts.values())
    unsharded = hosts.run(tx, params, tx.init(params), None, range(hosts.UPDATES))
    start = topkast.masks(tx.init(params), params)["w"].forward
    assert not np.array_equal(topkast.masks(unsharded[1], unsharded[0])["w"].forward, start)
    for name, array in hosts.as_dict(unsharded).items():
        if "supports" in name or array.dtype.kind == "i":
            np.testing.assert_array_equal(expected[name], array, err_msg=name)
        elif "checksum" not in name:  # of bits, which an order of additions may change
            np.testing.assert_allclose(expected[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, str]]:
    return [json.loads((folder / f"seen_{rank}.json").read_text()) for rank in range(2)]


def test_what_no_process_reads_alone_is_refused(seen: list[dict[str, str]]) -> None:
    for rank, messages in enumerate(seen):
        for name in ("summary", "masks"):
            assert (
                f"the sets of w lie on devices of several processes, and process {rank}"
                in (messages[name])
            )
            assert "jax.device_put((state, params), NamedSharding(mesh," in messages[name]
        assert (
            "w has no kernel for sparse execution: it lies on several devices"
            in (messages["sparsify"])
        )
    assert "5,200 weights, 592 active" in seen[0]["table"]


def test_all_processes_raise(seen: list[dict[str, str]]) -> None:
    for messages in seen:
        assert messages["nan"].startswith("w: 1 of 5120 entries are NaN or infinite")
        for name in ("replicas", "local"):
            assert messages[name].startswith("b has other values in process 1 than in process 0")
        for name in ("seed", "tree"):
            assert messages[name].startswith("the processes call init with different options")


@pytest.mark.filterwarnings("default:::orbax", "default::DeprecationWarning")
def test_a_checkpoint_of_two_processes_continues_in_two_and_in_one(folder: Path) -> None:
    expected = train("auto-rows-magnitude-1")
    for resumed in load(folder, "resumed"):
        assert_same(resumed, expected)

    mesh = hosts.make_mesh("auto", "rows", jax.devices())
    tx = hosts.wrap("magnitude", 1)
    params = hosts.shard(hosts.values(), mesh, hosts.SPECS["rows"])
    like = {"params": params, "state": tx.init(params)}
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(folder / "half", like)
    rest = range(hosts.UPDATES // 2, hosts.UPDATES)
    assert_same(hosts.as_dict(hosts.run(tx, found["params"], found["state"], mesh, rest)), expected)
