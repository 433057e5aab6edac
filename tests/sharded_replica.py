"""One process of an FSDP2 run, in its own module so that a new process can import it."""

from __future__ import annotations

import warnings
from typing import Any

import topkast_torch
import torch
import torch.distributed as dist
from odd_optimizers import Copies, FirstGradient, Stacked
from replica import leave
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh

import topkast

SPARSITIES: Any = {"fwd": 0.8, "bwd": 0.6}
OPTIONS: dict[str, Any] = {
    "adamw": {"refresh_every": 2},
    "resumed": {"refresh_every": 2},
    "sgd": {
        "refresh_every": 1,
        "penalty": 0.05,
        "penalty_kind": "l1",
        "explore_until": 5,
        "reservoir": "host",
    },
    "stacked": {"refresh_every": 2},
    "copies": {"refresh_every": 2},
    "first gradient": {"refresh_every": 2},
    "convolution": {"refresh_every": 3, "penalty": 0.0},
    "static": {"method": topkast.methods.Static()},
}
ODD: dict[str, Any] = {"stacked": Stacked, "copies": Copies, "first gradient": FirstGradient}
STEPS, SAVED = 9, 4


def build(case: str) -> nn.Sequential:
    """The same model in all processes; its layers are sparse."""
    torch.manual_seed(0)
    if case == "convolution":
        dense: Any = nn.Sequential(nn.Conv2d(1, 5, 2), nn.Flatten(), nn.Linear(40, 5)).double()
        opt: Any = torch.optim.SGD(dense.named_parameters(), 0.1)
        opt = topkast.wrap_optimizer(opt, **SPARSITIES)
        topkast.sparsify(dense, opt)
        topkast.unwrap(opt)
        return dense  # type: ignore[no-any-return]
    more: Any = {"reservoir": "seeded", "seed": 5} if case == "sgd" else {}
    first = topkast_torch.SparseLinear(13, 17, **SPARSITIES, **more)
    return nn.Sequential(first, nn.Tanh(), topkast_torch.SparseLinear(17, 5, **SPARSITIES, **more))


def shard(model: nn.Sequential, count: int, *, mesh: Any = None) -> None:
    """Shard each layer, and then the rest: nothing."""
    mesh = mesh or init_device_mesh("cpu", (count,))
    for layer in (model[0], model[2], model):
        topkast_torch.fully_shard(layer, mesh=mesh)


def wrap(model: nn.Module, case: str) -> Any:
    """An optimizer of the model's parameters, which are DTensors if it is sharded."""
    params: Any = model.named_parameters()
    if case == "sgd":
        inner: Any = torch.optim.SGD(params, 0.1, momentum=0.9)
    elif case in ODD:
        inner = ODD[case](params, 0.05)
    elif case == "convolution":
        inner = torch.optim.Adam(params, 0.02, foreach=True)
    else:
        inner = torch.optim.AdamW(params, 0.05)
    options = dict(OPTIONS[case])
    if model.get_submodule("0").sharding is None:  # the seed of the layers is their reservoir
        options.pop("reservoir", None)
    return topkast.wrap_optimizer(inner, **SPARSITIES, **options)


def loss_of(model: nn.Module, case: str, step: int, rank: int) -> torch.Tensor:
    """The loss of one process; the case "resumed" has the same data in all of them."""
    number = 0 if case == "resumed" else rank
    generator = torch.Generator().manual_seed(100 * step + number)
    inputs = torch.randn(8, 13, generator=generator)
    targets = inputs[:, :5]
    if case == "convolution":
        inputs, targets = inputs[:, :10].reshape(8, 1, 5, 2).double(), targets.double()
        inputs = nn.functional.pad(inputs, (0, 1))
    loss: torch.Tensor = (model(inputs) - targets).square().mean()
    return loss


def train(model: nn.Module, opt: Any, case: str, steps: range, rank: int) -> None:
    for step in steps:
        opt.zero_grad()
        loss_of(model, case, step, rank).backward()
        opt.step()


def train_alone(model: nn.Module, opt: Any, case: str, steps: range, count: int) -> None:
    """The same in one process, which averages the gradients of all."""
    for step in steps:
        grads = []
        for rank in range(count):
            model.zero_grad()
            loss_of(model, case, step, rank).backward()
            grads.append([param.grad for param in model.parameters()])
        for own, *others in zip(model.parameters(), *grads, strict=True):
            total = others[0]
            for grad in others[1:]:
                total = total + grad
            own.grad = total / count
        opt.step()


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def report(opt: Any) -> dict[str, Any]:
    """Weights, sets and state of a run, the same however many processes it has."""
    saved = opt.state_dict()
    entries = {
        f"{number}.{name}": whole(entry)
        for number, state in saved["state"].items()
        for name, entry in state.items()
        if isinstance(entry, torch.Tensor)
    }
    extras = [state["topkast"] for state in saved["state"].values()]
    return {
        "theta": {name: whole(theta) for name, theta in topkast.dense_params(opt).items()},
        "masks": {name: tuple(masks) for name, masks in topkast.masks(opt).items()},
        "entries": entries,
        "ages": [whole(extra["ages"]) for extra in extras if "ages" in extra],
        "entered": [extra.get("entered_active") for extra in extras],
    }


