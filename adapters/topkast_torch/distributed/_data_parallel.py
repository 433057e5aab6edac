"""A communication hook of DistributedDataParallel that sends the gradients on B alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from topkast import MismatchError, OptionError
from topkast_torch.distributed._replicas import hash_sets
from topkast_torch.execution._execution import Execution
from topkast_torch.execution._flat import FlatEntries
from topkast_torch.execution._masked_execution import MaskedExecution
from topkast_torch.optimizer._optimizer import TopKASTOptimizer
from topkast_torch.optimizer._ownership import owner_of

Hook: TypeAlias = Callable[[Any, Any], Future[Tensor]]


def ddp_comm_hook(optimizer: TopKASTOptimizer, *, dtype: torch.dtype | None = None) -> Hook:
    """A communication hook that sends the gradients of masked tensors on B alone.

    Replicas share their sets, so the values on B are sent as plain vectors, without indices, and
    averaged as DistributedDataParallel averages whole gradients. Whole gradients are sent of dense
    tensors, and, before a refresh, of tensors whose method needs the gradient outside B (RigL). The
    Parameters of sparse layers hold B alone: their gradients are sent as they are.

    With the last gradients of each backward pass, a checksum of all sets is compared.

    Parameters
    ----------
    optimizer
        The wrapped optimizer of the model, wrapped after DistributedDataParallel.
    dtype
        The dtype to send gradients in, for example torch.bfloat16; by default their own.

    Returns
    -------
    callable
        A hook for ``model.register_comm_hook(process_group, hook)``, whose state is the process
        group, None for the default one. PyTorch's ``fp16_compress_wrapper`` and
        ``bf16_compress_wrapper`` (NCCL only) can be put around it.

    Raises
    ------
    OptionError
        If `optimizer` is not a wrapped one.
    MismatchError
        In the backward pass, if sets differ between the processes.

    Examples
    --------
    In each process, where `model` is a ``DistributedDataParallel``:

    >>> import torch, topkast, topkast_torch
    >>> model = torch.nn.Linear(20, 30)
    >>> optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    >>> optimizer = topkast.wrap_optimizer(optimizer, fwd=0.9, bwd=0.8)
    >>> hook = topkast_torch.ddp_comm_hook(optimizer, dtype=torch.bfloat16)

    Then ``model.register_comm_hook(None, hook)``.
    """
    if not isinstance(optimizer, TopKASTOptimizer):
        raise OptionError(
            f"ddp_comm_hook needs an optimizer of topkast.wrap_optimizer, got "
            f"{type(optimizer).__name__}"
        )
    checksum = _Checksum(optimizer)

    # DistributedDataParallel refuses annotations that are strings.
    def hook(group, bucket):  # type: ignore[no-untyped-def]
        group = group or dist.group.WORLD
        buffer: Tensor = bucket.buffer()
        parts = list(_parts_of(bucket.parameters(), buffer))
        gathered = [kept.gather(part.gradient) for part in parts for kept in part.sent]
        packed = torch.cat([tensor.view(-1) for tensor in gathered]) if gathered else buffer[:0]
        packed = packed.div_(group.size()).to(dtype or packed.dtype)
        compared = checksum.compare(group, buffer.device) if bucket.is_last() else None
        future: Any = dist.all_reduce(packed, group=group, async_op=True).get_future()

        def unpack(_: Any) -> Tensor:
            if compared is not None:
                compared()
            averaged = iter(packed.to(buffer.dtype).split([tensor.numel() for tensor in gathered]))
            for part in parts:
                if not part.is_whole:
                    part.gradient.zero_()
                for kept in part.sent:
                    kept.put(part.gradient, next(averaged))
            return buffer

        return future.then(unpack)

    return hook


class _Part(NamedTuple):
    """The gradient of one Parameter in a bucket, and what is sent of it."""

    gradient: Tensor
    sent: tuple[Any, ...]
    is_whole: bool


class _Whole:
    """All entries of a gradient, in the order of its memory."""

    @staticmethod
    def gather(gradient: Tensor) -> Tensor:
        return _memory(gradient)

    @staticmethod
    def put(gradient: Tensor, values: Tensor) -> None:
        _memory(gradient).copy_(values)


def _memory(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))


def _parts_of(params: Iterable[Tensor], buffer: Tensor) -> Iterable[_Part]:
    """The gradients of a bucket, which lie in its buffer one after the other."""
    start = buffer.storage_offset()
    for param in params:
        strides = param.stride() if _is_dense(param) else _rows_first(param.shape)
        gradient = buffer.as_strided(param.shape, strides, start)
        start += param.numel()
        owner = owner_of(param)
        if not isinstance(owner, MaskedExecution) or owner.awaits_gradient:
            yield _Part(gradient, (_Whole,), is_whole=True)
            continue
        sections: tuple[FlatEntries, ...] = next(
            member.entries for member in owner.members.values() if member.param is param
        )
        yield _Part(gradient, sections if owner.step.exploring else sections[:1], is_whole=False)


def _is_dense(param: Tensor) -> bool:
    """Whether a Parameter fills its memory; if not, its gradient is laid out row by row."""
    last = sum((n - 1) * step for n, step in zip(param.shape, param.stride(), strict=True))
    return last + 1 == param.numel()


def _rows_first(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


class _Checksum:
    """The checksum of all sets, made once for each refresh."""

    def __init__(self, optimizer: TopKASTOptimizer) -> None:
        self._optimizer = optimizer
        self._hashes: dict[str, tuple[Any, Tensor]] = {}

    def compare(self, group: Any, device: torch.device) -> Callable[[], None]:
        """Start to compare the checksums of all processes; the result raises if they differ."""
        checksum = torch.zeros((), dtype=torch.int64, device=device)
        for execution in self._executions():
            name, support = execution.ranked.key, execution.support
            known = self._hashes.get(name)
            if known is None or known[0] is not support.indices:
                known = support.indices, hash_sets(support)
                self._hashes[name] = known
            checksum = (31 * checksum + known[1].to(device)) >> 2  # its negative is an int64 too
        extremes = torch.stack([checksum, -checksum])
        work = dist.all_reduce(extremes, dist.ReduceOp.MAX, group, async_op=True)

        def check() -> None:
            work.wait()
            if int(extremes[0]) != -int(extremes[1]):
                raise MismatchError(
                    "the sets A and B differ between the processes, and only gradients on B are "
                    "sent: start all processes with the same weights, the same seed of "
                    "wrap_optimizer and the same state dicts, and skip the same updates in each"
                )

        return check

    def _executions(self) -> Iterable[Execution]:
        for group in self._optimizer._wrapper_state.groups:
            yield from group.executions
