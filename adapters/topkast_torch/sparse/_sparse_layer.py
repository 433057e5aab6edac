"""The base class of sparse layers: values on B and their indices, saved and loaded together."""

from __future__ import annotations

import math
import sys
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from topkast import Blocks, MismatchError, SparseExportWarning, Support
from topkast.adapter import IncrementalSelection
from topkast.reservoirs import Reservoir
from topkast_torch._reservoirs import check_convertible, convert, forget_changes
from topkast_torch.distributed._sharding import is_sharded
from topkast_torch.optimizer._ownership import owner_of
from topkast_torch.sparse._dense_weight import weight_of
from topkast_torch.sparse._functions import refuse_export
from topkast_torch.sparse._products import Entries
from topkast_torch.sparse._structure import (
    BLOCK,
    STRUCTURE,
    check_dense,
    check_sets,
    describe_units,
    read_structure,
    with_version,
)

# By backward pass: inputs and gradients of outputs, or gradients of the dense weight and None.
Passes: TypeAlias = list[tuple[Tensor, Tensor | None]]

# The layer by its Parameter of values, since an optimizer knows only the Parameter.
_LAYERS: Any = WeakTensorKeyDictionary()


def layer_of(param: Tensor) -> SparseLayer | None:
    """The layer whose values on B are this Parameter, if any."""
    reference = _LAYERS.get(param)
    layer: SparseLayer | None = reference() if reference is not None else None
    return layer


def _is_saving_pretrained() -> bool:
    """Whether Transformers' ``save_pretrained`` asks for the state dict, to save a dense model."""
    frame = sys._getframe() if "transformers" in sys.modules else None
    while frame is not None:
        if frame.f_code.co_name == "save_pretrained":
            return "state_dict" not in frame.f_locals or frame.f_locals["state_dict"] is None
        frame = frame.f_back
    return False


def unregister(param: Tensor) -> None:
    """Remove a Parameter's link to its sparse layer."""
    _LAYERS.pop(param, None)


def replace_data(param: Parameter, data: Tensor) -> None:
    """Give a Parameter data of another shape, and drop its gradient.

    In between, the Parameter gets another dtype, so that autograd drops the old shape: graphs of
    earlier passes that are still alive would keep it.
    """
    param.grad = None
    other = torch.float32 if data.dtype == torch.float64 else torch.float64
    param.data = torch.empty(0, dtype=other, device=data.device)
    param.data = data


