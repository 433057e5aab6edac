"""Layers whose weight is stored on B alone and multiplied on A alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import pad

from topkast import MismatchError, OptionError, UnsupportedTensorError
from topkast.adapter import check_block, check_sparsities
from topkast.reservoirs import Generated, Init, LayeredReservoir
from topkast_torch._reservoirs import STREAMED
from topkast_torch.checkpoint import _prefixes  # noqa: F401, for its hook
from topkast_torch.optimizer._ownership import owner_of
from topkast_torch.sparse._convolutions import Convolution, Window, make_convolution
from topkast_torch.sparse._drawing import draw_dense, draw_streamed, set_undrawn
from topkast_torch.sparse._functions import convolve, multiply, unflatten
from topkast_torch.sparse._products import Entries, Products, make_products, numpy_name
from topkast_torch.sparse._sparse_layer import SparseLayer
from topkast_torch.sparse._structure import blocks_of_weight


class SparseLinear(SparseLayer):
    r"""A linear layer whose weight is always sparse, in memory and in all three products.

    :func:`topkast.sparsify` makes it from ``torch.nn.Linear``. If it is constructed directly, the
    wrapped optimizer refreshes A and B and keeps their sizes.

    Parameters
    ----------
    in_features, out_features, bias
        As for ``torch.nn.Linear``, which also draws the initial weights.
    fwd, bwd
        Forward and backward sparsity, ``0 <= bwd <= fwd < 1``.
    block
        Rows and columns of a unit, which divide `out_features` and `in_features`: A and B consist
        of whole blocks, and the sparsities are shares of blocks. The first sets have the largest
        sums of magnitudes; the optimizer keeps the block, and chooses by its own `block_score`.
        None: single weights.
    device, dtype
        Device and dtype of the Parameters; float32 or float64. On the meta device nothing is drawn
        until :meth:`reset_parameters`.
    reservoir
        ``"device"``: all weights are drawn and kept until an optimizer takes them over.
        ``"seeded"``: they are generated from a seed whenever they are needed, and never form a
        dense matrix.
    init
        Rule or :class:`topkast.reservoirs.Init` by which weights are generated; see
        :meth:`topkast.reservoirs.Init.of`. None: as ``torch.nn.Linear`` draws them, and
        ``"default"``, the same distribution, if they are seeded.
    seed
        Seed of generated weights, an integer of at least 0, which should differ from layer to
        layer; None: drawn by PyTorch's default generator.

    Attributes
    ----------
    values
        The weights on B, in the order of ``Support.entries``; Parameter of shape (1, \|B\|).
    bias
        (out_features,) or None.
    block
        As given; None if units are single weights.

    Raises
    ------
    OptionError
        If the sparsities are out of range, blocks do not divide the weight, the reservoir or the
        rule is not known, or the seed is invalid or without effect.
    UnsupportedTensorError
        If the dtype is neither float32 nor float64.

    Examples
    --------
    >>> import torch, topkast, topkast_torch
    >>> layer = topkast_torch.SparseLinear(20, 30, fwd=0.9, bwd=0.8)
    >>> layer(torch.ones(4, 20)).shape, layer.values.shape
    (torch.Size([4, 30]), torch.Size([1, 120]))
    >>> opt = torch.optim.AdamW(layer.named_parameters(), 1e-3)
    >>> opt = topkast.wrap_optimizer(opt, fwd=0.9, bwd=0.8)
    >>> layer(torch.ones(4, 20)).square().sum().backward()
    >>> opt.step()

    The units are the weights of one input for three outputs; B has 40 of 200:

    >>> layer = topkast_torch.SparseLinear(20, 30, fwd=0.9, bwd=0.8, block=(3, 1))
    >>> layer.indices.shape, layer.values.shape
    (torch.Size([40]), torch.Size([1, 120]))

    Ten billion weights, of which B has 10,000:

    >>> large = topkast_torch.SparseLinear(
    ...     10**5, 10**5, fwd=0.999999, bwd=0.999999, reservoir="seeded", device="meta")
    >>> large.values.shape
    torch.Size([1, 10000])
    """

    _recipe: _Recipe

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        fwd: float,
        bwd: float,
        block: tuple[int, int] | None = None,
        device: Any = None,
        dtype: Any = None,
        reservoir: Literal["device", "seeded"] = "device",
        init: str | Init | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        fwd, bwd = check_sparsities(fwd, bwd)
        self._recipe = _Recipe(fwd, bwd, reservoir, init, seed)
        shape = out_features, in_features
        self._recipe.check(shape)
        blocks = blocks_of_weight("SparseLinear", shape, check_block(block))
        biases = torch.empty(out_features if bias else 0, device=device, dtype=dtype)
        if biases.dtype not in STREAMED:
            raise UnsupportedTensorError(
                f"sparse layers need dtype float32 or float64, got {biases.dtype}"
            )
        self.in_features, self.out_features = in_features, out_features
        set_undrawn(self, shape, blocks, fwd=fwd, bwd=bwd, like=biases)
        self.register_parameter("bias", Parameter(biases) if bias else None)
        if not biases.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights and the bias, and choose A and B, as at construction.

        Raises :class:`topkast.MismatchError` for a layer that an optimizer trains, or that
        :func:`topkast.sparsify` made.
        """
        self._check_whole("reset_parameters")
        recipe = self.__dict__.get("_recipe")
        if recipe is None or owner_of(self.values) is not None:
            raise MismatchError(
                "reset_parameters draws the weights of a SparseLinear that was constructed "
                "directly, before its optimizer is built"
            )
        recipe.draw(self)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch.nn.Linear has it
        """(…, out_features) from (…, in_features).

        Raises :class:`topkast.MismatchError` if the input has another width or dtype.
        """
        inputs = self._check_input(input)
        *leading, features = inputs.shape or (0,)
        if features != self.in_features or not inputs.dim():
            raise MismatchError(
                f"SparseLinear takes {self.in_features} features, got an input of shape "
                f"{tuple(inputs.shape)}"
            )
        rows = inputs.reshape(math.prod(leading), features)
        output: Tensor = multiply(rows, self.values, self.bias, lambda: self.products, self.record)
        return unflatten(output, leading)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {_describe(self)}"
        )

    def _initial_reservoir(self) -> LayeredReservoir | None:
        recipe = self.__dict__.get("_recipe")
        if recipe is None or recipe.reservoir != "seeded" or self.sharding is not None:
            return None
        return LayeredReservoir("seeded", [recipe.generate(self)])

    def _make_products(self) -> Products:
        return make_products(self._entries, self.values.dtype)


