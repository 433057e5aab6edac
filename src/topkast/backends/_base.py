"""The backend of any array library: what is asked of one, by functions of the standard alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar

from array_api_compat import array_namespace
from array_api_compat import device as device_of

from topkast._errors import NonFiniteError

T = TypeVar("T")
Array = Any
Host = Any  # numpy.ndarray


class Ranks(Protocol):
    """The rank of each entry among those of equal magnitude; see ``topkast.selection._random``."""

    @property
    def key(self) -> tuple[int, int, int, int]: ...

    @property
    def first(self) -> Array | int: ...

    @property
    def indices(self) -> Array | None: ...

    def __call__(self, positions: Array) -> Array:
        """Ranks at some positions (k,), the largest first; int64 of 32 bits, all different."""

    def at(self, indices: Array) -> Ranks:
        """Those of the entries at some positions (k,)."""


class Backend:
    """How vectors of one array library are read, written and ranked.

    A vector is of shape (n,); indices into it are integers (k,), unique and below n, in any order.

    Attributes
    ----------
    by_elements
        Whether vectors over B are better treated entry by entry, under a condition, than cut into
        A and B∖A: where a compiler fuses the one, and cannot lay out the other over devices.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.backends import backend_of
    >>> backend = backend_of(np.ones(1))
    >>> backend.true_indices(np.asarray([True, False, True]), 2)
    array([0, 2])
    >>> backend.put(np.zeros(3), np.asarray([2, 0]), np.asarray([1.0, 2.0]))
    array([2., 0., 1.])
    """

    by_elements: ClassVar[bool] = False

    def check(self, name: str, array: Array) -> None:
        """Raise an error that names `array`, if this backend cannot work on it."""

    def device(self, array: Array) -> Any:
        """Where to make an array that works together with `array`."""
        return device_of(array)

    def host(self, array: Array) -> Host | None:
        """The same numbers as a NumPy array without a copy, or None where that cannot be.

        It cannot on an accelerator, in a traced computation, and for libraries that hide their
        memory. Floats that NumPy lacks or is slow at (bfloat16, float16) come as float32, which
        holds each of their values exactly.
        """
        return None

    def is_traced(self, array: Array) -> bool:
        """Whether `array` stands for values that are not known yet."""
        return False

    def constant(self, array: Array) -> Array:
        """The same numbers, from which nothing is differentiated."""
        return array

    def zero_count(self, beside: Array) -> Array:
        """A 0-d int32 zero that can be read without waiting for the device of `beside`."""
        xp = array_namespace(beside)
        return xp.zeros((), dtype=xp.int32, device=self.device(beside))

    def cond(self, due: Array, change: Callable[..., T], state: T, *operands: Any) -> T:
        """``change(state, *operands) if due else state``, for a 0-d flag that may be traced."""
        return change(state, *operands) if bool(due) else state

    def take(self, flat: Array, indices: Array) -> Array:
        """Entries (k,) of a vector."""
        return array_namespace(flat).take(flat, indices)

    def lookup(self, table: Array, indices: Array) -> Array:
        """Entries (k,) of a short vector, at indices of which some may be equal."""
        return array_namespace(table).take(table, indices)

    def scatter(self, values: Array, indices: Array, size: int, fill: float) -> Array:
        """A vector of `size` entries, `values` (k,) at `indices` and `fill` elsewhere."""
        xp = array_namespace(values, indices)
        base = xp.full((size,), fill, dtype=values.dtype, device=self.device(values))
        if not values.shape[0]:
            return base
        order = xp.argsort(indices)
        indices, values = xp.take(indices, order), xp.take(values, order)
        everywhere = xp.arange(size, dtype=indices.dtype)
        place = xp.searchsorted(indices, everywhere)
        place = xp.minimum(place, xp.asarray(values.shape[0] - 1, dtype=place.dtype))
        hit = xp.take(indices, place) == everywhere
        return xp.where(hit, xp.take(values, place), base)

    def put(self, flat: Array, indices: Array, values: Array) -> Array:
        """A copy of a vector with `values` (k,) at `indices`."""
        xp, size = array_namespace(flat), flat.shape[0]
        everywhere = xp.ones(indices.shape[0], dtype=xp.bool, device=self.device(flat))
        inside = self.scatter(everywhere, indices, size, False)
        return xp.where(inside, self.scatter(values, indices, size, 0.0), flat)

    def true_indices(self, mask: Array, count: int) -> Array:
        """Ascending indices of the `count` true entries of a mask (n,), `count` being known."""
        xp = array_namespace(mask)
        dtype = self.index_dtype(mask)
        seen = xp.cumulative_sum(xp.astype(mask, dtype), dtype=dtype)
        wanted = xp.arange(1, count + 1, dtype=dtype, device=self.device(mask))
        return xp.astype(xp.searchsorted(seen, wanted), dtype)

    def index_dtype(self, beside: Array) -> Any:
        """The library's own dtype for indices (int64; int32 in JAX unless 64 bits are enabled)."""
        info = array_namespace(beside).__array_namespace_info__()
        return info.default_dtypes(device=self.device(beside))["indexing"]

    def flagged_first(self, entries: Array, flags: Array, count: int) -> Array:
        """Entries (k,) in their order, but the `count` of them that are flagged (k,) first."""
        chosen = self.take(entries, self.true_indices(flags, count))
        others = self.take(entries, self.true_indices(~flags, entries.shape[0] - count))
        return array_namespace(entries).concat([chosen, others])

    def largest_first(self, flat: Array, forward: int, backward: int, ranks: Ranks) -> Array:
        """Indices of the `backward` largest magnitudes, of which the `forward` largest come first.

        Both parts ascend. Equal magnitudes rank by `ranks`, the largest first. Raises
        :class:`topkast.NonFiniteError` for NaN and infinity, where values can be looked at;
        elsewhere NaN ranks last.
        """
        indices = self.true_indices(self.largest_flags(flat, backward, ranks), backward)
        flags = self.largest_flags(self.take(flat, indices), forward, ranks.at(indices))
        return self.flagged_first(indices, flags, forward)

    def largest_flags(self, flat: Array, count: int, ranks: Ranks) -> Array:
        """Flags (n,) of the `count` largest magnitudes of floats, or the largest of integers."""
        xp, keys = array_namespace(flat), self.magnitudes(flat)
        threshold = self.kth_largest(keys, count)
        above, equal = keys > threshold, keys == threshold
        found = int(xp.count_nonzero(equal))
        wanted = count - int(xp.count_nonzero(above))
        if found > wanted:
            positions = self.true_indices(equal, found)
            order = ranks(positions)
            chosen = order >= self.kth_largest(order, wanted)
            equal = self.scatter(chosen, positions, keys.shape[0], False)
        return above | equal

    def magnitudes(self, flat: Array) -> Array:
        """Absolute values of floats; integers as they are."""
        xp = array_namespace(flat)
        if not xp.isdtype(flat.dtype, "real floating"):
            return flat
        magnitudes = xp.abs(flat)
        if not bool(xp.isfinite(xp.max(magnitudes))):
            bad = flat.shape[0] - int(xp.count_nonzero(xp.isfinite(flat)))
            raise NonFiniteError(f"{bad} of {flat.shape[0]} entries are NaN or infinite")
        return magnitudes

    def kth_largest(self, keys: Array, count: int) -> Array:
        """The `count`-th largest of a vector, 0-d."""
        return array_namespace(keys).sort(keys)[keys.shape[0] - count]

    def positions(
        self, old: Array, old_split: int, new: Array, new_split: int, size: int | None
    ) -> tuple[Array, Array]:
        """Where each of the indices `new` (k,) is in `old` (k,), and flags of those that are.

        Both are two ascending parts, of which the second begins at the split, of indices below
        `size`, which is None where they are traced and it is not known. Where one is nowhere, any
        position below k is returned for it.
        """
        xp = array_namespace(old, new)
        source, found = xp.zeros_like(new), xp.zeros_like(new, dtype=xp.bool)
        for part, first in ((old[:old_split], 0), (old[old_split:], old_split)):
            if part.shape[0]:
                last = xp.full((), part.shape[0] - 1, dtype=part.dtype, device=self.device(part))
                position = xp.minimum(xp.astype(xp.searchsorted(part, new), part.dtype), last)
                hit = xp.take(part, position) == new
                source, found = xp.where(hit, position + first, source), found | hit
        return source, found

    def for_each_layer(
        self, choose: Callable[[Array, Any], Array], flat: Array, layers: int
    ) -> Array:
        """``choose(part, first index)`` for parts of equal length of a vector, stacked."""
        length = flat.shape[0] // layers
        starts = range(0, flat.shape[0], length)
        chosen = [choose(flat[start : start + length], start) for start in starts]
        return array_namespace(*chosen).stack(chosen)

    def fuses(self, rule: Any) -> bool:
        """Whether :meth:`step` does a whole update of this rule."""
        return False

    def step(self, rule: Any, plan: Any, steps: Any, grads: Any, state: Any, params: Any) -> Any:
        """The next parameters, the rule's next state, and ages, for a rule that it fuses.

        `steps` say what the update does to each tensor, by its key.
        """
        raise NotImplementedError
