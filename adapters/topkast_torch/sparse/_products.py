"""The three products of a sparse layer, by the kernels of ``topkast.kernels`` or by PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from topkast import MismatchError, UnsupportedTensorError
from topkast.adapter import has_numba
from topkast_torch.sparse.chains._passes import Passes


class Products(Protocol):
    """Products with a sparse weight W (rows × width), whose values on B are a vector (|B|,).

    :meth:`pack` converts activations (batch, features) once to the form that the products read.
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
    """Entries of a sparse matrix: flat indices of B in the weight.

    The `active_count` indices of A come first, in ascending order, then those of B∖A in ascending
    order. `shape` is (rows, width) of the matrix. Its rows form `groups` equal groups, each with
    columns of its own.
    """

    indices: Tensor
    active_count: int
    shape: tuple[int, int]
    groups: int = 1

    @property
    def slices(self) -> tuple[slice, slice]:
        """Slices of A and of B∖A in vectors over B."""
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


def make_products(find_entries: Callable[[], Entries], dtype: torch.dtype) -> Products:
    """Make products for the entries that `find_entries` returns; it may be called again later."""
    entries = find_entries()
    if has_kernels(entries.indices.device, dtype):
        return CompiledProducts(entries, find_entries, dtype)
    return TorchProducts(entries, find_entries)


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for weights of this device and dtype."""
    return device.type == "cpu" and dtype in (torch.float32, torch.float64) and has_numba()


def numpy_name(dtype: torch.dtype) -> str:
    """NumPy's name of a dtype."""
    return str(dtype).removeprefix("torch.")


class GuardedIndices:
    """Indices that kernels read at each product, guarded against writes in between."""

    def __init__(self, entries: Entries) -> None:
        self._indices = entries.indices
        self._version = self._indices._version
        if len(self._indices) >= 1 << 31:
            raise UnsupportedTensorError(
                f"a layer has {len(self._indices)} weights in B, but kernels support fewer than "
                f"{1 << 31}: keep the layer masked (topkast.sparsify(..., only=...))"
            )
        self.array = self._indices.numpy()

    def check(self) -> None:
        """Raise :class:`topkast.MismatchError` if the indices were written to."""
        if self._indices._version != self._version:
            raise MismatchError(
                "the indices of a sparse layer were written to between its forward and its "
                "backward pass: assign a new tensor to `indices` instead"
            )


class CompiledProducts:
    """Products by ``topkast.kernels.LinearProducts``, on the memory of the tensors."""

    def __init__(
        self, entries: Entries, find_entries: Callable[[], Entries], dtype: torch.dtype
    ) -> None:
        from topkast.kernels import LinearProducts

        self._find_entries, self.shape, self.dtype = find_entries, entries.shape, dtype
        self.entry_count = len(entries.indices)
        self._guard = GuardedIndices(entries)
        self.linear = LinearProducts(self._guard.array, entries.active_count, shape=entries.shape)
        self.passes = Passes([self], [False])

    def check(self) -> None:
        """Raise an error if the indices were written to."""
        self._guard.check()
        self.linear.check()

    def packed_shape(self, batch: int) -> tuple[int, int, int]:
        """Shape of the packed input."""
        return self.linear.packed_shape((batch, self.shape[1]), numpy_name(self.dtype))

    def pack(self, activations: Tensor) -> Tensor:
        batch, features = activations.shape
        shape = self.linear.packed_shape((batch, features), numpy_name(activations.dtype))
        packed = activations.new_empty(shape)
        self.linear.pack(activations.contiguous().numpy(), packed.numpy())
        return packed

    def forward(self, values: Tensor, x: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        self._guard.check()
        output = x.new_empty(batch, self.shape[0])
        bias_array = None if bias is None else bias.numpy()
        self.linear.forward(values.numpy(), x.numpy(), output.numpy(), bias=bias_array)
        return output

    def input_gradient(self, values: Tensor, grad_output: Tensor, batch: int) -> Tensor:
        gradient = grad_output.new_empty(batch, self.shape[1])
        self.linear.input_gradient(values.numpy(), grad_output.numpy(), gradient.numpy())
        return gradient

    def weight_gradient(self, grad_output: Tensor, x: Tensor, out: Tensor) -> None:
        self._guard.check()
        self.linear.weight_gradient(grad_output.numpy(), x.numpy(), out.numpy())

    def on_backward_set(self) -> Products:
        return TorchProducts(self._find_entries(), self._find_entries, uses_backward_set=True)

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes


class TorchProducts:
    """Products by PyTorch's sparse matrices, for weights without kernels and for W on all of B.

    W is on A or, if `uses_backward_set`, on all of B.
    """

    def __init__(
        self,
        entries: Entries,
        find_entries: Callable[[], Entries],
        *,
        uses_backward_set: bool = False,
    ) -> None:
        self._find_entries, self.shape = find_entries, entries.shape
        rows, columns = entries.rows_and_columns()
        self._slices = entries.slices
        self._csr_indices = [
            (_row_starts(rows[subset], self.shape[0]), columns[subset]) for subset in self._slices
        ]
        self._forward_matrices = 2 if uses_backward_set else 1
        count = len(rows) if uses_backward_set else entries.active_count
        self._by_column = torch.argsort(columns[:count], stable=True)
        self._transposed = (
            _row_starts(columns.index_select(0, self._by_column), self.shape[1]),
            rows.index_select(0, self._by_column),
        )

    def pack(self, activations: Tensor) -> Tensor:
        return activations.view_as(activations)  # autograd needs a new tensor object

    def forward(self, values: Tensor, x: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        columns = x.t()
        pairs = list(zip(self._csr_indices, self._slices, strict=True))[: self._forward_matrices]
        products = [
            _csr(indices, values[subset], self.shape) @ columns for indices, subset in pairs
        ]
        output: Tensor = torch.stack(products).sum(0).t() if len(products) > 1 else products[0].t()
        return (output if bias is None else output + bias).contiguous()

    def input_gradient(self, values: Tensor, grad_output: Tensor, batch: int) -> Tensor:
        ordered = values.index_select(0, self._by_column)
        weight = _csr(self._transposed, ordered, self.shape[::-1])
        gradient: Tensor = (weight @ grad_output.t()).t().contiguous()
        return gradient

    def weight_gradient(self, grad_output: Tensor, x: Tensor, out: Tensor) -> None:
        out.zero_()
        if not len(grad_output):  # MKL refuses an empty product
            return
        for indices, subset in zip(self._csr_indices, self._slices, strict=True):
            pattern = _csr(indices, torch.zeros_like(out[subset]), self.shape)
            gradient = torch.sparse.sampled_addmm(pattern, grad_output.t(), x, beta=0.0)
            out[subset] += gradient.values()

    def on_backward_set(self) -> Products:
        return TorchProducts(self._find_entries(), self._find_entries, uses_backward_set=True)

    @property
    def nbytes(self) -> int:
        pairs = *self._csr_indices, self._transposed
        tensors = [tensor for pair in pairs for tensor in pair]
        return sum(tensor.nbytes for tensor in (*tensors, self._by_column))


def _row_starts(rows: Tensor, height: int) -> Tensor:
    edges = torch.arange(height + 1, device=rows.device, dtype=rows.dtype)
    is_int32 = rows.dtype == torch.int32
    return torch.searchsorted(rows.contiguous(), edges, out_int32=is_int32)


def _csr(indices: tuple[Tensor, Tensor], values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A matrix in CSR format from its row starts and columns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
        return torch.sparse_csr_tensor(
            *indices, values, shape, device=values.device, check_invariants=False
        )
