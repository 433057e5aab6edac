"""A forward or a backward pass of sparse linear layers in a row, in one parallel region each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from topkast.kernels._linear import LinearProducts
from topkast.kernels._packing import pack_scratch_bytes
from topkast.kernels._products import registers_of, tile_width
from topkast.kernels.chains._plan import Plan, Slot, Stage
from topkast.kernels.runtime._pool import scratch_at
from topkast.kernels.runtime._vector import VECTOR_BYTES

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
        self, products: Sequence[LinearProducts], rectifies: Sequence[bool], dtype: Any
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
        self.products, self._rectifies = tuple(products), tuple(rectifies)
        self._dtype = np.dtype(dtype)
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
        stages = [self._pack(batch, self._features[0], Slot("x"), Slot("packed"))]
        for number, products in enumerate(self.products):
            is_last = number == last
            stages.append(
                self._multiply(
                    products._active,
                    batch,
                    waits_for=number,
                    values=Slot(f"values {number}"),
                    x=Slot("packed", offsets[number]),
                    out=Slot("out") if is_last else Slot("packed", offsets[number + 1]),
                    bias=Slot(f"bias {number}") if has_bias[number] else 0,
                    is_packed=int(not is_last),
                    rectifies=int(self._rectifies[number]),
                )
            )
        width = tile_width(batch, self._dtype)
        scratch_bytes = self.products[-1]._active.max_chunk_rows * width * self._dtype.itemsize
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
        width = tile_width(batch, self._dtype)
        if positive:
            scratch_bytes = pack_scratch_bytes(width, self._dtype.itemsize)
        for number in reversed(range(count)):
            products, written = self.products[number], ready
            packed = Slot("packed", inputs[number])
            if any(
                wanted[: number + 1]
            ):  # the gradient of this layer's input, or of an earlier one
                layout = products._transposed
                is_first = number == 0
                masks = not is_first and self._rectifies[number - 1]
                stages.append(
                    self._multiply(
                        layout,
                        batch,
                        waits_for=written,
                        values=Slot(f"values {number}"),
                        x=gradient,
                        out=Slot("grad_x") if is_first else Slot("gradients", outputs[number - 1]),
                        is_packed=int(not is_first),
                        positive=packed if masks else 0,
                    )
                )
                ready = len(stages) - 1
                if is_first:
                    needed_bytes = layout.max_chunk_rows * width * self._dtype.itemsize
                    scratch_bytes = max(scratch_bytes, needed_bytes)
            if needed.values[number]:
                out = Slot(f"grad_values {number}")
                stages.append(self._sample(products, batch, written, gradient, packed, out))
            if needed.biases[number]:
                out = Slot(f"grad_bias {number}")
                stages.append(self._sum(batch, products.shape[0], written, gradient, out))
            if number:
                gradient = Slot("gradients", outputs[number - 1])
            if not any(wanted[: number + 1]):
                break
        return Plan(stages, names, self._dtype), scratch_bytes

    def _pack(
        self, batch: int, features: int, source: Slot, target: Slot, positive: Slot | int = 0
    ) -> Stage:
        width = tile_width(batch, self._dtype)
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

    def _multiply(
        self, layout: Any, batch: int, *, waits_for: int, **arguments: int | Slot
    ) -> Stage:
        width = tile_width(batch, self._dtype)
        tiles, registers = -(-batch // width), registers_of(width, self._dtype)
        complete: dict[str, int | Slot] = {
            "bias": 0,
            "rectifies": 0,
            "positive": 0,
            "layout": _address(layout._record),
            "scratch": Slot("scratch"),
            "max_chunk_rows": layout.max_chunk_rows,
            "tiles": tiles,
            "registers": registers,
            "batch": batch,
        } | arguments
        work = int(layout.chunk_entries[-1] - layout.chunk_entries[0]) * tiles * registers
        return Stage("multiply", complete, work, waits_for)

    def _sample(
        self,
        products: LinearProducts,
        batch: int,
        waits_for: int,
        gradient: Slot,
        packed: Slot,
        out: Slot,
    ) -> Stage:
        active, exploring = products._active, products._exploring
        width = tile_width(batch, self._dtype)
        tiles, registers = -(-batch // width), registers_of(width, self._dtype)
        has_other = exploring.stop > exploring.start
        arguments: dict[str, int | Slot] = {
            "layout": _address(active._record),
            "other": _address(exploring._record) if has_other else 0,
            "columns": _address(active.columns),
            "other_columns": _address(exploring.columns),
            "pitch": active.pitch,
            "stride": registers * VECTOR_BYTES,
            "x": packed,
            "y": gradient,
            "out": out,
            "image_groups": tiles,
            "image_group_length": active.width * registers,
            "plane_length": registers,
            "leading_zeros": 0,
            "positions": registers,
            "registers": registers,
        }
        return Stage("sample", arguments, exploring.stop * tiles * registers, waits_for)

    def _sum(self, batch: int, rows: int, waits_for: int, gradient: Slot, out: Slot) -> Stage:
        width = tile_width(batch, self._dtype)
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
        width = tile_width(batch, self._dtype)
        return int(-(-batch // width) * width)

    def _offsets(self, batch: int, features: Sequence[int]) -> list[int]:
        """Offset in bytes of each of some packed activations that lie in a row."""
        size = self._packed(batch) * self._dtype.itemsize
        return [size * sum(features[:number]) for number in range(len(features))]


def _numbered(name: str, flags: Sequence[bool]) -> list[str]:
    return [f"{name} {number}" for number, flag in enumerate(flags) if flag]


def _address(array: Any) -> int:
    return int(array.ctypes.data)
