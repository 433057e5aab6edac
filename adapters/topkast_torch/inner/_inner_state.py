"""What an inner optimizer keeps for each weight, wherever it keeps it, found by trying it.

An optimizer may keep one value per weight as a tensor of the weight's shape, as a vector, stacked
with others, in lists, queues and dictionaries; in its ``state`` or in a dictionary of its own by
Parameter. When B changes, all of that must follow, and nothing else.
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

_EACH = "*"  # in a path, any item of a sequence
_QUEUE = "topkast.deque"


class Start(Enum):
    """Where an entry starts that enters B, if not at a number."""

    WEIGHT = "the weight"


class Spec(NamedTuple):
    """Where an entry has one value per weight: behind `leading` axes, as a vector or in shape."""

    leading: int
    flat: bool

    def axis(self, compact: Shape) -> int:
        """The axis of the weights, in an entry for a compact vector of shape (1, …, 1, n)."""
        return self.leading + (0 if self.flat else len(compact) - 1)

    def reshape(self, entry: Tensor, old: Shape, new: Shape) -> Tensor:
        """An entry for a weight of shape `old`, as one for `new`, of as many entries."""
        count = 1 if self.flat else len(old)
        middle = (math.prod(new),) if self.flat else new
        return entry.reshape(
            *entry.shape[: self.leading], *middle, *entry.shape[self.leading + count :]
        )


@dataclass(frozen=True)
class Layout:
    """What an optimizer keeps per weight.

    Attributes
    ----------
    specs
        Where entries have one value per weight, by their path in what is kept for a Parameter.
        A path begins with the name of the attribute that holds the entry (``"state"``).
    fixed
        Paths of the other entries that trials showed.
    starts
        Where such entries start: at a number, or at the weight.
    starts_suffice
        Whether entries that start so are, one step later, what a fresh optimizer would have. Where
        not, a fresh one takes the first step of what enters B.
    attributes
        Names of what an optimizer counts on itself, besides state and groups.
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


def entries_of(
    optimizer: torch.optim.Optimizer, param: Tensor, stores: tuple[str, ...]
) -> dict[str, Any]:
    """What is kept for a Parameter, by the attribute that holds it; absent where nothing is."""
    kept = {}
    for name in stores:
        mapping = getattr(optimizer, name, {})
        if param in mapping:
            kept[name] = mapping[param]
    return kept


def steps_taken(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], params: Iterable[Tensor]
) -> int:
    """How often an optimizer has stepped some Parameters, as far as it says; else many times."""
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
            yield from walk(value, (*path, _EACH))


