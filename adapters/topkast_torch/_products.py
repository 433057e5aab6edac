"""The three products of a sparse layer: by the kernels of ``topkast.kernels``, or by PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import fold, unfold


class Window(NamedTuple):
    """What of an image each place of a convolution's output sees."""

    size: tuple[int, int]
    dilation: tuple[int, int]
    stride: tuple[int, int]

    def places(self, images: torch.Size) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = (
            (length - dilation * (size - 1) - 1) // stride + 1
            for length, size, dilation, stride in zip(images[2:], *self, strict=True)
        )
        return height, width


class Products(Protocol):
    """Products with a sparse weight W (rows × width), whose values on B are a vector (|B|,).

    Activations are handed over once as (batch, features), by :meth:`pack`, in the form that the
    products want. Results lie in memory by row if that is asked for, else by column.
    """

    shape: tuple[int, int]

    def pack(self, activations: Tensor) -> Tensor: ...

    def unfold(self, images: Tensor, window: Window) -> Tensor:
        """What each place of the output sees of (images, channels, height, width), packed."""

    def fold(self, unfolded: Tensor, images: Tensor, window: Window) -> None:
        """The transpose: into `images`, from (places, features) by column."""

    def forward(
        self, values: Tensor, x: Tensor, bias: Tensor | None, batch: int, *, by_row: bool
    ) -> Tensor:
        """The output ``x · Wᵀ + bias`` with W on A, as (batch, rows)."""

    def input_gradient(self, values: Tensor, slope: Tensor, batch: int, *, by_row: bool) -> Tensor:
        """The gradient ``slope · W`` with W on A, as (batch, width)."""

    def weight_gradient(self, slope: Tensor, x: Tensor, out: Tensor, *, add: bool) -> None:
        """Write the gradient ``slopeᵀ · x`` on B into `out` (|B|,), or add it to that."""

    @property
    def nbytes(self) -> int: ...


