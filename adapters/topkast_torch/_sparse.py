"""Sparse execution: the values on B are the model's Parameter, and α is nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast import MismatchError, OptionError
from topkast._options import Options
from topkast._plan import Block
from topkast_torch._compact import CompactTensor
from topkast_torch._layers import SparseLayer
from topkast_torch._masked import MaskedTensor


class SparseTensor(CompactTensor):
    """A block of one tensor, the weight of a sparse layer."""

    layer: SparseLayer
    # During a step
    _gradient: Tensor | None  # of the loss, while the inner optimizer sees the penalty's added

    @classmethod
    def of_layer(
        cls, name: str, layer: SparseLayer, options: Options, updates: int
    ) -> SparseTensor:
        """For a layer that was made sparse: its values, its sets, its sparsities."""
        if options.distribution == "global":
            raise OptionError(
                f"{name} is the weight of a {type(layer).__name__}, whose sets have fixed sizes: "
                "distribution='global' would move weights from tensor to tensor"
            )
        fwd = layer.__dict__.get("sparsities", (options.fwd, options.bwd))[0]
        block = Block(
            {name: layer.weight_shape},
            int(layer.active.sum()),
            layer.values.numel(),
            1.0 - fwd,
        )
        values = layer.values
        theta = layer.__dict__.pop("reservoir", None)
        if theta is None:  # loaded from a file: what lies outside B is not known
            theta = torch.zeros(block.size)
        return cls(block, values, theta.to(values), layer, options, updates)

    @classmethod
    def of_masked(cls, masked: MaskedTensor, layer: SparseLayer) -> SparseTensor:
        """Go on from masked execution: the same values, sets and weights."""
        tensor = cls.__new__(cls)
        for name in CompactTensor.__annotations__:
            setattr(tensor, name, getattr(masked, name))
        tensor.layer, tensor._gradient = layer, None
        return tensor

    def __init__(
        self,
        block: Block,
        values: Parameter,
        theta: Tensor,
        layer: SparseLayer,
        options: Options,
        updates: int,
    ) -> None:
        self.block, self.values, self.reservoir, self.layer = block, values, theta, layer
        self.support = layer.support
        self.changed = block.no_change(self.support.indices)
        self.set_exploring(options.explore_until, updates)
        self._gradient = None
        self.weigh()

    def install(self) -> None:
        pass  # the layer is there

    def adopt_changes(self) -> None:
        layer, name = self.layer, self.block.key
        if layer.values is not self.values or layer.values.dtype != self.reservoir.dtype:
            raise MismatchError(
                f"the layer of {name} was converted or made dense after its optimizer was built: "
                "convert and move the model first"
            )
        if layer.indices is not self.support.indices:
            raise MismatchError(
                f"{name} was given other sets than its optimizer has, as by model.load_state_dict: "
                "load the optimizer's state dict too, which holds them all"
            )

    def load_gradient(self, *, penalty: float, kind: str) -> None:
        self._gradient = self.values.grad
        if self._gradient is not None and (penalty or not self.exploring):
            whole = torch.empty_like(self._gradient)
            flat = self._gradient.view(-1), whole.view(-1)
            self.add_penalty(*flat, penalty=penalty, kind=kind)
            self.values.grad = whole

    def settle(self) -> None:
        super().settle()
        self.values.grad = self._gradient
        self._gradient = None

    def show(self, *, everywhere: bool = False) -> None:
        pass  # the model's Parameter is what was updated

    def derive(self) -> None:
        self.layer.set_support(self.support)

    def gather_state(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return dict(next(iter(states.values()), {}))

    def held_tensors(self) -> list[Tensor]:
        return [] if self.values.grad is None else [self.values.grad]

    def held_bytes(self, state: Mapping[str, Any]) -> int:
        return super().held_bytes(state) + self.layer.products.nbytes
