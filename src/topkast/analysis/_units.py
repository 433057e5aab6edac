"""Units that a mask leaves without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from topkast.analysis._layers import (
    Layers,
    UnitGroup,
    by_units,
    unit_axes,
    unit_groups,
)
from topkast.analysis._sets import Flags, read_sets, shapes_of

Numbers = NDArray[np.int64]


class UnitCounts(NamedTuple):
    """Numbers of weights in A of each unit of a tensor.

    Attributes
    ----------
    outputs
        Of each output unit: the rows of a matrix (outputs, inputs).
    inputs
        Of each input unit: its columns.
    """

    outputs: Numbers
    inputs: Numbers

    @property
    def empty_outputs(self) -> Numbers:
        """Numbers of the output units without a weight, ascending."""
        return np.flatnonzero(self.outputs == 0)

    @property
    def empty_inputs(self) -> Numbers:
        """Numbers of the input units without a weight, ascending."""
        return np.flatnonzero(self.inputs == 0)


class DeadUnits(NamedTuple):
    """Hidden units that cannot carry anything from the network's inputs to its outputs.

    Attributes
    ----------
    producers, consumers
        Names of the tensors whose outputs and whose inputs the units are.
    units
        Number of units, dead and alive.
    without_inputs
        Units without a weight in any producer: they are constant.
    without_outputs
        Units without a weight in any consumer: they have no effect.
    disconnected
        All units that lie on no path from an input to an output of the network: those above, and
        those whose only connections are with dead units.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    units: int
    without_inputs: Numbers
    without_outputs: Numbers
    disconnected: Numbers


def unit_counts(sets: Any, /, params: Any = None, *, output_axis: int = 0) -> dict[str, UnitCounts]:
    """Count the weights in A of each output unit and of each input unit.

    Parameters
    ----------
    sets
        A wrapped optimizer or masks; see :mod:`topkast.analysis`. Tensors have at least two axes.
    params
        The weights, needed with a functional state and with supports.
    output_axis
        0 for weights (outputs, inputs, ...), as in PyTorch; -1 for weights (..., inputs, outputs),
        as in Flax. The other axes, of a convolution's kernel, belong to their units.
        PyTorch's transposed convolutions have (inputs, outputs, ...): swap these axes first.
        Inputs of a grouped convolution are numbered inside a group.

    Returns
    -------
    dict of str to UnitCounts
        Counts of each unit, by tensor.

    Raises
    ------
    MismatchError
        If a tensor has fewer than two axes, or the masks are not boolean.
    OptionError
        If `output_axis` is neither 0 nor -1.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.analysis import unit_counts
    >>> mask = np.asarray([[True, False, True], [False, False, False]])
    >>> counts = unit_counts({"w": mask})["w"]
    >>> counts.outputs, counts.inputs
    (array([2, 0]), array([1, 0, 1]))
    >>> counts.empty_outputs, counts.empty_inputs
    (array([1]), array([1]))
    """
    counts = {}
    for name, tensor in read_sets(sets, params).items():
        axes = unit_axes(name, tensor.shape, output_axis)
        mask = tensor.mask
        counts[name] = UnitCounts(
            *(by_units(mask, axis).sum(axis=1, dtype=np.int64) for axis in axes)
        )
    return counts


def dead_units(
    sets: Any, /, layers: Layers, params: Any = None, *, output_axis: int = 0
) -> list[DeadUnits]:
    """Find the hidden units that A leaves without incoming or outgoing weights.

    Parameters
    ----------
    sets
        A wrapped optimizer or masks; see :mod:`topkast.analysis`.
    layers
        Names of consecutive layers, from the first to the last; or pairs (producer, consumer) of
        names, where the outputs of the one are the inputs of the other. None stands for a dense
        tensor, which connects all units.
    params
        The weights, needed with a functional state and with supports.
    output_axis
        0 for weights (outputs, inputs, ...), as in PyTorch; -1 for weights (..., inputs, outputs),
        as in Flax.

    Returns
    -------
    list of DeadUnits
        One for the hidden units between each producer and its consumer. Biases are not considered:
        a unit without inputs may still be a constant that matters.

    Raises
    ------
    MismatchError
        If a layer is not among the sets, or layers do not fit together.
    OptionError
        If `layers` has no hidden units.

    Examples
    --------
    Unit 0 has no input. Unit 2 has no output:

    >>> import numpy as np
    >>> from topkast.analysis import dead_units
    >>> first = np.asarray([[False, False], [True, False], [False, True]])
    >>> second = np.asarray([[True, True, False]])
    >>> (hidden,) = dead_units({"first": first, "second": second}, ["first", "second"])
    >>> hidden.without_inputs, hidden.without_outputs, hidden.disconnected
    (array([0]), array([2]), array([0, 2]))
    """
    read = read_sets(sets, params)
    groups = unit_groups(layers, shapes_of(read), output_axis)
    names = {name for group in groups for name in (*group.producers, *group.consumers)}
    weights = {name: _connections(name, read[name].mask, output_axis) for name in names}
    has_input = [
        _any_of(
            [_any_along(weights[name], 1) for name in group.producers],
            group.size,
            dense=group.dense_producer,
        )
        for group in groups
    ]
    has_output = [
        _any_of(
            [_any_along(weights[name], 0) for name in group.consumers],
            group.size,
            dense=group.dense_consumer,
        )
        for group in groups
    ]
    reached = _spread(has_input, groups, weights, forwards=True)
    used = _spread(has_output, groups, weights, forwards=False)
    return [
        DeadUnits(
            group.producers,
            group.consumers,
            group.size,
            np.flatnonzero(~has_input[number]),
            np.flatnonzero(~has_output[number]),
            np.flatnonzero(~(reached[number] & used[number])),
        )
        for number, group in enumerate(groups)
    ]


def _connections(name: str, mask: Flags, output_axis: int) -> Flags:
    """The matrix (outputs, inputs) of units that are connected."""
    axes = unit_axes(name, mask.shape, output_axis)
    moved = np.moveaxis(mask, axes, (0, 1))
    return np.asarray(moved.any(axis=tuple(range(2, mask.ndim))))


def _any_along(flags: Flags, axis: int) -> Flags:
    return np.asarray(flags.any(axis=axis))


def _any_of(flags: list[Flags], size: int, *, dense: bool) -> Flags:
    """Units with a connection in any tensor; all units if one of the tensors is dense."""
    return np.ones(size, dtype=np.bool_) if dense else np.logical_or.reduce(flags)


def _spread(
    connected: list[Flags],
    groups: tuple[UnitGroup, ...],
    weights: Mapping[str, Flags],
    *,
    forwards: bool,
) -> list[Flags]:
    """Units with a path from an input (or to an output) of the network.

    Starts from the ends of the network, and adds units until nothing changes.
    """
    near, far = ("producers", "consumers") if forwards else ("consumers", "producers")
    group_beyond = {
        name: number for number, group in enumerate(groups) for name in getattr(group, far)
    }
    matrices = weights if forwards else {name: matrix.T for name, matrix in weights.items()}
    alive = [np.zeros_like(flags) for flags in connected]
    while True:
        grown = []
        for group, flags in zip(groups, connected, strict=True):
            names = getattr(group, near)
            from_each = [
                _any_along(matrices[name][:, alive[group_beyond[name]]], 1)
                if name in group_beyond
                else _any_along(matrices[name], 1)
                for name in names
            ]
            dense = group.dense_producer if forwards else group.dense_consumer
            grown.append(_any_of(from_each, group.size, dense=dense) & flags)
        if all(np.array_equal(old, new) for old, new in zip(alive, grown, strict=True)):
            return alive
        alive = grown
