"""PyTorch: NumPy's algorithms in host memory, PyTorch's own functions on other devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topkast.backends import _host
from topkast.backends._base import Backend


class TorchBackend(Backend):
    """See :class:`topkast.backends.Backend`."""

    def host(self, array: Tensor) -> np.ndarray[Any, Any] | None:
        if array.device.type != "cpu":
            return None
        array = array.detach()
        return (array.float() if array.dtype.itemsize <= 2 else array).numpy()

    def zero_count(self, beside: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.int32, device="cpu")

    def take(self, flat: Tensor, indices: Tensor) -> Tensor:
        return flat.index_select(0, indices)

    def lookup(self, table: Tensor, indices: Tensor) -> Tensor:
        return table.index_select(0, indices)

    def scatter(self, values: Tensor, indices: Tensor, size: int, fill: float) -> Tensor:
        base = torch.full((size,), fill, dtype=values.dtype, device=values.device)
        return base.scatter_(0, indices.long(), values)

    def put(self, flat: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        return flat.scatter(0, indices.long(), values)

    def true_indices(self, mask: Tensor, count: int) -> Tensor:
        return mask.nonzero().view(-1)

    def kth_largest(self, keys: Tensor, count: int) -> Tensor:
        return keys.topk(count, sorted=False).values.amin()  # by radix selection

    def positions(
        self, old: Tensor, old_split: int, new: Tensor, new_split: int, size: int | None
    ) -> tuple[Tensor, Tensor]:
        old_host, new_host = self.host(old), self.host(new)
        if old_host is not None and new_host is not None:
            migration = _host.common_positions(old_host, old_split, new_host, new_split)
            source, survives = map(torch.from_numpy, migration)
            return source, survives
        assert size is not None  # only traced indices have an unknown size
        table = torch.full((size,), -1, dtype=torch.int32, device=old.device)
        positions = torch.arange(len(old), dtype=torch.int32, device=old.device)
        source = table.index_copy_(0, old.long(), positions).index_select(0, new)
        return source.clamp(min=0), source >= 0

    def full(self, number: float, like: Tensor) -> Tensor:
        return like.new_full((), number)

    def migrate(
        self, moves: Sequence[tuple[Tensor, Tensor]], source: Tensor, survives: Tensor
    ) -> list[Tensor]:
        if not (source.device.type == "cpu" and all(_can_view(flat) for flat, _ in moves)):
            return [
                torch.where(survives, flat.index_select(0, source), fresh) for flat, fresh in moves
            ]
        pairs = [(_view(flat), _view(fresh)) for flat, fresh in moves]
        moved = [flat.new_empty(source.shape) for flat, _ in moves]  # aligned to a cache line
        outs = [_view(out) for out in moved]
        _host.migrate(pairs, source.numpy(), survives.numpy(), outs)
        return moved


def _view(vector: Tensor) -> np.ndarray[Any, Any]:
    """The entries as an array; where NumPy lacks their dtype, as integers with the same bits."""
    if vector.requires_grad:
        vector = vector.detach()
    if vector.dtype not in _NUMPY_DTYPES:
        vector = vector.view(_WORDS[vector.dtype.itemsize])
    return vector.numpy()


def _can_view(flat: Tensor) -> bool:
    """Whether NumPy can carry the bits of the entries."""
    has_words = flat.dtype.itemsize in _WORDS and not (flat.is_conj() or flat.is_neg())
    return flat.device.type == "cpu" and has_words


_NUMPY_DTYPES = {torch.int16, torch.int32, torch.int64, torch.float32, torch.float64}
# Integers that carry the bits of entries, whatever NumPy knows of their dtype.
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

BACKEND = TorchBackend()
