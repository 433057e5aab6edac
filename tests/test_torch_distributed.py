"""Two processes with different seeds have identical masks, or raise an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import topkast_torch
import torch
from replica import train, train_with_hook
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

import topkast


@pytest.mark.timeout(120)
@pytest.mark.parametrize("explore", ["magnitude", "random"])
def test_replicas_agree(tmp_path: Path, explore: str) -> None:
    spawn(train, args=(str(tmp_path), explore), nprocs=2)
    assert_equal(tmp_path)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("block", [None, (4, 1)])
def test_sparse_replicas_agree(tmp_path: Path, block: tuple[int, int] | None) -> None:
    spawn(train, args=(str(tmp_path), "magnitude", (3, 3), block), nprocs=2)
    assert_equal(tmp_path)


@pytest.mark.timeout(120)
def test_sparse_replicas_with_different_weights_raise(tmp_path: Path) -> None:
    with pytest.raises(ProcessRaisedException, match="start all processes with the same weights"):
        spawn(train, args=(str(tmp_path), "magnitude", (3, 4)), nprocs=2)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("count", "kind"),
    [
        (2, "magnitude"),
        pytest.param(2, "rigl", marks=pytest.mark.slow),
        pytest.param(4, "magnitude", marks=pytest.mark.slow),
    ],
)
def test_the_hook_changes_nothing_and_sends_b_alone(tmp_path: Path, kind: str, count: int) -> None:
    for name in (kind, f"{kind}_hook"):
        spawn(train_with_hook, args=(str(tmp_path), count, name), nprocs=count)
    plain, *hooked = (
        torch.load(tmp_path / f"{name}.pt", weights_only=False)
        for name in (f"{kind}_0", *(f"{kind}_hook_{rank}" for rank in range(count)))
    )
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


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", [pytest.param("hook_bf16", marks=pytest.mark.slow), "hook_fp16"])
def test_the_hook_with_half_precision(tmp_path: Path, kind: str) -> None:
    """In bfloat16 by an option, in float16 by PyTorch's own wrapper around the hook."""
    spawn(train_with_hook, args=(str(tmp_path), 2, kind), nprocs=2)
    first, second = (
        torch.load(tmp_path / f"{kind}_{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert_same(first, second)
    on_b = sum(int(masks.backward.sum()) for masks in first["masks"].values())
    assert first["bytes"] == [2 * (on_b + 220) + 16] * 9


@pytest.mark.timeout(120)
def test_replicas_with_other_sets_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ProcessRaisedException, match="the sets A and B differ between"):
        spawn(train_with_hook, args=(str(tmp_path), 2, "hook", True), nprocs=2)


def test_the_hook_needs_a_wrapped_optimizer() -> None:
    optimizer: Any = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, 2))], 0.1)
    with pytest.raises(topkast.OptionError, match="needs an optimizer of topkast"):
        topkast_torch.ddp_comm_hook(optimizer)


def assert_equal(tmp_path: Path) -> None:
    assert_same(*(torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)))


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    for name, theta in first["theta"].items():
        assert torch.equal(theta, second["theta"][name]), name
    for name, masks in first["masks"].items():
        assert torch.equal(masks.forward, second["masks"][name].forward), name
        assert torch.equal(masks.backward, second["masks"][name].backward), name
