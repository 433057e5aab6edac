"""Passes of sparse linear layers in a row, on the memory of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from topkast_torch.sparse.chains._group_passes import (
    Gradients,
    GroupPasses,
    Needs,
    address,
    readable,
)

if TYPE_CHECKING:
    from topkast_torch.sparse._products import CompiledProducts


class Passes(GroupPasses):
    """Forward and backward pass of layers in a row with compiled products, without autograd.

    Each is one call of compiled code. `rectifies` says which layers end with a ReLU.
    """

    def __init__(self, products: Sequence[CompiledProducts], rectifies: Sequence[bool]) -> None:
        super().__init__(products)
        self.rectifies = tuple(rectifies)

    @property
    def reads_output(self) -> bool:
        """Whether the backward pass needs the output."""
        return self.rectifies[-1]

    @cached_property
    def _chain(self) -> Any:
        from topkast.kernels import LinearChain

        linear, dtype = self.linear()
        return LinearChain(linear, self.rectifies, dtype)

    def forward(
        self, x: Tensor, values: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """The output of x (batch, width), and the packed inputs of all layers."""
        self.check()
        chain, batch = self._chain, len(x)
        x = x.contiguous()
        packed = self.empty(chain.packed_size(batch))
        output = self.empty(batch, self.products[-1].shape[0])
        addresses = [tensor.data_ptr() for tensor in (x, packed, output, *values)]
        addresses += [bias.data_ptr() for bias in biases if bias is not None]
        chain.forward(batch, addresses, has_bias=tuple([bias is not None for bias in biases]))
        return output, packed

    def backward(
        self,
        grad_output: Tensor,
        packed: Tensor | None,
        output: Tensor | None,
        values: Sequence[Tensor],
        needs: Needs,
    ) -> Gradients:
        """The gradients that are needed: of x, of the values and of the biases of each layer.

        `output` is needed if the last layer ends with a ReLU, `packed` if another one does or a
        gradient of values is needed.
        """
        self.check()
        chain, batch = self._chain, len(grad_output)
        grad_output, values = readable(grad_output), self.saved_values(values)
        packed = self.saved(packed, chain.packed_size(batch))
        output = self.saved(output, batch * self.products[-1].shape[0])
        gradients = self.empty(chain.gradient_size(batch))
        results = self.empty_gradients(batch, values, needs)
        read = grad_output, gradients, packed, output, *values
        addresses = [*map(address, read), *results.addresses()]
        chain.backward(batch, addresses, needed=needs)
        return results
