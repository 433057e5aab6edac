"""A forward or a backward pass of sparse linear layers that read the same activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from topkast.kernels._linear import LinearProducts
from topkast.kernels.chains._group import Needed, ProductGroup, numbered
from topkast.kernels.chains._plan import Plan, Slot
from topkast.kernels.units._linear import UnitLinearProducts


class ParallelLinear(ProductGroup):
    """Sparse linear layers that read the same activations, in one parallel region for each pass.

    The activations are packed once. The input gradient is the sum of those of the layers, added up
    from the last layer to the first. Results have the same bits as those of the layers one by one
    whose input gradients are added in this order.

    Addresses are those of contiguous memory of the dtype, aligned to the length of a vector where
    it is packed. They are not checked: sizes follow from `products` and the batch.

    Parameters
    ----------
    products
        The products of each layer, of the same width. All have single weights, or all have units
        of the same number of rows.
    dtype
        float32 or float64.

    Raises
    ------
    ValueError
        If there is no layer, or widths or units differ.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import LinearProducts, ParallelLinear
    >>> first = LinearProducts(np.asarray([0, 3], np.int32), 2, shape=(2, 2))
    >>> second = LinearProducts(np.asarray([1], np.int32), 1, shape=(1, 2))
    >>> parallel = ParallelLinear([first, second], "float64")
    >>> x, values, other = np.asarray([[1.0, 10.0]]), np.asarray([2.0, 3.0]), np.asarray([5.0])
    >>> packed, out, other_out = np.empty(parallel.packed_size(1)), np.empty(2), np.empty(1)
    >>> arrays = x, packed, out, other_out, values, other
    >>> addresses = [array.ctypes.data for array in arrays]
    >>> parallel.forward(1, addresses, has_bias=(False, False))
    >>> out, other_out
    (array([ 2., 30.]), array([50.]))
    """

    def __init__(self, products: Sequence[LinearProducts | UnitLinearProducts], dtype: Any) -> None:
        super().__init__(products, dtype)
        widths = sorted({layer.shape[1] for layer in products})
        if len(widths) > 1:
            raise ValueError(f"layers that read the same activations differ in width: {widths}")
        self._features = widths[0]
        self._rows = [layer.shape[0] for layer in products]

    def packed_size(self, batch: int) -> int:
        """Entries of the packed input, which the backward pass reads."""
        return self._packed(batch) * self._features

    def gradient_size(self, batch: int) -> int:
        """Entries of packed gradients that a backward pass needs."""
        sums = min(len(self._rows) - 1, 2)  # a layer reads one and writes the other
        return self._packed(batch) * (sum(self._rows) + sums * self._features)

    def forward(self, batch: int, addresses: Sequence[int], *, has_bias: Sequence[bool]) -> None:
        """Write the packed input and the output (batch, rows) of each layer.

        `addresses` are those of the input (batch, width), the packed input, the output of each
        layer, the values of each layer, and the bias of each layer that has one.
        """
        self._run((batch, has_bias), self._plan_forward, addresses)

    def backward(
        self,
        batch: int,
        addresses: Sequence[int],
        *,
        has_gradient: Sequence[bool],
        needed: Needed | tuple[bool, tuple[bool, ...], tuple[bool, ...]],
    ) -> None:
        r"""Write the gradients; `has_gradient` says whose output has one, of at least one layer.

        `addresses` are those of the gradient (batch, rows) of each output that has one, the packed
        gradients, the packed input, the values of each layer, the gradient of the input if it is
        needed, the gradients of the values (\|B\|,) that are needed, and those of the biases that
        are needed.

        Raises ValueError if gradients of a layer are needed whose output has none.
        """
        self._run((batch, has_gradient, needed), self._plan_backward, addresses)

    def _plan_forward(self, batch: int, has_bias: Sequence[bool]) -> Plan:
        every = [True] * len(self._layers)
        names = ["x", "packed", *numbered("out", every)]
        names += [*numbered("values", every), *numbered("bias", has_bias)]
        stages, scratch_bytes = [self._pack(batch, self._features, Slot("x"), Slot("packed"))], 0
        for number, layer in enumerate(self._layers):
            product = layer.forward(
                batch,
                (0,),
                values=Slot(f"values {number}"),
                x=Slot("packed"),
                out=Slot(f"out {number}"),
                bias=Slot(f"bias {number}") if has_bias[number] else None,
                is_packed=False,
                rectifies=False,
                scratch=Slot("scratch", scratch_bytes),  # products may run at the same time
            )
            stages.append(product.stage)
            scratch_bytes += product.scratch_bytes
        return Plan(stages, names, self._dtype, scratch_bytes=scratch_bytes)

    def _plan_backward(self, batch: int, has_gradient: Sequence[bool], flags: Needed) -> Plan:
        needed = Needed(*flags)
        for number, has_one in enumerate(has_gradient):
            if not has_one and (needed.values[number] or needed.biases[number]):
                raise ValueError(f"the output of layer {number} has no gradient, but its need one")
        if not any(has_gradient):
            raise ValueError("no output has a gradient")
        names = [*numbered("grad_output", has_gradient), "gradients", "packed"]
        names += numbered("values", [True] * len(self._layers))
        names += ["grad_x"] if needed.x else []
        names += [*numbered("grad_values", needed.values), *numbered("grad_bias", needed.biases)]
        *offsets, first_sum, second_sum, _ = self._offsets(
            batch, [*self._rows, self._features, self._features, 0]
        )
        sums = Slot("gradients", first_sum), Slot("gradients", second_sum)
        # From the last layer to the first, as autograd adds gradients of layers called in a row.
        order = [number for number in reversed(range(len(self._layers))) if has_gradient[number]]
        gradients = {number: Slot("gradients", offsets[number]) for number in order}
        packs = [
            self._pack(batch, self._rows[number], Slot(f"grad_output {number}"), gradients[number])
            for number in order
        ]
        stages, scratch_bytes = packs[:1], 0
        written = 0  # the stage that writes the packed gradient
        summed: tuple[int, ...] = ()  # the stage that writes the sum over the layers so far
        for position, number in enumerate(order):
            if needed.x:
                is_last = position == len(order) - 1
                product = self._layers[number].input_gradient(
                    batch,
                    (written, *summed),
                    values=Slot(f"values {number}"),
                    gradient=gradients[number],
                    out=Slot("grad_x") if is_last else sums[position % 2],
                    is_packed=not is_last,
                    addend=sums[(position - 1) % 2] if position else None,
                )
                summed = (len(stages),)
                stages.append(product.stage)
                scratch_bytes = max(scratch_bytes, product.scratch_bytes)
            of_parameters = self._parameter_gradients(
                batch, number, written, needed, gradients[number], Slot("packed")
            )
            # The next gradient is packed after the large products that read this one, which stays
            # in the caches for them, and before the last stage, so that threads need not wait.
            stages += of_parameters[:1]
            written = len(stages)
            stages += packs[position + 1 : position + 2]
            stages += of_parameters[1:]
        return Plan(stages, names, self._dtype, scratch_bytes=scratch_bytes)
