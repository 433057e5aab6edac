"""Reservoirs of tensors: the weights outside B, on a device or wherever the library keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from topkast import MismatchError, OptionError, Support
from topkast.adapter import Migration, Options, RankedTensors, method_of
from topkast.reservoirs import (
    ArrayReservoir,
    FileBase,
    Generated,
    LayeredReservoir,
    Reservoir,
    Zeros,
)
from topkast_torch.sparse._products import numpy_name

if TYPE_CHECKING:
    from topkast_torch.execution._execution import Execution

STREAMED = (torch.float32, torch.float64)  # dtypes of weights outside of tensors
_NUMPY_DTYPES = {dtype: np.dtype(numpy_name(dtype)) for dtype in STREAMED}

# The seed, name and distribution of a Parameter's initial weights.
_ORIGINS: Any = WeakTensorKeyDictionary()


class TensorReservoir(Reservoir):
    """All weights as one tensor (n,), on the device of the values or in host memory."""

    def __init__(self, tensor: Tensor, kind: str = "device") -> None:
        self.kind, self.tensor, self.size = kind, tensor, tensor.numel()

    def read(self, start: int, stop: int) -> Any:
        return self.tensor[start:stop].to("cpu", copy=True).numpy()

    def view(self, start: int, stop: int) -> Any:
        return self.tensor[start:stop].cpu().contiguous().numpy()

    def take(self, indices: Any) -> Any:
        positions = torch.from_numpy(indices).to(self.tensor.device)
        return self.tensor.index_select(0, positions).cpu().numpy()

    def write(self, indices: Any, weights: Any, inside: Any = ()) -> None:
        dtype = _NUMPY_DTYPES.get(self.tensor.dtype)
        if self.tensor.device.type == "cpu" and dtype is not None and weights.dtype == dtype:
            ArrayReservoir(self.tensor.numpy()).write(indices, weights)  # without int64 positions
        else:
            keep_weights(self, torch.from_numpy(indices), torch.from_numpy(weights))

    def copy(self) -> TensorReservoir:
        return TensorReservoir(self.tensor.clone(), self.kind)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


def all_weights(reservoir: Reservoir, support: Support, values: Tensor) -> Tensor:
    """All weights as one vector on the device of the values on B, which are written into it.

    It is the reservoir's own tensor where that has this device.
    """
    if isinstance(reservoir, TensorReservoir):
        theta = reservoir.tensor.to(values.device)
    else:
        theta = torch.from_numpy(reservoir.read(0, reservoir.size)).to(values)
    return theta.index_copy_(0, support.entries.long(), values.detach().view(-1))


def take_weights(reservoir: Reservoir, entries: Tensor, like: Tensor) -> Tensor:
    """The weights at flat indices (k,), of the dtype and device of `like`."""
    if isinstance(reservoir, TensorReservoir):
        return reservoir.tensor.index_select(0, entries.to(reservoir.tensor.device)).to(like)
    return torch.from_numpy(reservoir.take(entries.cpu().numpy())).to(like)


def keep_weights(reservoir: Reservoir, entries: Tensor, weights: Tensor) -> None:
    """Keep the weights (k,) of entries that left B, at flat indices."""
    if isinstance(reservoir, TensorReservoir):  # of any dtype
        target = reservoir.tensor
        target.index_copy_(0, entries.to(target.device).long(), weights.to(target))
    elif reservoir.kind != "none":  # which may be of a dtype that NumPy does not know
        reservoir.write(entries.cpu().numpy(), weights.cpu().numpy())


def exchange_weights(
    reservoir: Reservoir, old: Support, new: Support, migration: Migration, values: Tensor
) -> Tensor:
    """Keep the weights that leave B, whose old values are (|B|,); return those on the new B."""
    if isinstance(reservoir, TensorReservoir) and reservoir.kind == "device":
        # All of B: to find what leaves, one would wait for the device.
        keep_weights(reservoir, old.entries, values)
        return take_weights(reservoir, new.entries, values)
    fresh = take_weights(reservoir, new.entries, values)
    leaves = torch.ones_like(values, dtype=torch.bool)
    leaves[migration.source[migration.survives].long()] = False
    keep_weights(reservoir, old.entries[leaves], values[leaves])
    moved: Tensor = migration.apply(values, fresh)
    return moved


def make_reservoir(
    theta: Tensor, ranked: RankedTensors, options: Options, params: Mapping[str, Tensor]
) -> Reservoir:
    """The reservoir of dense tensors, whose weights are `theta` (n,); `options` are of the tensors.

    Raises :class:`topkast.OptionError` if the weights cannot be kept where the options want them.
    """
    kind = options.reservoir
    if method_of(options).forgets:
        return _nothing(theta)
    if kind in ("disk", "seeded") and theta.dtype not in STREAMED:
        raise OptionError(
            f"reservoir={kind!r} keeps float32 and float64, but {ranked.key} is {theta.dtype}: "
            "choose 'device' or 'host'"
        )
    if kind == "disk":
        base = FileBase.create(options.reservoir_path, ranked.key, theta.detach().cpu().numpy())
        return LayeredReservoir("disk", [base])
    if kind == "seeded":
        return LayeredReservoir(
            "seeded", [_origin_of(name, params[name]) for name in ranked.shapes]
        )
    return TensorReservoir(_in_host_memory(theta) if kind == "host" else theta, kind)


def take_over(
    reservoir: Reservoir | None, values: Tensor, ranked: RankedTensors, options: Options
) -> Reservoir:
    """The reservoir of a layer that is sparse already, from the one that the layer has."""
    kind = options.reservoir
    if method_of(options).forgets:
        return _nothing(values, ranked.size)
    # Loaded from a file, or trained by a method that forgets: there are no weights outside B.
    if reservoir is None or reservoir.kind == "none":
        reservoir = TensorReservoir(values.detach().new_zeros(ranked.size))
    if not isinstance(reservoir, TensorReservoir):
        if kind not in ("device", reservoir.kind):
            raise OptionError(
                f"the layer of {ranked.key} was built with reservoir={reservoir.kind!r}, but the "
                f"optimizer wants {kind!r}: leave the option out, which keeps the layer's"
            )
        return reservoir
    theta = reservoir.tensor.to(values)
    if kind == "seeded":
        raise OptionError(
            f"reservoir='seeded' generates weights again, but those of {ranked.key} were drawn "
            "otherwise: build the layer as topkast_torch.SparseLinear(..., reservoir='seeded')"
        )
    return make_reservoir(theta, ranked, options, {})


def check_convertible(reservoir: Reservoir, dtype: torch.dtype) -> None:
    """Raise :class:`topkast.MismatchError` if a layer's weights cannot have this dtype."""
    if isinstance(reservoir, LayeredReservoir) and numpy_name(dtype) != reservoir.dtype.name:
        raise MismatchError(
            f"the layer was built with reservoir={reservoir.kind!r} in {reservoir.dtype.name}, and "
            f"cannot be converted to {dtype}: build it with dtype={dtype}"
        )


