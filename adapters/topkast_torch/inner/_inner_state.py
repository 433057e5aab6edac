"""The entries that an inner optimizer keeps per weight, and how they follow B.

An optimizer may keep one value per weight as a tensor of the weight's shape, as a vector, stacked
with others, in lists, queues and dictionaries; in its ``state`` or in a dictionary of its own by
Parameter. When B changes, all of these must migrate, and nothing else.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from topkast import MismatchError, UnsupportedOptimizerError
from topkast.adapter import SETTLED, Migration

Path: TypeAlias = tuple[Hashable, ...]
Shape: TypeAlias = tuple[int, ...]

_ANY_ITEM = "*"  # in a path, any item of a sequence
_QUEUE = "topkast.deque"


class Start(Enum):
    """The start of an entry for a weight that enters B, if it is not a number."""

    WEIGHT = "the weight"


class Spec(NamedTuple):
    """The weight axes of an entry: after `leading` other axes, flat or in the weight's shape."""

    leading: int
    flat: bool

    def axis(self, compact: Shape) -> int:
        """The axis of the weights in an entry for a compact vector of shape (1, …, 1, n)."""
        return self.leading + (0 if self.flat else len(compact) - 1)

    def reshape(self, entry: Tensor, old: Shape, new: Shape) -> Tensor:
        """Reshape an entry for a weight of shape `old` to one of shape `new`, of the same size."""
        count = 1 if self.flat else len(old)
        middle = (math.prod(new),) if self.flat else new
        return entry.reshape(
            *entry.shape[: self.leading], *middle, *entry.shape[self.leading + count :]
        )


@dataclass(frozen=True)
class Layout:
    """The entries that an optimizer keeps per Parameter.

    Attributes
    ----------
    specs
        The weight axes of entries with one value per weight, by path. A path begins with the name
        of the attribute that holds the entry (``"state"``).
    fixed
        Paths of all other entries that trials found.
    starts
        The start of each entry in `specs`: a number, or the weight.
    starts_suffice
        Whether an entry with this start equals a fresh optimizer's after one step. If not, a fresh
        optimizer takes the first step of the weights that enter B.
    attributes
        Names of attributes in which the optimizer counts, besides state and groups.
    """

    specs: Mapping[Path, Spec]
    fixed: frozenset[Path]
    starts: Mapping[Path, float | Start]
    starts_suffice: bool
    attributes: tuple[str, ...]

    @property
    def stores(self) -> tuple[str, ...]:
        """The attributes that hold entries by Parameter."""
        return tuple(dict.fromkeys(["state", *(str(path[0]) for path in self.specs)]))

    @property
    def copies_weights(self) -> bool:
        """Whether an entry starts with the weights."""
        return any(isinstance(start, Start) for start in self.starts.values())


def entries_of(
    optimizer: torch.optim.Optimizer, param: Tensor, stores: tuple[str, ...]
) -> dict[str, Any]:
    """The entries for a Parameter, by the attribute that holds them, if any."""
    entries = {}
    for name in stores:
        store = getattr(optimizer, name, {})
        if param in store:
            entries[name] = store[param]
    return entries


def count_steps(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], params: Iterable[Tensor]
) -> int:
    """Number of steps on `params` that an optimizer has counted; SETTLED if it counts none."""
    states = [optimizer.state[param] for param in params if param in optimizer.state]
    if not any(states):
        return 0
    counts = [state["step"] for state in states if isinstance(state, Mapping) and "step" in state]
    counts += [group[name] for name in ("step", "k") if name in group]
    return int(max(counts)) if counts else SETTLED


