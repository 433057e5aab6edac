"""The three products of a sparse layer: by the kernels of ``topkast.kernels``, or by PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from topkast import MismatchError, UnsupportedTensorError


class Products(Protocol):
    """Products with a sparse weight W (rows × width), whose values on B are a vector (|B|,).

    Activations are handed over once as (batch, features), by :meth:`pack`, in the form that the
    products want.
    """

    def pack(self, activations: Tensor) -> Tensor: ...

    def forward(self, values: Tensor, x: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        """The output ``x · Wᵀ + bias`` with W on A, as (batch, rows)."""

    def input_gradient(self, values: Tensor, grad_output: Tensor, batch: int) -> Tensor:
        """The gradient ``grad_output · W`` with W on A, as (batch, width)."""

    def weight_gradient(self, grad_output: Tensor, x: Tensor, out: Tensor) -> None:
        """Write the gradient ``grad_outputᵀ · x`` on B into `out` (|B|,)."""

    def on_backward_set(self) -> Products:
        """The same products with W on all of B."""

    @property
    def nbytes(self) -> int: ...


class Entries(NamedTuple):
    """Where the entries of a matrix are: flat indices of B in a weight, those of A first.

    Of A, of which there are `active_count`, and of B∖A the indices ascend. `shape` is the matrix's,
    (rows, width); of its `groups` of rows, each has as many columns of its own.
    """

    indices: Tensor
    active_count: int
    shape: tuple[int, int]
    groups: int = 1

    @property
    def parts(self) -> tuple[slice, slice]:
        """Where A and B∖A are in vectors over B."""
        return slice(self.active_count), slice(self.active_count, len(self.indices))

    def rows_and_columns(self) -> tuple[Tensor, Tensor]:
        """Row and column of each entry in the matrix."""
        height, width = self.shape[0], self.shape[1] // self.groups
        rows = torch.div(self.indices, width, rounding_mode="floor")
        columns = self.indices - rows * width
        if self.groups == 1:
            return rows, columns
        group = torch.div(rows * self.groups, height, rounding_mode="floor")
        return rows, columns + group * width


def make_products(find: Callable[[], Entries], dtype: torch.dtype) -> Products:
    """Products for the entries that `find` returns, now and whenever they are needed again."""
    entries = find()
    kind = _CompiledProducts if has_kernels(entries.indices.device, dtype) else TorchProducts
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


class Guarded:
    """Indices that kernels read at each product: they must not be written to in between."""

    def __init__(self, entries: Entries) -> None:
        self._indices = entries.indices
        self._version = self._indices._version
        if len(self._indices) >= 1 << 31:
            raise UnsupportedTensorError(
                f"{len(self._indices)} weights of one layer in B are more than the kernels can "
                "number: keep the layer masked (topkast.sparsify(..., only=...))"
            )
        self.array = self._indices.numpy()

    def check(self) -> None:
        """Raise :class:`topkast.MismatchError` if somebody has written to them."""
        if self._indices._version != self._version:
            raise MismatchError(
                "the indices of a sparse layer were written to between its forward and its "
                "backward pass: assign a new tensor to `indices` instead"
            )


class _CompiledProducts:
    """By ``topkast.kernels.LinearProducts``, which works on the memory of these tensors."""

    def __init__(self, entries: Entries, find: Callable[[], Entries]) -> None:
        from topkast.kernels import LinearProducts

        self._find, self._shape = find, entries.shape
        self._guard = Guarded(entries)
        self._products = LinearProducts(
            self._guard.array, entries.active_count, shape=entries.shape
        )

    def pack(self, activations: Tensor) -> Tensor:
        batch, features = activations.shape
        shape = self._products.packed_shape((batch, features), numpy_name(activations.dtype))
        packed = activations.new_empty(shape)
        self._products.pack(activations.contiguous().numpy(), packed.numpy())
        return packed

    def forward(self, values: Tensor, x: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        self._guard.check()
        output = x.new_empty(batch, self._shape[0])
        given = None if bias is None else bias.numpy()
        self._products.forward(values.numpy(), x.numpy(), output.numpy(), bias=given)
        return output

    def input_gradient(self, values: Tensor, grad_output: Tensor, batch: int) -> Tensor:
        gradient = grad_output.new_empty(batch, self._shape[1])
        self._products.input_gradient(values.numpy(), grad_output.numpy(), gradient.numpy())
        return gradient

    def weight_gradient(self, grad_output: Tensor, x: Tensor, out: Tensor) -> None:
        self._guard.check()
        self._products.weight_gradient(grad_output.numpy(), x.numpy(), out.numpy())

    def on_backward_set(self) -> Products:
        return TorchProducts(self._find(), self._find, everywhere=True)

    @property
    def nbytes(self) -> int:
        return self._products.nbytes


class TorchProducts:
    """By PyTorch's own sparse matrices, which know less about these products.

    W is on A, or, if `everywhere`, on all of B.
    """

    def __init__(
        self, entries: Entries, find: Callable[[], Entries], *, everywhere: bool = False
    ) -> None:
        self._find, self.shape = find, entries.shape
        rows, columns = entries.rows_and_columns()
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

    def input_gradient(self, values: Tensor, grad_output: Tensor, batch: int) -> Tensor:
        ordered = values.index_select(0, self._by_column)
        weight = _matrix(self._transposed, ordered, self.shape[::-1])
        found: Tensor = (weight @ grad_output.t()).t().contiguous()
        return found

    def weight_gradient(self, grad_output: Tensor, x: Tensor, out: Tensor) -> None:
        out.zero_()
        if not len(grad_output):  # MKL refuses a product over nothing
            return
        for places, part in zip(self._places, self._parts, strict=True):
            where = _matrix(places, torch.zeros_like(out[part]), self.shape)
            out[part] += torch.sparse.sampled_addmm(where, grad_output.t(), x, beta=0.0).values()

    def on_backward_set(self) -> Products:
        return TorchProducts(self._find(), self._find, everywhere=True)

    @property
    def nbytes(self) -> int:
        parts = [tensor for places in (*self._places, self._transposed) for tensor in places]
        return sum(part.nbytes for part in (*parts, self._by_column))


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
