"""The three products of a sparse layer, by the kernels of ``topkast.kernels`` or by PyTorch."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from topkast import Blocks, MismatchError, UnsupportedTensorError
from topkast.adapter import has_numba
from topkast_torch.sparse.chains._group_passes import readable
from topkast_torch.sparse.chains._passes import Passes

_UNIT_ROWS = 2, 4, 8  # of columns of weights that have kernels of their own


class Products(Protocol):
    """Products with a sparse weight W (rows × width), whose values on B are a vector.

    :meth:`pack` converts activations (batch, features) once to the form that the products read.
    """

    def pack(self, activations: Tensor) -> Tensor: ...

    def forward(self, values: Tensor, x: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        """The output ``x · Wᵀ + bias`` with W on A, as (batch, rows)."""

    def input_gradient(self, values: Tensor, grad_output: Tensor, batch: int) -> Tensor:
        """The gradient ``grad_output · W`` with W on A, as (batch, width)."""

    def weight_gradient(self, grad_output: Tensor, x: Tensor, out: Tensor) -> None:
        """Write the gradient ``grad_outputᵀ · x`` on B into `out`, in the order of the values."""

    def on_backward_set(self) -> Products:
        """The same products with W on all of B."""

    @property
    def nbytes(self) -> int: ...


class Entries(NamedTuple):
    """Entries of a sparse matrix: flat indices of B in the weight, or numbers of `blocks`.

    The `active_count` indices of A come first, in ascending order, then those of B∖A in ascending
    order. `shape` is (rows, width) of the matrix. Its rows form `groups` equal groups, each with
    columns of its own.
    """

    indices: Tensor
    active_count: int
    shape: tuple[int, int]
    groups: int = 1
    blocks: Blocks | None = None

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
    is_compiled = has_kernels(entries.indices.device, dtype)
    if is_compiled and (entries.blocks is None or unit_kernels("UnitLinearProducts", entries)):
        return CompiledProducts(entries, find_entries, dtype)
    if entries.blocks is None:
        return TorchProducts(entries, find_entries)
    products: Products = ProductsByWeight(entries, lambda find: make_products(find, dtype))
    return products


def unit_kernels(name: str, entries: Entries) -> Any:
    """The kernels' class `name` if it fits these blocks, else None."""
    blocks = entries.blocks
    if blocks is None or blocks.columns > 1 or blocks.rows not in _UNIT_ROWS:
        return None
    group_rows = entries.shape[0] // entries.groups
    if group_rows % blocks.rows or entries.indices.dtype != torch.int32:
        return None
    from topkast import kernels

    return getattr(kernels, name)


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for weights of this device and dtype."""
    return device.type == "cpu" and dtype in (torch.float32, torch.float64) and has_numba()


@functools.cache
def numpy_name(dtype: torch.dtype) -> str:
    """NumPy's name of a dtype."""
    return str(dtype).removeprefix("torch.")


def array_of_param(param: Tensor) -> Any:
    """The memory of a Parameter as a NumPy array, for one call.

    After ``param.numpy()``, FSDP could no longer free the memory.
    """
    return np.from_dlpack(readable(param.detach()))


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
    """Products by ``topkast.kernels``, on the memory of the tensors."""

    def __init__(
        self, entries: Entries, find_entries: Callable[[], Entries], dtype: torch.dtype
    ) -> None:
        self._find_entries, self.shape, self.dtype = find_entries, entries.shape, dtype
        self.block = (1, 1) if entries.blocks is None else (entries.blocks.rows, 1)
        self.entry_count = len(entries.indices) * self.block[0]
        self._guard = GuardedIndices(entries)
        self.linear = _kernels_for(entries, self._guard.array)
        self.passes = Passes([self], [False])

    def check(self) -> None:
        """Raise an error if the indices were written to."""
        self._guard.check()
        self.linear.check()

    def packed_shape(self, batch: int) -> tuple[int, int, int]:
        """Shape of the packed input."""
        shape: tuple[int, int, int] = self.linear.packed_shape(
            (batch, self.shape[1]), numpy_name(self.dtype)
        )
        return shape

    def pack(self, activations: Tensor) -> Tensor:
        batch, features = activations.shape
        shape = self.linear.packed_shape((batch, features), numpy_name(activations.dtype))
        packed = activations.new_empty(shape)
        self.linear.pack(readable(activations).numpy(), packed.numpy())
        return packed

    def forward(self, values: Tensor, x: Tensor, bias: Tensor | None, batch: int) -> Tensor:
        self._guard.check()
        output = x.new_empty(batch, self.shape[0])
        bias_array = None if bias is None else array_of_param(bias)
        self.linear.forward(array_of_param(values), x.numpy(), output.numpy(), bias=bias_array)
        return output

    def input_gradient(self, values: Tensor, grad_output: Tensor, batch: int) -> Tensor:
        gradient = grad_output.new_empty(batch, self.shape[1])
        self.linear.input_gradient(array_of_param(values), grad_output.numpy(), gradient.numpy())
        return gradient

    def weight_gradient(self, grad_output: Tensor, x: Tensor, out: Tensor) -> None:
        self._guard.check()
        self.linear.weight_gradient(grad_output.numpy(), readable(x).numpy(), out.numpy())

    def on_backward_set(self) -> Products:
        return _products_on_backward_set(self._find_entries)

    @property
    def nbytes(self) -> int:
        nbytes: int = self.linear.nbytes
        return nbytes


