"""Tensors as their cost depends on them, and the sizes of their sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, Literal

from topkast._errors import OptionError
from topkast._options import Options
from topkast._patterns import kept_dense
from topkast._tensors import rank_tensors
from topkast.functional._plan import check_any
from topkast.selection._distribution import Shape


@dataclass(frozen=True)
class Layer:
    r"""A tensor of a model: its shape, and how often each of its weights is used.

    Attributes
    ----------
    shape
        Shape of the weight, (rows, columns) or as a convolution has it. Tensors with fewer than
        two dimensions (biases, scales) take memory but no products.
    positions
        Number of times that one sample uses each weight: 1 for a linear layer on a vector, the
        number of tokens on a sequence, the number of output positions (height · width) of a
        convolution, of input positions of a transposed one, 0 for an embedding, which is looked up.
        It may be a fraction: an expert that gets a quarter of 64 tokens has 16 positions.
    itemsize
        Bytes of a number.
    sets
        \|A\| and \|B\| of a tensor whose sets are known; None: they follow from the options.
    block
        Rows and columns of a unit of known sets, if units are blocks.
    tensor
        The object that a predicate given as `dense` gets; None: this one.

    Raises
    ------
    OptionError
        If a dimension is not an integer of at least 0, `positions` is negative or not finite,
        `sets` are no numbers of weights, or `itemsize` or a side of `block` is not positive.

    Examples
    --------
    >>> import topkast
    >>> topkast.analysis.Layer((64, 3, 7, 7), positions=112 * 112).flops
    Fraction(236027904, 1)
    """

    shape: Shape
    positions: float | Fraction = 1
    itemsize: int = 4
    sets: tuple[int, int] | None = None
    block: tuple[int, int] | None = None
    tensor: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        shape: Any = self.shape
        if not isinstance(shape, Sequence) or not all(map(is_count, shape)):
            raise OptionError(
                "the shape of a layer must be a sequence of integers of at least 0, such as "
                f"(64, 3, 7, 7), got {shape!r}"
            )
        object.__setattr__(self, "shape", tuple(map(int, shape)))
        positions: Any = self.positions
        is_number = isinstance(positions, Real) and math.isfinite(positions)
        if not is_number or positions < 0:
            raise OptionError(
                "positions is the number of times that one sample uses each weight: it must be a "
                f"finite number of at least 0, got {positions!r}"
            )
        if not is_count(self.itemsize) or not self.itemsize:
            raise OptionError(f"itemsize must be a positive integer, got {self.itemsize!r}")
        sets: Any = self.sets
        if sets is not None and not (
            isinstance(sets, (tuple, list))
            and len(sets) == 2
            and all(map(is_count, sets))
            and sets[0] <= sets[1] <= self.size
        ):
            raise OptionError(
                f"sets must be the numbers of weights in A and in B, such as ({self.size // 10}, "
                f"{self.size // 5}) of {self.size}, with A in B, got {sets!r}"
            )
        block: Any = self.block
        if block is not None and (len(block) != 2 or not all(is_count(n) and n for n in block)):
            raise OptionError(f"block must be two positive integers or None, got {block!r}")

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def flops(self) -> Fraction:
        """FLOPs of the forward product of one sample, all weights used (f_D of the formulas)."""
        return self.flops_of(self.size)

    def flops_of(self, weights: int | Fraction) -> Fraction:
        """FLOPs of a product of one sample with this number of weights: two for each."""
        return 2 * Fraction(self.positions) * weights if self.ndim > 1 else Fraction()


def is_count(value: Any) -> bool:
    """Whether a value is an integer of at least 0."""
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 0


@dataclass(frozen=True)
class Sets:
    r"""Sizes of A and B of one tensor, in weights.

    Attributes
    ----------
    forward, backward
        \|A\| and \|B\|.
    block
        Rows and columns of a unit; (1, 1) for single weights.
    as_one
        Whether all units of the tensor are ranked together: not layer by layer of a stack.
    """

    forward: int
    backward: int
    block: tuple[int, int] = (1, 1)
    as_one: bool = True

    @property
    def units(self) -> int:
        """Number of indices that B has: of weights, or of blocks."""
        return self.backward // math.prod(self.block)

    @classmethod
    def full(cls, layer: Layer) -> Sets:
        """The sets of a tensor whose weights are all in A."""
        return cls(layer.size, layer.size)


def sets_of(
    layers: Mapping[str, Layer], options: Options, trains: Literal["A", "B", "all"]
) -> dict[str, Sets]:
    """Sizes of the sets of all sparsified tensors, as :func:`topkast.wrap_optimizer` makes them.

    `trains` says which weights have a gradient if the sets of a layer are known already.

    Raises :class:`topkast.OptionError` as it does: for names that match nothing, for blocks that do
    not divide a tensor, and if nothing is left to sparsify.
    """
    options.check_names(layers)
    tensors = {
        name: layer if layer.tensor is None else layer.tensor for name, layer in layers.items()
    }
    known = {
        name: _known_sets(layer, layer.sets, trains)
        for name, layer in layers.items()
        if layer.sets is not None and options.dense is not True
    }
    dense = kept_dense(tensors, options.dense, options.stacked)
    sparse = {name: layer.shape for name, layer in layers.items() if name not in dense | {*known}}
    check_any(sparse or known, tensors, options)
    if sparse and options.distribution == "global":
        raise OptionError(
            "distribution='global' fixes the sizes of the sets only in total, and their cost "
            "depends on the weights: expected 'uniform' or 'erk'. Give the sizes that "
            "topkast.summary reports as Layer(shape, sets=(forward, backward))"
        )
    sets = dict(known)
    for ranked in rank_tensors(sparse, options):
        blocks = ranked.blocks
        block = (1, 1) if blocks is None else (blocks.rows, blocks.columns)
        forward = ranked.forward * math.prod(block)
        sets[ranked.key] = Sets(forward, ranked.backward_size, block, as_one=ranked.layers == 1)
    return {name: sets[name] for name in layers if name in sets}


def _known_sets(layer: Layer, counts: tuple[int, int], trains: Literal["A", "B", "all"]) -> Sets:
    forward = counts[0]
    backward = {"A": forward, "B": counts[1], "all": layer.size}[trains]
    return Sets(forward, backward, layer.block or (1, 1))
