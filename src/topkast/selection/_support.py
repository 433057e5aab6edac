"""The sets A and B of a tensor, and the migration of vectors over B when they change."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from array_api_compat import array_namespace, is_jax_array

from topkast._errors import MismatchError
from topkast._primitives import Array, Namespace, device, fill_like, is_traced
from topkast.backends import backend_of, load_builtin
from topkast.selection._units import Blocks


@dataclass(frozen=True)
class Support:
    r"""The sets of one tensor: the units of B, with those of A first.

    A unit is a weight, or a block of weights. Every vector over B (values, gradient, moments) is in
    this order, unit by unit: its first `forward_size` entries belong to A, which the forward pass
    sees, and the others to B∖A, which explores.

    Attributes
    ----------
    indices
        Unit numbers of B, of shape (\|B\|,): A ascending, then B∖A ascending. For single weights
        they are flat (C-order) indices. int32 if the tensor has fewer than 2³¹ units, else int64.
    forward
        \|A\|, in units.
    blocks
        The division of the tensor into blocks; None if units are single weights.
    group_size
        Number of consecutive weights in a group, under the option `pattern`: each group holds
        equally many of A, and of B. None: no pattern.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> support = topkast.Support.of(active=np.asarray([2, 5]), exploring=np.asarray([0, 3]))
    >>> support.indices
    array([2, 5, 0, 3])
    >>> support.active, support.exploring
    (array([2, 5]), array([0, 3]))

    A 4 × 4 matrix in blocks of 2 × 2, where A is the last block and B∖A the first:

    >>> blocks = topkast.Blocks(rows=2, columns=2, height=4, width=4)
    >>> support = topkast.Support(np.asarray([3, 0], np.int32), 1, blocks)
    >>> support.entries
    array([10, 11, 14, 15,  0,  1,  4,  5], dtype=int32)
    """

    indices: Array
    forward: int
    blocks: Blocks | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        if sys.modules.get("jax") is not None:
            load_builtin("jax")  # registers Support as a pytree

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_entries"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @classmethod
    def of(cls, active: Array, exploring: Array) -> Support:
        r"""Make a support from ascending indices of A (\|A\|,) and of B∖A, of one library."""
        xp = array_namespace(active, exploring)
        return cls(xp.concat([active, exploring]), active.shape[0])

    @classmethod
    def split(cls, indices: Array, in_forward: Array, forward: int) -> Support:
        r"""Make a support from ascending indices of B (\|B\|,) and flags (\|B\|,) of A."""
        return cls(backend_of(indices).flagged_first(indices, in_forward, forward), forward)

    @property
    def backward(self) -> int:
        r"""\|B\|, in units."""
        size: int = self.indices.shape[0]
        return size

    @property
    def active(self) -> Array:
        r"""Units of A, ascending (\|A\|,)."""
        return self.indices[: self.forward]

    @property
    def exploring(self) -> Array:
        r"""Units of B∖A, ascending (\|B\| − \|A\|,)."""
        return self.indices[self.forward :]

    @property
    def forward_size(self) -> int:
        r"""Number of weights in A, and the position at which B∖A begins in vectors over B."""
        return self.forward * self._unit_size

    @property
    def backward_size(self) -> int:
        r"""Number of weights in B, and the length of vectors over B."""
        return self.backward * self._unit_size

    @property
    def entries(self) -> Array:
        """Flat (C-order) indices of the weights in B (backward_size,), unit by unit, A first.

        The weights of a block are in row-major order.
        """
        if self.blocks is None:
            return self.indices
        if is_jax_array(self.indices):  # a traced array must not outlive its trace
            return self.blocks.entries(self.indices)
        if "_entries" not in self.__dict__:
            self.__dict__["_entries"] = self.blocks.entries(self.indices)
        entries: Array = self.__dict__["_entries"]
        return entries

    @property
    def active_entries(self) -> Array:
        """Flat (C-order) indices of the weights in A (forward_size,), in the order of `entries`."""
        return self.entries[: self.forward_size]

    @property
    def exploring_entries(self) -> Array:
        """Flat (C-order) indices of the weights in B∖A, in the order of `entries`."""
        return self.entries[self.forward_size :]

    def ascending_entries(self) -> Iterator[Array]:
        """Yield the flat indices of the weights in A, then of those in B∖A, both ascending."""
        for units in (self.active, self.exploring):
            if self.blocks is None:
                yield units
            else:
                entries = self.blocks.entries(units)
                ascends = self.blocks.rows == 1
                yield entries if ascends else array_namespace(entries).sort(entries)

    @property
    def cached_bytes(self) -> int:
        """Bytes of :attr:`entries` of blocks, if they were computed and are kept."""
        entries: Array = self.__dict__.get("_entries")
        if entries is None:
            return 0
        return int(entries.shape[0]) * int(array_namespace(entries).iinfo(entries.dtype).bits) // 8

    @property
    def _unit_size(self) -> int:
        return 1 if self.blocks is None else self.blocks.size

    def in_blocks(self, blocks: Blocks | None) -> Support:
        """Reinterpret the units as blocks of a tensor, or as single weights."""
        return self if blocks is self.blocks else replace(self, blocks=blocks)

    def in_groups(self, group_size: int | None) -> Support:
        """Reinterpret the units as those of groups of consecutive weights, or of no pattern."""
        return self if group_size == self.group_size else replace(self, group_size=group_size)

    def check(self, size: int, what: str) -> None:
        """Raise :class:`topkast.MismatchError` unless these are valid sets of a tensor.

        Inside ``jax.jit``, where values cannot be inspected, only dtype, shape and counts are
        checked.

        Parameters
        ----------
        size
            Number of entries of the tensor.
        what
            Subject of the error message.
        """
        indices = self.indices
        if self.blocks is not None:
            size = self._count_blocks(size, what)
        xp = array_namespace(indices)
        if not xp.isdtype(indices.dtype, "signed integer") or len(indices.shape) != 1:
            raise MismatchError(
                f"{what} has indices of {indices.dtype} and shape {tuple(indices.shape)}: "
                "expected one vector of signed integers"
            )
        count: Any = self.forward  # a custom method may set any type
        if not isinstance(count, int) or not 0 <= count <= self.backward:
            raise MismatchError(
                f"{what} has |A| = {self.forward!r} and |B| = {self.backward}: expected an integer "
                "|A| between 0 and |B|"
            )
        if is_traced(indices):
            return
        nonempty = {
            name: units
            for name, units in (("A", self.active), ("B∖A", self.exploring))
            if units.shape[0]
        }
        for name, units in nonempty.items():
            if bool(xp.any(units[1:] <= units[:-1])):
                raise MismatchError(f"{what} has indices of {name} that do not ascend")
            if int(units[0]) < 0 or int(units[-1]) >= size:
                raise MismatchError(f"{what} has indices outside of [0, {size})")
        if len(nonempty) == 2:
            active, exploring = nonempty.values()
            _, in_both = backend_of(indices).positions(
                active, active.shape[0], exploring, exploring.shape[0], size
            )
            if bool(xp.any(in_both)):
                raise MismatchError(f"{what} has an index twice, in A and in B∖A")
        if self.group_size is not None:
            self._check_groups(size, what)

    def _check_groups(self, size: int, what: str) -> None:
        """Raise :class:`topkast.MismatchError` unless all groups hold equally many units."""
        assert self.group_size is not None
        xp, groups = array_namespace(self.indices), size // self.group_size
        for name, units in (("A", self.active), ("B∖A", self.exploring)):
            expected, remainder = divmod(units.shape[0], max(groups, 1))
            by_group = xp.reshape(units[: groups * expected], (groups, expected))
            numbers = xp.arange(groups, dtype=units.dtype, device=device(units))[:, None]
            # Units ascend: if each group holds `expected` of them, row i is of group i.
            if remainder or bool(xp.any(by_group // self.group_size != numbers)):
                raise MismatchError(
                    f"{what} does not hold equally many units of {name} in each group of "
                    f"{self.group_size} consecutive ones, as the option `pattern` requires"
                )

    def _count_blocks(self, size: int, what: str) -> int:
        blocks = self.blocks
        assert blocks is not None
        if blocks.height * blocks.width != size:
            raise MismatchError(
                f"{what} has blocks of a matrix of {blocks.height} × {blocks.width}, but the "
                f"tensor has {size} entries"
            )
        return blocks.count

    def narrowed(self, size: int) -> Support:
        """Convert the indices to the dtype for a tensor of `size` units."""
        xp = array_namespace(self.indices)
        dtype = index_dtype_for(xp, size)
        return replace(self, indices=xp.astype(self.indices, dtype, copy=False))


def index_dtype_for(xp: Namespace, size: int) -> Any:
    """The dtype of indices of a tensor of `size` units."""
    return xp.int32 if size < 1 << 31 else xp.int64


def join_layers(indices: Array, forward: int, size: int) -> Support:
    """Join the sets of layers into those of a stacked tensor of `size` units.

    Row i of `indices` (layers, k) holds the indices of layer i, the first `forward` of them its A.
    """
    xp = array_namespace(indices)
    layers = indices.shape[0]
    dtype = index_dtype_for(xp, size)
    firsts = xp.arange(layers, dtype=dtype, device=device(indices)) * (size // layers)
    indices = xp.astype(indices, dtype) + firsts[:, None]
    active, exploring = indices[:, :forward], indices[:, forward:]
    return Support.of(xp.reshape(active, (-1,)), xp.reshape(exploring, (-1,)))


def in_forward(support: Support) -> Array:
    r"""Flags (backward_size,) of the weights in B that are in A."""
    xp = array_namespace(support.indices)
    numbers = xp.arange(support.backward_size, dtype=xp.int32, device=device(support.indices))
    return numbers < support.forward_size


def scale_by_set(values: Array, support: Support, on_active: float, on_exploring: float) -> Array:
    r"""Multiply `values` (1, …, \|B\|) by one factor on A and another on B∖A."""
    xp = array_namespace(values)
    if backend_of(values).by_elements:
        factors = xp.where(in_forward(support), on_active, on_exploring)
        return xp.reshape(xp.astype(factors, values.real.dtype), values.shape) * values
    flat, split = xp.reshape(values, (-1,)), support.forward_size
    scaled = xp.concat([flat[:split] * on_active, flat[split:] * on_exploring])
    return xp.reshape(scaled, values.shape)


def restrict_to_active(
    values: Array, support: Support, exploring: Array | bool, fill: float
) -> Array:
    r"""Set `values` (1, …, \|B\|) to `fill` on B∖A unless `exploring`."""
    if exploring is True:
        return values
    xp = array_namespace(values)
    if backend_of(values).by_elements:
        kept = xp.reshape(in_forward(support) | exploring, values.shape)
        return xp.where(kept, values, xp.full((), fill, dtype=values.dtype))
    if exploring:
        return values
    flat, split = xp.reshape(values, (-1,)), support.forward_size
    filled = xp.full_like(flat[split:], fill)
    return xp.reshape(xp.concat([flat[:split], filled]), values.shape)


class Migration(NamedTuple):
    r"""The positions from which entries of vectors over B are taken when the sets change.

    Attributes
    ----------
    source
        Position in the old B of each weight of the new B; integers (backward_size,).
    survives
        Whether each weight of the new B was in the old B; booleans (backward_size,).
    """

    source: Array
    survives: Array

    @classmethod
    def between(cls, old: Support, new: Support, size: int | None = None) -> Migration:
        """Compute the migration between two supports of a tensor; giving its `size` saves time."""
        if old.blocks != new.blocks:
            raise MismatchError(
                f"the units changed from {old.blocks or 'single weights'} to "
                f"{new.blocks or 'single weights'}: both supports must have the same blocks"
            )
        if new.blocks is None:
            return cls._between_units(old, new, size)
        source, survives = cls._between_units(old, new, new.blocks.count)
        return cls(new.blocks.positions(source), new.blocks.repeat(survives))

    @classmethod
    def _between_units(cls, old: Support, new: Support, size: int | None) -> Migration:
        if size is None and not (is_traced(old.indices) or is_traced(new.indices)):
            size = 1 + max(_largest(old), _largest(new))
        backend = backend_of(old.indices)
        return cls(*backend.positions(old.indices, old.forward, new.indices, new.forward, size))

    def apply(self, entry: Array, fresh: Array | float = 0.0) -> Array:
        r"""Move `entry` (1, …, \|B\|) of any dtype to the new B; entries that enter get `fresh`."""
        return self.apply_all([(entry, fresh)])[0]

    def apply_all(self, moves: Sequence[tuple[Array, Array | float]]) -> list[Array]:
        """Move several arrays at once: pairs of `entry` and `fresh`, as for :meth:`apply`."""
        xp = array_namespace(self.source)
        pairs = [(xp.reshape(entry, (-1,)), fill_like(entry, fresh)) for entry, fresh in moves]
        moved = backend_of(self.source).migrate(pairs, self.source, self.survives)
        return [xp.reshape(out, entry.shape) for out, (entry, _) in zip(moved, moves, strict=True)]

    def entered_forward(self, old: Support, new: Support) -> Array:
        """Flags (forward_size,) of the weights in the new A that were not in the old A."""
        split = new.forward_size
        source, survives = self.source[:split], self.survives[:split]
        return ~survives | (source >= old.forward_size)

    def renewing(self, old: Support, new: Support) -> Migration:
        """The same, but entries that enter A start anew, also those that were in the old B."""
        split = new.forward_size
        stays = ~self.entered_forward(old, new)
        xp = array_namespace(stays)
        return Migration(self.source, xp.concat([stays, self.survives[split:]]))


def migrate(entry: Array, old: Support, new: Support, /, *, fresh: Array | float = 0.0) -> Array:
    """Carry a vector over B from one support to the next.

    Entries that stay in B keep their bits; entries that leave B are dropped.

    Parameters
    ----------
    entry
        One value per index of ``old.entries``, of any dtype; a moment, for example.
    old, new
        The supports before and after a refresh.
    fresh
        Value of entries that enter B: a number, or an array like `entry`.

    Returns
    -------
    array
        Shape and dtype of `entry`, in the order of ``new.entries``.

    Raises
    ------
    MismatchError
        If the two supports have different blocks.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> old = topkast.Support.of(np.asarray([0, 5]), np.asarray([2]))
    >>> new = topkast.Support.of(np.asarray([2, 3]), np.asarray([5]))
    >>> topkast.migrate(np.asarray([10.0, 20.0, 30.0]), old, new)
    array([30.,  0., 20.])
    """
    return Migration.between(old, new).apply(entry, fresh)


def _largest(support: Support) -> int:
    """The largest index, or -1 if B is empty."""
    nonempty = [units for units in (support.active, support.exploring) if units.shape[0]]
    return max((int(units[-1]) for units in nonempty), default=-1)
