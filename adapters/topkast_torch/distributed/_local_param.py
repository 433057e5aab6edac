"""Dense Parameters that are DTensors: the inner optimizer steps the part of this process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast import UnsupportedOptimizerError
from topkast_torch.distributed._sharding import contiguous_strides, is_sharded, local_part
from topkast_torch.inner._inner_state import Layout, Path, map_tree


class LocalParam:
    """The part of a DTensor that this process holds, as a Parameter that shares its memory.

    So the inner optimizer steps plain tensors only: its fused and foreach forms cannot mix them
    with DTensors. Its state has the shape of the part.
    """

    def __init__(self, name: str, param: Any, layout: Layout) -> None:
        flat = [path[-1] for path, spec in layout.specs.items() if spec.flat and param.dim() > 1]
        if flat:
            raise UnsupportedOptimizerError(
                f"the optimizer keeps {flat[0]!r} as one vector of all weights of {name}, which is "
                "a DTensor: choose an optimizer whose state has the shape of the weights"
            )
        self._param, self._layout = param, layout
        self.part = Parameter(local_part(param.detach()), requires_grad=param.requires_grad)

    @torch.no_grad()
    def load_gradient(self) -> None:
        """Give the part its gradient, and the memory that the DTensor has now."""
        memory = local_part(self._param.detach())
        if self.part.data_ptr() != memory.data_ptr():
            self.part.data = memory
        grad = self._param.grad
        if is_sharded(grad) and grad.placements != self._param.placements:
            grad = grad.redistribute(placements=self._param.placements)
        self.part.grad = None if grad is None else local_part(grad)

    def take_state(self, entries: Any) -> tuple[Parameter, Any]:
        """The part, and the entries that an optimizer has for the DTensor as its own."""
        return self.part, self.load_entries({"state": entries})["state"]

    def save_entries(self, stores: Any) -> Any:
        """Entries with a value for each weight as DTensors, and others as they are."""
        return map_tree(self._save, stores)

    def load_entries(self, stores: Any) -> Any:
        """The inverse of :meth:`save_entries`, which also takes whole tensors."""
        return map_tree(self._load, stores)

    def _placements(self, leading: int) -> list[Any]:
        """How an entry with `leading` axes before those of the weights is placed."""
        from torch.distributed.tensor import Shard

        return [
            Shard(place.dim + leading) if place.is_shard() else place
            for place in self._param.placements
        ]

    def _save(self, path: Path, entry: Any) -> Any:
        spec, param = self._layout.specs.get(path), self._param
        if spec is None or not isinstance(entry, Tensor):
            return entry
        from torch.distributed.tensor import DTensor

        shape = list(entry.shape)
        shape[spec.leading : spec.leading + param.dim()] = param.shape
        return DTensor.from_local(
            entry,
            param.device_mesh,
            self._placements(spec.leading),
            run_check=False,
            shape=torch.Size(shape),
            stride=contiguous_strides(shape),
        )

    def _load(self, path: Path, entry: Any) -> Any:
        spec, param = self._layout.specs.get(path), self._param
        if spec is None or not isinstance(entry, Tensor):
            return entry
        sharded: Any = entry
        placements = self._placements(spec.leading)
        if not is_sharded(entry):
            from torch.distributed.tensor import distribute_tensor

            whole = entry.to(param.device)
            sharded = distribute_tensor(whole, param.device_mesh, placements, src_data_rank=None)
        elif list(sharded.placements) != placements:
            sharded = sharded.redistribute(param.device_mesh, placements)
        return local_part(sharded)
