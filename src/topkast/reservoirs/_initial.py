"""Initial weights as a function of seed, tensor and index, with equal bits in every library."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from array_api_compat import array_namespace

from topkast._errors import OptionError
from topkast._primitives import Array, device, take
from topkast.backends._compiled import function, has_kernel
from topkast.selection._random import Key, make_key, random_words

Vector = np.ndarray[Any, Any]

_UNIFORM_BITS = 24  # of a uniform number: float32 holds all of them
_CELL_BITS, _FRACTION_BITS = 15, 8  # of the half-normal quantile: one cell, and the place inside
_NORMAL_BITS = 21  # fraction of a normal number, whose whole part is below 8
_LAST_QUANTILE = 4.5  # standard deviations, at the end of the last cell


@dataclass(frozen=True)
class Init:
    """The distribution of initial weights.

    Attributes
    ----------
    kind
        ``"uniform"`` or ``"normal"``. Normal weights are cut off at 4.5 standard deviations.
    scale
        Largest magnitude of a uniform weight, standard deviation of a normal one.

    Raises
    ------
    OptionError
        For another kind, or a scale that is not positive and finite.

    Examples
    --------
    >>> from topkast.reservoirs import Init
    >>> Init.of("default", (50, 100))
    Init(kind='uniform', scale=0.1)
    """

    kind: Literal["uniform", "normal"]
    scale: float

    def __post_init__(self) -> None:
        if self.kind not in ("uniform", "normal"):
            raise OptionError(f"kind must be 'uniform' or 'normal', got {self.kind!r}")
        if not 0 < self.scale < math.inf:
            raise OptionError(f"scale must be positive and finite, got {self.scale!r}")

    @classmethod
    def of(cls, init: str | Init, shape: Sequence[int]) -> Init:
        """The distribution that a rule gives a weight of this shape.

        The rules are PyTorch's: ``"default"`` (of ``torch.nn.Linear`` and ``torch.nn.Conv2d``),
        ``"kaiming_uniform"``, ``"kaiming_normal"`` (for ReLU, by fan-in), ``"xavier_uniform"`` and
        ``"xavier_normal"``.
        """
        if isinstance(init, Init):
            return init
        if len(shape) < 2 or 0 in shape:
            raise OptionError(
                f"init={init!r} needs a weight with inputs and outputs, got shape {tuple(shape)}: "
                "pass an Init with a scale of your own"
            )
        window = math.prod(shape[2:])
        fan_in, fan_out = shape[1] * window, shape[0] * window
        scales = {
            "default": 1 / math.sqrt(fan_in),
            "kaiming_uniform": math.sqrt(6 / fan_in),
            "kaiming_normal": math.sqrt(2 / fan_in),
            "xavier_uniform": math.sqrt(6 / (fan_in + fan_out)),
            "xavier_normal": math.sqrt(2 / (fan_in + fan_out)),
        }
        if init not in scales:
            raise OptionError(
                f"init must be a topkast.reservoirs.Init or one of "
                f"{', '.join(map(repr, scales))}, got {init!r}"
            )
        return cls("normal" if init.endswith("normal") else "uniform", scales[init])


@dataclass(frozen=True)
class Generated:
    """The initial weights of one tensor, generated where they are needed.

    A weight depends on seed, name and its flat index alone. NumPy, PyTorch, JAX and the compiled
    kernel generate the same bits.

    Attributes
    ----------
    name, seed
        Of the random numbers: tensors that differ in either are independent.
    init
        The distribution.
    size
        Number of weights.
    dtype
        ``"float32"`` or ``"float64"``.

    Raises
    ------
    OptionError
        If the seed is not an integer of at least 0.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.reservoirs import Generated, Init
    >>> weights = Generated("layer.weight", 0, Init("uniform", 0.1), size=1_000_000)
    >>> weights.read(10, 12), weights.take(np.asarray([11]))
    (array([-0.04337406,  0.04922093], dtype=float32), array([0.04922093], dtype=float32))
    """

    name: str
    seed: int
    init: Init
    size: int
    dtype: str = "float32"

    def __post_init__(self) -> None:
        seed: Any = self.seed
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise OptionError(f"seed must be an integer of at least 0, got {seed!r}")

    @property
    def nbytes(self) -> int:
        """No bytes in memory."""
        return 0

    @functools.cached_property
    def _key(self) -> Key:
        return make_key(self.seed, self.name, "initial weights")

    def read(self, start: int, stop: int) -> Vector:
        """The weights of a range of flat indices, as a new array."""
        size = stop - start
        if not has_kernel("generate", size):
            weights: Vector = self.take(np.arange(start, stop))
            return weights
        table = half_normal_quantiles() if self.init.kind == "normal" else None
        out = np.empty(size, dtype=self.dtype)
        function("generate", size)(out, start, self._key, table, self._unit)
        return out

    def take(self, indices: Array) -> Any:
        """The weights at flat indices (k,), in the library of `indices`."""
        xp = array_namespace(indices)
        numbers = _numbers(random_words(indices, self._key), self.init.kind == "normal")
        unit = xp.asarray(self._unit, dtype=getattr(xp, self.dtype), device=device(indices))
        return xp.astype(numbers, unit.dtype) * unit

    @property
    def _unit(self) -> float:
        """The weight that the number 1 stands for."""
        bits = _UNIFORM_BITS if self.init.kind == "uniform" else _NORMAL_BITS
        return self.init.scale / (1 << bits)

    def describe(self) -> dict[str, Any]:
        """Numbers and strings from which the weights can be generated again."""
        return {
            "name": self.name,
            "seed": self.seed,
            "init": self.init.kind,
            "scale": self.init.scale,
            "size": self.size,
            "dtype": self.dtype,
        }

    @classmethod
    def from_description(cls, saved: dict[str, Any]) -> Generated:
        """The inverse of :meth:`describe`."""
        init = Init(saved["init"], saved["scale"])
        return cls(saved["name"], saved["seed"], init, saved["size"], saved["dtype"])


def _numbers(words: Array, is_normal: bool) -> Array:
    """Odd numbers below 2²⁴ in magnitude, as int32, from random words (int32)."""
    xp = array_namespace(words)

    def constant(number: int) -> Array:
        return xp.asarray(number, dtype=xp.int32, device=device(words))

    def bits(first: int, count: int) -> Array:
        shifted = xp.bitwise_right_shift(words, constant(first))
        return shifted & constant((1 << count) - 1)

    if not is_normal:
        return bits(32 - _UNIFORM_BITS, _UNIFORM_BITS) * 2 + (1 - (1 << _UNIFORM_BITS))
    table = xp.asarray(half_normal_quantiles(), device=device(words))
    cell = bits(31 - _CELL_BITS, _CELL_BITS)
    fraction = bits(31 - _CELL_BITS - _FRACTION_BITS, _FRACTION_BITS)
    low, high = take(table, cell), take(table, cell + 1)
    step = xp.bitwise_right_shift((high - low) * fraction, constant(_FRACTION_BITS))
    magnitude = (low + step) * 2 + 1
    return xp.where(words < 0, -magnitude, magnitude)


@functools.cache
def half_normal_quantiles() -> Vector:
    """Quantiles of the magnitude of a normal number at the edges of the cells; int32.

    They are multiples of 2⁻²⁰, so that interpolation is exact arithmetic of integers.
    """
    cells, inverse = 1 << _CELL_BITS, NormalDist().inv_cdf
    quantiles = [inverse(0.5 + cell / (2 * cells)) for cell in range(cells)]
    edges = np.asarray([*quantiles, _LAST_QUANTILE]) * (1 << (_NORMAL_BITS - 1))
    table: Vector = np.rint(edges).astype(np.int32)
    return table
