"""One process of a data-parallel run, in its own module so that a new process can import it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import topkast_torch
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_wrapper
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import topkast


def leave() -> None:
    """End this process at once: when PyTorch destructs a model, gloo's threads may need the GIL.

    The thread that destructs waits for them, and holds the GIL: one run in twenty did not end.
    """
    dist.destroy_process_group()
    os._exit(0)


# PyTorch's hook for gradients may still run while a model is destructed: they live as long as the
# process does.
MODELS: list[nn.Module] = []


def run(rank: int, folder: str, count: int, names: list[str]) -> None:
    """Train by each name in turn, with one group of processes, and save what came of it."""
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store_{names[0]}", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    for name in names:
        try:
            state = RUNS[name](rank)
        except (topkast.MismatchError, RuntimeError) as error:  # the latter from a callback
            state = {"error": str(error)}
        torch.save(state, f"{folder}/{name}_{rank}.pt")
    leave()


def train(
    rank: int,
    explore: Any = "magnitude",
    seeds: tuple[int, int] | None = None,
    block: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Train in masked execution, or in sparse execution if `seeds` of the weights are given."""
    torch.manual_seed(rank if seeds is None else seeds[rank])
    model: nn.Module = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    MODELS.append(model)
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
    MODELS.append(model)
    for _ in range(7):
        optimizer.zero_grad()
        inputs = torch.randn(8, 12)  # differs between processes
        (model(inputs) - inputs[:, :4]).square().mean().backward()
        optimizer.step()
    return {"theta": topkast.dense_params(optimizer), "masks": dict(topkast.masks(optimizer))}


def train_with_hook(rank: int, kind: str, *, diverge: bool = False) -> dict[str, Any]:
    """Train masked tensors by whole gradients, or by `ddp_comm_hook`, and count what is sent."""
    torch.manual_seed(0)
    body: nn.Module = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 40), nn.Linear(40, 4)
    )
    body = body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    linear: Any = body.get_submodule("3")
    linear.weight = nn.Parameter((torch.randn(40, 600) / 24)[:, :576])  # with gaps in its memory
    model = DistributedDataParallel(body, bucket_cap_mb=0.05)
    MODELS.append(model)
    method = topkast.methods.RigL() if "rigl" in kind else None
    optimizer: Any = topkast.wrap_optimizer(
        torch.optim.AdamW(model.named_parameters(), 0.01),
        fwd=0.9,
        bwd=0.9 if method else 0.8,
        refresh_every=4,
        dense="module.4.*",
        method=method,
    )
    sent: list[int] = []
    original = dist.all_reduce

    def counting(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.nbytes)
        return original(tensor, *arguments, **options)

    if "hook" in kind:
        dtype = torch.bfloat16 if "bf16" in kind else None
        hook: Any = topkast_torch.ddp_comm_hook(optimizer, dtype=dtype)
        if "fp16" in kind:
            hook = fp16_compress_wrapper(hook)
        model.register_comm_hook(None, hook)
    torch.manual_seed(100 + rank)
    bytes_of_steps, grads = [], []
    for _ in range(9):
        optimizer.zero_grad()
        inputs = torch.randn(6, 3, 8, 8)  # differs between processes
        sent.clear()
        with mock.patch.object(dist, "all_reduce", counting):
            model(inputs).square().mean().backward()
        bytes_of_steps.append(sum(sent))
        grads.append([param.grad.clone() for param in model.parameters() if param.grad is not None])
        optimizer.step()
        if diverge:
            optimizer.param_groups[0]["penalty"] = 1.0 * rank
    return {
        "theta": topkast.dense_params(optimizer),
        "masks": dict(topkast.masks(optimizer)),
        "grads": grads,
        "bytes": bytes_of_steps,
    }


