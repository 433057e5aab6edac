"""FSDP2 for models with sparse layers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import Parameter

from topkast import MismatchError, OptionError
from topkast_torch._reservoirs import TensorReservoir
from topkast_torch.distributed._replicas import checksum_of
from topkast_torch.distributed._sharding import Sharding, is_sharded
from topkast_torch.optimizer._ownership import owner_of
from topkast_torch.sparse._sparse_layer import SparseLayer, replace_data


def fully_shard(module: Any, **options: Any) -> Any:
    r"""``torch.distributed.fsdp.fully_shard`` (FSDP2) for modules with sparse layers.

    The values of each sparse layer become a DTensor of shape (\|B\|, 1), of which each process
    holds a part. Where the layer computes, FSDP gathers all of them, and it sums and scatters their
    gradients. The weights outside B are divided by rows of the weight. The indices of B stay whole
    in each process. All other Parameters are sharded as FSDP2 does.

    Call it in all processes, from the inner modules to the model, before building the optimizer:
    see :doc:`distributed`.

    Parameters
    ----------
    module
        A module or a list of modules; their sparse layers have the same weights in all processes.
    **options
        Those of PyTorch's function, as ``mesh`` and ``reshard_after_forward``.

    Returns
    -------
    FSDPModule
        What PyTorch's function returns: `module`, changed in place.

    Raises
    ------
    OptionError
        If an option or a layer cannot be combined with sparse layers.
    MismatchError
        If weights or sets of sparse layers differ between the processes, if a layer was never
        drawn, or if a wrapped optimizer trains it already.

    Examples
    --------
    In each process, after ``torch.distributed.init_process_group``; here in a single one:

    >>> import torch, topkast, topkast_torch
    >>> from torch.distributed import HashStore
    >>> torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    >>> model = torch.nn.Sequential(
    ...     topkast_torch.SparseLinear(20, 30, fwd=0.9, bwd=0.8), torch.nn.ReLU(),
    ...     torch.nn.Linear(30, 5))
    >>> mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    >>> model = topkast_torch.fully_shard(model, mesh=mesh)
    >>> model[0].values.shape, model[0].values.placements
    (torch.Size([120, 1]), (Shard(dim=0),))
    >>> adamw = torch.optim.AdamW(model.named_parameters(), 1e-3)
    >>> opt = topkast.wrap_optimizer(adamw, fwd=0.9, bwd=0.8, dense="2.*")
    >>> model(torch.ones(4, 20)).square().mean().backward()
    >>> opt.step()
    >>> torch.distributed.destroy_process_group()
    """
    from torch.distributed.fsdp import fully_shard as shard_module

    modules: Iterable[nn.Module] = module if isinstance(module, list) else [module]
    ignored = options.get("ignored_params") or set()
    layers = {
        layer: name
        for root in modules
        for name, layer in root.named_modules()
        if isinstance(layer, SparseLayer) and layer.values not in ignored
    }
    layers = {layer: name for layer, name in layers.items() if layer.sharding is None}
    if layers:
        _check_options(options)
    for layer, name in layers.items():
        _check_layer(name or "the layer", layer)
    if layers and options.get("shard_placement_fn") is not None:
        options["shard_placement_fn"] = _excluding(layers, options["shard_placement_fn"])
    checksums = [checksum_of([layer], layer.values) for layer in layers]
    shapes = {layer: layer.values.shape for layer in layers}
    for layer, shape in shapes.items():
        _reshape(layer, shape[::-1])  # FSDP2 cuts the first axis
    try:
        sharded = shard_module(module, **options)
    except Exception:
        for layer, shape in shapes.items():
            _reshape(layer, shape)
        raise
    for (layer, name), checksum in zip(layers.items(), checksums, strict=True):
        _divide(name or "the layer", layer, checksum)
    return sharded


def _reshape(layer: SparseLayer, shape: torch.Size) -> None:
    if not is_sharded(layer.values):
        replace_data(layer.values, layer.values.detach().view(shape))


def _check_options(options: dict[str, Any]) -> None:
    policy = options.get("mp_policy")
    if policy is not None and policy.param_dtype not in (None, torch.float32, torch.float64):
        raise OptionError(
            f"mp_policy has param_dtype={policy.param_dtype}, but sparse layers compute in float32 "
            "or float64: leave param_dtype out for modules that contain them (reduce_dtype may be "
            "lower), and shard the other modules on their own"
        )
    if type(options.get("offload_policy")).__name__ == "CPUOffloadPolicy":
        raise OptionError(
            "CPUOffloadPolicy would keep the values of sparse layers apart from their indices: "
            "leave it out. reservoir='host' of topkast.wrap_optimizer keeps the weights outside B "
            "in host memory"
        )
    if options.get("dp_mesh_dims") is not None:
        raise OptionError(
            "dp_mesh_dims is for DTensors, as tensor parallelism makes them, but sparse layers can "
            "only be sharded by fully_shard: leave it out for modules that contain them"
        )


def _check_layer(name: str, layer: SparseLayer) -> None:
    kind = type(layer).__name__
    if is_sharded(layer.values):
        Sharding.of(name, layer.values)
        raise MismatchError(
            f"{name} was sharded by PyTorch's fully_shard, which leaves all values of a {kind} in "
            "one process: call topkast_torch.fully_shard instead"
        )
    if layer.blocks is not None:
        raise OptionError(
            f"{name} is a {kind} with block={layer.block}, but only single weights can be sharded: "
            "build it with block=None, or train it in DistributedDataParallel"
        )
    if not layer._is_drawn or layer.values.is_meta:
        raise MismatchError(
            f"{name} is a {kind} on the meta device, whose weights were never drawn: build it on "
            "its device with reservoir='seeded', which forms no dense weight, and then shard it"
        )
    if owner_of(layer.values) is not None:
        raise MismatchError(
            f"{name} is trained by a wrapped optimizer already: shard the model first, then build "
            "and wrap its optimizer. After topkast.sparsify, call topkast.unwrap before"
        )


def _excluding(layers: dict[SparseLayer, str], place: Any) -> Any:
    """A placement function that leaves the values of sparse layers to the default."""
    values = {layer.values for layer in layers}

    def place_others(param: Parameter) -> Any:
        return None if param in values else place(param)

    return place_others


@torch.no_grad()
def _divide(name: str, layer: SparseLayer, checksum: int) -> None:
    """Keep this process's rows of the weights outside B.

    `checksum` is that of weights and sets, which must be the same in all processes.
    """
    values: Any = layer.values
    sharding = Sharding.of(name, values)
    extremes = torch.tensor([checksum, -checksum], dtype=torch.int64, device=values.device)
    for axis in range(sharding.mesh.ndim):
        dist.all_reduce(extremes, dist.ReduceOp.MAX, sharding.mesh.get_group(axis))
    if int(extremes[0]) != -int(extremes[1]):
        raise MismatchError(
            f"the sets or weights of {name} differ between processes: draw the same weights in "
            "each, by torch.manual_seed before building the model or by the seed of a SparseLinear"
        )
    layer.sharding = sharding
    if layer.reservoir is None:
        return
    rows, *others = layer.weight_shape
    start, stop = (bound * math.prod(others) for bound in sharding.bounds(rows))
    reservoir = layer.reservoir
    if isinstance(reservoir, TensorReservoir):
        part = reservoir.tensor[start:stop].clone()
    else:
        part = torch.from_numpy(reservoir.read(start, stop)).to(values.device)
    layer.reservoir, layer.selection = TensorReservoir(part), None
