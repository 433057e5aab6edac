"""How FSDP divides a tensor among processes, and exchanges of entries between them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from topkast import UnsupportedTensorError
from topkast.adapter import Migration


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # which some builds of PyTorch lack
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def local_part(tensor: Any) -> Tensor:
    """The memory of this process of a DTensor; any other tensor itself."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass(frozen=True)
class Sharding:
    """A division of vectors and matrices into one part for each process of a group.

    A vector of `n` entries is cut into parts of ``ceil(n / count)``, as ``torch.chunk`` cuts: the
    last parts may be shorter, or empty. If the mesh has more axes, the division is repeated along
    them.
    """

    mesh: Any  # a DeviceMesh
    axis: int  # of the mesh

    @classmethod
    def of(cls, name: str, tensor: Any) -> Sharding:
        """The division of a DTensor; raises :class:`UnsupportedTensorError` unless FSDP made it."""
        from torch.distributed.tensor import Replicate, Shard

        axes = [axis for axis, place in enumerate(tensor.placements) if place == Shard(0)]
        others = [place for place in tensor.placements if place != Shard(0)]
        if len(axes) != 1 or not all(isinstance(place, Replicate) for place in others):
            raise UnsupportedTensorError(
                f"{name} is a DTensor placed {tuple(tensor.placements)}, but sparse layers can "
                "only be sharded by topkast_torch.fully_shard, over one axis of a mesh: leave them "
                "out of tensor parallelism (parallelize_module)"
            )
        return cls(tensor.device_mesh, axes[0])

    @property
    def group(self) -> Any:
        """The process group that holds all parts."""
        return self.mesh.get_group(self.axis)

    @property
    def count(self) -> int:
        """Number of parts."""
        return int(self.mesh.size(self.axis))

    @property
    def rank(self) -> int:
        """Number of this process's part."""
        return int(self.mesh.get_local_rank(self.axis))

    def part_size(self, length: int) -> int:
        """Number of entries in all parts but the last ones of a vector."""
        return max(1, math.ceil(length / self.count))

    def bounds(self, length: int) -> tuple[int, int]:
        """The entries of a vector that this process holds, as a half-open range."""
        size = self.part_size(length)
        return min(self.rank * size, length), min((self.rank + 1) * size, length)

    def wrap(self, part: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
        """A DTensor of `shape`, cut along `dim`, from this process's part, which it shares."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placements: list[Any] = [Replicate()] * self.mesh.ndim
        placements[self.axis] = Shard(dim)
        wrapped: Tensor = DTensor.from_local(
            part.detach(),
            self.mesh,
            placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=contiguous_strides(shape),
        )
        return wrapped

    def part_of(self, tensor: Any, dim: int) -> Tensor:
        """The part of this process, along `dim`, of a tensor or a DTensor; it shares memory."""
        if is_sharded(tensor):
            is_cut = tensor.placements[self.axis].is_shard(dim)
            is_ours = is_cut and tensor.device_mesh == self.mesh
            if is_ours:
                return local_part(tensor)
            tensor = tensor.full_tensor()
        start, stop = self.bounds(tensor.shape[dim])
        part: Tensor = tensor.narrow(dim, start, stop - start)
        return part

    def total(self, counts: Tensor) -> Tensor:
        """The sum of a vector over all parts."""
        summed = counts.clone()
        dist.all_reduce(summed, group=self.group)
        return summed

    def gather(self, part: Tensor) -> Tensor:
        """Vectors of all processes (any lengths), one after the other."""
        lengths = torch.zeros(self.count, dtype=torch.int64, device=part.device)
        lengths[self.rank] = len(part)
        sizes: list[int] = self.total(lengths).tolist()
        padded = part.new_zeros(max(sizes))
        padded[: len(part)] = part
        gathered = [torch.empty_like(padded) for _ in sizes]
        if max(sizes):
            dist.all_gather(gathered, padded, group=self.group)
        return torch.cat([own[:size] for own, size in zip(gathered, sizes, strict=True)])


class Exchange:
    """Entries that go from one process to another, known to all processes.

    Parameters
    ----------
    sharding
        The processes.
    owners, receivers
        For each entry, the process that has it and the one that gets it; integers (k,), equal in
        all processes.

    Attributes
    ----------
    sent, received
        Numbers of the entries that this process sends and gets, in the order of the rows of a call.
    """

    def __init__(self, sharding: Sharding, owners: Tensor, receivers: Tensor) -> None:
        self._group, rank = sharding.group, sharding.rank
        sent, received = (own == rank for own in (owners, receivers))
        self.sent, self._sizes_sent = _order(sent.nonzero().view(-1), receivers, sharding.count)
        self.received, self._sizes = _order(received.nonzero().view(-1), owners, sharding.count)

    def __call__(self, rows: Tensor) -> Tensor:
        """Send rows (len(sent), …), and return those of :attr:`received`."""
        shape = rows.shape[1:]
        rows = rows.detach().reshape(len(self.sent), math.prod(shape)).contiguous()
        out = rows.new_empty(len(self.received), math.prod(shape))
        # As bytes: gloo does not know all dtypes.
        dist.all_to_all_single(
            out.view(torch.uint8),
            rows.view(torch.uint8),
            self._sizes,
            self._sizes_sent,
            self._group,
        )
        return out.view(len(self.received), *shape)


def _order(numbers: Tensor, processes: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """Entry numbers by the process at the other end, and how many each has."""
    others = processes.index_select(0, numbers)
    order = torch.argsort(others, stable=True)
    sizes: list[int] = torch.bincount(others, minlength=count).tolist()
    return numbers.index_select(0, order), sizes


class ShardedMigration:
    """The migration of vectors over B whose parts are in several processes.

    :meth:`apply` is called in all processes at the same time, as that of
    :class:`topkast.adapter.Migration` is in one.
    """

    def __init__(self, sharding: Sharding, migration: Migration) -> None:
        length = len(migration.source)
        part, (start, stop) = sharding.part_size(length), sharding.bounds(length)
        survivors = migration.survives.nonzero().view(-1)
        source = migration.source.index_select(0, survivors).long()
        self._exchange = Exchange(sharding, source // part, survivors // part)
        self._sent = source.index_select(0, self._exchange.sent) - start
        self._received = survivors.index_select(0, self._exchange.received) - start
        self._count = stop - start

    def apply(self, entry: Tensor, fresh: Tensor | float = 0.0) -> Tensor:
        """The part of this process of a vector on the new B, from its part on the old one."""
        return self.apply_rows(entry.reshape(-1), fresh).view(entry.shape)

    def apply_rows(self, rows: Tensor, fresh: Tensor | float = 0.0) -> Tensor:
        """The same for rows (entries, …)."""
        moved = self._exchange(rows.index_select(0, self._sent))
        target = torch.empty_like(rows)
        target[:] = fresh.to(rows.dtype) if isinstance(fresh, Tensor) else fresh
        return target.index_copy_(0, self._received, moved)
