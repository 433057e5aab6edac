"""Two processes with different seeds: their masks stay identical, or an error says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import topkast


def _train(rank: int, folder: str, explore: Any) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)))
    optimizer = topkast.wrap_optimizer(
        torch.optim.AdamW(model.named_parameters(), 0.05),
        fwd=0.9,
        bwd=0.7,
        refresh_every=2,
        explore=explore,
    )
    for _ in range(7):
        optimizer.zero_grad()
        inputs = torch.randn(8, 12)  # each process has its own
        (model(inputs) - inputs[:, :4]).square().mean().backward()
        optimizer.step()
    state = {"theta": topkast.dense_params(optimizer), "masks": dict(topkast.masks(optimizer))}
    torch.save(state, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("explore", ["magnitude", "random"])
def test_replicas_agree(tmp_path: Path, explore: str) -> None:
    spawn(_train, args=(str(tmp_path), explore), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for name, theta in first["theta"].items():
        assert torch.equal(theta, second["theta"][name]), name
    for name, masks in first["masks"].items():
        assert torch.equal(masks.forward, second["masks"][name].forward), name
        assert torch.equal(masks.backward, second["masks"][name].backward), name
