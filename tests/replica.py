"""One process of a data-parallel run, in its own module so that a new process can import it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.nn.parallel import DistributedDataParallel

import topkast


def train(
    rank: int,
    folder: str,
    explore: Any,
    seeds: tuple[int, int] | None = None,
    block: tuple[int, int] | None = None,
) -> None:
    """Train in masked execution, or in sparse execution if `seeds` of the weights are given."""
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(rank if seeds is None else seeds[rank])
    model: nn.Module = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    if seeds is None:
        model = DistributedDataParallel(model)
    optimizer = topkast.wrap_optimizer(
        torch.optim.AdamW(model.named_parameters(), 0.05),
        fwd=0.9,
        bwd=0.7,
        refresh_every=2,
        explore=explore,
        block=block,
    )
    if seeds is not None:
        topkast.sparsify(model, optimizer)
        model = DistributedDataParallel(model)
        torch.manual_seed(rank)
    for _ in range(7):
        optimizer.zero_grad()
        inputs = torch.randn(8, 12)  # differs between processes
        (model(inputs) - inputs[:, :4]).square().mean().backward()
        optimizer.step()
    state = {"theta": topkast.dense_params(optimizer), "masks": dict(topkast.masks(optimizer))}
    torch.save(state, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
