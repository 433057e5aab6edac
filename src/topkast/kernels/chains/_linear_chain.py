"""A forward or a backward pass of sparse linear layers in a row, in one parallel region each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from topkast.kernels._linear import LinearProducts
from topkast.kernels._packing import pack_scratch_bytes
from topkast.kernels.chains._plan import Plan, Slot, Stage
from topkast.kernels.chains._stages import stages_of
from topkast.kernels.runtime._pool import scratch_at
from topkast.kernels.runtime._vector import VECTOR_BYTES
from topkast.kernels.units._linear import UnitLinearProducts

_MAX_PLANS = 64  # kept: one for each batch size and set of needed gradients


class Needed(NamedTuple):
    """The gradients that a backward pass computes; those of values and biases by layer."""

    x: bool
    values: tuple[bool, ...]
    biases: tuple[bool, ...]


class LinearChain:
    """Sparse linear layers, each of which reads the output of the one before it.

    A pass packs the rows that come from outside once, and each product writes what the next one
    reads: packed activations, or gradients. Results have the same bits as those of the layers one
    by one.

    Addresses are those of contiguous memory of the chain's dtype, aligned to the length of a
    vector where it is packed. They are not checked: sizes follow from `products` and the batch.

    Parameters
    ----------
    products
        The products of each layer; the width of each is the number of rows of the one before it.
        All have single weights, or all have units of the same number of rows.
    rectifies
        Whether negative outputs of a layer become 0, by layer.
    dtype
        float32 or float64.

    Raises
    ------
    ValueError
        If there is no layer, or the layers do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import LinearChain, LinearProducts
    >>> products = LinearProducts(np.asarray([0, 3], np.int32), 2, shape=(2, 2))
    >>> chain = LinearChain([products, products], [True, False], "float64")
    >>> values, x = np.asarray([2.0, -3.0]), np.asarray([[1.0, 10.0]])
    >>> packed, out = np.empty(chain.packed_size(1)), np.empty((1, 2))
    >>> addresses = [array.ctypes.data for array in (x, packed, out, values, values)]
    >>> chain.forward(1, addresses, has_bias=(False, False))
    >>> out
    array([[4., 0.]])
    """

    def __init__(
        self,
        products: Sequence[LinearProducts | UnitLinearProducts],
        rectifies: Sequence[bool],
        dtype: Any,
    ) -> None:
        if not products or len(products) != len(rectifies):
            raise ValueError(
                f"a chain needs one flag for each layer and at least one layer, got "
                f"{len(products)} layers and {len(rectifies)} flags"
            )
        for first, second in itertools.pairwise(products):
            if first.shape[0] != second.shape[1]:
                raise ValueError(
                    f"a layer of {first.shape[0]} outputs cannot be followed by one of "
                    f"{second.shape[1]} inputs"
                )
            if getattr(first, "rows", 1) != getattr(second, "rows", 1):
                raise ValueError("the layers of a chain must have units of the same size")
        self.products, self._rectifies = tuple(products), tuple(rectifies)
        self._dtype = np.dtype(dtype)
        self._layers = [stages_of(layer, dtype) for layer in products]
        self._features = [products[0].shape[1], *(layer.shape[0] for layer in products)]
        self._plans: dict[Any, tuple[Plan, int]] = {}

    def packed_size(self, batch: int) -> int:
        """Entries of the packed inputs of all layers, which the backward pass reads."""
        return self._packed(batch) * sum(self._features[:-1])

    def gradient_size(self, batch: int) -> int:
        """Entries of the packed gradients of all outputs, which a backward pass needs."""
        return self._packed(batch) * sum(self._features[1:])

    def forward(self, batch: int, addresses: Sequence[int], *, has_bias: Sequence[bool]) -> None:
        """Write the packed inputs of all layers, and the output (batch, rows) of the last.

        `addresses` are those of the input (batch, width), the packed inputs, the output, the values
        of each layer, and the bias of each layer that has one.
        """
        self._run((batch, has_bias), self._plan_forward, addresses)

    def backward(
        self,
        batch: int,
        addresses: Sequence[int],
        *,
        needed: Needed | tuple[bool, tuple[bool, ...], tuple[bool, ...]],
    ) -> None:
        r"""Write the gradients.

        `addresses` are those of the gradient of the output (batch, rows), the packed gradients, the
        packed inputs, the output (read if the last layer rectifies), the values of each layer, the
        gradient of the input if it is needed, the gradients of the values (\|B\|,) that are needed,
        and those of the biases that are needed.
        """
        self._run((batch, needed), self._plan_backward, addresses)

    def check(self) -> None:
        """Raise ValueError if the columns of a layer were overwritten."""
        for products in self.products:
            products.check()

    def _run(
        self,
        key: Any,
        make_plan: Callable[..., tuple[Plan, int]],
        addresses: Sequence[int],
    ) -> None:
        entry = self._plans.get(key)
        if entry is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            entry = self._plans[key] = make_plan(*key)
        plan, scratch_bytes = entry
        threads = plan.threads()
        plan.run((scratch_at(threads * scratch_bytes), *addresses), threads)

    def _plan_forward(self, batch: int, has_bias: Sequence[bool]) -> tuple[Plan, int]:
        last = len(self.products) - 1
        names = ["scratch", "x", "packed", "out", *_numbered("values", [True] * (last + 1))]
        names += _numbered("bias", has_bias)
        offsets = self._offsets(batch, self._features[:-1])
        stages, scratch_bytes = [self._pack(batch, self._features[0], Slot("x"), Slot("packed"))], 0
        for number, layer in enumerate(self._layers):
            is_last = number == last
            stage, needed_bytes = layer.forward(
                batch,
                number,
                values=Slot(f"values {number}"),
                x=Slot("packed", offsets[number]),
                out=Slot("out") if is_last else Slot("packed", offsets[number + 1]),
                bias=Slot(f"bias {number}") if has_bias[number] else None,
                is_packed=not is_last,
                rectifies=self._rectifies[number],
            )
            stages.append(stage)
            scratch_bytes = max(scratch_bytes, needed_bytes)
        return Plan(stages, names, self._dtype), scratch_bytes

    def _plan_backward(self, batch: int, flags: Needed) -> tuple[Plan, int]:
        needed = Needed(*flags)
        count = len(self.products)
        names = ["scratch", "grad_output", "gradients", "packed", "out"]
        names += _numbered("values", [True] * count)
        names += ["grad_x"] if needed.x else []
        names += [*_numbered("grad_values", needed.values), *_numbered("grad_bias", needed.biases)]
        inputs = self._offsets(batch, self._features[:-1])
        outputs = self._offsets(batch, self._features[1:])
        wanted = [
            needed.x if number < 0 else needed.values[number] or needed.biases[number]
            for number in range(-1, count)
        ]
        positive = Slot("out") if self._rectifies[-1] else 0
        gradient = Slot("gradients", outputs[-1])
        stages = [self._pack(batch, self._features[-1], Slot("grad_output"), gradient, positive)]
        ready, scratch_bytes = 0, 0  # the stage that writes `gradient`
        if positive:
            scratch_bytes = pack_scratch_bytes(self._width(batch), self._dtype.itemsize)
        for number in reversed(range(count)):
            layer, written = self._layers[number], ready
            packed = Slot("packed", inputs[number])
            is_first = number == 0
            # Whether the gradient of this layer's input, or of an earlier layer, is needed.
            goes_on = any(wanted[: number + 1])
            if goes_on:
                masks = not is_first and self._rectifies[number - 1]
                stage, needed_bytes = layer.input_gradient(
                    batch,
                    written,
                    values=Slot(f"values {number}"),
                    gradient=gradient,
                    out=Slot("grad_x") if is_first else Slot("gradients", outputs[number - 1]),
                    is_packed=not is_first,
                    positive=packed if masks else None,
                )
                stages.append(stage)
                ready = len(stages) - 1
                scratch_bytes = max(scratch_bytes, needed_bytes)
            if needed.values[number]:
                out = Slot(f"grad_values {number}")
                stage, _ = layer.weight_gradient(
                    batch, written, gradient=gradient, x=packed, out=out
                )
                stages.append(stage)
            if needed.biases[number]:
                out = Slot(f"grad_bias {number}")
                rows = self.products[number].shape[0]
                stages.append(self._sum(batch, rows, written, gradient, out))
            if number:
                gradient = Slot("gradients", outputs[number - 1])
            if not goes_on:
                break
        return Plan(stages, names, self._dtype), scratch_bytes

    def _pack(
        self, batch: int, features: int, source: Slot, target: Slot, positive: Slot | int = 0
    ) -> Stage:
        width = self._width(batch)
        arguments: dict[str, int | Slot] = {
            "source": source,
            "target": target,
            "count": -(-batch // width),
            "batch": batch,
            "features": features,
            "width": width,
            "positive": positive,
            "scratch": Slot("scratch") if positive else 0,
        }
        return Stage("pack", arguments, self._packed(batch) * features // self._lanes)

    def _sum(self, batch: int, rows: int, waits_for: int, gradient: Slot, out: Slot) -> Stage:
        width = self._width(batch)
        arguments: dict[str, int | Slot] = {
            "source": gradient,
            "out": out,
            "tiles": -(-batch // width),
            "rows": rows,
            "width": width,
        }
        return Stage("sum", arguments, self._packed(batch) * rows // self._lanes, waits_for)

    @property
    def _lanes(self) -> int:
        return int(VECTOR_BYTES // self._dtype.itemsize)

    def _packed(self, batch: int) -> int:
        """Entries of a packed feature."""
        width = self._width(batch)
        return int(-(-batch // width) * width)

    def _width(self, batch: int) -> int:
        """Width of the tiles, which all layers share."""
        return self._layers[0].width(batch)

    def _offsets(self, batch: int, features: Sequence[int]) -> list[int]:
        """Offset in bytes of each of some packed activations that lie in a row."""
        size = self._packed(batch) * self._dtype.itemsize
        return [size * sum(features[:number]) for number in range(len(features))]


def _numbered(name: str, flags: Sequence[bool]) -> list[str]:
    return [f"{name} {number}" for number, flag in enumerate(flags) if flag]
