"""The backend interface, implemented for any array library by functions of the standard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar, Protocol, TypeVar

from array_api_compat import array_namespace
from array_api_compat import device as device_of

from topkast._errors import NonFiniteError

T = TypeVar("T")
Array = Any
Host = Any  # numpy.ndarray
ThresholdFinder = Callable[[Array, Any], Array]

# How JAX finds the k-th largest of int32 keys (n,), given keys and k: a function of an adapter, or
# None for a bisection.
threshold_finder: ContextVar[ThresholdFinder | None] = ContextVar("threshold_finder", default=None)


class Ranks(Protocol):
    """Ranks of entries with equal magnitudes; see ``topkast.selection._random``."""

    @property
    def key(self) -> tuple[int, int, int, int]: ...

    @property
    def first(self) -> Array | int: ...

    @property
    def indices(self) -> Array | None: ...

    def __call__(self, positions: Array) -> Array:
        """Ranks at positions (k,): distinct 32-bit numbers as int64; the largest comes first."""

    def at(self, indices: Array) -> Ranks:
        """The ranks of the entries at `indices` (k,)."""


class Backend:
    """Operations that read, write and rank vectors of one array library.

    A vector has shape (n,); indices into it are integers (k,), unique and below n, in any order.

    Attributes
    ----------
    by_elements
        Whether code should select entries of A by a mask instead of slicing a vector over B into A
        and B∖A. A compiler fuses masks, but cannot place slices on several devices.

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
        """Raise an error that names the array, if this backend does not support it."""

    def device(self, array: Array) -> Any:
        """The device on which new arrays can be combined with `array`."""
        return device_of(array)

    def full(self, number: float, like: Array) -> Array:
        """A number as an array (), of the dtype and device of `like`."""
        xp = array_namespace(like)
        return xp.full((), number, dtype=like.dtype, device=self.device(like))

    def host(self, array: Array) -> Host | None:
        """View `array` as a NumPy array without a copy, or return None if that is impossible.

        It is impossible on an accelerator, in a traced computation, and for libraries that hide
        their memory. Dtypes that NumPy lacks or computes slowly (bfloat16, float16) are converted
        to float32, which is exact.
        """
        return None

    def is_traced(self, array: Array) -> bool:
        """Whether the values of `array` are unknown, as inside ``jax.jit``."""
        return False

    def unsharded(self, array: Array) -> Array:
        """`array`, gathered on all devices if its type says how it is sharded."""
        return array

    def constant(self, array: Array) -> Array:
        """Detach `array` from differentiation."""
        return array

    def zero_count(self, beside: Array) -> Array:
        """Make a 0-d int32 zero that can be read without waiting for the device of `beside`."""
        xp = array_namespace(beside)
        return xp.zeros((), dtype=xp.int32, device=self.device(beside))

    def cond(self, due: Array, change: Callable[..., T], state: T, *operands: Any) -> T:
        """``change(state, *operands) if due else state``, for a 0-d flag that may be traced."""
        return change(state, *operands) if bool(due) else state

    def take(self, flat: Array, indices: Array) -> Array:
        """Read the entries (k,) of a vector at `indices`."""
        return array_namespace(flat).take(flat, indices)

    def lookup(self, table: Array, indices: Array) -> Array:
        """Read the entries (k,) of a short vector at `indices`, which may repeat."""
        return array_namespace(table).take(table, indices)

    def scatter(self, values: Array, indices: Array, size: int, fill: float) -> Array:
        """Make a vector of `size` entries: `values` (k,) at `indices` and `fill` elsewhere."""
        xp = array_namespace(values, indices)
        base = xp.full((size,), fill, dtype=values.dtype, device=self.device(values))
        if not values.shape[0]:
            return base
        order = xp.argsort(indices)
        indices, values = xp.take(indices, order), xp.take(values, order)
        all_indices = xp.arange(size, dtype=indices.dtype)
        position = xp.searchsorted(indices, all_indices)
        position = xp.minimum(position, xp.asarray(values.shape[0] - 1, dtype=position.dtype))
        is_written = xp.take(indices, position) == all_indices
        return xp.where(is_written, xp.take(values, position), base)

    def put(self, flat: Array, indices: Array, values: Array) -> Array:
        """Copy a vector and write `values` (k,) at `indices`."""
        xp, size = array_namespace(flat), flat.shape[0]
        flags = xp.ones(indices.shape[0], dtype=xp.bool, device=self.device(flat))
        is_written = self.scatter(flags, indices, size, False)
        return xp.where(is_written, self.scatter(values, indices, size, 0.0), flat)

    def true_indices(self, mask: Array, count: int) -> Array:
        """Ascending indices of the true entries of a mask (n,), which has `count` of them."""
        xp = array_namespace(mask)
        dtype = self.index_dtype(mask)
        running_count = xp.cumulative_sum(xp.astype(mask, dtype), dtype=dtype)
        ordinals = xp.arange(1, count + 1, dtype=dtype, device=self.device(mask))
        return xp.astype(xp.searchsorted(running_count, ordinals), dtype)

    def index_dtype(self, beside: Array) -> Any:
        """The library's default index dtype (int64; int32 in JAX unless 64 bits are enabled)."""
        info = array_namespace(beside).__array_namespace_info__()
        return info.default_dtypes(device=self.device(beside))["indexing"]

    def flagged_first(self, entries: Array, flags: Array, count: int) -> Array:
        """Move the `count` flagged entries (k,) to the front, and keep the order otherwise."""
        flagged = self.take(entries, self.true_indices(flags, count))
        others = self.take(entries, self.true_indices(~flags, entries.shape[0] - count))
        return array_namespace(entries).concat([flagged, others])

    def largest_first(self, flat: Array, forward: int, backward: int, ranks: Ranks) -> Array:
        """Indices of the `backward` largest magnitudes, with those of the `forward` largest first.

        Both groups ascend. Equal magnitudes rank by `ranks`, the largest first. Raises
        :class:`topkast.NonFiniteError` for NaN and infinity; in a traced computation NaN ranks last
        instead.
        """
        keys = self.magnitudes(flat)
        indices = self.true_indices(self.flag_largest(keys, backward, ranks), backward)
        flags = self.flag_largest(self.take(keys, indices), forward, ranks.at(indices))
        return self.flagged_first(indices, flags, forward)

    def largest_flags(self, flat: Array, count: int, ranks: Ranks) -> Array:
        """Flags (n,) of the `count` largest magnitudes of floats, or the largest of integers."""
        return self.flag_largest(self.magnitudes(flat), count, ranks)

    def flag_largest(self, keys: Array, count: int, ranks: Ranks) -> Array:
        """Flags (n,) of the `count` largest of keys from :meth:`magnitudes`."""
        xp = array_namespace(keys)
        threshold = self.kth_largest(keys, count)
        flags = keys >= threshold
        surplus = int(xp.count_nonzero(flags)) - count
        if not surplus:
            return flags
        equal = keys == threshold
        ties = int(xp.count_nonzero(equal))
        positions = self.true_indices(equal, ties)
        tie_ranks = ranks(positions)
        chosen = tie_ranks >= self.kth_largest(tie_ranks, ties - surplus)
        return (keys > threshold) | self.scatter(chosen, positions, keys.shape[0], False)

    def magnitudes(self, flat: Array) -> Array:
        """Absolute values of floats; integers unchanged."""
        xp = array_namespace(flat)
        if not xp.isdtype(flat.dtype, "real floating"):
            return flat
        magnitudes = xp.abs(flat)
        if not bool(xp.isfinite(xp.max(magnitudes))):
            bad_count = flat.shape[0] - int(xp.count_nonzero(xp.isfinite(flat)))
            raise NonFiniteError(f"{bad_count} of {flat.shape[0]} entries are NaN or infinite")
        return magnitudes

    def kth_largest(self, keys: Array, count: int) -> Array:
        """The `count`-th largest entry of a vector, 0-d."""
        return array_namespace(keys).sort(keys)[keys.shape[0] - count]

    def positions(
        self, old: Array, old_split: int, new: Array, new_split: int, size: int | None
    ) -> tuple[Array, Array]:
        """Positions in `old` (k,) of the indices `new` (k,), and flags of those in `old`.

        Both vectors consist of two ascending runs, the second of which begins at the split. Indices
        are below `size`, which is None if they are traced and it is unknown. The position of an
        index that `old` lacks is arbitrary, but below k.
        """
        xp = array_namespace(old, new)
        source, is_found = xp.zeros_like(new), xp.zeros_like(new, dtype=xp.bool)
        for run, start in ((old[:old_split], 0), (old[old_split:], old_split)):
            if run.shape[0]:
                last = xp.full((), run.shape[0] - 1, dtype=run.dtype, device=self.device(run))
                position = xp.minimum(xp.astype(xp.searchsorted(run, new), run.dtype), last)
                is_match = xp.take(run, position) == new
                source = xp.where(is_match, position + start, source)
                is_found = is_found | is_match
        return source, is_found

    def migrate(
        self, moves: Sequence[tuple[Array, Array]], source: Array, survives: Array
    ) -> list[Array]:
        """Entries (k,) at the positions `source`; `fresh`, 0-d or (k,), where not `survives`.

        `moves` are pairs of a vector and of its `fresh` entries.
        """
        xp = array_namespace(source)
        return [xp.where(survives, xp.take(flat, source), fresh) for flat, fresh in moves]

    def for_each_layer(
        self, choose: Callable[[Array, Any], Array], flat: Array, layers: int
    ) -> Array:
        """Stack ``choose(layer, first index)`` over the layers of a vector, of equal length."""
        length = flat.shape[0] // layers
        starts = range(0, flat.shape[0], length)
        chosen = [choose(flat[start : start + length], start) for start in starts]
        return array_namespace(*chosen).stack(chosen)

    def fuses(self, rule: Any) -> bool:
        """Whether :meth:`step` supports this rule."""
        return False

    def step(self, rule: Any, plan: Any, steps: Any, grads: Any, state: Any, params: Any) -> Any:
        """Take a whole update in fused kernels; return parameters, the rule's state and ages.

        `steps` are the :class:`topkast.adapter.Step` of each tensor, by key.
        """
        raise NotImplementedError