class SparseLayer(nn.Module):
    """Base class of sparse layers: values on B and their indices.

    ``values`` is the only Parameter besides the bias. ``indices`` are the values' flat indices in
    the weight; the first ``active_count`` are those of A. If units are ``blocks`` of weights,
    ``indices`` are numbers of blocks, ``active_count`` is a number of blocks, and values are in the
    order of :class:`topkast.Support`. The state dict has these, and the weight's shape, as tensors.
    They are not buffers, which would be broadcast and averaged.
    """

    values: Parameter
    bias: Parameter | None
    indices: Tensor
    active_count: int
    blocks: Blocks | None = None  # of the weight as a matrix; None if units are single weights
    reservoir: Reservoir | None  # the weights outside B, until an optimizer takes them over
    selection: IncrementalSelection | None  # for the next refresh, likewise
    _valid_version: tuple[int, ...] | None = None  # of sets that need no check
    _products: tuple[Any, tuple[Any, ...]] | None  # with the key that they were made for
    _assignment_count: int = 0  # how often `indices`, `active_count` or `blocks` were assigned
    _is_drawn: bool = True  # whether the weights have values: not on the meta device
    recording: Any = None  # of backward passes, while an optimizer needs it
    sharding: Any = None  # the division of values and reservoir, after topkast_torch.fully_shard

    def set_sparse(self, values: Parameter, support: Support, shape: tuple[int, ...]) -> None:
        """Set the values, the support and the weight's shape."""
        self.values = values
        self.weight_shape = tuple(shape)
        self.reservoir = self.selection = self._products = None
        self.set_support(support)

    def set_support(self, support: Support, *, is_valid: bool = False) -> None:
        """Set the indices of the values, and |A|; unless `is_valid`, they are checked later."""
        attributes = self.__dict__  # PyTorch's __setattr__ is slow, and this runs at each refresh
        attributes["_assignment_count"] = self._assignment_count + 1
        attributes["indices"], attributes["blocks"] = with_version(support.indices), support.blocks
        attributes["active_count"] = support.forward
        attributes["_is_drawn"] = not support.indices.is_meta
        if is_valid:
            attributes["_valid_version"] = self.sets_version

    @property
    def support(self) -> Support:
        """The sets A and B."""
        return Support(self.indices, self.active_count, self.blocks)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, under its name in the state dict, which PyTorch looks up."""
        return self.weight_shape

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of a unit; None if units are single weights."""
        return None if self.blocks is None else (self.blocks.rows, self.blocks.columns)

    def structure(self) -> dict[str, Tensor]:
        """The entries of the state dict besides the values, as tensors."""
        numbers: dict[str, Any] = {"active_count": self.active_count, "shape": self.weight_shape}
        if self.block is not None:
            numbers[BLOCK] = self.block
        tensors = {name: torch.tensor(entry, device="cpu") for name, entry in numbers.items()}
        return {"indices": self.indices} | tensors

    @property
    def weight(self) -> Tensor:
        """The forward view α as a dense copy, whose gradient flows to the values on B.

        Writing to the copy would not change the layer, and raises :class:`topkast.MismatchError`.
        """
        self._check_whole("weight")
        return weight_of(self)

    def _check_whole(self, what: str) -> None:
        """Raise :class:`topkast.MismatchError` if the values are divided among processes."""
        if is_sharded(self.values):
            raise MismatchError(
                f"{what} needs all values of a {type(self).__name__}, which are divided among "
                "processes: gather a full state dict (get_model_state_dict with full_state_dict) "
                "and pass it to topkast.densify, or load it into a model that is not sharded"
            )

    @property
    def products(self) -> Any:
        """The products with this layer's weight, rebuilt after each refresh."""
        if not self._is_drawn:
            raise MismatchError(
                f"the weights of this {type(self).__name__} were never drawn, since it was built "
                "on the meta device: call reset_parameters() after to_empty(), or load a state dict"
            )
        key = *self.sets_version, self._window
        if self._products is None or self._products[1] != key:
            if self._valid_version != self.sets_version:
                check_sets("the layer", self.support, self.weight_shape, self.values.numel())
            with torch.inference_mode(mode=False):  # training may use them later
                self._products = self._make_products(), key
        return self._products[0]

    @property
    def sets_version(self) -> tuple[int, ...]:
        """A version that changes when the sets are assigned or written to."""
        return self._assignment_count, self.indices._version

    @property
    def _window(self) -> Any:
        """The window of a convolution, from its current attributes; None for other layers."""
        return None

    def record(self, x: Tensor, grad_output: Tensor | None) -> None:
        """Record a product of a backward pass, if an optimizer has asked for it.

        Without `grad_output`, `x` is a gradient of :attr:`weight`.
        """
        if self.recording is not None:
            self.recording.add(self.values.grad, x, grad_output)

    def _make_products(self) -> Any:
        raise NotImplementedError

    def _entries(self) -> Entries:
        """The positions of B in the matrix of the products."""
        return Entries(self.indices, self.active_count, self._matrix_shape(), blocks=self.blocks)

    def _matrix_shape(self) -> tuple[int, int]:
        rows, *others = self.weight_shape
        return rows, math.prod(others)

    def _check_input(self, inputs: Tensor) -> Tensor:
        name = type(self).__name__
        check_dense(name, inputs)
        if torch._C._get_tracing_state() is not None:  # a trace would hold the output as a constant
            refuse_export()
        if self.values.dtype not in (torch.float32, torch.float64):
            raise MismatchError(
                f"sparse layers need dtype float32 or float64, but this {name} was "
                f"converted to {self.values.dtype}"
            )
        if inputs.device != self.values.device:
            raise MismatchError(
                f"the input of {name} is on {inputs.device}, its values on "
                f"{self.values.device}: move the input or the layer"
            )
        if inputs.dtype == self.values.dtype:
            return inputs
        converts = inputs.is_floating_point()  # of others a conversion may lose something
        if converts and torch.is_autocast_enabled(inputs.device.type):
            return inputs.to(self.values.dtype)  # no product has lower precision
        raise MismatchError(
            f"the input of {name} has dtype {inputs.dtype}, its values {self.values.dtype}: "
            f"convert the input{' (torch.autocast does so)' if converts else ''}"
        )

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """As of ``torch.nn.Module``; the layer is found by its values."""
        if name == "values" and param is not None:
            layer = layer_of(param)
            if layer is not None and layer is not self:
                raise MismatchError(
                    "the values belong to another sparse layer: tie weights by using one layer "
                    "twice"
                )
            _LAYERS[param] = weakref.ref(self)
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("indices", "active_count", "blocks") and value is not self.__dict__.get(name):
            self._assignment_count += 1
            value = with_version(value) if name == "indices" else value
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_products": None, "recording": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__["indices"] = with_version(self.indices)
        if layer_of(self.values) is None:
            _LAYERS[self.values] = weakref.ref(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.reservoir is not None:
            check_convertible(self.reservoir, fn(self.values.detach().new_empty(0)).dtype)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if layer_of(self.values) is None:
            _LAYERS[self.values] = weakref.ref(self)
        device = self.values.device
        if device.type != "meta":
            if self.indices.is_meta:  # reset_parameters() will choose the sets
                self.indices = torch.zeros_like(self.indices, device=device)
            self.indices = self.indices.to(device)
            if self.reservoir is not None:
                self.reservoir = convert(self.reservoir, self.values)
        self._products = None
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if _is_saving_pretrained():
            warnings.warn(
                "save_pretrained saves a model with sparse layers, which from_pretrained cannot "
                "load: pass state_dict=topkast.densify(model.state_dict())",
                SparseExportWarning,
                stacklevel=2,
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, entry in self.structure().items():
            destination[prefix + name] = entry

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load values and structure, or a dense ``weight`` that is zero outside A."""
        merged, was_drawn = dict(state_dict), self._is_drawn
        dense = merged.pop(prefix + "weight", None)
        structure = [merged.pop(prefix + name, None) for name in (*STRUCTURE, BLOCK)]
        if prefix + "values" in state_dict or any(entry is not None for entry in structure):
            support = self._check_structure(prefix, state_dict)
            assigns = local_metadata.get("assign_to_params_buffers", False)
            self._load_support(support, assigns=assigns)
            if isinstance(merged[prefix + "values"], Tensor):
                merged[prefix + "values"] = self._fit_values(merged[prefix + "values"])
        elif dense is not None:
            self._check_whole(f"loading {prefix}weight")
            merged[prefix + "values"] = self._gather_values(prefix + "weight", dense)
        if prefix + "values" in merged:
            if not was_drawn:
                self.reservoir = self._initial_reservoir()
            elif self.reservoir is not None:
                self.reservoir = forget_changes(self.reservoir)
            self.selection = None
        super()._load_from_state_dict(
            merged, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_support(self, support: Support, *, assigns: bool) -> None:
        """Take the sets of a state dict, unless they are this layer's already."""
        is_meta = self.indices.is_meta
        if is_meta and not assigns:  # where PyTorch loads nothing
            return
        indices = support.indices if is_meta else support.indices.to(self.indices)
        is_same = self._is_drawn and torch.equal(indices, self.indices)
        if not is_same or support.forward != self.active_count:
            # Clone: an optimizer that shares the old tensor must detect the change.
            self.set_support(Support(indices.clone(), support.forward, self.blocks))

    def _initial_reservoir(self) -> Reservoir | None:
        """The weights outside B of a layer whose own were never drawn; None if there are none."""
        return None

    def _check_structure(self, prefix: str, state_dict: Mapping[str, Any]) -> Support:
        """The sets in a state dict; raises :class:`topkast.MismatchError` if they do not fit."""
        names = [prefix + name for name in ("values", *STRUCTURE)]
        present = [name for name in names if name in state_dict]
        if len(present) < len(names):
            raise MismatchError(
                f"the state dict has {present} but not {sorted({*names} - {*present})}: values and "
                "indices must be loaded together. broadcast_from_rank0 of torch.distributed "
                "sends no indices: read the state dict in each process instead"
            )
        layer = prefix.rstrip(".") or "the layer"
        values = state_dict[names[0]]
        support, shape = read_structure(layer, state_dict, prefix)
        if not isinstance(values, Tensor):
            raise MismatchError(f"{names[0]} must be a tensor, got {type(values).__name__}")
        if shape != self.weight_shape:
            raise MismatchError(
                f"{layer}: the state dict has a weight of shape {shape}, the layer "
                f"{self.weight_shape}"
            )
        if support.blocks != self.blocks:
            raise MismatchError(
                f"{layer}: the state dict has {describe_units(support.blocks)}, the layer "
                f"{describe_units(self.blocks)}: build the layer with the same block"
            )
        if values.shape not in (self.values.shape, self.values.shape[::-1]):
            raise MismatchError(
                f"{layer}: the state dict has values of shape {tuple(values.shape)}, the layer "
                f"{tuple(self.values.shape)}"
            )
        check_sets(f"{layer}: the state dict", support, shape, values.numel())
        if support.forward != self.active_count and not self._is_scheduled():
            raise MismatchError(
                f"{layer}: the state dict has |A| = {support.forward}, the layer "
                f"{self.active_count}"
            )
        return support

    def _fit_values(self, values: Tensor) -> Tensor:
        """Values in the form of this layer's: sharded layers have another shape, and DTensors."""
        if self.sharding is not None and not is_sharded(values):
            whole = values.reshape(self.values.shape)
            part = self.sharding.part_of(whole, 0)
            return self.sharding.wrap(part, tuple(whole.shape), 0)  # type: ignore[no-any-return]
        return values if values.shape == self.values.shape else values.reshape(self.values.shape)

    def _is_scheduled(self) -> bool:
        """Whether an optimizer changes the size of A in training."""
        execution = owner_of(self.values)
        return execution is not None and execution.method.schedules

    def _gather_values(self, name: str, dense: Tensor) -> Tensor:
        """The values on B of a dense weight that is zero outside A."""
        if tuple(dense.shape) != self.weight_shape:
            raise MismatchError(
                f"{name} has shape {tuple(dense.shape)}, the layer {self.weight_shape}"
            )
        values = self.values.detach().clone().view(-1)
        support = self.support
        current = dense.reshape(-1).index_select(0, support.active_entries)
        if torch.count_nonzero(dense) > torch.count_nonzero(current):
            raise MismatchError(
                f"{name} has nonzero weights outside the forward set of the layer: load the "
                "optimizer's state dict first, which has the sets, or load the weight into the "
                "dense model, then wrap and sparsify"
            )
        values[: support.forward_size] = current.to(values.dtype)
        return values.view(self.values.shape)
