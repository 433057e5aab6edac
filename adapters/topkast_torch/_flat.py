"""Entries of a tensor at flat C-order indices, whatever its strides are."""

from __future__ import annotations

import torch
from torch import Tensor


class Flat:
    """Reads and writes the entries of tensors at some indices (k,).

    ``Tensor.take`` and ``Tensor.put_`` do so too, but the second alerts where algorithms have to be
    deterministic, and both unravel each index anew.
    """

    def __init__(self, c_order: Tensor) -> None:
        self.c_order = c_order  # int32 or int64
        self._memory: dict[tuple[int, ...], Tensor] = {}  # offsets in memory, by strides

    def __len__(self) -> int:
        return self.c_order.numel()

    def gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """The entries (k,), in the dtype of `out` if there is one."""
        memory, indices = self._view(tensor)
        if out is None:
            return memory.index_select(0, indices)
        if out.dtype == tensor.dtype:
            return torch.index_select(memory, 0, indices, out=out)
        return out.copy_(memory.index_select(0, indices))

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write the entries (k,)."""
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
        left, offsets = self.c_order, torch.zeros_like(self.c_order)
        for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            offsets += left.remainder(size) * stride
            left = torch.div(left, size, rounding_mode="floor")
        return offsets
