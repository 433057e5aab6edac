"""Two processes with different seeds: their masks stay identical, or an error says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from replica import train
from torch.multiprocessing.spawn import spawn


@pytest.mark.timeout(120)
@pytest.mark.parametrize("explore", ["magnitude", "random"])
def test_replicas_agree(tmp_path: Path, explore: str) -> None:
    spawn(train, args=(str(tmp_path), explore), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for name, theta in first["theta"].items():
        assert torch.equal(theta, second["theta"][name]), name
    for name, masks in first["masks"].items():
        assert torch.equal(masks.forward, second["masks"][name].forward), name
        assert torch.equal(masks.backward, second["masks"][name].backward), name
