"""Functions without weights between layers, as arrays to arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from topkast._errors import MismatchError
from topkast.inference._layers import Layer, check_array, check_axes
from topkast.inference._weights import Array


def make_function(name: str, description: Mapping[str, Any]) -> Layer | None:
    """The function of a layer's description; None if its type is not one of these."""
    layer_type = description["type"]
    if layer_type == "Flatten":
        start, end = int(description["start"]), int(description["end"])
        return lambda x: flatten(x, start, end)
    if layer_type == "MaxPool2d":
        size, stride = (read_pair(name, description[option]) for option in ("size", "stride"))
        padding = read_pair(name, description["padding"], min=0)
        return lambda x: max_pool(x, size, stride, padding)
    return _FUNCTIONS.get(layer_type)


def relu(x: Array) -> Array:
    """Negative numbers become 0."""
    _check_floats("ReLU", x)
    out: Array = np.maximum(x, x.dtype.type(0))
    return out


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(−x)), without overflow, and as precise where it is close to 0."""
    _check_floats("Sigmoid", x)
    power, one = np.exp(-np.abs(x)), x.dtype.type(1)
    out: Array = np.where(x < 0, power, one) / (one + power)
    return out


def tanh(x: Array) -> Array:
    """The hyperbolic tangent."""
    _check_floats("Tanh", x)
    out: Array = np.tanh(x)
    return out


def flatten(x: Array, start: int, end: int) -> Array:
    """Join the axes from `start` to `end`, both included."""
    check_array("Flatten", x)
    if not all(-x.ndim <= axis < x.ndim for axis in (start, end)) or start % x.ndim > end % x.ndim:
        raise MismatchError(
            f"Flatten joins the axes {start} to {end}, which an input of shape {x.shape} lacks"
        )
    first, last = start % x.ndim, end % x.ndim
    length = math.prod(x.shape[first : last + 1])
    return x.reshape(*x.shape[:first], length, *x.shape[last + 1 :])


def max_pool(
    x: Array, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Array:
    """The largest pixel under each window, of images (…, height, width) of three or four axes."""
    _check_floats("MaxPool2d", x)
    check_axes("MaxPool2d", x, (3, 4))
    margins = [(0, 0)] * (x.ndim - 2) + [(zeros, zeros) for zeros in padding]
    padded = np.pad(x, margins, constant_values=-np.inf) if any(padding) else x
    if padded.shape[-2] < size[0] or padded.shape[-1] < size[1]:
        raise MismatchError(f"a window of {size} does not fit an input of shape {x.shape}")
    windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=(-2, -1))
    out: Array = windows[..., :: stride[0], :: stride[1], :, :].max(axis=(-2, -1))
    return out


def mean_pool(x: Array) -> Array:
    """The mean of all pixels, (…, 1, 1)."""
    _check_floats("AdaptiveAvgPool2d", x)
    if x.ndim < 2:
        raise MismatchError(f"AdaptiveAvgPool2d takes images, got an input of shape {x.shape}")
    out: Array = x.mean(axis=(-2, -1), keepdims=True)
    return out


def identity(x: Array) -> Array:
    """The input."""
    return x


_FUNCTIONS: dict[str, Layer] = {
    "Identity": identity,
    "MeanPool2d": mean_pool,
    "ReLU": relu,
    "Sigmoid": sigmoid,
    "Tanh": tanh,
}


def _check_floats(name: str, x: Any) -> None:
    """Raise :class:`topkast.MismatchError` unless x is an array of floats."""
    check_array(name, x)
    if x.dtype.kind != "f":
        raise MismatchError(f"the layer {name} takes floats, got {x.dtype}: convert the input")


def read_pair(name: str, value: Any, *, min: int = 1) -> tuple[int, int]:  # noqa: A002
    """Two integers of a layer's description; raises ValueError if they are below `min`."""
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(isinstance(number, int) and number >= min for number in value)
    ):
        raise ValueError(
            f"an option of the layer {name} must be two integers of at least {min}, got {value!r}"
        )
    first, second = value
    return first, second