def train_differently(
    rank: int,
    order: str = "after",
    weights: Callable[[int], int] = lambda rank: 3,
    zeros: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train processes that differ: options that are functions give each process its own.

    The optimizer is wrapped after or before DistributedDataParallel; "sparse": before, and layers
    are made sparse.
    """
    torch.manual_seed(weights(rank))
    model: nn.Module = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    if zeros:
        for param in model.parameters():
            param.detach().zero_()
    wrapped: nn.Module = DistributedDataParallel(model) if order == "after" else model
    own = {name: entry(rank) if callable(entry) else entry for name, entry in options.items()}
    optimizer = topkast.wrap_optimizer(
        torch.optim.SGD(model.named_parameters(), 0.05),
        **{"fwd": 0.9, "bwd": 0.7, "refresh_every": 2} | own,
    )
    if order == "sparse":
        topkast.sparsify(model, optimizer)
    if order != "after":
        wrapped = DistributedDataParallel(model)
    MODELS.append(wrapped)
    torch.manual_seed(100 + rank)
    for _ in range(5):
        optimizer.zero_grad()
        inputs = torch.randn(8, 12)
        (wrapped(inputs) - inputs[:, :4]).square().mean().backward()
        optimizer.step()
    return {"theta": topkast.dense_params(optimizer), "masks": dict(topkast.masks(optimizer))}


def train_own_heads(rank: int) -> dict[str, Any]:
    """Train a model of which only the first layer is in DistributedDataParallel."""
    torch.manual_seed(3)
    body = nn.Sequential(nn.Linear(12, 16), nn.Tanh())
    wrapped = DistributedDataParallel(body)
    torch.manual_seed(rank)
    head = nn.Linear(16, 4)
    MODELS.append(wrapped)
    named: dict[str, Any] = {"body.weight": body[0].weight, "head.weight": head.weight}
    optimizer = topkast.wrap_optimizer(
        torch.optim.SGD([*named.items()], 0.05), fwd=0.9, bwd=0.7, refresh_every=2
    )
    for _ in range(5):
        optimizer.zero_grad()
        inputs = torch.randn(8, 12)
        (head(wrapped(inputs)) - inputs[:, :4]).square().mean().backward()
        optimizer.step()
    theta, masks = topkast.dense_params(optimizer), topkast.masks(optimizer)
    return {
        "theta": {"body.weight": theta["body.weight"]},
        "masks": {"body.weight": masks["body.weight"]},
    }


def train_joined(rank: int, uneven: bool) -> dict[str, Any]:
    """Train inside of PyTorch's Join, the first process perhaps with fewer batches."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = topkast.wrap_optimizer(
        torch.optim.SGD(model.named_parameters(), 0.05), fwd=0.9, bwd=0.7, refresh_every=2
    )
    topkast.sparsify(model, optimizer)
    wrapped = DistributedDataParallel(model)
    MODELS.append(wrapped)
    torch.manual_seed(100 + rank)
    with Join([wrapped]):
        for _ in range(3 + rank if uneven else 4):
            optimizer.zero_grad()
            inputs = torch.randn(8, 12)
            (wrapped(inputs) - inputs[:, :4]).square().mean().backward()
            optimizer.step()
    return {"theta": topkast.dense_params(optimizer), "masks": dict(topkast.masks(optimizer))}


def sensitivities_of(rank: int) -> topkast.methods.SNIP:
    """Those of each process's own batch."""
    generator = torch.Generator().manual_seed(rank)
    shapes = {"0.weight": (16, 12), "2.weight": (4, 16)}
    own = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return topkast.methods.SNIP(own)


def own_number(rank: int) -> int:
    return rank


DIFFERENT: dict[str, dict[str, Any]] = {
    "seeds": {"explore": "random", "seed": own_number},
    "seeds before": {"order": "before", "zeros": True, "seed": own_number},
    "seeds of layers": {
        "order": "sparse",
        "bwd": 0.9,
        "method": topkast.methods.SET(),
        "seed": own_number,
    },
    "intervals": {"refresh_every": lambda rank: 2 + rank},
    "shares": {"bwd": 0.9, "method": lambda rank: topkast.methods.SET(0.3 + 0.1 * rank)},
    "sensitivities": {"bwd": 0.9, "method": sensitivities_of},
    "weights before": {"order": "before", "weights": own_number},
    "weights outside A": {
        "order": "before",
        "weights": own_number,
        "method": topkast.methods.Static(),
    },
    # What DistributedDataParallel copies, or what changes no set, may differ.
    "weights in A": {
        "order": "before",
        "weights": own_number,
        "bwd": 0.9,
        "method": topkast.methods.SET(),
    },
    "weights after": {"weights": own_number},
    "reservoirs": {"reservoir": lambda rank: ("device", "host")[rank]},
}

RUNS: dict[str, Callable[[int], dict[str, Any]]] = (
    {
        "masked": train,
        "random": lambda rank: train(rank, "random"),
        "sparse": lambda rank: train(rank, seeds=(3, 3)),
        "blocks": lambda rank: train(rank, seeds=(3, 3), block=(4, 1)),
        "other weights": lambda rank: train(rank, seeds=(3, 4)),
        "own heads": train_own_heads,
        "joined": lambda rank: train_joined(rank, uneven=False),
        "joined unevenly": lambda rank: train_joined(rank, uneven=True),
        "other sets": lambda rank: train_with_hook(rank, "hook", diverge=True),
    }
    | {kind: functools.partial(train_differently, **options) for kind, options in DIFFERENT.items()}
    | {
        kind: functools.partial(train_with_hook, kind=kind)
        for kind in ("magnitude", "magnitude_hook", "rigl", "rigl_hook", "hook_bf16", "hook_fp16")
    }
)