def _kernels_for(entries: Entries, indices: Any) -> Any:
    from topkast.kernels import LinearProducts

    options: dict[str, Any] = {"shape": entries.shape}
    if entries.blocks is None:
        return LinearProducts(indices, entries.active_count, **options)
    products_type = unit_kernels("UnitLinearProducts", entries)
    return products_type(indices, entries.active_count, **options, rows=entries.blocks.rows)


def _products_on_backward_set(find_entries: Callable[[], Entries]) -> Products:
    def make(find: Callable[[], Entries]) -> TorchProducts:
        return TorchProducts(find(), find, uses_backward_set=True)

    entries = find_entries()
    if entries.blocks is None:
        return make(find_entries)
    products: Products = ProductsByWeight(entries, make)
    return products


class ProductsByWeight:
    """Products of blocks, linear or convolutions, by those of their weights in ascending order.

    The products with single weights are made by `make`, from a function that finds their entries.
    Values and gradients come and go block by block.
    """

    def __init__(self, entries: Entries, make: Callable[[Callable[[], Entries]], Any]) -> None:
        self._order = _WeightOrder(entries)
        self._products = make(lambda: self._order.entries)

    def pack(self, x: Tensor) -> Any:
        return self._products.pack(x)

    def pack_gradient(self, *arguments: Any) -> Any:
        return self._products.pack_gradient(*arguments)

    def forward(self, values: Tensor, *arguments: Any) -> Any:
        return self._products.forward(self._order.ascending(values), *arguments)

    def input_gradient(self, values: Tensor, *arguments: Any) -> Any:
        return self._products.input_gradient(self._order.ascending(values), *arguments)

    def weight_gradient(self, gradient: Tensor, packed: Tensor, out: Tensor, *shape: Any) -> None:
        ascending = torch.empty_like(out)
        self._products.weight_gradient(gradient, packed, ascending, *shape)
        self._order.write_by_block(ascending, out)

    def on_backward_set(self) -> Any:
        copied = copy.copy(self)
        copied._products = self._products.on_backward_set()
        return copied

    @property
    def nbytes(self) -> int:
        nbytes: int = self._products.nbytes + self._order.nbytes
        return nbytes


class _WeightOrder:
    """The weights of blocks by flat index, A and then B∖A, and where each is block by block."""

    def __init__(self, blocks_entries: Entries) -> None:
        indices, active_count, shape, groups, blocks = blocks_entries
        assert blocks is not None
        entries, split = blocks.entries(indices), active_count * blocks.size
        self._ranks = self._order = None  # the same order, if blocks have one row
        if blocks.rows > 1:
            ranks = [blocks.ranks(units) for units in indices.tensor_split([active_count])]
            self._ranks = torch.cat([ranks[0], ranks[1] + split])
            self._order = torch.empty_like(self._ranks)
            positions = torch.arange(len(entries), dtype=entries.dtype, device=entries.device)
            self._order.scatter_(0, self._ranks.long(), positions)
            entries = entries.index_select(0, self._order)
        self.entries = Entries(entries, split, shape, groups)

    def ascending(self, values: Tensor) -> Tensor:
        """Values (|B|,) in ascending order of their weights."""
        return values if self._order is None else values.index_select(0, self._order)

    def write_by_block(self, ascending: Tensor, out: Tensor) -> None:
        """Write values in ascending order into `out` (|B|,), block by block."""
        if self._ranks is None:
            out.copy_(ascending)
        else:
            torch.index_select(ascending, 0, self._ranks, out=out)

    @property
    def nbytes(self) -> int:
        orders = [order for order in (self._ranks, self._order) if order is not None]
        return sum(tensor.nbytes for tensor in (self.entries.indices, *orders))


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
