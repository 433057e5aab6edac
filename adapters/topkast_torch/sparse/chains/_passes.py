"""Passes of sparse linear layers in a row, on the memory of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from topkast_torch.sparse._products import CompiledProducts

_PLAIN = Tensor, Parameter  # types whose memory can be read directly


class Gradients(NamedTuple):
    """The gradients that were needed, None for others; those of values and biases by layer."""

    x: Tensor | None
    values: list[Tensor | None]
    biases: list[Tensor | None]


class Passes:
    """Forward and backward pass of layers with compiled products, without autograd.

    Each is one call of compiled code. `rectifies` says which layers end with a ReLU.
    """

    def __init__(self, products: Sequence[CompiledProducts], rectifies: Sequence[bool]) -> None:
        self.products = tuple(products)
        self.rectifies = tuple(rectifies)
        self._dtype = products[0].dtype
        self._rows, self._width = products[-1].shape[0], products[0].shape[1]

    @property
    def reads_output(self) -> bool:
        """Whether the backward pass needs the output."""
        return self.rectifies[-1]

    @cached_property
    def _chain(self) -> Any:
        from topkast.kernels import LinearChain

        linear = [products.linear for products in self.products]
        return LinearChain(linear, self.rectifies, str(self._dtype).removeprefix("torch."))

    def accepts(self, x: Tensor, values: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
        """Whether the memory of all tensors can be read as it is."""
        if not (
            type(x) in _PLAIN and x.is_cpu and x.dtype == self._dtype and x.layout == torch.strided
        ):
            return False
        for entries, bias, products in zip(values, biases, self.products, strict=True):
            if not self._is_vector(entries, products.entry_count) or not (
                bias is None or self._is_vector(bias, products.shape[0])
            ):
                return False
        return not x.is_neg()

    def _is_vector(self, tensor: Tensor, size: int) -> bool:
        return (
            type(tensor) in _PLAIN
            and tensor.is_cpu
            and tensor.dtype == self._dtype
            and tensor.numel() == size
            and tensor.is_contiguous()
        )

    def forward(
        self, x: Tensor, values: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """The output of x (batch, width), and the packed inputs of all layers."""
        self._check()
        chain, batch = self._chain, len(x)
        x = x.contiguous()
        packed = torch.empty(chain.packed_size(batch), dtype=self._dtype, device="cpu")
        output = torch.empty((batch, self._rows), dtype=self._dtype, device="cpu")
        addresses = [tensor.data_ptr() for tensor in (x, packed, output, *values)]
        addresses += [bias.data_ptr() for bias in biases if bias is not None]
        chain.forward(batch, addresses, has_bias=tuple([bias is not None for bias in biases]))
        return output, packed

    def backward(
        self,
        grad_output: Tensor,
        packed: Tensor,
        output: Tensor | None,
        values: Sequence[Tensor],
        needs: tuple[bool, tuple[bool, ...], tuple[bool, ...]],
    ) -> Gradients:
        """The gradients that are needed: of x, of the values and of the biases of each layer.

        `output` is needed if the last layer ends with a ReLU.
        """
        self._check()
        chain, batch = self._chain, len(grad_output)
        grad_output = grad_output.contiguous().resolve_neg()
        gradients = torch.empty(chain.gradient_size(batch), dtype=self._dtype, device="cpu")
        needs_x, needs_values, needs_biases = needs
        shape = batch, self._width
        grad_x = torch.empty(shape, dtype=self._dtype, device="cpu") if needs_x else None
        grad_values = [
            torch.empty_like(entries) if needed else None
            for entries, needed in zip(values, needs_values, strict=True)
        ]
        grad_biases = [
            torch.empty(products.shape[0], dtype=self._dtype, device="cpu") if needed else None
            for products, needed in zip(self.products, needs_biases, strict=True)
        ]
        addresses = [grad_output.data_ptr(), gradients.data_ptr(), packed.data_ptr()]
        addresses.append(0 if output is None else output.data_ptr())
        addresses += [entries.data_ptr() for entries in values]
        written = (grad_x, *grad_values, *grad_biases)
        addresses += [tensor.data_ptr() for tensor in written if tensor is not None]
        chain.backward(batch, addresses, needed=needs)
        return Gradients(grad_x, grad_values, grad_biases)

    def _check(self) -> None:
        """Raise an error if the indices of a layer were written to."""
        for products in self.products:
            products.check()
