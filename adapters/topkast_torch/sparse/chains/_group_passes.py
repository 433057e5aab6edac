"""What passes of several sparse linear layers, on the memory of tensors, share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast import MismatchError

if TYPE_CHECKING:
    from topkast_torch.sparse._products import CompiledProducts

Needs: TypeAlias = tuple[bool, tuple[bool, ...], tuple[bool, ...]]  # of x, values and biases

_PLAIN = Tensor, Parameter  # types whose memory can be read directly


class Gradients(NamedTuple):
    """The gradients that were needed, None for others; those of values and biases by layer."""

    x: Tensor | None
    values: list[Tensor | None]
    biases: list[Tensor | None]

    def addresses(self) -> list[int]:
        """The addresses of those that are needed, in order."""
        results = self.x, *self.values, *self.biases
        return [tensor.data_ptr() for tensor in results if tensor is not None]


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's memory; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where its memory does not hold its entries in order."""
    if tensor._is_zerotensor():  # has no memory
        return torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    return tensor.contiguous().resolve_neg()


class GroupPasses:
    """What passes of several layers with compiled products share."""

    def __init__(self, products: Sequence[CompiledProducts]) -> None:
        self.products = tuple(products)
        self._dtype = products[0].dtype

    def accepts(self, x: Tensor, values: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
        """Whether the memory of all tensors can be read as it is."""
        if not self._is_plain(x) or x.layout != torch.strided or x.is_nested:
            return False
        for entries, bias, products in zip(values, biases, self.products, strict=True):
            if not self._is_vector(entries, products.entry_count) or not (
                bias is None or self._is_vector(bias, products.shape[0])
            ):
                return False
        return True

    def _is_vector(self, tensor: Tensor, size: int) -> bool:
        return self._is_plain(tensor) and tensor.numel() == size and tensor.is_contiguous()

    def _is_plain(self, tensor: Tensor) -> bool:
        return (
            type(tensor) in _PLAIN
            and tensor.is_cpu
            and tensor.dtype == self._dtype
            and not tensor.is_neg()
            and not tensor._is_zerotensor()
        )

    def saved(self, tensor: Tensor | None, size: int) -> Tensor | None:
        """A tensor that was saved for the backward pass, readable; None if it is not needed.

        Raises :class:`topkast.MismatchError` if it is not what was saved.
        """
        if tensor is None or self._is_vector(tensor, size):
            return tensor
        if tensor.dtype != self._dtype or tensor.numel() != size or not tensor.is_cpu:
            raise MismatchError(
                f"the backward pass of a sparse layer needs a tensor of {size} numbers of "
                f"{self._dtype} on the CPU that its forward pass saved, but got shape "
                f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}: hooks for saved "
                "tensors must return what they were given, and Parameters must keep their size"
            )
        return readable(tensor)

    def saved_values(self, values: Sequence[Tensor]) -> list[Any]:
        """:meth:`saved` for the values of each layer."""
        return [
            self.saved(entries, products.entry_count)
            for entries, products in zip(values, self.products, strict=True)
        ]

    def linear(self) -> tuple[list[Any], str]:
        """The kernels' products, and their dtype."""
        linear = [products.linear for products in self.products]
        return linear, str(self._dtype).removeprefix("torch.")

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device="cpu")

    def empty_gradients(
        self,
        batch: int,
        values: Sequence[Tensor],
        needs: Needs,
    ) -> Gradients:
        """Memory for the gradients that are needed."""
        needs_x, needs_values, needs_biases = needs
        dtype, rows = self._dtype, [products.shape[0] for products in self.products]
        grad_x = None
        if needs_x:
            grad_x = torch.empty(batch, self.products[0].shape[1], dtype=dtype, device="cpu")
        return Gradients(
            grad_x,
            [
                torch.empty_like(entries) if needed else None
                for entries, needed in zip(values, needs_values, strict=True)
            ],
            [
                torch.empty(count, dtype=dtype, device="cpu") if needed else None
                for count, needed in zip(rows, needs_biases, strict=True)
            ],
        )

    def check(self) -> None:
        """Raise an error if the indices of a layer were written to."""
        for products in self.products:
            products.check()