class SparseConv2d(SparseLayer):
    """A two-dimensional convolution whose weight is always sparse.

    :func:`topkast.sparsify` makes it from ``torch.nn.Conv2d``, whose attributes it keeps. The CPU
    kernels lay images side by side in vectors, 16 of float32 with AVX-512: batch sizes that are
    multiples of the vector length are fastest.

    Examples
    --------
    >>> import torch, topkast
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, padding=1))
    >>> opt = torch.optim.SGD(model.named_parameters(), 0.1)
    >>> opt = topkast.wrap_optimizer(opt, fwd=0.9, bwd=0.8)
    >>> report = topkast.sparsify(model, opt)
    >>> model(torch.ones(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch.nn.Conv2d has it
        """(batch, out_channels, height', width') from (batch, in_channels, height, width).

        Raises :class:`topkast.MismatchError` if the input has other channels or another dtype.
        """
        inputs = self._check_input(input)
        images = inputs if inputs.dim() == 4 else inputs[None]
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise MismatchError(
                f"SparseConv2d takes images of {self.in_channels} channels, got an input of shape "
                f"{tuple(inputs.shape)}"
            )
        if self.padding_mode != "zeros":
            images = pad(images, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        if min(*images.shape[2:], *self._window.output_extent(images.shape)) < 1:
            raise MismatchError(
                f"a kernel of size {self.kernel_size} does not fit an input of shape "
                f"{tuple(inputs.shape)}"
            )
        output: Tensor = convolve(
            images, self.values, self.bias, lambda: self.products, self.record
        )
        return output if inputs.dim() == 4 else output[0]

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return (
            f"{self.in_channels}, {self.out_channels}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}, {_describe(self)}"
        )

    @property
    def _window(self) -> Window:
        left, right, top, bottom = self._reversed_padding_repeated_twice
        zeros = ((top, bottom), (left, right)) if self.padding_mode == "zeros" else ((0, 0), (0, 0))
        return Window(self.kernel_size, self.dilation, self.stride, zeros)

    def _make_products(self) -> Convolution:
        return make_convolution(self._entries, self._window, self.values.dtype)

    def _entries(self) -> Entries:
        rows, width = self._matrix_shape()
        shape = rows, width * self.groups
        return Entries(self.indices, self.active_count, shape, self.groups, self.blocks)


@dataclass(frozen=True)
class _Recipe:
    """How the weights of a :class:`SparseLinear` are drawn."""

    fwd: float
    bwd: float
    reservoir: str
    init: str | Init | None
    seed: int | None

    def check(self, shape: tuple[int, int]) -> None:
        if self.reservoir not in ("device", "seeded"):
            raise OptionError(
                f"reservoir of a SparseLinear must be 'device' or 'seeded', got {self.reservoir!r}:"
                " pass the others to topkast.wrap_optimizer"
            )
        if self.reservoir == "device" and self.init is None:
            if self.seed is not None:
                raise OptionError(
                    f"seed={self.seed!r} is of generated weights: pass init too, or leave the seed "
                    "out to draw the weights as torch.nn.Linear does"
                )
            return
        Generated("weight", self.seed or 0, Init.of(self.init or "default", shape), 0)

    def draw(self, layer: SparseLinear) -> None:
        """Draw the weights, choose the sets, and store values and reservoir in the layer."""
        shape, values = layer.weight_shape, layer.values
        if self.reservoir == "device" and self.init is None:
            theta = torch.empty(shape, dtype=values.dtype, device=values.device)
            nn.init.kaiming_uniform_(theta, a=math.sqrt(5))  # as torch.nn.Linear does
            draw_dense(layer, theta, fwd=self.fwd, bwd=self.bwd)
            return
        weights = self.generate(layer)
        if self.reservoir == "device":
            theta = torch.from_numpy(weights.read(0, weights.size)).to(values.device)
            draw_dense(layer, theta.view(shape), fwd=self.fwd, bwd=self.bwd)
        else:
            draw_streamed(layer, LayeredReservoir("seeded", [weights]))

    def generate(self, layer: SparseLinear) -> Generated:
        """The weights of a layer, from the seed or from one that PyTorch's generator draws."""
        seed = int(torch.randint(1 << 62, ())) if self.seed is None else self.seed
        shape, dtype = layer.weight_shape, numpy_name(layer.values.dtype)
        init = Init.of(self.init or "default", shape)
        return Generated("weight", seed, init, math.prod(shape), dtype)


def _describe(layer: SparseLayer) -> str:
    size = max(math.prod(layer.weight_shape), 1)
    sparsities = (
        f"{name}={1 - count / size:.4g}"
        for name, count in (
            ("fwd", layer.support.forward_size),
            ("bwd", layer.values.numel()),
        )
    )
    block = () if layer.block is None else (f"block={layer.block}",)
    return ", ".join((*sparsities, *block))
