"""Two processes with different seeds have identical masks, or raise an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import topkast_torch
import torch
from replica import DIFFERENT, run
from torch.multiprocessing.spawn import spawn

import topkast

QUICK = ["masked", "random", "sparse", "blocks", "magnitude", "magnitude_hook", "hook_fp16"]
QUICK += ["own heads", "joined", "joined unevenly"]
REFUSED = ["other weights", "other sets"]  # the last ones: they leave a step unfinished
SLOW = ["rigl", "rigl_hook", "hook_bf16"]


def train(folder: Path, names: list[str], count: int = 2) -> None:
    spawn(run, args=(str(folder), count, names), nprocs=count)


def states(folder: Path, name: str, count: int = 2) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}_{rank}.pt", weights_only=False) for rank in range(count)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One start of two processes serves all tests: it takes longer than the training."""
    folder = tmp_path_factory.mktemp("replicas")
    train(folder, [*QUICK, *DIFFERENT, *REFUSED])
    return folder


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("more")
    train(folder, SLOW)
    return folder


@pytest.mark.parametrize("name", ["masked", "random", "sparse", "blocks"])
def test_replicas_agree(quick: Path, name: str) -> None:
    assert_same(*states(quick, name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("seeds", "options of topkast.wrap_optimizer, or the names"),
        ("seeds before", "options of topkast.wrap_optimizer, or the names"),
        ("seeds of layers", "options of topkast.wrap_optimizer, or the names"),
        ("intervals", "options of topkast.wrap_optimizer, or the names"),
        ("shares", "options of topkast.wrap_optimizer, or the names"),
        ("sensitivities", "sets A and B differ between the processes: wrap the optimizer after"),
        ("weights before", "sets A and B differ between the processes: wrap the optimizer after"),
        ("weights outside A", "weights that the optimizer holds differ between the processes"),
        ("joined unevenly", "took different numbers of updates inside of Join"),
        ("other weights", "start all processes with the same weights"),
        ("other sets", "the sets A and B differ between"),
    ],
)
def test_replicas_that_differ_raise(quick: Path, name: str, message: str) -> None:
    for state in states(quick, name):
        assert message in state["error"]


@pytest.mark.parametrize(
    "name", ["weights in A", "weights after", "reservoirs", "own heads", "joined"]
)
def test_what_may_differ_makes_no_difference(quick: Path, name: str) -> None:
    assert_same(*states(quick, name))


def check_hook(folder: Path, kind: str, count: int = 2) -> None:
    """The hook gives the gradients of whole tensors, and sends those on B alone."""
    plain, *hooked = states(folder, kind, count)[:1] + states(folder, f"{kind}_hook", count)
    for state in hooked:
        assert_same(state, hooked[0])
        # Two numbers have one sum. Four are added in an order that depends on their place.
        rtol, atol = (0.0, 0.0) if count == 2 else (1e-5, 1e-6)
        for grads, others in zip(state["grads"], plain["grads"], strict=True):
            for grad, other in zip(grads, others, strict=True):
                torch.testing.assert_close(grad, other, rtol=rtol, atol=atol)
            if count > 2:
                break  # later sets may differ
    if count == 2:
        assert_same(hooked[0], plain)
    sparse, others = 16 * 27 + 40 * 576, 16 + 40 + 164  # dense: the biases, and the last layer
    on_b = sum(int(masks.backward.sum()) for masks in plain["masks"].values())
    assert on_b == {"magnitude": 4695, "rigl": 2348}[kind]  # 20 % and 10 %
    checksum = 16
    expected = 4 * (on_b + others) + checksum
    whole = 4 * (sparse + others) + checksum
    # RigL needs the whole gradient in the step before a refresh: the fourth and the eighth.
    due = [kind == "rigl" and step in (3, 7) for step in range(9)]
    assert hooked[0]["bytes"] == [whole if is_due else expected for is_due in due]


def test_the_hook_changes_nothing_and_sends_b_alone(quick: Path) -> None:
    check_hook(quick, "magnitude")


@pytest.mark.slow
def test_the_hook_of_four_processes(tmp_path: Path) -> None:
    train(tmp_path, ["magnitude", "magnitude_hook"], 4)
    check_hook(tmp_path, "magnitude", 4)


@pytest.mark.slow
def test_the_hook_sends_all_before_a_refresh_of_rigl(slow: Path) -> None:
    check_hook(slow, "rigl")


def check_half_precision(folder: Path, kind: str) -> None:
    first, second = states(folder, kind)
    assert_same(first, second)
    on_b = sum(int(masks.backward.sum()) for masks in first["masks"].values())
    assert first["bytes"] == [2 * (on_b + 220) + 16] * 9


def test_the_hook_in_float16(quick: Path) -> None:
    """By PyTorch's own wrapper around the hook."""
    check_half_precision(quick, "hook_fp16")


@pytest.mark.slow
def test_the_hook_in_bfloat16(slow: Path) -> None:
    """By an option of the hook."""
    check_half_precision(slow, "hook_bf16")


def test_the_hook_needs_a_wrapped_optimizer() -> None:
    optimizer: Any = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, 2))], 0.1)
    with pytest.raises(topkast.OptionError, match="needs an optimizer of topkast"):
        topkast_torch.ddp_comm_hook(optimizer)


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    for name, theta in first["theta"].items():
        assert torch.equal(theta, second["theta"][name]), name
    for name, masks in first["masks"].items():
        assert torch.equal(masks.forward, second["masks"][name].forward), name
        assert torch.equal(masks.backward, second["masks"][name].backward), name
