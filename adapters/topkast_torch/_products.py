"""The three products of a sparse layer: by the kernels of ``topkast.kernels``, or by PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from topkast import UnsupportedTensorError


class Products(Protocol):
    """Products with a sparse weight W (rows × width), whose values on B are a vector (|B|,).

    Activations are handed over once as (batch, features), by :meth:`pack`, in the form that the
    products want.
    """

    def pack(self, activations: Tensor) -> Tensor: ...

    def forward(self, values: Tensor, x: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        """The output ``x · Wᵀ + bias`` with W on A, as (batch, rows)."""

    def input_gradient(self, values: Tensor, slope: Tensor, batch: int) -> Tensor:
        """The gradient ``slope · W`` with W on A, as (batch, width)."""

    def weight_gradient(self, slope: Tensor, x: Tensor, out: Tensor) -> None:
        """Write the gradient ``slopeᵀ · x`` on B into `out` (|B|,)."""

    def on_backward_set(self) -> Products:
        """The same products with W on all of B."""

    @property
    def nbytes(self) -> int: ...


class Entries(NamedTuple):
    """Where the entries of a matrix are: `rows` and `columns` of B, int64, by row, then column.

    `active` are the positions in B of the entries that are in A; `shape` is the matrix's.
    """

    rows: Tensor
    columns: Tensor
    active: Tensor
    shape: tuple[int, int]

    def all_active(self) -> Entries:
        """The same with all of B in A."""
        everywhere = torch.arange(len(self.rows), device=self.rows.device)
        return self._replace(active=everywhere)


def make_products(find: Callable[[], Entries], dtype: torch.dtype) -> Products:
    """Products for the entries that `find` returns, now and whenever they are needed again."""
    entries = find()
    kind = _CompiledProducts if has_kernels(entries.rows.device, dtype) else TorchProducts
    return kind(entries, find)


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for these weights."""
    return device.type == "cpu" and dtype in (torch.float32, torch.float64) and has_numba()


@functools.cache
def has_numba() -> bool:
    """Whether the kernels can be compiled."""
    disabled = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
    return not disabled and importlib.util.find_spec("numba") is not None


def numpy_name(dtype: torch.dtype) -> str:
    """What NumPy calls it."""
    return str(dtype).removeprefix("torch.")


class _CompiledProducts:
    def __init__(self, entries: Entries, find: Callable[[], Entries]) -> None:
        from topkast.kernels import arrange

        self._find, (rows, columns, active, shape) = find, entries
        row, column, place = (narrow(tensor).numpy() for tensor in (rows, columns, active))
        everywhere = torch.arange(len(row), dtype=torch.int32, device="cpu").numpy()
        self._forward = arrange(row[place], column[place], place, shape=shape)
        self._transposed = arrange(column[place], row[place], place, shape=shape[::-1])
        self._backward = arrange(row, column, everywhere, shape=shape, runs=True)

    def pack(self, activations: Tensor) -> Tensor:
        """(tiles, features, width), with zeros behind the batch."""
        from topkast.kernels import pack, tile_width

        batch, features = activations.shape
        width = tile_width(batch, numpy_name(activations.dtype))
        packed = activations.new_empty(-(-batch // width), features, width)
        pack(activations.contiguous().numpy(), packed.numpy())
        return packed

    def forward(self, values: Tensor, x: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        return self._multiply(self._forward, values, x, bias, batch)

    def input_gradient(self, values: Tensor, slope: Tensor, batch: int) -> Tensor:
        return self._multiply(self._transposed, values, slope, None, batch)

    def weight_gradient(self, slope: Tensor, x: Tensor, out: Tensor) -> None:
        from topkast.kernels import sampled_product

        sampled_product(self._backward, slope.numpy(), x.numpy(), out.numpy())

    def on_backward_set(self) -> Products:
        return TorchProducts(self._find().all_active(), self._find)

    @property
    def nbytes(self) -> int:
        return self._forward.nbytes + self._transposed.nbytes + self._backward.nbytes

    @staticmethod
    def _multiply(
        layout: Any, values: Tensor, x: Tensor, bias: Tensor | None, batch: int
    ) -> Tensor:
        from topkast.kernels import multiply

        found = x.new_empty(batch, layout.rows)
        given = None if bias is None else bias.numpy()
        multiply(layout, values.numpy(), x.numpy(), found.numpy(), bias=given)
        return found


class TorchProducts:
    """By PyTorch's own sparse matrices, which know less about these products."""

    def __init__(self, entries: Entries, find: Callable[[], Entries]) -> None:
        self._find, (rows, columns, active, shape) = find, entries
        self.shape = shape
        self._backward = _row_starts(rows, shape[0]), columns
        self._active = active
        self._forward = _row_starts(rows[active], shape[0]), columns[active]
        order = torch.argsort(columns[active], stable=True)
        self._active_by_column = active[order]
        self._transposed = (
            _row_starts(columns[self._active_by_column], shape[1]),
            rows[self._active_by_column],
        )

    def pack(self, activations: Tensor) -> Tensor:
        return activations.view_as(activations)  # autograd wants an object of its own

    def forward(self, values: Tensor, x: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        weight = _matrix(self._forward, values[self._active], self.shape)
        found: Tensor = (weight @ x.t()).t()
        return (found if bias is None else found + bias).contiguous()

    def input_gradient(self, values: Tensor, slope: Tensor, batch: int) -> Tensor:
        weight = _matrix(self._transposed, values[self._active_by_column], self.shape[::-1])
        found: Tensor = (weight @ slope.t()).t().contiguous()
        return found

    def weight_gradient(self, slope: Tensor, x: Tensor, out: Tensor) -> None:
        out.zero_()
        if len(slope):  # MKL refuses a product over nothing
            where = _matrix(self._backward, out.new_zeros(len(out)), self.shape)
            out += torch.sparse.sampled_addmm(where, slope.t(), x, beta=0.0).values()

    def on_backward_set(self) -> Products:
        return TorchProducts(self._find().all_active(), self._find)

    @property
    def nbytes(self) -> int:
        parts = (*self._forward, *self._transposed, *self._backward)
        return sum(part.nbytes for part in (*parts, self._active, self._active_by_column))


def narrow(tensor: Tensor) -> Tensor:
    """Indices as int32, which the kernels read; refused where they would not fit."""
    if len(tensor) >= 1 << 31:
        raise UnsupportedTensorError(
            f"{len(tensor)} weights of one layer in B are more than the kernels can number: keep "
            "the layer masked (topkast.sparsify(..., only=...))"
        )
    return tensor.int()


def _row_starts(rows: Tensor, height: int) -> Tensor:
    edges = torch.arange(height + 1, device=rows.device)
    return torch.searchsorted(rows.contiguous(), edges)


def _matrix(places: tuple[Tensor, Tensor], values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
        return torch.sparse_csr_tensor(
            *places, values, shape, device=values.device, check_invariants=False
        )