def map_tree(function: Callable[[Path, Any], Any], tree: Any, path: Path = ()) -> Any:
    """The same containers with ``function(path, leaf)`` in the place of each leaf."""
    if isinstance(tree, Mapping):
        return {key: map_tree(function, value, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, deque):
        items = (map_tree(function, value, (*path, _EACH)) for value in tree)
        return deque(items, maxlen=tree.maxlen)
    if isinstance(tree, (list, tuple)):
        values = [map_tree(function, value, (*path, _EACH)) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return function(path, tree)


def encode(tree: Any) -> Any:
    """`tree` without the queues that ``torch.load`` refuses with ``weights_only``."""
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


def renew(kept: Mapping[str, Any], layout: Layout, values: Tensor, positions: Tensor) -> None:
    """Start the entries of the weights at some positions (k,) of a compact vector anew."""
    for path, entry in walk(kept):
        if path in layout.specs:
            axis = layout.specs[path].axis(tuple(values.shape))
            where = positions.to(entry.device)
            fresh = _start(layout, path, entry.index_select(axis, where), axis, values, positions)
            entry.index_copy_(axis, where, fresh)


def migrate(kept: Mapping[str, Any], layout: Layout, values: Tensor, migration: Migration) -> None:
    """Carry entries over to the next B, in place: survivors keep their bits, others start anew.

    `values` (1, …, |B|) are the weights on the next B.
    """
    if bool(migration.survives.all()) and _in_place(migration.source):
        return
    for path, entry in walk(kept):
        spec = layout.specs.get(path)
        if spec is None:
            continue
        axis = spec.axis(tuple(values.shape))
        moved = entry.index_select(axis, migration.source)
        start = layout.starts[path]
        shape = [1] * entry.dim()
        shape[axis] = -1
        survives = migration.survives.view(shape)
        if isinstance(start, Start):
            fresh = values.detach().to(entry.dtype).view(shape).expand_as(entry)
            entry.copy_(torch.where(survives, moved, fresh))
        else:
            entry.copy_(moved.masked_fill_(~survives, start))


def check_known(kept: Mapping[str, Any], layout: Layout, count: int, name: str) -> None:
    """Raise :class:`topkast.UnsupportedOptimizerError` for values per weight that no trial showed.

    `kept` is what the optimizer called `name` keeps for a vector of `count` weights.
    """
    for path, entry in walk(kept):
        if path not in layout.specs and path not in layout.fixed and entry.numel() == count > 1:
            raise UnsupportedOptimizerError(
                f"{name} keeps {path[-1]!r}, a value for each weight, and did not in the steps for "
                "which it was tried on wrapping: it cannot be carried over when B changes"
            )


def _in_place(source: Tensor) -> bool:
    """Whether nothing moves."""
    return bool((source[1:] > source[:-1]).all()) and (
        not len(source) or int(source[-1]) == len(source) - 1
    )


def _start(
    layout: Layout, path: Path, like: Tensor, axis: int, values: Tensor, positions: Tensor
) -> Tensor:
    start = layout.starts[path]
    if not isinstance(start, Start):
        return torch.full_like(like, start)
    shape = [1] * like.dim()
    shape[axis] = -1
    weights = values.detach().view(-1).index_select(0, positions)
    return weights.to(like.dtype).to(like.device).view(shape).expand_as(like)


def restrict(kept: Mapping[str, Any], layout: Layout, shape: Shape, indices: Tensor) -> Any:
    """Entries for a dense weight of some shape, cut down to the weights at flat `indices`."""

    def take(path: Path, entry: Any) -> Any:
        spec = layout.specs.get(path)
        if spec is None or not isinstance(entry, Tensor):
            return entry
        row = (1,) * (len(shape) - 1) + (math.prod(shape),)
        flat = spec.reshape(entry, shape, row)
        return flat.index_select(spec.axis(row), indices)

    return map_tree(take, kept)


def join(parts: Sequence[Any], layout: Layout, compact: Shape) -> Any:
    """Entries of several vectors as those of one of shape `compact`, one behind the other.

    Raises :class:`topkast.MismatchError` where they differ in what is not one value per weight.
    """
    leaves = [list(_leaves(part)) for part in parts]
    counts = iter(range(len(leaves[0])))

    def together(path: Path, leaf: Any) -> Any:
        number = next(counts)
        others = [part[number] for part in leaves]
        if path in layout.specs and isinstance(leaf, Tensor):
            return torch.cat(others, dim=layout.specs[path].axis(compact))
        if not all(_same(leaf, other) for other in others):
            raise MismatchError(f"their {path[-1]!r} differ")
        return leaf

    if any(len(part) != len(leaves[0]) for part in leaves):
        raise MismatchError("they have different entries")
    return map_tree(together, parts[0])


def take(kept: Any, layout: Layout, compact: Shape, positions: Tensor) -> Any:
    """Entries of the weights at some positions (k,) of a compact vector, copied."""

    def copied(path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if path in layout.specs:
            return leaf.index_select(layout.specs[path].axis(compact), positions.to(leaf.device))
        return leaf.clone()

    return map_tree(copied, kept)


def _leaves(tree: Any) -> Iterator[Any]:
    leaves: list[Any] = []
    map_tree(lambda _, leaf: leaves.append(leaf), tree)
    yield from leaves


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    return bool(first == second)


def expand(
    kept: Mapping[str, Any], layout: Layout, compact: Shape, indices: Tensor, theta: Tensor
) -> Any:
    """The inverse of :func:`restrict`: entries of the dense weight `theta`, fresh outside B."""

    def spread(path: Path, entry: Any) -> Any:
        spec = layout.specs.get(path)
        if spec is None or not isinstance(entry, Tensor):
            return entry
        axis = spec.axis(compact)
        sizes = list(entry.shape)
        sizes[axis] = theta.numel()
        row = (*compact[:-1], theta.numel())
        dense = entry.new_empty(sizes)
        everywhere = torch.arange(theta.numel(), device=theta.device)
        dense = _start(layout, path, dense, axis, theta, everywhere).clone()
        dense.index_copy_(axis, indices.long(), entry)
        return spec.reshape(dense, row, tuple(theta.shape))

    return map_tree(spread, kept)
