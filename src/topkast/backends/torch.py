"""PyTorch: NumPy's way in the memory of the host, PyTorch's own functions elsewhere."""

from __future__ import annotations

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
        hosts = self.host(old), self.host(new)
        if hosts[0] is not None and hosts[1] is not None:
            found = _host.common_positions(hosts[0], old_split, hosts[1], new_split)
            source, flags = map(torch.from_numpy, found)
            return source, flags
        assert size is not None  # nothing is traced here
        table = torch.full((size,), -1, dtype=torch.int32, device=old.device)
        numbers = torch.arange(len(old), dtype=torch.int32, device=old.device)
        source = table.index_copy_(0, old.long(), numbers).index_select(0, new)
        return source.clamp(min=0), source >= 0


BACKEND = TorchBackend()
