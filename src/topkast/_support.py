"""The sets A and B of a tensor, and how a vector over B follows when they change."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from topkast._errors import MismatchError
from topkast._primitives import Array, Namespace, device, is_traced
from topkast.backends import backend_of


@dataclass(frozen=True)
class Support:
    r"""The sets of one tensor: the flat indices of B, those of A first.

    Every vector over B (values, gradient, moments) is in this order, so that its first \|A\|
    entries are what the forward pass sees, and the others what explores.

    Attributes
    ----------
    indices
        Flat (C-order) indices of shape (\|B\|,): those of A ascending, then those of B∖A
        ascending. int32 where the tensor has fewer than 2³¹ entries, else int64.
    forward
        \|A\|.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> support = topkast.Support.of(active=np.asarray([2, 5]), exploring=np.asarray([0, 3]))
    >>> support.indices
    array([2, 5, 0, 3])
    >>> support.active, support.exploring
    (array([2, 5]), array([0, 3]))
    """

    indices: Array
    forward: int

    def __post_init__(self) -> None:
        if "jax" in sys.modules:
            _register_with_jax()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @classmethod
    def of(cls, active: Array, exploring: Array) -> Support:
        r"""From the ascending indices of A (\|A\|,) and of B∖A, arrays of one library."""
        xp = array_namespace(active, exploring)
        return cls(xp.concat([active, exploring]), active.shape[0])

    @classmethod
    def split(cls, indices: Array, in_forward: Array, forward: int) -> Support:
        r"""From ascending indices of B (\|B\|,) and flags (\|B\|,) of the \|A\| that are in A."""
        return cls(backend_of(indices).flagged_first(indices, in_forward, forward), forward)

    @property
    def backward(self) -> int:
        r"""\|B\|."""
        size: int = self.indices.shape[0]
        return size

    @property
    def active(self) -> Array:
        r"""Indices of A, ascending (\|A\|,)."""
        return self.indices[: self.forward]

    @property
    def exploring(self) -> Array:
        r"""Indices of B∖A, ascending (\|B\| − \|A\|,)."""
        return self.indices[self.forward :]

    def check(self, size: int, what: str) -> None:
        """Raise :class:`topkast.MismatchError` unless these are sets of a tensor of that size.

        Where values cannot be inspected, inside ``jax.jit``, the shape alone is checked.

        Parameters
        ----------
        size
            Number of entries of the tensor.
        what
            The subject of the message.
        """
        indices = self.indices
        xp = array_namespace(indices)
        if not xp.isdtype(indices.dtype, "signed integer") or len(indices.shape) != 1:
            raise MismatchError(
                f"{what} has indices of {indices.dtype} and shape {tuple(indices.shape)}: "
                "expected one vector of signed integers"
            )
        count: Any = self.forward  # of whatever type was given
        if not isinstance(count, int) or not 0 <= count <= self.backward:
            raise MismatchError(
                f"{what} has |A| = {self.forward!r} and |B| = {self.backward}: A is in B"
            )
        if is_traced(indices) or not self.backward:
            return
        ordered = xp.sort(indices)
        if int(ordered[0]) < 0 or int(ordered[-1]) >= size:
            raise MismatchError(f"{what} has indices outside of [0, {size})")
        if bool(xp.any(ordered[1:] == ordered[:-1])):
            raise MismatchError(f"{what} has an index twice")
        for name, part in (("A", self.active), ("B∖A", self.exploring)):
            if bool(xp.any(part[1:] < part[:-1])):
                raise MismatchError(f"{what} has indices of {name} that do not ascend")

    def narrowed(self, size: int) -> Support:
        """The same with indices as wide as a tensor of that size needs."""
        xp = array_namespace(self.indices)
        return Support(xp.astype(self.indices, width(xp, size), copy=False), self.forward)


def width(xp: Namespace, size: int) -> Any:
    """The dtype of flat indices into a tensor of that size."""
    return xp.int32 if size < 1 << 31 else xp.int64


def join_layers(indices: Array, forward: int, size: int) -> Support:
    """The sets of a tensor of some size from those of its layers.

    Of each layer there are the indices (layers, k), the first `forward` of them those of its A.
    """
    xp = array_namespace(indices)
    layers = indices.shape[0]
    dtype = width(xp, size)
    firsts = xp.arange(layers, dtype=dtype, device=device(indices)) * (size // layers)
    indices = xp.astype(indices, dtype) + firsts[:, None]
    parts = indices[:, :forward], indices[:, forward:]
    return Support.of(*(xp.reshape(part, (-1,)) for part in parts))


def in_forward(support: Support) -> Array:
    r"""Flags (\|B\|,) of the entries that are in A: the first \|A\|."""
    xp = array_namespace(support.indices)
    numbers = xp.arange(support.backward, dtype=xp.int32, device=device(support.indices))
    return numbers < support.forward


def weigh(values: Array, support: Support, on_active: float, on_exploring: float) -> Array:
    r"""`values` (shape (1, …, \|B\|)) times one number on A and another one on B∖A."""
    xp = array_namespace(values)
    if backend_of(values).by_elements:
        weights = xp.where(in_forward(support), on_active, on_exploring)
        return xp.reshape(xp.astype(weights, values.real.dtype), values.shape) * values
    flat, split = xp.reshape(values, (-1,)), support.forward
    weighed = xp.concat([flat[:split] * on_active, flat[split:] * on_exploring])
    return xp.reshape(weighed, values.shape)


def restrict_to_active(
    values: Array, support: Support, exploring: Array | bool, fill: float
) -> Array:
    r"""`values` (shape (1, …, \|B\|)), with `fill` on B∖A unless `exploring`."""
    if exploring is True:
        return values
    xp = array_namespace(values)
    if backend_of(values).by_elements:
        kept = xp.reshape(in_forward(support) | exploring, values.shape)
        return xp.where(kept, values, xp.full((), fill, dtype=values.dtype))
    if exploring:
        return values
    flat, split = xp.reshape(values, (-1,)), support.forward
    filled = xp.full_like(flat[split:], fill)
    return xp.reshape(xp.concat([flat[:split], filled]), values.shape)


class Migration(NamedTuple):
    r"""How the entries of vectors over B move when the sets change.

    Attributes
    ----------
    source
        For each index of the new B its position in the old one, below \|B\|; integers (\|B\|,).
    survives
        Whether it was there at all; booleans (\|B\|,).
    """

    source: Array
    survives: Array

    @classmethod
    def between(cls, old: Support, new: Support, size: int | None = None) -> Migration:
        """From one support to the next, of one tensor, whose size saves time where it is known."""
        if size is None:
            size = 1 + max(_largest(old), _largest(new))
        backend = backend_of(old.indices)
        return cls(*backend.positions(old.indices, old.forward, new.indices, new.forward, size))

    def apply(self, entry: Array, fresh: Array | float = 0.0) -> Array:
        r"""`entry` (shape (1, …, \|B\|), any dtype) on the new B, `fresh` for what enters it."""
        xp = array_namespace(entry)
        flat = xp.reshape(entry, (-1,))
        if isinstance(fresh, (int, float)):
            fresh = xp.full((), fresh, dtype=entry.dtype, device=device(entry))
        else:
            fresh = xp.astype(xp.reshape(fresh, (-1,)), entry.dtype)
        moved = xp.where(self.survives, xp.take(flat, self.source), fresh)
        return xp.reshape(moved, entry.shape)

    def entered_forward(self, old: Support, new: Support) -> Array:
        r"""Flags (\|A\|,) of the new A that say what was not in the old one."""
        source, survives = self.source[: new.forward], self.survives[: new.forward]
        return ~survives | (source >= old.forward)


def migrate(entry: Array, old: Support, new: Support, /, *, fresh: Array | float = 0.0) -> Array:
    """Carry a vector over B from one support to the next.

    Entries of indices that stay in B keep their bits, those of indices that leave are dropped.

    Parameters
    ----------
    entry
        One value per index of ``old.indices``, of any dtype: a moment, say.
    old, new
        The supports before and after a refresh.
    fresh
        Value for indices that enter B: a number, or an array like `entry`.

    Returns
    -------
    array
        Shape and dtype of `entry`, in the order of ``new.indices``.

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
    """The largest index, -1 where there is none."""
    parts = [part for part in (support.active, support.exploring) if part.shape[0]]
    return max((int(part[-1]) for part in parts), default=-1)


_registered: set[str] = set()


def _register_with_jax() -> None:
    """To JAX a support is a pytree: its indices are data, and |A| belongs to its structure."""
    if "jax" not in _registered:
        from jax.tree_util import register_dataclass

        register_dataclass(Support, data_fields=["indices"], meta_fields=["forward"])
        _registered.add("jax")
