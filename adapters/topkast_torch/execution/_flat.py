"""Entries of a tensor at flat C-order indices, whatever its strides are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast_torch.sparse._products import has_kernels

_FEW = 1 << 14  # entries, below which a call of a kernel costs more than it saves


class Flat:
    """Reads and writes the entries of tensors at some indices (k,).

    ``Tensor.take`` and ``Tensor.put_`` do so too, but the second alerts where algorithms have to be
    deterministic, and both unravel each index anew.
    """

    def __init__(self, c_order: Tensor, *, ascending: bool = True) -> None:
        self.c_order = c_order  # int32 or int64
        self.ascending = ascending  # as kernels want it; those of blocks of several rows do not
        self._memory: dict[tuple[int, ...], Tensor] = {}  # offsets in memory, int64, by strides

    def __len__(self) -> int:
        return self.c_order.numel()

    def gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """The entries (k,), in the dtype of `out` if there is one."""
        if out is None:
            out = tensor.new_empty(len(self))
        if _suits(tensor, [self], [out]):
            from topkast.kernels import gather

            gather(tensor.view(-1).numpy(), self.c_order.numpy(), out.numpy())
            return out
        memory, indices = self._view(tensor)
        if out.dtype == tensor.dtype:
            return torch.index_select(memory, 0, indices, out=out)
        return out.copy_(memory.index_select(0, indices))

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write the entries (k,)."""
        if _suits(tensor, [self], [values]):
            from topkast.kernels import put

            put(tensor.view(-1).numpy(), self.c_order.numpy(), values.numpy())
            torch.autograd.graph.increment_version(tensor)  # NumPy leaves no trace
            return
        memory, indices = self._view(tensor)
        memory.index_copy_(0, indices.long(), values)  # which takes no int32

    def held(self) -> list[Tensor]:
        """What is kept."""
        return [self.c_order, *self._memory.values()]

    def _view(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The memory of a tensor as a vector, and where in it the entries are."""
        if tensor.is_contiguous():
            return tensor.view(-1), self.c_order
        strides = tensor.stride()
        if strides not in self._memory:
            self._memory[strides] = self._find(tensor)
        span = 1 + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True)
        )
        return tensor.as_strided((span,), (1,)), self._memory[strides]

    def _find(self, tensor: Tensor) -> Tensor:
        left = self.c_order.long()  # offsets may need more bits than indices
        offsets = torch.zeros_like(left)
        for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            offsets += left.remainder(size) * stride
            left = torch.div(left, size, rounding_mode="floor")
        return offsets


def compress(tensor: Tensor, places: Sequence[Flat], outs: Sequence[Tensor]) -> None:
    """Gather the entries of a tensor at some places, and clear all others."""
    if _suits(tensor, places, outs):
        from topkast.kernels import compress as run

        parts = zip(places, outs, strict=True)
        run(tensor.view(-1).numpy(), *((one.c_order.numpy(), out.numpy()) for one, out in parts))
        torch.autograd.graph.increment_version(tensor)
        return
    values = [place.gather(tensor) for place in places]
    tensor.zero_()
    for place, part, out in zip(places, values, outs, strict=True):
        place.put(tensor, part)
        out.copy_(part)


def _suits(tensor: Tensor, places: Sequence[Flat], values: Sequence[Tensor]) -> bool:
    """Whether kernels can work on a tensor and these vectors, and are worth it."""
    return (
        sum(map(len, places)) >= _FEW
        and type(tensor) in (Tensor, Parameter)
        and has_kernels(tensor.device, tensor.dtype)
        and tensor.is_contiguous()
        and not tensor.requires_grad
        and not tensor.is_neg()
        and all(place.ascending and place.c_order.dtype == torch.int32 for place in places)
        and all(part.dtype == tensor.dtype and part.is_contiguous() for part in values)
    )