def walk(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """All tensors in nested dictionaries and sequences, with their paths."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from walk(value, (*path, key))
    elif isinstance(tree, (list, tuple, deque)):
        for value in tree:
            yield from walk(value, (*path, _ANY_ITEM))


def map_tree(function: Callable[[Path, Any], Any], tree: Any, path: Path = ()) -> Any:
    """The same containers with each leaf replaced by ``function(path, leaf)``."""
    if isinstance(tree, Mapping):
        return {key: map_tree(function, value, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, deque):
        items = (map_tree(function, value, (*path, _ANY_ITEM)) for value in tree)
        return deque(items, maxlen=tree.maxlen)
    if isinstance(tree, (list, tuple)):
        values = [map_tree(function, value, (*path, _ANY_ITEM)) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return function(path, tree)


def encode(tree: Any) -> Any:
    """`tree` with queues, which ``torch.load(weights_only=True)`` refuses, as dictionaries."""
    if isinstance(tree, deque):
        return {_QUEUE: [encode(value) for value in tree], "maxlen": tree.maxlen}
    return _map_children(encode, tree)


def decode(tree: Any) -> Any:
    """The inverse of :func:`encode`."""
    if isinstance(tree, Mapping) and _QUEUE in tree:
        return deque((decode(value) for value in tree[_QUEUE]), maxlen=tree["maxlen"])
    return _map_children(decode, tree)


def _map_children(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: function(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        values = [function(value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree


def reset_entries(
    entries: Mapping[str, Any], layout: Layout, values: Tensor, positions: Tensor
) -> None:
    """Set the entries at `positions` (k,) of a compact vector back to their start."""
    for path, entry in walk(entries):
        if path in layout.specs:
            axis = layout.specs[path].axis(tuple(values.shape))
            index = positions.to(entry.device)
            old = entry.index_select(axis, index)
            fresh = _starting_entry(layout, path, old, axis, values, positions)
            entry.index_copy_(axis, index, fresh)


class Moving:
    """Vectors over B that are moved to the next B in one pass over its positions."""

    def __init__(self, migration: Migration) -> None:
        self.migration = migration
        self._moves: list[tuple[Tensor, Tensor | float]] = []
        self._takers: list[Callable[[Tensor], object]] = []

    def add(self, entry: Tensor, fresh: Tensor | float, take: Callable[[Tensor], object]) -> None:
        """Move `entry`; entries that enter B get `fresh`. Then `take` gets the result."""
        self._moves.append((entry, fresh))
        self._takers.append(take)

    def run(self) -> None:
        """Move all vectors."""
        moved = self.migration.apply_all(self._moves)
        for take, vector in zip(self._takers, moved, strict=True):
            take(vector)


def add_entries(moving: Moving, entries: Mapping[str, Any], layout: Layout, values: Tensor) -> None:
    """Let entries move to the new B, in place: survivors keep their bits, others start anew.

    `values` (1, …, |B|) are the weights on the new B.
    """
    for path, entry in walk(entries):
        spec = layout.specs.get(path)
        if spec is None:
            continue
        axis = spec.axis(tuple(values.shape))
        start = layout.starts[path]
        if entry.numel() == values.numel() and entry.is_contiguous():
            fresh = values.detach() if isinstance(start, Start) else start
            moving.add(entry, fresh, entry.copy_)
            continue
        moved = entry.index_select(axis, moving.migration.source)
        shape = [1] * entry.dim()
        shape[axis] = -1
        survives = moving.migration.survives.view(shape)
        if isinstance(start, Start):
            fresh = values.detach().to(entry.dtype).view(shape).expand_as(entry)
            entry.copy_(torch.where(survives, moved, fresh))
        else:
            entry.copy_(moved.masked_fill_(~survives, start))


def check_migratable(entries: Mapping[str, Any], layout: Layout, count: int, name: str) -> None:
    """Raise :class:`topkast.UnsupportedOptimizerError` for values per weight that no trial found.

    `entries` are those of the optimizer class `name` for a vector of `count` weights.
    """
    for path, entry in walk(entries):
        if path not in layout.specs and path not in layout.fixed and entry.numel() == count > 1:
            raise UnsupportedOptimizerError(
                f"{name} keeps {path[-1]!r}, a value for each weight, and did not in its trial "
                "steps on wrapping: it cannot be carried over when B changes"
            )


def is_identity(migration: Migration) -> bool:
    """Whether each entry stays where it is."""
    source, survives = migration
    # NumPy stops at the first entry that does not survive.
    stays = survives.numpy() if survives.device.type == "cpu" else survives
    return bool(stays.all()) and (
        not len(source)
        or (bool((source[1:] > source[:-1]).all()) and int(source[-1]) == len(source) - 1)
    )


def _starting_entry(
    layout: Layout, path: Path, template: Tensor, axis: int, values: Tensor, positions: Tensor
) -> Tensor:
    start = layout.starts[path]
    if not isinstance(start, Start):
        return torch.full_like(template, start)
    shape = [1] * template.dim()
    shape[axis] = -1
    weights = values.detach().view(-1).index_select(0, positions)
    return weights.to(template.dtype).to(template.device).view(shape).expand_as(template)


def restrict_entries(
    entries: Mapping[str, Any], layout: Layout, shape: Shape, compact: Shape, indices: Tensor
) -> Any:
    """Entries for a dense weight of `shape`, restricted to the weights at flat `indices`.

    They have the dimensions of those for a vector of shape `compact`.
    """

    def restrict_leaf(path: Path, entry: Any) -> Any:
        spec = layout.specs.get(path)
        if spec is None or not isinstance(entry, Tensor):
            return entry
        row = (*compact[:-1], math.prod(shape))
        flat = spec.reshape(entry, shape, row)
        return flat.index_select(spec.axis(row), indices)

    return map_tree(restrict_leaf, entries)


def join_entries(trees: Sequence[Any], layout: Layout, compact: Shape) -> Any:
    """Concatenate the entries of several vectors to those of one vector of shape `compact`.

    Raises :class:`topkast.MismatchError` if entries that are not per weight differ.
    """
    leaves = [list(_leaves(tree)) for tree in trees]
    numbers = iter(range(len(leaves[0])))

    def join_leaf(path: Path, leaf: Any) -> Any:
        number = next(numbers)
        leaves_to_join = [tree_leaves[number] for tree_leaves in leaves]
        if path in layout.specs and isinstance(leaf, Tensor):
            return torch.cat(leaves_to_join, dim=layout.specs[path].axis(compact))
        if not all(_equal(leaf, other) for other in leaves_to_join):
            raise MismatchError(f"their {path[-1]!r} differ")
        return leaf

    if any(len(tree_leaves) != len(leaves[0]) for tree_leaves in leaves):
        raise MismatchError("they have different entries")
    return map_tree(join_leaf, trees[0])


def gather_entries(entries: Any, layout: Layout, compact: Shape, positions: Tensor) -> Any:
    """Copies of the entries of the weights at `positions` (k,) of a compact vector."""

    def gather_leaf(path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if path in layout.specs:
            return leaf.index_select(layout.specs[path].axis(compact), positions.to(leaf.device))
        return leaf.clone()

    return map_tree(gather_leaf, entries)


def _leaves(tree: Any) -> Iterator[Any]:
    leaves: list[Any] = []
    map_tree(lambda _, leaf: leaves.append(leaf), tree)
    yield from leaves


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    return bool(first == second)


def expand_entries(
    entries: Mapping[str, Any], layout: Layout, compact: Shape, indices: Tensor, theta: Tensor
) -> Any:
    """Entries of the dense weight `theta`, fresh outside B; inverse of :func:`restrict_entries`."""

    def expand_leaf(path: Path, entry: Any) -> Any:
        spec = layout.specs.get(path)
        if spec is None or not isinstance(entry, Tensor):
            return entry
        axis = spec.axis(compact)
        sizes = list(entry.shape)
        sizes[axis] = theta.numel()
        row = (*compact[:-1], theta.numel())
        dense = entry.new_empty(sizes)
        all_positions = torch.arange(theta.numel(), device=theta.device)
        dense = _starting_entry(layout, path, dense, axis, theta, all_positions).clone()
        dense.index_copy_(axis, indices.long(), entry)
        return spec.reshape(dense, row, tuple(theta.shape))

    return map_tree(expand_leaf, entries)
