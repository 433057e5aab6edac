"""What a sparse layer is: values on B, where they are, and how both are saved and loaded."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from topkast import MismatchError, Support, select
from topkast._distribution import as_written

# Of each Parameter with the values of a layer, that layer: all that an optimizer is given of it.
_LAYERS: Any = WeakTensorKeyDictionary()


def layer_of(param: Tensor) -> SparseLayer | None:
    """The layer whose values on B are this Parameter."""
    found = _LAYERS.get(param)
    layer: SparseLayer | None = found() if found is not None else None
    return layer


class SparseLayer(nn.Module):
    """What the sparse layers share: values on B, and where they are.

    ``values`` is the only Parameter besides the bias; the buffers ``indices`` (int64) and
    ``active`` (bool) say where B is in the flat weight and what of it is in A, and ``shape`` what
    the weight's shape would be. All are in the state dict.
    """

    values: Parameter
    bias: Parameter | None
    indices: Tensor
    active: Tensor
    shape: Tensor
    reservoir: Tensor | None  # all weights, until an optimizer takes them over
    _products: tuple[Any, tuple[Any, ...]] | None  # and what they were made from
    _versions: tuple[int, int]
    _content: tuple[int, int]

    def set_sparse(self, values: Parameter, support: Support, shape: tuple[int, ...]) -> None:
        """Take these values, this support, and a weight of this shape."""
        self.values = values
        self.register_buffer("shape", torch.tensor(shape))
        self.register_buffer("indices", None)
        self.register_buffer("active", None)
        self.register_buffer("reservoir", None, persistent=False)
        self.set_support(support)

    def set_support(self, support: Support) -> None:
        """Take new places of the values."""
        self.indices, self.active = support
        self._products, self._versions = None, (-1, -1)

    @property
    def support(self) -> Support:
        """Where B is, and what of it is in A."""
        return Support(self.indices, self.active)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.shape.tolist())

    @property
    def weight(self) -> Tensor:
        """The forward view α as a dense tensor: a copy, whose gradient reaches the values on B."""
        found: Tensor = Dense.apply(self.values, *self.support, self.weight_shape)  # type: ignore[no-untyped-call]
        return found

    @property
    def products(self) -> Any:
        """The products with this layer's weight, of its kind, made once after each refresh."""
        made_from = *self.content(), self._window
        if self._products is None or self._products[1] != made_from:
            self._products = self._make_products(), made_from
        return self._products[0]

    def content(self) -> tuple[int, int]:
        """Checksums of indices and flags, which someone may write to: an average of models, say."""
        versions = self.indices._version, self.active._version
        if self._versions != versions:
            self._versions = versions
            self._content = _checksum(self.indices), _checksum(self.active)
        return self._content

    @property
    def _window(self) -> Any:
        """What a convolution sees of an image; its attributes may be changed."""
        return None

    def _make_products(self) -> Any:
        raise NotImplementedError

    def _entries(self) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Rows and columns of B's entries, which of them are in A, and the matrix's shape."""
        active = torch.nonzero(self.active).view(-1)
        return *self._places(self.indices), active, self._matrix_shape()

    def _matrix_shape(self) -> tuple[int, int]:
        rows, *others = self.weight_shape
        return rows, math.prod(others)

    def _places(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns, in the matrix of the products, of flat indices of the weight."""
        width = self._matrix_shape()[1]
        rows = torch.div(indices, width, rounding_mode="floor")
        return rows, indices - rows * width

    def _check_input(self, inputs: Tensor) -> Tensor:
        if self.values.dtype not in (torch.float32, torch.float64):
            raise MismatchError(
                f"sparse layers are of float32 or float64, and this one was converted to "
                f"{self.values.dtype}"
            )
        if inputs.dtype == self.values.dtype:
            return inputs
        if torch.is_autocast_enabled(inputs.device.type):
            return inputs.to(self.values.dtype)  # there is no product of lower precision
        raise MismatchError(
            f"the input of {type(self).__name__} is {inputs.dtype} and its values are "
            f"{self.values.dtype}: convert the input (under torch.autocast it is done for you)"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "values":
            holder = layer_of(value)
            if holder is not None and holder is not self:
                raise MismatchError(
                    "these values belong to another sparse layer: tie weights by using one layer "
                    "in both places"
                )
            _LAYERS[value] = weakref.ref(self)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_products": None, "_versions": (-1, -1)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if layer_of(self.values) is None:
            _LAYERS[self.values] = weakref.ref(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if layer_of(self.values) is None:
            _LAYERS[self.values] = weakref.ref(self)
        self._products, self._versions = None, (-1, -1)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Take values and structure, or a dense ``weight`` that vanishes outside A."""
        taken = {}
        dense = state_dict.get(prefix + "weight")
        if dense is not None and prefix + "values" not in state_dict:
            taken = {name: getattr(self, name) for name in ("indices", "active", "shape")}
            taken["values"] = self._restrict(prefix + "weight", dense)
        else:
            _check_structure(prefix, state_dict, self)
        merged = {
            name: value for name, value in state_dict.items() if name != prefix + "weight"
        } | {prefix + name: value for name, value in taken.items()}
        given = [merged[key] for key in (prefix + "indices", prefix + "active") if key in merged]
        pairs = zip(given, self.support, strict=False)
        if not all(torch.equal(tensor.to(own.device), own) for tensor, own in pairs):
            # New tensors: an optimizer that shares the old ones is to notice.
            device = self.values.device
            self.set_support(Support(*(tensor.to(device, copy=True) for tensor in given)))
        self.reservoir = None  # what lay outside B was that of other weights
        unexpected = arguments[3]
        super()._load_from_state_dict(merged, prefix, *arguments)
        if prefix + "weight" in unexpected:
            unexpected.remove(prefix + "weight")

    def _restrict(self, name: str, dense: Tensor) -> Tensor:
        """The values on B of a dense weight that is zero outside A."""
        if tuple(dense.shape) != self.weight_shape:
            raise MismatchError(
                f"{name} has shape {tuple(dense.shape)}, the layer {self.weight_shape}"
            )
        values = self.values.detach().clone().view(-1)
        current = dense.reshape(-1)[self.indices[self.active]]
        if torch.count_nonzero(dense) > torch.count_nonzero(current):
            raise MismatchError(
                f"{name} has nonzero weights outside the forward set of the layer that it is "
                "loaded into. Load the optimizer's state first, which brings the sets; or load it "
                "into the dense model, then wrap and sparsify"
            )
        values[self.active] = current.to(values.dtype)
        return values.view(self.values.shape)


def start(layer: SparseLayer, theta: Tensor, *, fwd: float, bwd: float) -> None:
    """Give a layer its first values: those on B of the weights `theta`, which it remembers."""
    support = select(theta, fwd=fwd, bwd=bwd)
    flat = theta.reshape(-1)
    shape = (1,) * (theta.dim() - 1) + (len(support.indices),)
    layer.set_sparse(Parameter(flat[support.indices].view(shape)), support, tuple(theta.shape))
    layer.reservoir = flat.clone()
    layer.density = float(1 - as_written(fwd))


def to_dense(values: Tensor, indices: Tensor, active: Tensor, shape: tuple[int, ...]) -> Tensor:
    """α as a dense tensor."""
    dense = values.new_zeros(math.prod(shape))
    dense[indices[active]] = values.detach().view(-1)[active]
    return dense.view(shape)


class Dense(torch.autograd.Function):
    """:func:`to_dense`, with a gradient on B, as that of the products."""

    @staticmethod
    def forward(
        context: Any, values: Tensor, indices: Tensor, active: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        context.save_for_backward(indices)
        context.shape = values.shape
        return to_dense(values, indices, active, shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = context.saved_tensors
        return slope.reshape(-1)[indices].view(context.shape), None, None, None


def _checksum(tensor: Tensor) -> int:
    return crc32(tensor.cpu().contiguous().numpy().tobytes())


def _check_structure(prefix: str, state_dict: Mapping[str, Any], layer: SparseLayer) -> None:
    """Raise :class:`topkast.MismatchError` unless a saved structure fits a layer."""
    names = [prefix + name for name in ("values", "indices", "active", "shape")]
    there = [name for name in names if name in state_dict]
    if not there:
        return  # torch says that all is missing
    if len(there) < len(names):
        raise MismatchError(
            f"the state dict has {there} but not {sorted({*names} - {*there})}: values and their "
            "places belong together"
        )
    values, indices, active, shape = (state_dict[name] for name in names)
    size = math.prod(layer.weight_shape)
    problem = None
    if tuple(shape.tolist()) != layer.weight_shape:
        problem = f"a weight of shape {tuple(shape.tolist())}, the layer {layer.weight_shape}"
    elif not values.numel() == indices.numel() == active.numel() == layer.values.numel():
        problem = f"|B| = {values.numel()}, the layer {layer.values.numel()}"
    elif int(active.sum()) != int(layer.active.sum()):
        problem = f"|A| = {int(active.sum())}, the layer {int(layer.active.sum())}"
    elif indices.dtype != torch.int64 or active.dtype != torch.bool:
        problem = f"indices of {indices.dtype} and flags of {active.dtype}"
    elif len(indices) and not (
        bool((indices[1:] > indices[:-1]).all()) and indices[0] >= 0 and indices[-1] < size
    ):
        problem = f"indices that do not ascend in [0, {size})"
    if problem:
        raise MismatchError(f"{prefix.rstrip('.')}: the state dict has {problem}")
