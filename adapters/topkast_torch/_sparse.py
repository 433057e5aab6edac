"""Sparse execution: the values on B are the model's Parameter, and α is nowhere."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast import MismatchError, OptionError
from topkast._compact import Migration, move
from topkast._options import Options
from topkast._plan import Block
from topkast_torch._compact import CompactTensor
from topkast_torch._masked import MaskedTensor
from topkast_torch._sparse_layer import SparseLayer


class SparseTensor(CompactTensor):
    """A block of one tensor, the weight of a sparse layer."""

    layer: SparseLayer
    # Changed by a refresh
    _content: tuple[int, int]  # of the layer's sets
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
        forward, size = int(layer.active.sum()), math.prod(layer.weight_shape)
        density = getattr(layer, "density", forward / size)
        block = Block({name: layer.weight_shape}, forward, layer.values.numel(), density)
        theta = layer.reservoir
        if theta is None:  # loaded from a file: what lies outside B is not known
            theta = layer.values.detach().new_zeros(size)
        return cls(block, layer.values, theta.to(layer.values), layer, options, updates)

    @classmethod
    def of_masked(cls, masked: MaskedTensor, layer: SparseLayer) -> SparseTensor:
        """Go on from masked execution: the same values, sets and weights."""
        tensor = cls.__new__(cls)
        for name in CompactTensor.__annotations__:
            setattr(tensor, name, getattr(masked, name))
        tensor.layer, tensor._gradient, tensor._content = layer, None, layer.content()
        tensor._register_hook()
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
        self._gradient, self._content = None, layer.content()
        self.weigh()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hook": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register_hook()

    def _register_hook(self) -> None:
        if self.values.requires_grad:
            restrict = _Restrict(weakref.ref(self))
            self._hook = self.values.register_post_accumulate_grad_hook(restrict)
            weakref.finalize(self, self._hook.remove)

    def install(self) -> None:
        self.layer.reservoir = None  # it is here from now on
        self._register_hook()

    def adopt_changes(self) -> None:
        layer, name = self.layer, self.block.key
        values = getattr(layer, "values", None)
        if values is None:
            raise MismatchError(
                f"the layer of {name} was made dense by topkast.densify: its optimizer no longer "
                "reaches it. To export and train on, densify a copy.deepcopy of the model"
            )
        if values is not self.values or values.dtype != self.reservoir.dtype:
            raise MismatchError(
                f"the layer of {name} was converted, or given other Parameters, after its "
                "optimizer was built: convert and move the model first"
            )
        if layer.indices is not self.support.indices or layer.content() != self._content:
            raise MismatchError(
                f"{name} was given other sets than its optimizer has, as by model.load_state_dict: "
                "load the optimizer's state dict too, which holds them all. If it was "
                "DistributedDataParallel, start all processes with the same weights"
            )

    def load_gradient(self, *, penalty: float, kind: str) -> None:
        self._gradient = self.values.grad
        if self._gradient is not None and (penalty or not self.exploring):
            whole = torch.empty_like(self._gradient)
            flat = self._gradient.view(-1), whole.view(-1)
            self.add_penalty(*flat, penalty=penalty, kind=kind)
            self.values.grad = whole

    def unload_gradient(self) -> None:
        if self._gradient is not None:
            self.values.grad = self._gradient
            self._gradient = None

    def carry(self, migration: Migration) -> None:
        if self.values.grad is not None:  # which may be added to
            self.values.grad = move(self.values.grad, migration)

    def show(self, *, everywhere: bool = False) -> None:
        pass  # the model's Parameter is what was updated

    def derive(self) -> None:
        layer: Any = self.layer
        if isinstance(layer, SparseLayer):  # it may have been made dense
            layer.set_support(self.support)
            self._content = layer.content()

    def gather_state(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return dict(next(iter(states.values()), {}))

    def held_tensors(self) -> list[Tensor]:
        return [] if self.values.grad is None else [self.values.grad]

    def held_bytes(self, state: Mapping[str, Any]) -> int:
        layer: Any = self.layer
        own = layer.products.nbytes if isinstance(layer, SparseLayer) else 0
        return super().held_bytes(state) + own


@dataclass(frozen=True)
class _Restrict:
    """Hook that zeroes the gradient on B∖A once exploration has stopped."""

    owner: weakref.ref[SparseTensor]

    def __call__(self, param: Tensor) -> None:
        owner = self.owner()
        if owner is not None and not owner.exploring and param.grad is not None:
            param.grad.masked_fill_(~owner.support.active.view(param.shape), 0)
