"""Check that processes which train one model agree: in options, sets and weights outside A.

Gradients alone pass between replicas, so that nothing would ever correct a difference.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from topkast import MismatchError, Support
from topkast.adapter import Options, method_of
from topkast.reservoirs import LayeredReservoir, Reservoir
from topkast_torch._reservoirs import TensorReservoir, keep_weights
from topkast_torch.execution._execution import Execution
from topkast_torch.execution._masked_execution import MaskedExecution
from topkast_torch.execution._sparse_execution import check_processes
from topkast_torch.optimizer._ownership import owner_of
from topkast_torch.sparse._sparse_layer import SparseLayer

if TYPE_CHECKING:
    from topkast_torch.optimizer._groups import Group

_FACTOR = 0x9E3779B97F4A7C1  # odd: a product modulo 2⁶⁴ loses nothing

# Weak reference to the DistributedDataParallel that exchanges the gradients of a Parameter.
_DATA_PARALLEL: Any = WeakTensorKeyDictionary()

_OPTIONS_DIFFER = (
    "the options of topkast.wrap_optimizer, or the names of the tensors, differ between the "
    "processes, which would choose other sets: pass the same options, seed and method in each"
)
_SETS_DIFFER = (
    "the sets A and B differ between the processes: wrap the optimizer after "
    "DistributedDataParallel, which copies the weights of the first process, or start all with the "
    "same weights and the same method (the sensitivities of SNIP, added up over all processes)"
)
_LAYERS_DIFFER = (
    "the sets of the sparse layers, or their weights outside B, differ between processes, "
    "and only values on B are sent: start all processes with the same weights, or load "
    "the same state dict in each"
)
_WEIGHTS_DIFFER = (
    "the weights that the optimizer holds differ between the processes, and "
    "DistributedDataParallel sends only those in A to the others: wrap the optimizer after "
    "DistributedDataParallel, start all processes with the same weights, or load the same state "
    "dict in each"
)

_JOINED = (
    "the processes took different numbers of updates inside of Join, which would copy the weights "
    "in A of the last one to the others, without its sets and the weights outside A: give all "
    "processes equally many batches, as DistributedSampler does, or step the optimizer in all"
)


def _check_replicas(parent: nn.Module, name: str, model: Any) -> None:
    """Raise if DistributedDataParallel gets a model that differs between processes."""
    if not isinstance(parent, DistributedDataParallel) or name != "module":
        return
    if not dist.is_initialized():
        return
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    params = [param for key, param in model.named_parameters() if key not in ignored]
    executions = _owners(params)
    layers = [
        module
        for key, module in model.named_modules()
        if isinstance(module, SparseLayer) and f"{key}.values" not in ignored
    ]
    layers = [layer for layer in layers if layer.sharding is None]
    for execution in executions:
        if not isinstance(execution, MaskedExecution):
            check_processes(execution.ranked.key, execution.method)
    if executions or layers:
        masked = [execution for execution in executions if isinstance(execution, MaskedExecution)]
        checksums = {
            _OPTIONS_DIFFER: _checksum(execution.options_checksum for execution in executions),
            _LAYERS_DIFFER: checksum_of(layers),
            _SETS_DIFFER: _checksum(_sets_checksum(execution) for execution in masked),
            _WEIGHTS_DIFFER: _checksum(_weights_checksum(execution) for execution in masked),
        }
        device = (executions[0] if executions else layers[0]).values.device
        _compare(checksums, getattr(parent, "process_group", None), device)
    for param in params:
        _DATA_PARALLEL[param] = weakref.ref(parent)
    parent.join_hook = partial(_make_join_hook, parent)  # type: ignore[method-assign]


def _make_join_hook(parent: DistributedDataParallel, **options: Any) -> Any:
    """A hook of PyTorch's Join that first compares the processes.

    At its end Join copies the Parameters of the last process to the others, without their sets.
    """
    hook = type(parent).join_hook(parent, **options)
    copy_parameters = hook.post_hook

    def compare_and_copy(is_last_joiner: bool) -> None:
        executions = _owners(parent.module.parameters())
        if executions:
            numbers = (
                number
                for execution in executions
                for number in (execution.steps, _sets_checksum(execution))
            )
            device = executions[0].values.device
            _compare({_JOINED: _checksum(numbers)}, parent.process_group, device)
        copy_parameters(is_last_joiner)

    hook.post_hook = compare_and_copy
    return hook


def check_new(groups: Iterable[tuple[Group, Options]]) -> None:
    """Raise, in all processes, if they wrap the optimizer of one model in different ways.

    Called with new parameter groups and their options. The processes are compared whose gradients
    are exchanged: by DistributedDataParallel, or by FSDP2 with sparse layers.
    """
    exchanged: dict[Any, _Exchange] = {}  # by what exchanges gradients
    for new, options in groups:
        for execution in new.executions:
            execution.options_checksum = _describe(execution.ranked.key, options)
            if (sharding := getattr(execution, "sharding", None)) is not None:
                for axis in range(sharding.mesh.ndim):
                    exchange = _Exchange(sharding.mesh.get_group(axis), execution.values.device)
                    exchanged.setdefault((sharding.mesh, axis), exchange).add(execution)
        for name, param in zip(new.names, new.params, strict=True):
            reference = _DATA_PARALLEL.get(param)
            parent = None if reference is None else reference()
            if parent is not None:  # also for a dense tensor: it may be sparse in other processes
                exchange = _Exchange(parent.process_group, param.device)
                exchanged.setdefault(parent, exchange).add(new.execution_by_name.get(name))
    _compare_all([exchange.comparison() for exchange in exchanged.values()])


class _Exchange:
    """The executions whose gradients one process group exchanges."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group, self._device = group, device
        self._executions: dict[int, Execution] = {}

    def add(self, execution: Execution | None) -> None:
        if execution is not None:
            self._executions[id(execution)] = execution

    def comparison(self) -> tuple[dict[str, int], Any, torch.device]:
        executions = list(self._executions.values())
        checksums = {
            _OPTIONS_DIFFER: _checksum(execution.options_checksum for execution in executions),
            _SETS_DIFFER: _checksum(_sets_checksum(execution) for execution in executions),
        }
        return checksums, self._group, self._device


