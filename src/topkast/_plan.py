"""The fixed part of a sparsified tensor (or of several ranked as one): names, shapes, counts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

from array_api_compat import array_namespace

from topkast._compact import Migration, migration, move
from topkast._distribution import Shape, as_written, exact_densities, kept_count
from topkast._errors import NonFiniteError, OptionError
from topkast._options import Options
from topkast._primitives import Array, device
from topkast._selection import Support, check_finite, select_counts

_JOIN = " + "


@dataclass(frozen=True)
class Block:
    """What shares one compact vector: a tensor, or all tensors of a group if ranked globally.

    Attributes
    ----------
    shapes
        Shape of each member, by name, in the order in which their entries are numbered.
    forward, backward
        |A| and |B|.
    density
        The forward density D of the exploration penalty.
    """

    shapes: Mapping[str, Shape]
    forward: int
    backward: int
    density: float

    @property
    def key(self) -> str:
        """The tensor's name; for several, their names joined."""
        return _JOIN.join(self.shapes)

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def compact_shape(self) -> Shape:
        """(1, …, 1, |B|): as many dimensions as the tensor, which some optimizers look at."""
        return (1,) * (max(map(len, self.shapes.values())) - 1) + (self.backward,)

    @property
    def bounds(self) -> dict[str, tuple[int, int]]:
        """First flat index of each member, and the one behind its last."""
        bounds, start = {}, 0
        for name, shape in self.shapes.items():
            bounds[name] = (start, start + math.prod(shape))
            start += math.prod(shape)
        return bounds

    def flatten(self, tensors: Mapping[str, Array]) -> Array:
        """The members of this block as one vector (size,)."""
        members = [tensors[name] for name in self.shapes]
        xp = array_namespace(*members)
        flat = [xp.reshape(member, (-1,)) for member in members]
        return flat[0] if len(flat) == 1 else xp.concat(flat)

    def unflatten(self, flat: Array) -> dict[str, Array]:
        """The inverse of :meth:`flatten`."""
        xp = array_namespace(flat)
        return {
            name: xp.reshape(flat[start:stop], self.shapes[name])
            for name, (start, stop) in self.bounds.items()
        }

    def select(self, flat: Array, options: Options, round_: Array | int = 0) -> Support:
        """Sets of the block from its weights as one vector; `round_` numbers random draws."""
        with _named(self.key):
            return select_counts(
                flat,
                self.forward,
                self.backward,
                explore=options.explore,
                # Tensors of one size must not draw one set.
                seed=options.seed | crc32(self.key.encode()) << 64,
                round_=round_,
            )

    def check_finite(self, tensors: Mapping[str, Array]) -> None:
        """Raise :class:`topkast.NonFiniteError` for NaN or infinity in a member."""
        for name in self.shapes:
            with _named(name):
                check_finite(tensors[name])

    def refresh(self, flat: Array, old: Support, options: Options, round_: Array | int) -> Refresh:
        """Select anew from the current weights (size,)."""
        new = self.select(flat, options, round_)
        moved = migration(old.indices, new.indices, self.size)
        entered = new.active & ~move(old.active, moved)
        return Refresh(new, moved, self._count_members(new.indices, entered))

    def no_change(self, like: Array) -> Array:
        """The `changed` of a :class:`Refresh` that changed nothing."""
        xp = array_namespace(like)
        return xp.zeros(len(self.shapes), dtype=xp.int32, device=device(like))

    def _count_members(self, indices: Array, flags: Array) -> Array:
        xp = array_namespace(indices)
        return xp.stack(
            [
                xp.sum(
                    xp.astype(flags & (indices >= start) & (indices < stop), xp.int32),
                    dtype=xp.int32,
                )
                for start, stop in self.bounds.values()
            ]
        )


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say in the error which tensor has the entries that have no rank."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{name}: {error}; it has no rank by magnitude") from None


class Refresh(NamedTuple):
    """Outcome of a refresh: new sets, how B moved, entries new to A by member (int32)."""

    support: Support
    migration: Migration
    changed: Array


def plan(shapes: Mapping[str, Shape], options: Options) -> list[Block]:
    """The blocks of the tensors that are to be sparsified, given their shapes by name."""
    if not shapes:
        return []
    if options.distribution == "global":
        return [_plan_global(shapes, options)]
    fwd = exact_densities(shapes, options.fwd, distribution=options.distribution)
    bwd = exact_densities(shapes, options.bwd, distribution=options.distribution)
    return [
        Block(
            {name: shape},
            kept_count(math.prod(shape), fwd[name]),
            kept_count(math.prod(shape), bwd[name]),
            float(fwd[name]),
        )
        for name, shape in shapes.items()
    ]


def members(key: str, names: Mapping[str, object]) -> list[str]:
    """Names of the members of the block with this key."""
    return [key] if key in names else key.split(_JOIN)


def _plan_global(shapes: Mapping[str, Shape], options: Options) -> Block:
    for name in shapes:
        if _JOIN in name:
            raise OptionError(f"distribution='global' needs names without {_JOIN!r}, got {name!r}")
    size = sum(map(math.prod, shapes.values()))
    fwd, bwd = (1 - as_written(sparsity) for sparsity in (options.fwd, options.bwd))
    return Block(dict(shapes), kept_count(size, fwd), kept_count(size, bwd), float(fwd))