def start(rank: int, folder: str, count: int, name: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="FSDP2-wrapped module")  # of outputs that are views
    store = FileStore(f"{folder}/store_{name}", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)


def run_two(rank: int, folder: str) -> None:
    """All cases on two processes; one is saved on the way."""
    start(rank, folder, 2, "two")
    result: dict[str, Any] = {}
    for case in OPTIONS:
        model = build(case)
        shard(model, 2)
        opt = wrap(model, case)
        if case == "resumed":
            train(model, opt, case, range(SAVED), rank)
            saved_model, saved = get_state_dict(model, opt)
            save({"model": saved_model, "optimizer": saved}, checkpoint_id=f"{folder}/checkpoint")
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            full = get_state_dict(model, opt, options=options)
            if rank == 0:
                torch.save(full, f"{folder}/full.pt")
            train(model, opt, case, range(SAVED, STEPS), rank)
        else:
            train(model, opt, case, range(STEPS), rank)
        result[case] = report(opt) | {"parts": topkast.summary(opt).held_parts}
    result["errors"] = [
        _refuse_other_weights(rank),
        _refuse_other_options(rank),
        *_refuse_bad_weights(rank),
    ]
    torch.save(result, f"{folder}/two_{rank}.pt")
    leave()


def _refuse_other_weights(rank: int) -> str:
    torch.manual_seed(rank)
    model = nn.Sequential(topkast_torch.SparseLinear(9, 9, **SPARSITIES))
    try:
        topkast_torch.fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    except topkast.MismatchError as error:
        return str(error)
    return ""


def _refuse_other_options(rank: int) -> str:
    """Otherwise one process would wait for the other at a refresh that only one has."""
    model = build("adamw")
    shard(model, 2)
    inner = torch.optim.AdamW(model.named_parameters(), 0.05)
    try:
        topkast.wrap_optimizer(inner, **SPARSITIES, refresh_every=2 + rank)
    except topkast.MismatchError as error:
        return str(error)
    return ""


def _refuse_bad_weights(rank: int) -> tuple[str, Any]:
    """The second process gets a NaN; both raise, and go on after it is repaired."""
    model = build("adamw")
    shard(model, 2)
    opt = wrap(model, "adamw")
    opt.param_groups[0]["penalty"] = 0.0  # it would carry the NaN into the moments
    train(model, opt, "adamw", range(1), rank)
    before = report(opt)["masks"]
    loss_of(model, "adamw", 1, rank).backward()
    values: Any = model[0].values
    if rank == 1:
        values.to_local().data[0] = torch.nan
    message = ""
    try:
        opt.step()
    except topkast.NonFiniteError as error:
        message = str(error)
    same = all(
        torch.equal(now, then)
        for name, masks in report(opt)["masks"].items()
        for now, then in zip(masks, before[name], strict=True)
    )
    values.to_local().data.nan_to_num_()
    opt.step()
    return message, same


def run_four(rank: int, folder: str) -> None:
    """A run from the start, and one that goes on from two processes; and sharded replicas."""
    start(rank, folder, 4, "four")
    result: dict[str, Any] = {}
    model = build("adamw")
    shard(model, 4)
    opt = wrap(model, "adamw")
    train(model, opt, "adamw", range(STEPS), rank)
    result["adamw"] = report(opt) | {"parts": topkast.summary(opt).held_parts}
    model = build("resumed")
    shard(model, 4)
    opt = wrap(model, "resumed")
    resume(model, opt, folder, rank)
    result["resumed"] = report(opt)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = build("resumed")
    shard(model, 4, mesh=mesh)
    opt = wrap(model, "resumed")
    train(model, opt, "resumed", range(STEPS), rank)
    result["replicated"] = report(opt)
    torch.save(result, f"{folder}/four_{rank}.pt")
    leave()


def resume(model: nn.Module, opt: Any, folder: str, rank: int) -> None:
    """Go on from the checkpoint of two processes."""
    target_model, target = get_state_dict(model, opt)
    state: Any = {"model": target_model, "optimizer": target}
    load(state, checkpoint_id=f"{folder}/checkpoint")
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, opt, "resumed", range(SAVED, STEPS), rank)
