"""The overlap of two networks after matching their hidden units, which have no order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topkast._adapters import name_extra
from topkast._errors import OptionError
from topkast.analysis._layers import Layers, UnitGroup, by_units, unit_axes, unit_groups
from topkast.analysis._overlap import Overlap, overlap_of, read_pair
from topkast.analysis._sets import ByTensor, Flags, Sets, TensorSets, pack, shapes_of

Counts = NDArray[np.float32]  # masks as 0 and 1, for matrix products
Permutation = NDArray[np.int64]


@dataclass(frozen=True)
class UnitMatch:
    """The result of :func:`match_units`.

    Attributes
    ----------
    raw
        Overlap of the networks as they are.
    matched
        Overlap after matching. Its chance values are means over pairs of random networks that were
        matched in the same way, NaN without any: matching finds common weights in any two networks.
    groups
        The hidden units that were matched: for each group, the tensors that produce and consume it.
    permutations
        For each group, the number of the second network's unit that matches each unit of the first.
    masks
        A of the second network with its units in the first network's order, by tensor.
    rounds
        Number of passes over all groups, the last of which changed nothing.
    """

    raw: ByTensor[Overlap]
    matched: ByTensor[Overlap]
    groups: tuple[UnitGroup, ...]
    permutations: tuple[Permutation, ...]
    masks: Mapping[str, Flags]
    rounds: int


def match_units(
    first: Any,
    second: Any,
    /,
    layers: Layers,
    params: Any = None,
    *,
    output_axis: int = 0,
    chance_draws: int = 0,
    seed: int = 0,
) -> UnitMatch:
    r"""Permute the hidden units of the second network so that its A overlaps most with the first's.

    The rows of a weight and the columns of the next are permuted together, which leaves the
    network's function as it is. The units of one layer are assigned to each other by the Hungarian
    algorithm, which is optimal while the other layers stay as they are. This goes on from layer to
    layer until nothing changes, from three starts: the given order, and the orders found from the
    first layer onwards and from the last layer backwards. The best result counts.

    With one group of hidden units the result is optimal. With several it is a local optimum: the
    problem is NP-hard (Ainsworth et al., 2023, `arXiv:2209.04836
    <https://arxiv.org/abs/2209.04836>`_, section 3.2). A permuted copy of a network is recognised
    if the units of each layer differ in their incoming weights.

    Parameters
    ----------
    first, second
        Sets of two networks of one architecture; see :mod:`topkast.analysis`.
    layers
        Names of consecutive layers, from the first to the last; or pairs (producer, consumer) of
        names, where the outputs of the one are the inputs of the other. None stands for a dense
        tensor. Units that share a producer or a consumer are permuted alike. Inputs of the first
        layer and outputs of the last keep their order.
    params
        The weights, needed with functional states and with supports.
    output_axis
        0 for weights (outputs, inputs, ...), as in PyTorch; -1 for weights (..., inputs, outputs),
        as in Flax.
    chance_draws
        Number of random networks for the chance values of the matched overlap. In each of them, the
        weights of the second network's A are drawn anew, uniformly in each tensor.
    seed
        Seed of these draws.

    Returns
    -------
    UnitMatch
        Overlap before and after matching, of the tensors that `layers` name, and the permutations.

    Raises
    ------
    MismatchError
        If tensors or shapes differ, if a layer is not among the sets, if numbers of units do not
        fit, or if an A is empty everywhere.
    OptionError
        If `layers` has no hidden units, or an option is invalid.
    ModuleNotFoundError
        If scipy is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.analysis import match_units
    >>> first = {"0": np.eye(3) > 0, "1": np.eye(3) > 0}
    >>> order = [2, 0, 1]
    >>> second = {"0": first["0"][order], "1": first["1"][:, order]}
    >>> match = match_units(first, second, ["0", "1"])
    >>> match.raw.total.common, match.matched.total.common
    (0.0, 1.0)
    >>> match.permutations
    (array([1, 2, 0]),)
    """
    assign = _hungarian_algorithm()
    draw_count: Any = chance_draws
    if isinstance(draw_count, bool) or not isinstance(draw_count, int) or draw_count < 0:
        raise OptionError(f"chance_draws={chance_draws!r}: expected an integer of at least 0")
    one, other = read_pair(first, second, params)
    groups = unit_groups(layers, shapes_of(one), output_axis)
    names = [
        name
        for name in one
        if any(name in (*group.producers, *group.consumers) for group in groups)
    ]
    one, other = ({name: sets[name] for name in names} for sets in (one, other))
    matching = _Matching(one, groups, output_axis, assign)
    permutations, rounds = matching.find(other)
    placed = matching.place(other, permutations)
    rng = np.random.default_rng(seed)
    draws = [matching.overlap(_drawn(other, rng)) for _ in range(chance_draws)]
    return UnitMatch(
        overlap_of(one, other),
        _with_chance(overlap_of(one, placed), draws),
        groups,
        permutations,
        {name: sets.mask for name, sets in placed.items()},
        rounds,
    )


class _Matching:
    """Matches the units of networks to those of one network."""

    def __init__(
        self,
        first: Sets,
        groups: tuple[UnitGroup, ...],
        output_axis: int,
        assign: Callable[..., tuple[Permutation, Permutation]],
    ) -> None:
        self._sets = first
        self._first = _as_counts(first)
        self._groups = groups
        self._assign = assign
        self._ends: list[list[tuple[str, int]]] = []  # of each group: tensors and their axes
        self._producers: list[int] = []  # of each group: how many of its ends are outputs
        self._axes: dict[str, dict[int, int]] = {name: {} for name in first}  # group of each axis
        for number, group in enumerate(groups):
            ends = [
                (name, unit_axes(name, first[name].shape, output_axis)[end])
                for end, names in enumerate((group.producers, group.consumers))
                for name in names
            ]
            self._ends.append(ends)
            self._producers.append(len(group.producers))
            for name, axis in ends:
                self._axes[name][axis] = number

    def find(self, second: Sets) -> tuple[tuple[Permutation, ...], int]:
        """Find the permutations of `second` with the largest overlap, and the number of rounds."""
        counts = _as_counts(second)
        given = [np.arange(group.size) for group in self._groups]
        starts = [given, self._swept(counts, given, +1), self._swept(counts, given, -1)]
        found = [self._improved(counts, start) for start in starts]
        permutations, rounds = max(
            found, key=lambda result: self._common(counts, result[0], counts.keys())
        )
        return tuple(permutations), rounds

    def place(self, second: Sets, permutations: Sequence[Permutation]) -> Sets:
        """Put the units of `second` into the order of the first network."""
        return {
            name: replace(
                sets,
                forward=pack(self._placed(name, sets.mask, permutations)),
                backward=pack(self._placed(name, sets.backward_mask, permutations)),
            )
            for name, sets in second.items()
        }

    def overlap(self, second: Sets) -> ByTensor[Overlap]:
        """The overlap after matching."""
        permutations, _ = self.find(second)
        return overlap_of(self._sets, self.place(second, permutations))

    def _swept(
        self, counts: Mapping[str, Counts], given: Sequence[Permutation], direction: int
    ) -> list[Permutation]:
        """Match each group by its producers alone, in order, or by its consumers alone, backwards.

        The units on that side have been matched before.
        """
        permutations = list(given)
        for number in range(len(self._groups))[::direction]:
            split = self._producers[number]
            ends = self._ends[number][:split] if direction > 0 else self._ends[number][split:]
            if ends:
                permutations[number] = self._best(counts, permutations, ends)
        return permutations

    def _improved(
        self, counts: Mapping[str, Counts], start: Sequence[Permutation]
    ) -> tuple[list[Permutation], int]:
        """Match group after group, given the others, until no group has a larger overlap."""
        permutations, rounds, changed = list(start), 0, True
        while changed:
            rounds, changed = rounds + 1, False
            for number, ends in enumerate(self._ends):
                trial = list(permutations)
                trial[number] = self._best(counts, permutations, ends)
                names = {name for name, _ in ends}
                # A tensor with both axes in one group may even lose: only gains are accepted.
                if self._common(counts, trial, names) > self._common(counts, permutations, names):
                    permutations, changed = trial, True
        return permutations, rounds

    def _best(
        self,
        counts: Mapping[str, Counts],
        permutations: Sequence[Permutation],
        ends: Sequence[tuple[str, int]],
    ) -> Permutation:
        """The best assignment of the units at `ends`, given the other permutations."""
        similarity: Any = 0.0
        for name, axis in ends:
            placed = self._placed(name, counts[name], permutations, but=axis)
            similarity = similarity + by_units(self._first[name], axis) @ by_units(placed, axis).T
        _, units = self._assign(similarity, maximize=True)
        return np.asarray(units, dtype=np.int64)

    def _placed(
        self,
        name: str,
        array: NDArray[Any],
        permutations: Sequence[Permutation],
        but: int | None = None,
    ) -> NDArray[Any]:
        for axis, number in self._axes[name].items():
            if axis != but:
                array = np.take(array, permutations[number], axis=axis)
        return array

    def _common(
        self, counts: Mapping[str, Counts], permutations: Sequence[Permutation], names: Any
    ) -> int:
        """Number of weights in common, in some of the tensors."""
        return sum(
            int(
                np.count_nonzero(self._first[name] * self._placed(name, counts[name], permutations))
            )
            for name in names
        )


def _as_counts(sets: Sets) -> dict[str, Counts]:
    return {name: tensor.mask.astype(np.float32) for name, tensor in sets.items()}


def _drawn(sets: Sets, rng: np.random.Generator) -> Sets:
    """Draw an A of the same size in each tensor; B plays no role."""
    drawn = {}
    for name, tensor in sets.items():
        bits = pack(rng.permutation(tensor.mask.reshape(-1)))
        drawn[name] = TensorSets(tensor.shape, bits, bits)
    return drawn


def _with_chance(
    matched: ByTensor[Overlap], draws: Sequence[ByTensor[Overlap]]
) -> ByTensor[Overlap]:
    """Set the chance values to the means of `draws`."""

    def mean(values: list[Overlap], field: str) -> float:
        return sum(getattr(value, field) for value in values) / len(values) if values else np.nan

    def with_means(result: Overlap, values: list[Overlap]) -> Overlap:
        return result._replace(chance_iou=mean(values, "iou"), chance_common=mean(values, "common"))

    return ByTensor(
        {
            name: with_means(result, [draw.tensors[name] for draw in draws])
            for name, result in matched.tensors.items()
        },
        with_means(matched.total, [draw.total for draw in draws]),
    )


def _hungarian_algorithm() -> Callable[..., tuple[Permutation, Permutation]]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise name_extra(error, "match_units needs", "analysis", "scipy") from None
    assign: Callable[..., tuple[Permutation, Permutation]] = linear_sum_assignment
    return assign
