"""Entries of a tensor at flat C-order indices, for any strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast_torch.sparse._products import has_kernels

_KERNEL_MIN_ENTRIES = 1 << 14  # below this, calling a kernel costs more than it saves


class FlatEntries:
    """Reads and writes the entries of tensors at flat indices (k,).

    ``Tensor.take`` and ``Tensor.put_`` unravel every index at each call, and ``put_`` raises under
    ``torch.use_deterministic_algorithms``.
    """

    def __init__(self, c_order: Tensor, *, ascending: bool = True) -> None:
        self.c_order = c_order  # int32 or int64
        self.ascending = ascending  # kernels need it; blocks of several rows do not ascend
        self._memory: dict[tuple[int, ...], Tensor] = {}  # memory offsets, int64, by strides

    def __len__(self) -> int:
        return self.c_order.numel()

    def gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """The entries (k,), in the dtype of `out` if given."""
        if out is None:
            out = tensor.new_empty(len(self))
        if _kernel_applies(tensor, [self], [out]):
            from topkast.kernels import gather

            gather(tensor.view(-1).numpy(), self.c_order.numpy(), out.numpy())
            return out
        memory, indices = self._view(tensor)
        if out.dtype == tensor.dtype:
            return torch.index_select(memory, 0, indices, out=out)
        return out.copy_(memory.index_select(0, indices))

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write the entries (k,)."""
        if _kernel_applies(tensor, [self], [values]):
            from topkast.kernels import put

            put(tensor.view(-1).numpy(), self.c_order.numpy(), values.numpy())
            torch.autograd.graph.increment_version(tensor)  # autograd does not see writes by NumPy
            return
        memory, indices = self._view(tensor)
        memory.index_copy_(0, indices.long(), values)  # index_copy_ takes no int32

    def tensors(self) -> list[Tensor]:
        """All tensors stored here."""
        return [self.c_order, *self._memory.values()]

    def _view(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The memory of a tensor as a vector, and the indices of the entries in it."""
        if tensor.is_contiguous():
            return tensor.view(-1), self.c_order
        strides = tensor.stride()
        if strides not in self._memory:
            self._memory[strides] = self._memory_offsets(tensor)
        span = 1 + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True)
        )
        return tensor.as_strided((span,), (1,)), self._memory[strides]

    def _memory_offsets(self, tensor: Tensor) -> Tensor:
        remaining = self.c_order.long()  # offsets may need more bits than indices
        offsets = torch.zeros_like(remaining)
        for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            offsets += remaining.remainder(size) * stride
            remaining = torch.div(remaining, size, rounding_mode="floor")
        return offsets


def compress(tensor: Tensor, kept: Sequence[FlatEntries], outs: Sequence[Tensor]) -> None:
    """Gather the kept entries of a tensor into `outs`, and zero all others."""
    if _kernel_applies(tensor, kept, outs):
        from topkast.kernels import compress as compress_array

        pairs = zip(kept, outs, strict=True)
        compress_array(
            tensor.view(-1).numpy(),
            *((entries.c_order.numpy(), out.numpy()) for entries, out in pairs),
        )
        torch.autograd.graph.increment_version(tensor)
        return
    gathered = [entries.gather(tensor) for entries in kept]
    tensor.zero_()
    for entries, values, out in zip(kept, gathered, outs, strict=True):
        entries.put(tensor, values)
        out.copy_(values)


def restrict(tensor: Tensor, kept: Sequence[FlatEntries]) -> Tensor:
    """A tensor with the kept entries of another and zeros elsewhere, differentiable in it."""
    with torch.enable_grad():
        mask = torch.zeros_like(tensor, dtype=torch.bool)
        for entries in kept:
            entries.put(mask, mask.new_ones(len(entries)))
        return torch.where(mask, tensor, 0)


def _kernel_applies(tensor: Tensor, kept: Sequence[FlatEntries], vectors: Sequence[Tensor]) -> bool:
    """Whether the kernels take a tensor and these vectors, and are faster."""
    return (
        sum(map(len, kept)) >= _KERNEL_MIN_ENTRIES
        and type(tensor) in (Tensor, Parameter)
        and has_kernels(tensor.device, tensor.dtype)
        and tensor.is_contiguous()
        and not tensor.requires_grad
        and not tensor.is_neg()
        and all(entries.ascending and entries.c_order.dtype == torch.int32 for entries in kept)
        and all(vector.dtype == tensor.dtype and vector.is_contiguous() for vector in vectors)
    )