def convert(reservoir: Reservoir, values: Tensor) -> Reservoir:
    """The reservoir of a layer whose values on B were moved or converted."""
    if isinstance(reservoir, TensorReservoir):
        moved = reservoir.tensor.to(device=values.device, dtype=values.dtype)
        return TensorReservoir(moved, reservoir.kind)
    return reservoir


def forget_changes(reservoir: Reservoir) -> Reservoir | None:
    """The reservoir of a layer that gets other values: what does not belong to the old ones."""
    if isinstance(reservoir, LayeredReservoir) and reservoir.kind != "disk":
        return LayeredReservoir(reservoir.kind, reservoir.bases)
    return None


def record_origin(param: Tensor, origin: Generated) -> None:
    """Record how a Parameter's initial weights were generated."""
    _ORIGINS[param] = origin


def _origin_of(name: str, param: Tensor) -> Generated:
    """How a Parameter's weights were generated, if they still have these values."""
    origin: Generated | None = _ORIGINS.get(param)
    remedy = "call topkast_torch.generate_weights(model) before building the optimizer"
    if origin is None:
        raise OptionError(
            f"reservoir='seeded' generates weights again from a seed, but those of {name} were "
            f"drawn otherwise: {remedy}"
        )
    generated = torch.from_numpy(origin.read(0, origin.size)).to(param.device)
    if generated.dtype != param.dtype or not torch.equal(generated, param.detach().reshape(-1)):
        raise OptionError(f"the weights of {name} have changed since they were generated: {remedy}")
    return origin


def _nothing(like: Tensor, size: int | None = None) -> LayeredReservoir:
    dtype = "float64" if like.dtype == torch.float64 else "float32"
    return LayeredReservoir("none", [Zeros(like.numel() if size is None else size, dtype)])


def _in_host_memory(theta: Tensor) -> Tensor:
    host = theta.cpu()
    return host.pin_memory() if theta.is_cuda else host


@contextmanager
def discarding(executions: Iterable[Execution]) -> Iterator[None]:
    """Remove the files of the reservoirs that were made so far if what follows fails."""
    try:
        yield
    except BaseException:
        for execution in executions:
            layer = getattr(execution, "layer", None)  # which may keep its reservoir
            execution.reservoir.discard(getattr(layer, "reservoir", None))
        raise
