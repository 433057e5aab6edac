"""Which tensors share hidden units: the rows of one weight are the columns of the next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from topkast._errors import MismatchError, OptionError
from topkast.selection._distribution import Shape

# Names of consecutive layers, or pairs (producer, consumer) of them.
Layers: TypeAlias = Sequence[str] | Sequence[tuple[str | None, str | None]]


@dataclass(frozen=True)
class UnitGroup:
    """Hidden units, and the tensors that they connect.

    Attributes
    ----------
    producers, consumers
        Names of the tensors whose outputs and whose inputs the units are.
    size
        Number of units.
    dense_producer, dense_consumer
        Whether a dense tensor produces or consumes the units too: None in the pairs of `layers`.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    size: int
    dense_producer: bool = False
    dense_consumer: bool = False

    def __str__(self) -> str:
        producers, consumers = (
            ", ".join([*names, *["dense"] * dense])
            for names, dense in (
                (self.producers, self.dense_producer),
                (self.consumers, self.dense_consumer),
            )
        )
        return f"{producers} → {consumers}"


def unit_axes(name: str, shape: Shape, output_axis: int) -> tuple[int, int]:
    """The axes of a tensor's output units and of its input units."""
    if output_axis not in (0, -1):
        raise OptionError(
            f"output_axis={output_axis!r}: expected 0 for weights (outputs, inputs, ...) as in "
            "PyTorch, or -1 for (..., inputs, outputs) as in JAX"
        )
    if len(shape) < 2:
        raise MismatchError(
            f"{name!r} has the shape {shape}: expected an axis of outputs and one of inputs; leave "
            "this tensor out"
        )
    return (0, 1) if output_axis == 0 else (len(shape) - 1, len(shape) - 2)


def by_units(array: NDArray[Any], axis: int) -> NDArray[Any]:
    """View a tensor as a matrix (units, others), with the units of one axis."""
    moved = np.moveaxis(array, axis, 0)
    return moved.reshape(moved.shape[0], math.prod(moved.shape[1:]))


def unit_groups(
    layers: Layers, shapes: Mapping[str, Shape], output_axis: int
) -> tuple[UnitGroup, ...]:
    """Find the hidden units between layers, in the order of their first mention."""
    pairs = _pairs(layers)
    ends: dict[tuple[str, str], int] = {}  # group number of the outputs or inputs of a tensor
    dense: dict[int, set[str]] = {}  # of each group: which ends dense tensors have in it
    for number, (producer, consumer) in enumerate(pairs):
        pair = [
            (end, name)
            for end, name in (("outputs", producer), ("inputs", consumer))
            if name is not None
        ]
        for _, name in pair:
            if name not in shapes:
                raise MismatchError(
                    f"layers name {name!r}, but the sets have only {', '.join(map(repr, shapes))}: "
                    "write None for a dense tensor in a pair (producer, consumer)"
                )
        joined = {ends[end] for end in pair if end in ends}
        dense[number] = {"outputs"} if producer is None else set()
        dense[number] |= {"inputs"} if consumer is None else set()
        dense[number].update(*(dense[group] for group in joined))
        ends.update(dict.fromkeys(pair, number))
        ends.update({end: number for end, group in ends.items() if group in joined})
    order = dict.fromkeys(ends.values())
    return tuple(
        _group(
            [end for end, of_end in ends.items() if of_end == number],
            shapes,
            output_axis,
            dense[number],
        )
        for number in order
    )


def _group(
    ends: Sequence[tuple[str, str]],
    shapes: Mapping[str, Shape],
    output_axis: int,
    dense: set[str],
) -> UnitGroup:
    sizes = {}
    for end, name in ends:
        outputs, inputs = unit_axes(name, shapes[name], output_axis)
        sizes[end, name] = shapes[name][outputs if end == "outputs" else inputs]
    if len(set(sizes.values())) > 1:
        described = ", ".join(f"{size} {end} of {name!r}" for (end, name), size in sizes.items())
        raise MismatchError(
            f"layers connect {described}: expected equal numbers of units; check the order of the "
            "names, and output_axis"
        )
    producers, consumers = (
        tuple(name for kind, name in ends if kind == wanted) for wanted in ("outputs", "inputs")
    )
    size = next(iter(sizes.values()))
    return UnitGroup(producers, consumers, size, "outputs" in dense, "inputs" in dense)


def _pairs(layers: Layers) -> list[tuple[str | None, str | None]]:
    entries: list[Any] = [] if isinstance(layers, str) else list(layers)
    if entries and all(isinstance(entry, str) for entry in entries):
        pairs: list[tuple[str | None, str | None]] = list(pairwise(entries))
        repeated = [name for name in dict.fromkeys(entries) if entries.count(name) > 1]
        if repeated:
            raise OptionError(f"layers name {', '.join(map(repr, repeated))} twice: name each once")
    else:
        for entry in entries:
            named = isinstance(entry, tuple) and [isinstance(name, str) for name in entry]
            is_pair = named and len(entry) == 2 and any(named)
            if not is_pair or not all(isinstance(name, str | None) for name in entry):
                raise OptionError(
                    f"layers contain {entry!r}: expected names only, or pairs (producer, consumer) "
                    "of names only, with None for a dense tensor"
                )
        pairs = entries
    if not pairs:
        raise OptionError(
            f"layers={layers!r} have no hidden units: expected the names of at least two "
            "consecutive layers, or pairs (producer, consumer)"
        )
    return pairs
