"""Passes of sparse linear layers that read the same activations, on the memory of tensors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from topkast_torch.sparse.chains._group_passes import (
    Gradients,
    GroupPasses,
    Needs,
    address,
    readable,
)


class ParallelPasses(GroupPasses):
    """Passes of layers with compiled products that read the same activations, without autograd.

    Each is one call of compiled code.
    """

    @cached_property
    def _parallel(self) -> Any:
        from topkast.kernels import ParallelLinear

        return ParallelLinear(*self.linear())

    def forward(
        self, x: Tensor, values: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], Tensor]:
        """The outputs of x (batch, width), and the packed input."""
        self.check()
        parallel, batch = self._parallel, len(x)
        x = x.contiguous()
        packed = self.empty(parallel.packed_size(batch))
        outputs = [self.empty(batch, products.shape[0]) for products in self.products]
        addresses = [tensor.data_ptr() for tensor in (x, packed, *outputs, *values)]
        addresses += [bias.data_ptr() for bias in biases if bias is not None]
        parallel.forward(batch, addresses, has_bias=tuple([bias is not None for bias in biases]))
        return outputs, packed

    def backward(
        self,
        grad_outputs: Sequence[Tensor | None],
        packed: Tensor | None,
        values: Sequence[Tensor],
        needs: Needs,
    ) -> Gradients:
        """The gradients that are needed; those of layers whose output has none are None.

        At least one output has a gradient. `packed` is needed for gradients of values.
        """
        self.check()
        has_gradient = tuple([gradient is not None for gradient in grad_outputs])
        needs_x, *by_layer = needs
        needs_values, needs_biases = (
            tuple(map(operator.and_, flags, has_gradient)) for flags in by_layer
        )
        needs = needs_x, needs_values, needs_biases
        contiguous = [readable(gradient) for gradient in grad_outputs if gradient is not None]
        parallel, batch = self._parallel, len(contiguous[0])
        values = self.saved_values(values)
        packed = self.saved(packed, parallel.packed_size(batch))
        gradients = self.empty(parallel.gradient_size(batch))
        results = self.empty_gradients(batch, values, needs)
        read = *contiguous, gradients, packed, *values
        addresses = [*map(address, read), *results.addresses()]
        parallel.backward(batch, addresses, has_gradient=has_gradient, needed=needs)
        return results
