"""Two processes with different seeds have identical masks, or raise an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from replica import train
from torch.multiprocessing.spawn import ProcessRaisedException, spawn


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


def assert_equal(tmp_path: Path) -> None:
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for name, theta in first["theta"].items():
        assert torch.equal(theta, second["theta"][name]), name
    for name, masks in first["masks"].items():
        assert torch.equal(masks.forward, second["masks"][name].forward), name
        assert torch.equal(masks.backward, second["masks"][name].backward), name
