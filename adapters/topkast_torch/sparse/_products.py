"""The three products of a sparse layer: by the kernels of ``topkast.kernels``, or by PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
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
    """Where the entries of a matrix are: `rows` and `columns` of B, those of A first.

    Of A, of which there are `active_count`, and of B∖A they are by row, then column; `shape` is
    the matrix's.
    """

    rows: Tensor
    columns: Tensor
    active_count: int
    shape: tuple[int, int]

    @property
    def parts(self) -> tuple[slice, slice]:
        """Where A and B∖A are in vectors over B."""
        return slice(self.active_count), slice(self.active_count, len(self.rows))


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

        self._find, shape = find, entries.shape
        row, column = (narrow(tensor).numpy() for tensor in (entries.rows, entries.columns))
        place = np.arange(len(row), dtype=np.int32)
        active, _ = entries.parts
        across, down, there = row[active], column[active], place[active]
        self._forward = arrange(across, down, there, shape=shape)
        self._transposed = arrange(down, across, there, shape=shape[::-1])
        self._backward = [
            arrange(row[part], column[part], place[part], shape=shape, runs=True)
            for part in entries.parts
        ]

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

        for layout in self._backward:
            sampled_product(layout, slope.numpy(), x.numpy(), out.numpy())

    def on_backward_set(self) -> Products:
        return TorchProducts(self._find(), self._find, everywhere=True)

    @property
    def nbytes(self) -> int:
        layouts = self._forward, self._transposed, *self._backward
        return sum(layout.nbytes for layout in layouts)

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
    """By PyTorch's own sparse matrices, which know less about these products.

    W is on A, or, if `everywhere`, on all of B.
    """

    def __init__(
        self, entries: Entries, find: Callable[[], Entries], *, everywhere: bool = False
    ) -> None:
        self._find, self.shape = find, entries.shape
        rows, columns = entries.rows, entries.columns
        self._parts = entries.parts
        self._places = [
            (_row_starts(rows[part], self.shape[0]), columns[part]) for part in self._parts
        ]
        self._used = 2 if everywhere else 1
        used = len(rows) if everywhere else entries.active_count
        self._by_column = torch.argsort(columns[:used], stable=True)
        self._transposed = (
            _row_starts(columns.index_select(0, self._by_column), self.shape[1]),
            rows.index_select(0, self._by_column),
        )

    def pack(self, activations: Tensor) -> Tensor:
        return activations.view_as(activations)  # autograd wants an object of its own

    def forward(self, values: Tensor, x: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        columns = x.t()
        pairs = list(zip(self._places, self._parts, strict=True))[: self._used]
        products = [_matrix(places, values[part], self.shape) @ columns for places, part in pairs]
        found: Tensor = torch.stack(products).sum(0).t() if len(products) > 1 else products[0].t()
        return (found if bias is None else found + bias).contiguous()

    def input_gradient(self, values: Tensor, slope: Tensor, batch: int) -> Tensor:
        ordered = values.index_select(0, self._by_column)
        weight = _matrix(self._transposed, ordered, self.shape[::-1])
        found: Tensor = (weight @ slope.t()).t().contiguous()
        return found

    def weight_gradient(self, slope: Tensor, x: Tensor, out: Tensor) -> None:
        out.zero_()
        if not len(slope):  # MKL refuses a product over nothing
            return
        for places, part in zip(self._places, self._parts, strict=True):
            where = _matrix(places, torch.zeros_like(out[part]), self.shape)
            out[part] += torch.sparse.sampled_addmm(where, slope.t(), x, beta=0.0).values()

    def on_backward_set(self) -> Products:
        return TorchProducts(self._find(), self._find, everywhere=True)

    @property
    def nbytes(self) -> int:
        parts = [tensor for places in (*self._places, self._transposed) for tensor in places]
        return sum(part.nbytes for part in (*parts, self._by_column))


def narrow(tensor: Tensor) -> Tensor:
    """Indices as int32, which the kernels read; refused where they would not fit."""
    if len(tensor) >= 1 << 31:
        raise UnsupportedTensorError(
            f"{len(tensor)} weights of one layer in B are more than the kernels can number: keep "
            "the layer masked (topkast.sparsify(..., only=...))"
        )
    return tensor.int()


def _row_starts(rows: Tensor, height: int) -> Tensor:
    edges = torch.arange(height + 1, device=rows.device, dtype=rows.dtype)
    narrow_enough = rows.dtype == torch.int32
    return torch.searchsorted(rows.contiguous(), edges, out_int32=narrow_enough)


def _matrix(places: tuple[Tensor, Tensor], values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
        return torch.sparse_csr_tensor(
            *places, values, shape, device=values.device, check_invariants=False
        )
