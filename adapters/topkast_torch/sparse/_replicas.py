"""Replicas of a model: sparse layers do not send their structure, so that it has to be the same."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from topkast import MismatchError
from topkast_torch.optimizer._ownership import owner_of
from topkast_torch.sparse._sparse_layer import SparseLayer


def _check_replicas(owner: nn.Module, name: str, model: Any) -> None:
    """When DistributedDataParallel takes a model over: raise unless all processes have its sets."""
    if not isinstance(owner, DistributedDataParallel) or name != "module":
        return
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    if not layers or not dist.is_initialized():
        return
    checksum = 0
    for layer in layers:
        execution = owner_of(layer.values)
        rest = layer.reservoir if execution is None else execution.reservoir
        checksum = crc32(str(layer.active_count).encode(), checksum)
        for tensor in (layer.indices, *([] if rest is None else [rest])):
            checksum = crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), checksum)
    group = getattr(owner, "process_group", None)
    device = layers[0].values.device
    extremes = torch.tensor([checksum, -checksum], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    if int(extremes[0]) != -int(extremes[1]):
        raise MismatchError(
            "the sparse layers have other sets, or other weights outside B, in other processes, "
            "and values on B alone are sent: start all processes with the same weights, or load "
            "one state dict in each"
        )


register_module_module_registration_hook(_check_replicas)
