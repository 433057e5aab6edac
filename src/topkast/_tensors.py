"""Tensors that are ranked together: names, shapes and counts, none of which change in training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple, TypeAlias

import numpy as np
from array_api_compat import array_namespace

from topkast._errors import NonFiniteError, OptionError
from topkast._method import View
from topkast._options import Options
from topkast._primitives import Array, device, take
from topkast.backends import backend_of
from topkast.methods._chosen import check_chosen, method_of
from topkast.reservoirs._reservoir import Reservoir
from topkast.selection._across import Chosen, Pieces, Total, choose_across
from topkast.selection._distribution import Shape, exact_densities, exact_fraction, kept_count
from topkast.selection._groups import group_size_of, pattern_densities
from topkast.selection._incremental import prepare_next
from topkast.selection._random import Ranks, make_key
from topkast.selection._ranking import Exchange, IncrementalSelection, Vector
from topkast.selection._select import check_finite, ranked_units
from topkast.selection._support import Migration, Support, join_layers
from topkast.selection._units import Blocks, blocks_of

_JOIN = " + "


@dataclass(frozen=True)
class RankedTensors:
    r"""Tensors that share one compact vector: a single one, or a whole group if ranked globally.

    Attributes
    ----------
    shapes
        Shape of each member, by name. Flat indices number the members in this order.
    forward, backward
        \|A\| and \|B\|, in units.
    density
        The forward density D in the exploration penalty.
    layers
        Number of layers that are ranked separately: the first axis of a stacked tensor, else 1.
    blocks
        The division of the tensor into blocks; None if units are single weights.
    group_size
        Number of consecutive weights in a group, of which A and B hold equally many; None without
        a pattern.
    """

    shapes: Mapping[str, Shape]
    forward: int
    backward: int
    density: float
    layers: int = 1
    blocks: Blocks | None = None
    group_size: int | None = None

    @property
    def key(self) -> str:
        """The tensor's name, or the joined names of several tensors."""
        return _JOIN.join(self.shapes)

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def backward_size(self) -> int:
        """Number of weights in B."""
        return self.backward * (1 if self.blocks is None else self.blocks.size)

    @property
    def compact_shape(self) -> Shape:
        """(1, …, 1, |B|): it keeps the number of dimensions, which some optimizers depend on."""
        return (1,) * (max(map(len, self.shapes.values())) - 1) + (self.backward_size,)

    @property
    def bounds(self) -> dict[str, tuple[int, int]]:
        """Half-open range of flat indices of each member."""
        bounds, start = {}, 0
        for name, shape in self.shapes.items():
            bounds[name] = (start, start + math.prod(shape))
            start += math.prod(shape)
        return bounds

    def flatten(self, tensors: Mapping[str, Array]) -> Array:
        """Join the members into one vector (size,)."""
        members = [tensors[name] for name in self.shapes]
        xp = array_namespace(*members)
        flat = [xp.reshape(member, (-1,)) for member in members]
        return flat[0] if len(flat) == 1 else xp.concat(flat)

    def unflatten(self, flat: Array) -> dict[str, Array]:
        """Split a vector (size,) into the members: the inverse of :meth:`flatten`."""
        xp = array_namespace(flat)
        return {
            name: xp.reshape(flat[start:stop], self.shapes[name])
            for name, (start, stop) in self.bounds.items()
        }

    def select(
        self,
        flat: Array,
        options: Options,
        draw: Array | int = 0,
        old: Support | None = None,
        values: Array | None = None,
        gradient: Array | None = None,
    ) -> Support:
        """Choose A and B from the weights (size,); `draw` numbers the random draws.

        `old` are the present sets, `values` the weights on them, read from `flat` if not given, and
        `gradient` is the loss's (size,), for methods that need them: see
        :class:`topkast.methods.View`.
        """
        method = method_of(options)
        forward, backward = self.forward // self.layers, self.backward // self.layers

        def choose(layer: Array, first: Array | int) -> Support:
            view = View(
                layer,
                forward,
                backward,
                options.seed,
                self.key,
                draw,
                first,
                group_size=self.group_size,
                shapes=self.shapes,
            )
            if old is not None and "sets" in method.needs:
                own = take(layer, old.entries) if values is None else values
                view = replace(view, support=old, values=own, members=self.bounds)
            if gradient is not None:
                view = replace(view, gradient=gradient)
            return check_chosen(method.choose(view), view, method)

        with _naming(self.key), ranked_units(flat, self.blocks, options.block_score) as units:
            if self.layers == 1:
                return choose(units, 0).in_blocks(self.blocks).in_groups(self.group_size)
            indices = backend_of(units).for_each_layer(
                lambda layer, first: choose(layer, first).indices, units, self.layers
            )
        joined = join_layers(indices, forward, units.shape[0])
        return joined.in_blocks(self.blocks).in_groups(self.group_size)

    def check_finite(self, tensors: Mapping[str, Array]) -> None:
        """Raise :class:`topkast.NonFiniteError` if a member contains NaN or infinity."""
        for name in self.shapes:
            with _naming(name):
                check_finite(tensors[name])

    def refresh(
        self,
        flat: Array,
        old: Support,
        options: Options,
        draw: Array | int,
        values: Array | None = None,
        gradient: Array | None = None,
    ) -> Refresh:
        """Choose new sets from the current weights (size,); see :meth:`select`."""
        method = method_of(options)
        new = self.select(flat, options, draw, old, values, gradient)
        migration = Migration.between(old, new, self.size)
        if method.forgets and not method.explores:
            migration = migration.renewing(old, new)
        entered = migration.entered_forward(old, new)
        return Refresh(new, migration, self._count_members(new, entered))

    def prepare_refresh(
        self,
        values: Vector,
        reservoir: Reservoir,
        old: Support,
        options: Options,
        selection: IncrementalSelection,
    ) -> PreparedRefresh | None:
        """Choose new sets from the entries of B and a reserve, on NumPy arrays.

        The candidates are ranked now, which may fail; calling the result divides them, and `values`
        must not change before. Returns None where all weights have to be looked at:
        :meth:`refresh` does so. See :func:`choose_next` for the arguments.
        """
        as_one = self.group_size is None and self.layers == 1
        if not (as_one and method_of(options).takes_largest):
            return None
        with _naming(self.key):
            ranks, score = Ranks(make_key(options.seed, self.key, "ties")), options.block_score
            finish = prepare_next(
                selection, old, values, reservoir, ranks, block_score=score, name=self.key
            )
        return None if finish is None else functools.partial(self._describe, old, finish)

    def _describe(
        self, old: Support, finish: Callable[[], tuple[Exchange, IncrementalSelection]]
    ) -> IncrementalRefresh:
        """The refresh that an exchange makes, with the entries new to A counted by member."""
        exchange, following = finish()
        new, migration = exchange.support, exchange.migration
        if len(self.shapes) == 1:
            entered = exchange.entered * (1 if self.blocks is None else self.blocks.size)
            counts = np.asarray([entered], dtype=np.int32)
        else:
            counts = self._count_members(new, migration.entered_forward(old, new))
        return IncrementalRefresh(new, migration, counts, exchange.values, exchange.left, following)

    def refresh_across(
        self, values: Array, indices: Array, outside: Pieces, options: Options, total: Total
    ) -> Chosen:
        """Choose new sets of a tensor whose weights are spread over processes.

        See :func:`choose_across` for the arguments, and :func:`change_sets` for the new sets.
        """
        with _naming(self.key):
            ranks = Ranks(make_key(options.seed, self.key, "ties"))
            counts = self.forward, self.backward
            return choose_across(values, indices, outside, counts, ranks, total)

    def no_change(self, like: Array) -> Array:
        """Return the `entered_active` of a :class:`Refresh` that changed nothing."""
        xp = array_namespace(like)
        return xp.zeros(len(self.shapes), dtype=xp.int32, device=device(like))

    def _count_members(self, support: Support, flags: Array) -> Array:
        """Number of weights of each member in A that are flagged; int32."""
        xp = array_namespace(flags)
        if len(self.shapes) == 1:
            return xp.reshape(xp.sum(xp.astype(flags, xp.int32), dtype=xp.int32), (1,))
        indices = support.active_entries
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
def _naming(name: str) -> Iterator[None]:
    """Add the name of the tensor to a :class:`NonFiniteError`."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{name}: {error}; these cannot be ranked by magnitude") from None


class Refresh(NamedTuple):
    """Result of a refresh: the new sets, the migration of B, entries new to A by member (int32)."""

    support: Support
    migration: Migration
    entered_active: Array


class IncrementalRefresh(NamedTuple):
    """Result of an incremental refresh, in NumPy arrays: see :class:`Refresh`.

    Attributes
    ----------
    values
        Weights on the new B (|B|,).
    left
        Indices and weights of the entries that left B.
    selection
        The selection for the next refresh.
    """

    support: Support
    migration: Migration
    entered_active: Array
    values: Vector
    left: tuple[Vector, Vector]
    selection: IncrementalSelection


def rank_tensors(shapes: Mapping[str, Shape], options: Options) -> list[RankedTensors]:
    """Group the tensors to sparsify, given their shapes, into those that are ranked together."""
    if not shapes:
        return []
    stacked = {name for name in shapes if options.is_stacked(name)}
    if options.distribution == "global":
        return [_rank_globally(shapes, options, stacked)]
    overridden = {name: options.for_tensor(name) for name in shapes if options.overrides_of(name)}
    distributed = {
        name: shape[1:] if name in stacked else shape
        for name, shape in shapes.items()
        if not {"fwd", "bwd"} & options.overrides_of(name).keys()
    }
    forward, backward = (
        exact_densities(distributed, sparsity, distribution=options.distribution)
        | {
            name: 1 - exact_fraction(getattr(overridden[name], option))
            for name in shapes
            if name not in distributed
        }
        for option, sparsity in (("fwd", options.fwd), ("bwd", options.bwd))
    )
    return [
        _rank_alone(
            name,
            shape,
            (forward[name], backward[name]),
            overridden.get(name, options),
            stacked=name in stacked,
        )
        for name, shape in shapes.items()
    ]


def _rank_alone(
    name: str,
    shape: Shape,
    densities: tuple[Fraction, Fraction],
    options: Options,
    *,
    stacked: bool,
) -> RankedTensors:
    layers = shape[0] if stacked else 1
    blocks = blocks_of(name, shape, options.block, stacked=stacked)
    group_size = group_size_of(name, shape, options.pattern, stacked=stacked)
    if options.pattern is not None:
        densities = pattern_densities(options.pattern, options.fwd, options.bwd)
    units = (math.prod(shape) if blocks is None else blocks.count) // layers
    forward, backward = (layers * kept_count(units, density) for density in densities)
    density = float(densities[0])
    return RankedTensors({name: shape}, forward, backward, density, layers, blocks, group_size)


def members(key: str, names: Mapping[str, object]) -> list[str]:
    """Names of the tensors that are ranked together under this key."""
    return [key] if key in names else key.split(_JOIN)


def _rank_globally(
    shapes: Mapping[str, Shape], options: Options, stacked: set[str]
) -> RankedTensors:
    if stacked:
        raise OptionError(
            f"stacked tensors ({', '.join(sorted(stacked))}) are ranked layer by layer, but "
            "distribution='global' ranks all tensors as one: choose one of the two"
        )
    for name in shapes:
        if _JOIN in name:
            raise OptionError(
                f"distribution='global' joins the names of tensors with {_JOIN!r}, which {name!r} "
                "contains: rename the tensor"
            )
    shared = options.overrides_of(_JOIN.join(shapes))
    for name in shapes:
        if options.overrides_of(name) != shared:
            raise OptionError(
                f"overrides give {name} options of its own, but distribution='global' ranks and "
                "trains all tensors as one: choose one of the two, or name all of them by '*'"
            )
    size = sum(map(math.prod, shapes.values()))
    fwd, bwd = (1 - exact_fraction(sparsity) for sparsity in (options.fwd, options.bwd))
    return RankedTensors(dict(shapes), kept_count(size, fwd), kept_count(size, bwd), float(fwd))


# Divides the candidates that were ranked.
PreparedRefresh: TypeAlias = Callable[[], IncrementalRefresh]
