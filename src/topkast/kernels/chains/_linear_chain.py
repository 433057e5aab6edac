"""A forward or a backward pass of sparse linear layers in a row, in one parallel region each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from topkast.kernels._linear import LinearProducts
from topkast.kernels._packing import pack_scratch_bytes
from topkast.kernels.chains._group import Needed, ProductGroup, numbered
from topkast.kernels.chains._plan import Plan, Slot
from topkast.kernels.units._linear import UnitLinearProducts


class LinearChain(ProductGroup):
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
        super().__init__(products, dtype)
        if len(products) != len(rectifies):
            raise ValueError(
                f"a chain needs one flag for each layer, got {len(products)} layers and "
                f"{len(rectifies)} flags"
            )
        for first, second in itertools.pairwise(products):
            if first.shape[0] != second.shape[1]:
                raise ValueError(
                    f"a layer of {first.shape[0]} outputs cannot be followed by one of "
                    f"{second.shape[1]} inputs"
                )
        self._rectifies = tuple(rectifies)
        self._features = [products[0].shape[1], *(layer.shape[0] for layer in products)]

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

    def _plan_forward(self, batch: int, has_bias: Sequence[bool]) -> Plan:
        last = len(self.products) - 1
        names = ["x", "packed", "out", *numbered("values", [True] * (last + 1))]
        names += numbered("bias", has_bias)
        offsets = self._offsets(batch, self._features[:-1])
        stages, scratch_bytes = [self._pack(batch, self._features[0], Slot("x"), Slot("packed"))], 0
        for number, layer in enumerate(self._layers):
            is_last = number == last
            stage, needed_bytes = layer.forward(
                batch,
                (number,),
                values=Slot(f"values {number}"),
                x=Slot("packed", offsets[number]),
                out=Slot("out") if is_last else Slot("packed", offsets[number + 1]),
                bias=Slot(f"bias {number}") if has_bias[number] else None,
                is_packed=not is_last,
                rectifies=self._rectifies[number],
            )
            stages.append(stage)
            scratch_bytes = max(scratch_bytes, needed_bytes)
        return Plan(stages, names, self._dtype, scratch_bytes=scratch_bytes)

    def _plan_backward(self, batch: int, flags: Needed) -> Plan:
        needed = Needed(*flags)
        count = len(self.products)
        names = ["grad_output", "gradients", "packed", "out"]
        names += numbered("values", [True] * count)
        names += ["grad_x"] if needed.x else []
        names += [*numbered("grad_values", needed.values), *numbered("grad_bias", needed.biases)]
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
                    (written,),
                    values=Slot(f"values {number}"),
                    gradient=gradient,
                    out=Slot("grad_x") if is_first else Slot("gradients", outputs[number - 1]),
                    is_packed=not is_first,
                    positive=packed if masks else None,
                )
                stages.append(stage)
                ready = len(stages) - 1
                scratch_bytes = max(scratch_bytes, needed_bytes)
            stages += self._parameter_gradients(batch, number, written, needed, gradient, packed)
            if number:
                gradient = Slot("gradients", outputs[number - 1])
            if not goes_on:
                break
        return Plan(stages, names, self._dtype, scratch_bytes=scratch_bytes)
