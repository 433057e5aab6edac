"""One process of a data-parallel run of rivals, in its own module so that others can import it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from replica import leave
from topkast_torch import SparseLinear
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.nn.parallel import DistributedDataParallel

import topkast
from topkast.methods import SET, Method, RigL


def make(method: Method) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    inner = torch.optim.AdamW(model.named_parameters(), 0.05)
    return model, topkast.wrap_optimizer(inner, fwd=0.8, bwd=0.8, method=method, refresh_every=2)


def train(model: nn.Module, opt: Any, rank: int) -> None:
    torch.manual_seed(1 + rank)
    for _ in range(7):
        opt.zero_grad()
        inputs = torch.randn(8, 12)  # differs between processes
        (model(inputs) - inputs[:, :4]).square().mean().backward()
        opt.step()


def run(rank: int, folder: str) -> None:
    """Train masked layers by RigL and sparse ones by SET; sparse ones by RigL are refused."""
    torch.set_num_threads(1)
    early_model, early = make(RigL())
    topkast.sparsify(early_model, early)
    store = FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    states = {}
    for name, method in (("rigl", RigL()), ("set", SET())):
        model, opt = make(method)
        if name == "set":
            topkast.sparsify(model, opt)
        train(DistributedDataParallel(model), opt, rank)
        states[name] = topkast.dense_params(opt), dict(topkast.masks(opt))
    message = r"RigL needs the gradient of 0\.(weight|values) outside B, but 2 processes .* masked"
    model, opt = make(RigL())
    with pytest.raises(topkast.OptionError, match=message):
        topkast.sparsify(model, opt)
    assert isinstance(model[0], nn.Linear)  # type: ignore[index]
    train(DistributedDataParallel(model), opt, rank)
    with pytest.raises(topkast.OptionError, match=message):
        DistributedDataParallel(early_model)
    layer = nn.Sequential(SparseLinear(12, 16, fwd=0.8, bwd=0.8))
    inner = torch.optim.AdamW(layer.named_parameters(), 0.05)
    with pytest.raises(topkast.OptionError, match=message):
        topkast.wrap_optimizer(inner, fwd=0.8, bwd=0.8, method=RigL())
    torch.save(states, f"{folder}/{rank}.pt")
    leave()