def _owners(params: Iterable[Tensor]) -> list[Execution]:
    """The executions of Parameters, in their order."""
    owners = (owner_of(param) for param in params)
    return list({id(owner): owner for owner in owners if owner is not None}.values())


def _compare(checksums: Mapping[str, int], group: Any, device: torch.device) -> None:
    """Raise the first message whose checksum differs between the processes of a group."""
    _compare_all([(checksums, group, device)])


def _compare_all(comparisons: Sequence[tuple[Mapping[str, int], Any, torch.device]]) -> None:
    """Raise the first message whose checksum differs, after all comparisons.

    A process that raised before the last one would leave others waiting in it.
    """
    different: list[str] = []
    for checksums, group, device in comparisons:
        numbers = list(checksums.values())
        extremes = torch.tensor([*numbers, *(-number for number in numbers)], device=device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        largest, smallest = extremes.view(2, -1).tolist()
        different += [
            message
            for message, first, second in zip(checksums, largest, smallest, strict=True)
            if first != -second
        ]
    if different:
        raise MismatchError(different[0])


def _checksum(numbers: Iterable[int]) -> int:
    return crc32(repr(list(numbers)).encode())


def _describe(name: str, options: Options) -> int:
    """A number that differs for other options of a tensor, if they decide its sets or updates."""
    own = options.for_tensor(name)
    method = method_of(own)
    # Other attributes may belong to one process, such as its rank or a path.
    fields = {name: getattr(method, name) for name in getattr(method, "__dataclass_fields__", ())}
    settings = [entry for entry in fields.items() if isinstance(entry[1], (int, float, str))]
    described = type(method).__qualname__, settings, own.for_group(), own.seed, own.power
    return crc32(f"{name} {described}".encode())


def _sets_checksum(execution: Execution) -> int:
    return int(hash_sets(execution.support))


def _weights_checksum(execution: Execution) -> int:
    """A number that differs for other weights outside A.

    What the reservoir has for entries of B is out of date, and may be written to.
    """
    entries, values = execution.support.entries, execution.values.detach().view(-1).clone()
    values[: execution.support.forward_size] = 0  # A is copied to all processes
    reservoir = execution.reservoir
    if isinstance(reservoir, TensorReservoir):
        keep_weights(reservoir, entries, values)
        return _crc(reservoir.tensor)
    checksum = _crc(values)
    if isinstance(reservoir, LayeredReservoir):
        indices, weights = reservoir.changes()
        outside = ~np.isin(indices, entries.cpu().numpy())
        for array in (indices[outside], weights[outside]):
            checksum = crc32(array.tobytes(), checksum)
        checksum = crc32(_bases_of(reservoir), checksum)
    return checksum


def _crc(tensor: Tensor, checksum: int = 0) -> int:
    """A checksum of the bits of a tensor."""
    flat = tensor.detach().resolve_conj().reshape(-1)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for chunk in flat.split(1 << 24):
        data = chunk.cpu().view(bits.get(chunk.element_size(), chunk.dtype))
        checksum = crc32(np.ascontiguousarray(data.numpy()).data, checksum)
    return checksum


def _bases_of(reservoir: LayeredReservoir) -> bytes:
    described = reservoir.describe()
    for base in described["bases"]:
        base.pop("path", None)  # processes may have their own copies of a file
    return repr(described).encode()


def checksum_of(layers: Iterable[SparseLayer], *others: Tensor) -> int:
    """A number that differs for other sets of sparse layers, or other weights outside B."""
    checksum = 0
    for layer in layers:
        execution = owner_of(layer.values)
        reservoir = layer.reservoir if execution is None else execution.reservoir
        checksum = crc32(f"{layer.active_count} {layer.block}".encode(), checksum)
        for tensor in (layer.indices, *_tensors_of(reservoir), *others):
            checksum = _crc(tensor, checksum)
        if isinstance(reservoir, LayeredReservoir):
            checksum = crc32(_bases_of(reservoir), checksum)
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
