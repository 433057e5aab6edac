"""Check that replicas of a model have the same sets, which sparse layers do not send."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from topkast import MismatchError, Support
from topkast.reservoirs import LayeredReservoir, Reservoir
from topkast_torch._reservoirs import TensorReservoir
from topkast_torch.execution._sparse_execution import check_processes
from topkast_torch.optimizer._ownership import owner_of
from topkast_torch.sparse._sparse_layer import SparseLayer

_FACTOR = 0x9E3779B97F4A7C1  # odd: a product modulo 2⁶⁴ loses nothing


def _check_replicas(parent: nn.Module, name: str, model: Any) -> None:
    """Raise if DistributedDataParallel gets a model whose sets differ between processes."""
    if not isinstance(parent, DistributedDataParallel) or name != "module":
        return
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    if not layers or not dist.is_initialized():
        return
    for layer in layers:
        execution = owner_of(layer.values)
        if execution is not None:
            check_processes(execution.ranked.key, execution.method)
    checksum = checksum_of(layers)
    group = getattr(parent, "process_group", None)
    device = layers[0].values.device
    extremes = torch.tensor([checksum, -checksum], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    if int(extremes[0]) != -int(extremes[1]):
        raise MismatchError(
            "the sets of the sparse layers, or their weights outside B, differ between processes, "
            "and only values on B are sent: start all processes with the same weights, or load "
            "the same state dict in each"
        )


def checksum_of(layers: Iterable[SparseLayer], *others: Tensor) -> int:
    """A number that differs for other sets of sparse layers, or other weights outside B."""
    checksum = 0
    for layer in layers:
        execution = owner_of(layer.values)
        reservoir = layer.reservoir if execution is None else execution.reservoir
        checksum = crc32(f"{layer.active_count} {layer.block}".encode(), checksum)
        for tensor in (layer.indices, *_tensors_of(reservoir), *others):
            checksum = crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), checksum)
        if isinstance(reservoir, LayeredReservoir):
            described = reservoir.describe()
            for base in described["bases"]:
                base.pop("path", None)  # processes may have their own copies of a file
            checksum = crc32(repr(described).encode(), checksum)
    return checksum


def hash_sets(support: Support) -> Tensor:
    """A number (int64, a scalar on the device of the sets) that differs for other sets."""
    active, exploring = support.active.long(), support.exploring.long()
    hashes = ((units * _FACTOR ^ units >> 5).sum() for units in (active, exploring))
    on_active, on_exploring = hashes
    total: Tensor = 3 * on_active + 7 * on_exploring
    return total


def _tensors_of(reservoir: Reservoir | None) -> list[Tensor]:
    """The tensors whose values are the weights outside B."""
    if isinstance(reservoir, TensorReservoir):
        return [reservoir.tensor]
    if isinstance(reservoir, LayeredReservoir):
        return [torch.from_numpy(array) for array in reservoir.changes()]
    return []


register_module_module_registration_hook(_check_replicas)
