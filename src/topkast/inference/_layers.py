"""Layers on NumPy arrays: products with A by the kernels, and what lies between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from topkast._errors import MismatchError
from topkast.inference._weights import Array, Weight

Layer: TypeAlias = Callable[[Array], Array]
Pair: TypeAlias = tuple[int, int]


class Linear:
    r"""A linear layer, ``x · Wᵀ + bias``.

    Attributes
    ----------
    shape
        Shape of W, (out_features, in_features).
    active
        Number of weights that are multiplied: \|A\|, or all if W was saved dense.
    dtype
        float32 or float64, of W and of the inputs.
    nbytes
        Bytes that the layer holds.

    Examples
    --------
    See :func:`load`.
    """

    def __init__(self, name: str, weight: Weight | Array, bias: Array | None) -> None:
        self._name, self.bias = name, bias
        self._dense: Array | None = weight if isinstance(weight, np.ndarray) else None
        values = weight if isinstance(weight, np.ndarray) else weight.values
        self.dtype, self.active, self._values = values.dtype, values.size, values
        rows, width = self.shape = weight.shape[0], weight.shape[1]
        _check_bias(name, bias, rows, self.dtype)
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._run: Chain | None = None
        if isinstance(weight, Weight):
            self.rows = weight.rows
            self.products = _make_products("LinearProducts", weight, shape=(rows, width))
            self.nbytes += self.products.nbytes
            self._run = Chain([self], [False])

    def __call__(self, x: Array, /) -> Array:
        """(…, out_features) from (…, in_features), of the layer's dtype.

        Raises :class:`topkast.MismatchError` for another width or dtype.
        """
        if self._run is not None:
            return self._run(x)
        check_input(self._name, x, self.dtype, self.shape[1])
        assert self._dense is not None
        out: Array = x @ self._dense.T
        return out if self.bias is None else out + self.bias

    @property
    def is_sparse(self) -> bool:
        """Whether A alone is multiplied."""
        return self._run is not None

    def joins(self, other: Linear) -> bool:
        """Whether another sparse layer, which follows, can run in one chain with this one."""
        return (
            self.dtype == other.dtype
            and self.rows == other.rows
            and self.shape[0] == other.shape[1]
        )


class Chain:
    """Sparse linear layers in a row, in one call of compiled code; some are followed by a ReLU."""

    def __init__(self, layers: Sequence[Linear], rectifies: Sequence[bool]) -> None:
        from topkast.kernels import LinearChain
        from topkast.kernels.runtime._arguments import empty_aligned

        first, last = layers[0], layers[-1]
        self._empty = empty_aligned
        self._chain = LinearChain([layer.products for layer in layers], rectifies, first.dtype)
        self._name, self._dtype = first._name, first.dtype
        self._width, self._rows = first.shape[1], last.shape[0]
        arrays = [layer._values for layer in layers]
        arrays += [layer.bias for layer in layers if layer.bias is not None]
        self._arrays = arrays  # `_addresses` are theirs
        self._addresses = [array.ctypes.data for array in arrays]
        self._has_bias = tuple(layer.bias is not None for layer in layers)

    def __call__(self, x: Array, /) -> Array:
        check_input(self._name, x, self._dtype, self._width)
        rows = np.ascontiguousarray(x.reshape(math.prod(x.shape[:-1]), self._width))
        batch = len(rows)
        packed = self._empty((self._chain.packed_size(batch),), self._dtype)
        out = np.empty((batch, self._rows), self._dtype)
        addresses = [array.ctypes.data for array in (rows, packed, out)]
        self._chain.forward(batch, addresses + self._addresses, has_bias=self._has_bias)
        return out.reshape(*x.shape[:-1], self._rows)


class Convolution:
    r"""A two-dimensional convolution with zero padding.

    Attributes
    ----------
    shape
        Shape of the weight, (out_channels, in_channels / groups, height, width).
    active
        Number of weights that are multiplied: \|A\|, or all if the weight was saved dense.
    dtype
        float32 or float64, of the weight and of the images.
    nbytes
        Bytes that the layer holds.

    Examples
    --------
    See :func:`load`.
    """

    def __init__(
        self,
        name: str,
        weight: Weight,
        bias: Array | None,
        *,
        stride: Pair,
        margins: tuple[Pair, Pair],
        dilation: Pair,
        groups: int,
    ) -> None:
        from topkast.kernels.runtime._arguments import empty_aligned

        self._empty = empty_aligned
        self._name, self.bias, self._values = name, bias, weight.values
        self.dtype, self.active = weight.values.dtype, weight.values.size
        self.shape = rows, channels, *size = weight.shape
        self._channels = channels * groups
        _check_bias(name, bias, rows, self.dtype)
        self._products = _make_products(
            "ConvolutionProducts",
            weight,
            shape=(rows, channels * groups * math.prod(size)),
            size=tuple(size),
            stride=stride,
            margins=margins,
            dilation=dilation,
            groups=groups,
        )
        self._own_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    @property
    def nbytes(self) -> int:
        return self._own_bytes + int(self._products.nbytes)

    def __call__(self, images: Array, /) -> Array:
        """(…, out_channels, height', width') from (…, in_channels, height, width).

        The images have three or four axes. Raises :class:`topkast.MismatchError` for other
        channels, another dtype, or images that are smaller than the window.
        """
        check_dtype(self._name, images, self.dtype)
        batch = images if images.ndim == 4 else images[None]
        if batch.ndim != 4 or batch.shape[1] != self._channels:
            raise MismatchError(
                f"the layer {self._name} takes images of {self._channels} channels, got an input "
                f"of shape {images.shape}"
            )
        try:
            extent = self._products.output_shape(batch.shape)
        except ValueError as error:
            raise MismatchError(f"the layer {self._name}: {error}") from None
        batch = np.ascontiguousarray(batch)
        packed = self._empty(self._products.packed_shape(batch.shape, self.dtype), self.dtype)
        self._products.pack(batch, packed)
        out = np.empty(extent, self.dtype)
        self._products.forward(self._values, packed, out, shape=batch.shape, bias=self.bias)
        return out if images.ndim == 4 else out[0]


class BatchNorm:
    """Batch normalization with the running statistics, as one product and one sum.

    Attributes
    ----------
    scale, shift
        (channels,): the factor and the addend of each channel.

    Examples
    --------
    See :func:`load`.
    """

    def __init__(
        self,
        name: str,
        mean: Array,
        variance: Array,
        weight: Array | None,
        bias: Array | None,
        epsilon: float,
        axes: Sequence[int],
    ) -> None:
        scale = 1 / np.sqrt(variance.astype(np.float64) + epsilon)
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        self._name, self._axes = name, tuple(axes)
        self.scale, self.shift = scale.astype(mean.dtype), shift.astype(mean.dtype)
        self.nbytes = self.scale.nbytes + self.shift.nbytes

    def __call__(self, x: Array, /) -> Array:
        """The same shape, (batch, channels, …).

        Raises :class:`topkast.MismatchError` for other channels, another number of axes, or another
        dtype.
        """
        check_dtype(self._name, x, self.scale.dtype)
        check_axes(self._name, x, self._axes)
        if x.shape[1] != len(self.scale):
            raise MismatchError(
                f"the layer {self._name} takes {len(self.scale)} channels, got an input of shape "
                f"{x.shape}"
            )
        shape = (-1,) + (1,) * (x.ndim - 2)
        out: Array = x * self.scale.reshape(shape) + self.shift.reshape(shape)
        return out


def _make_products(name: str, weight: Weight, **options: Any) -> Any:
    """The products with a weight, by a class of the kernels, which are imported here only."""
    from topkast import kernels

    if weight.rows > 1:
        name, options["rows"] = f"Unit{name}", weight.rows
    return getattr(kernels, name)(weight.indices, len(weight.indices), **options)


def check_input(name: str, x: Any, dtype: Any, width: int) -> None:
    """Raise :class:`topkast.MismatchError` unless x is (…, width) of the dtype."""
    check_dtype(name, x, dtype)
    if x.ndim < 1 or x.shape[-1] != width:
        raise MismatchError(
            f"the layer {name} takes {width} features, got an input of shape {x.shape}"
        )


def check_axes(name: str, x: Array, axes: Sequence[int]) -> None:
    """Raise :class:`topkast.MismatchError` unless x has one of these numbers of axes."""
    if x.ndim not in axes:
        raise MismatchError(
            f"the layer {name} takes an input of {' or '.join(map(str, axes))} axes, got one of "
            f"shape {x.shape}"
        )


def check_array(name: str, x: Any) -> None:
    """Raise :class:`topkast.MismatchError` unless x is a NumPy array without a mask."""
    if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray):
        raise MismatchError(
            f"the layer {name} takes a NumPy array, got {type(x).__module__}.{type(x).__qualname__}"
        )


def check_dtype(name: str, x: Any, dtype: Any) -> None:
    """Raise :class:`topkast.MismatchError` unless x is an array of the dtype."""
    check_array(name, x)
    if x.dtype != dtype:
        raise MismatchError(
            f"the layer {name} has dtype {dtype}, its input {x.dtype}: convert the input"
        )


def _check_bias(name: str, bias: Array | None, rows: int, dtype: Any) -> None:
    if bias is not None and (bias.shape != (rows,) or bias.dtype != dtype):
        raise MismatchError(
            f"the bias of the layer {name} must be {dtype} and of shape {(rows,)}, got "
            f"{bias.dtype} and {bias.shape}"
        )