def make_products(
    rows: Tensor, columns: Tensor, active: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Products:
    """Products for entries at `rows` and `columns` (int64, by row, then column) of B.

    `active` are the positions in B of the entries that are in A.
    """
    compiled = rows.device.type == "cpu" and dtype in (torch.float32, torch.float64)
    kind = _CompiledProducts if compiled and has_numba() else _TorchProducts
    return kind(rows, columns, active, shape)


@functools.cache
def has_numba() -> bool:
    """Whether the kernels can be compiled."""
    return importlib.util.find_spec("numba") is not None


class _CompiledProducts:
    def __init__(
        self, rows: Tensor, columns: Tensor, active: Tensor, shape: tuple[int, int]
    ) -> None:
        from topkast.kernels import arrange

        self.shape = shape
        row, column, place = (tensor.int().numpy() for tensor in (rows, columns, active))
        everywhere = torch.arange(len(row), dtype=torch.int32).numpy()
        self._forward = arrange(row[place], column[place], place, shape=shape)
        self._transposed = arrange(column[place], row[place], place, shape=shape[::-1])
        self._backward = arrange(row, column, everywhere, shape=shape, runs=True)

    def pack(self, activations: Tensor) -> Tensor:
        """(tiles, features, width), with zeros behind the batch."""
        from topkast.kernels import pack, tile_width

        batch, features = activations.shape
        width = tile_width(batch, str(activations.dtype).removeprefix("torch."))
        packed = activations.new_empty(-(-batch // width), features, width)
        pack(activations.contiguous().numpy(), packed.numpy())
        return packed

    def forward(
        self, values: Tensor, x: Tensor, bias: Tensor | None, batch: int, *, by_row: bool
    ) -> Tensor:
        return self._multiply(self._forward, values, x, bias, batch, by_row)

    def input_gradient(self, values: Tensor, slope: Tensor, batch: int, *, by_row: bool) -> Tensor:
        return self._multiply(self._transposed, values, slope, None, batch, by_row)

    def unfold(self, images: Tensor, window: Window) -> Tensor:
        from topkast.kernels import tile_width, unfold

        places = len(images) * math.prod(window.places(images.shape))
        width = tile_width(places, str(images.dtype).removeprefix("torch."))
        features = images.shape[1] * math.prod(window.size)
        tiles = images.new_empty(-(-places // width), features, width)
        unfold(images.numpy(), tiles.numpy(), **window._asdict())
        return tiles

    def fold(self, unfolded: Tensor, images: Tensor, window: Window) -> None:
        from topkast.kernels import fold

        fold(unfolded.t().contiguous().numpy(), images.numpy(), **window._asdict())

    def weight_gradient(self, slope: Tensor, x: Tensor, out: Tensor, *, add: bool) -> None:
        from topkast.kernels import sampled_product

        sampled_product(self._backward, slope.numpy(), x.numpy(), out.numpy(), accumulate=add)

    @property
    def nbytes(self) -> int:
        return self._forward.nbytes + self._transposed.nbytes + self._backward.nbytes

    @staticmethod
    def _multiply(
        layout: Any, values: Tensor, x: Tensor, bias: Tensor | None, batch: int, by_row: bool
    ) -> Tensor:
        from topkast.kernels import multiply

        tiles, _, width = x.shape
        shape = (batch, layout.rows) if by_row else (layout.rows, tiles * width)
        found = x.new_empty(shape)
        given = None if bias is None else bias.numpy()
        multiply(layout, values.numpy(), x.numpy(), found.numpy(), bias=given, by_row=by_row)
        return found if by_row else found[:, :batch].t()


class _TorchProducts:
    def __init__(
        self, rows: Tensor, columns: Tensor, active: Tensor, shape: tuple[int, int]
    ) -> None:
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
        return activations

    def forward(
        self, values: Tensor, x: Tensor, bias: Tensor | None, batch: int, *, by_row: bool
    ) -> Tensor:
        weight = _matrix(self._forward, values[self._active], self.shape)
        found: Tensor = (weight @ x.t()).t()
        if bias is not None:
            found = found + bias
        return found.contiguous() if by_row else found

    def input_gradient(self, values: Tensor, slope: Tensor, batch: int, *, by_row: bool) -> Tensor:
        weight = _matrix(self._transposed, values[self._active_by_column], self.shape[::-1])
        found: Tensor = (weight @ slope.t()).t()
        return found.contiguous() if by_row else found

    def unfold(self, images: Tensor, window: Window) -> Tensor:
        size, dilation, stride = window
        unfolded = unfold(images, size, dilation=dilation, stride=stride)
        return unfolded.transpose(0, 1).reshape(unfolded.shape[1], -1).t()

    def fold(self, unfolded: Tensor, images: Tensor, window: Window) -> None:
        size, dilation, stride = window
        pieces = unfolded.t().unflatten(1, (len(images), -1)).transpose(0, 1)
        images.copy_(fold(pieces, images.shape[2:], size, dilation=dilation, stride=stride))

    def weight_gradient(self, slope: Tensor, x: Tensor, out: Tensor, *, add: bool) -> None:
        if not add:
            out.zero_()
        if len(slope):  # MKL refuses a product over nothing
            where = _matrix(self._backward, out.new_zeros(len(out)), self.shape)
            out += torch.sparse.sampled_addmm(where, slope.t(), x, beta=0.0).values()

    @property
    def nbytes(self) -> int:
        parts = (*self._forward, *self._transposed, *self._backward)
        return sum(part.nbytes for part in (*parts, self._active, self._active_by_column))


def _row_starts(rows: Tensor, height: int) -> Tensor:
    edges = torch.arange(height + 1, device=rows.device)
    return torch.searchsorted(rows.contiguous(), edges)


def _matrix(places: tuple[Tensor, Tensor], values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
        return torch.sparse_csr_tensor(*places, values, shape, check_invariants=False)
