"""JAX, including compiled functions, where values cannot be inspected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import register_dataclass

from topkast.backends import _xla
from topkast.backends._base import Array, Backend, Ranks, threshold_finder
from topkast.selection._support import Support

T = TypeVar("T")

# Our indices are always in bounds, so that XLA can skip the checks.
_IN_BOUNDS: dict[str, Any] = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


class JAXBackend(Backend):
    """See :class:`topkast.backends.Backend`."""

    by_elements: ClassVar[bool] = True

    def device(self, array: Array) -> Any:
        if self.is_traced(array) or not array.committed:
            return None  # an explicit device would commit the results to it
        return _xla.replicated_beside(array)

    def host(self, array: Array) -> np.ndarray[Any, Any] | None:
        if self.is_traced(array) or {device.platform for device in array.devices()} != {"cpu"}:
            return None
        if not array.is_fully_addressable:  # parts of it are in other processes
            return None
        view = np.asarray(array)
        return view.astype(np.float32) if view.dtype.itemsize <= 2 else view

    def is_traced(self, array: Array) -> bool:
        return isinstance(array, jax.core.Tracer)

    def unsharded(self, array: Array) -> Array:
        return _xla.unsharded(array)

    def constant(self, array: Array) -> Array:
        return lax.stop_gradient(array)

    def cond(self, due: Array, change: Callable[..., T], state: T, *operands: Any) -> T:
        if not self.is_traced(due):
            return super().cond(due, change, state, *operands)
        return _xla.cond(due, change, state, *operands)

    def take(self, flat: Array, indices: Array) -> Array:
        return flat.at[indices].get(unique_indices=True, **_IN_BOUNDS)

    def lookup(self, table: Array, indices: Array) -> Array:
        return table.at[indices].get(**_IN_BOUNDS)

    def scatter(self, values: Array, indices: Array, size: int, fill: float) -> Array:
        base = jnp.full((size,), fill, dtype=values.dtype, device=self.device(values))
        return self.put(base, indices, values)

    def put(self, flat: Array, indices: Array, values: Array) -> Array:
        return flat.at[indices].set(values, unique_indices=True, **_IN_BOUNDS)

    def true_indices(self, mask: Array, count: int) -> Array:
        return _xla.true_indices(mask, count)

    def flagged_first(self, entries: Array, flags: Array, count: int) -> Array:
        return _xla.flagged_first(entries, flags, count)

    def flag_largest(self, keys: Array, count: int, ranks: Ranks) -> Array:
        indices = ranks.indices
        if indices is None:
            indices = jnp.arange(keys.shape[0], device=self.device(keys))
        find_threshold = threshold_finder.get() if keys.dtype == jnp.int32 else None
        return _xla.largest_flags(keys, count, indices + ranks.first, ranks.key, find_threshold)

    def magnitudes(self, flat: Array) -> Array:
        """Bit patterns of magnitudes, NaN lowest: XLA may flush subnormal floats to zero."""
        if not jnp.issubdtype(flat.dtype, jnp.floating):
            return flat
        magnitudes = jnp.abs(flat) if self.is_traced(flat) else super().magnitudes(flat)
        dtype = {1: jnp.int8, 2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[flat.dtype.itemsize]
        bits = lax.bitcast_convert_type(magnitudes, dtype)
        return jnp.where(jnp.isnan(flat), jnp.asarray(-1, dtype=dtype), bits)

    def positions(
        self, old: Array, old_split: int, new: Array, new_split: int, size: int | None
    ) -> tuple[Array, Array]:
        if size is None:
            return super().positions(old, old_split, new, new_split, size)
        positions = jnp.arange(old.shape[0], dtype=jnp.int32, device=self.device(old))
        table = jnp.full((size,), -1, dtype=jnp.int32, device=self.device(old))
        source = self.take(self.put(table, old, positions), new)
        return jnp.maximum(source, 0), source >= 0

    def for_each_layer(
        self, choose: Callable[[Array, Any], Array], flat: Array, layers: int
    ) -> Array:
        if not self.is_traced(flat):
            return super().for_each_layer(choose, flat, layers)
        by_layer = flat.reshape(layers, -1)
        return jax.vmap(choose)(by_layer, jnp.arange(layers) * by_layer.shape[1])


# The indices of a support are data; |A|, blocks and groups belong to the tree structure.
register_dataclass(
    Support, data_fields=["indices"], meta_fields=["forward", "blocks", "group_size"]
)

BACKEND = JAXBackend()
