"""The backend for CuPy, made of kernel launches: selection in a few passes, and fused updates."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np

from topkast import (
    SGD,
    Adam,
    AdamW,
    MismatchError,
    NonFiniteError,
    UnsupportedTensorError,
    apply_updates,
)
from topkast.adapter import (
    Array,
    Arrays,
    Backend,
    Betas,
    Plan,
    Ranks,
    Step,
    TopKASTState,
    bias_correction,
    corrections,
    grow,
    learning_rate,
)
from topkast_cupy._module import MAX_BINS, THREADS, TILE, Module, cuda_module

_MAX_GRID_SIZE = 2048  # thread blocks of kernels whose threads stride over all entries
_PER_THREAD = 8  # minimum number of entries for each thread of such a kernel
_MIN_WIDE_SIZE = 1 << 31  # number of entries from which indices have 64 bits

# The digits, in bits and from the highest, of a magnitude, by the number of bits of a weight.
_DIGITS = {16: (8, 7), 32: (11, 10, 10), 64: (11, 11, 11, 10, 10, 10)}


@functools.cache
def load() -> CuPyBackend:
    """The backend for CuPy's arrays."""
    import cupy

    return CuPyBackend(cupy, cuda_module, cupy.cuda.Device)


class CuPyBackend(Backend):
    """The backend for arrays of a library with NumPy's names.

    Parameters
    ----------
    xp
        The library: CuPy, or NumPy in tests, where `module` runs the kernels on the host.
    module
        Returns the kernels for the bits of a weight and of an index.
    device
        Returns the current device.
    """

    def __init__(
        self, xp: Any, module: Callable[[int, int], Module], device: Callable[[], Any]
    ) -> None:
        self.xp, self._module, self._device = xp, module, device

    def take(self, flat: Array, indices: Array) -> Array:
        """See :class:`topkast.backends.Backend`."""
        return flat.take(indices)

    def check(self, name: str, array: Array) -> None:
        """Raise an error that names the array, if the kernels do not support it."""
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise UnsupportedTensorError(
                f"{name}: weights in CuPy must be float16, float32 or float64, got {array.dtype}"
            )
        self._check_device(name, array)

    def _check_device(self, name: str, array: Array) -> None:
        if array.device != self._device():
            raise MismatchError(
                f"{name} is on {array.device!r}, but the current device is {self._device()!r}: "
                "run this code inside `with array.device:`"
            )

    def zero_count(self, beside: Array) -> Array:
        """See :class:`topkast.backends.Backend`; on the host."""
        return np.zeros((), dtype=np.int32)

    def largest_first(self, flat: Array, forward: int, backward: int, ranks: Ranks) -> Array:
        """See :class:`topkast.backends.Backend`."""
        indices, magnitudes = self.largest(flat, backward, ranks)
        flags = self.largest_flags(magnitudes, forward, ranks.at(indices))
        return self.flagged_first(indices, flags, forward)

    def largest(self, flat: Array, count: int, ranks: Ranks) -> tuple[Array, Array]:
        """Ascending indices of the `count` largest magnitudes of a vector (n,), and the entries."""
        flat, state = self._threshold(flat, count)
        above, equal, tiles = self._tally(flat, state)
        if int(equal[-1]) > int(state[1]):
            flags = self._break_ties(flat, state, int(equal[-1]), ranks)
            indices = self.true_indices(flags, count)
        else:
            indices = self._collect(flat, count, state, above, equal, tiles)
        return indices, flat.take(indices)

    def largest_flags(self, flat: Array, count: int, ranks: Ranks) -> Array:
        """Flags (n,) of the `count` largest magnitudes of floats, or of the largest integers."""
        flat, state = self._threshold(_as_floats(flat), count)
        _, equal, _ = self._tally(flat, state)
        if int(equal[-1]) > int(state[1]):
            return self._break_ties(flat, state, int(equal[-1]), ranks)
        return self._flags(flat, state, flat.size)

    def true_indices(self, mask: Array, count: int) -> Array:
        """Ascending indices of the `count` true entries of a mask (n,)."""
        mask = self.xp.ascontiguousarray(mask)
        state = self.xp.zeros(3, dtype=np.int64)  # selects entries above zero, and no ties
        above, equal, tiles = self._tally(mask, state)
        return self._collect(mask, count, state, above, equal, tiles)

    def scatter(self, values: Array, indices: Array, size: int, fill: float) -> Array:
        """See :class:`topkast.backends.Backend`."""
        base = self.xp.full((size,), fill, dtype=values.dtype)
        self.write(base, indices, values)
        return base

    def put(self, flat: Array, indices: Array, values: Array) -> Array:
        """See :class:`topkast.backends.Backend`."""
        copy = flat.copy()
        self.write(copy, indices, values)
        return copy

    def positions(
        self, old: Array, old_split: int, new: Array, new_split: int, size: int | None
    ) -> tuple[Array, Array]:
        """See :class:`topkast.backends.Backend`; it uses a table as long as the tensor."""
        table = self.xp.full((size,), -1, dtype=np.int32)
        self.write(table, old, self.xp.arange(len(old), dtype=np.int32))
        source = table.take(new)
        return self.xp.maximum(source, 0), source >= 0

    def write(self, flat: Array, indices: Array, values: Array) -> None:
        """Write `values` (k,) at `indices` into the vector `flat`, in place."""
        if flat.itemsize > 8:  # complex128
            flat[indices] = self.xp.reshape(values, (-1,))
            return
        values = self.xp.ascontiguousarray(values, dtype=flat.dtype)
        indices = self.xp.ascontiguousarray(indices, dtype=_index_dtype(flat.size))
        self._stride(
            "scatter", flat, len(indices), indices, values, len(indices), flat, wide=_is_wide(flat)
        )

    def fuses(self, rule: Any) -> bool:
        """See :class:`topkast.backends.Backend`; there are kernels for the rules of topkast."""
        return type(rule) in (SGD, Adam, AdamW)

    def step(
        self,
        rule: Any,
        plan: Plan,
        steps: Mapping[str, Step],
        grads: Mapping[str, Array],
        state: TopKASTState,
        params: Mapping[str, Array],
    ) -> tuple[Arrays, Any, Arrays]:
        """See :class:`topkast.backends.Backend`; one kernel reads, updates and writes a tensor."""
        dense = {name: params[name] for name in params if name not in plan.inside}
        fields = [field for field in state.inner._fields if field != "step"]
        old = {field: getattr(state.inner, field) for field in fields}
        gradients = {name: grads[name] for name in dense}
        displacements, inner = rule.update(gradients, state.inner, dense)
        weights = apply_updates(dense, displacements)
        kernel, shared_arguments = self._rule_arguments(rule, state.inner.step, inner.step)
        ages = {key: grow(age) for key, age in state.ages.items()}
        for ranked in plan.tensors:
            key, support, step = ranked.key, state.supports[ranked.key], steps[ranked.key]
            flat = ranked.flatten(params).copy()
            tensor_arguments = []
            for field in fields:
                entry = old[field].get(key)  # without momentum, SGD has no entry
                if entry is not None:
                    getattr(inner, field)[key] = self.xp.empty_like(entry)
                tensor_arguments += [entry, getattr(inner, field).get(key)]
            if kernel == "adam":
                tensor_arguments += self._age_arguments(step.betas, state, key)
            self._stride(
                kernel,
                flat,
                support.backward_size,
                self.xp.ascontiguousarray(support.entries, dtype=_index_dtype(flat.size)),
                support.forward_size,
                support.backward_size,
                step.on_active,
                step.on_exploring,
                int(step.penalty_kind == "l1"),
                int(step.exploring),
                flat,
                self.xp.ascontiguousarray(ranked.flatten(grads), dtype=flat.dtype),
                *tensor_arguments,
                *shared_arguments,
                wide=_is_wide(flat),
            )
            weights |= ranked.unflatten(flat)
        return {name: weights[name] for name in params}, inner, ages

    def _age_arguments(self, betas: Betas | None, state: TopKASTState, key: str) -> list[Any]:
        """Kernel arguments that scale young entries: see ``topkast._age``."""
        if betas is None:
            return [None, 0, None, None]
        factors = self._corrections(betas)
        count = min(int(state.updates) + 1, len(factors) - 1)
        return [state.ages[key], len(factors) - 1, factors, factors[count : count + 1]]

    @functools.lru_cache(maxsize=8)  # noqa: B019 - one object for each library
    def _corrections(self, betas: Betas) -> Array:
        return self.xp.asarray(corrections(betas))

    def _rule_arguments(
        self, rule: SGD | Adam, step: Array, next_step: Array
    ) -> tuple[str, list[Any]]:
        """The kernel of a rule, and the arguments that all tensors share."""
        lr = self._as_scalar(learning_rate(rule.lr, step))
        if isinstance(rule, SGD):
            return "sgd", [lr, float(rule.momentum), int(rule.nesterov), float(rule.weight_decay)]
        of_mean, of_square = (bias_correction(beta, next_step, np.float64) for beta in rule.betas)
        return "adam", [
            lr,
            self._as_scalar(lr / of_mean),
            self._as_scalar(self.xp.sqrt(of_square)),
            *map(float, rule.betas),
            float(rule.eps),
            float(rule.weight_decay),
            int(rule.decoupled),
        ]

    def _as_scalar(self, number: Any) -> Array:
        """Convert a number or a 0-d array to a 0-d array on the device."""
        if isinstance(number, Real):  # `full` does not synchronise, as a copy from the host would
            return self.xp.full((), float(number), dtype=np.float64)
        return self.xp.asarray(number, dtype=np.float64)

    def _threshold(self, flat: Array, count: int) -> tuple[Array, Array]:
        """Find the `count`-th largest magnitude of a vector, as the State of kernels.cu."""
        self.check("params", flat)
        flat = self.xp.ascontiguousarray(flat)
        state = self.xp.asarray(np.asarray([0, count, 0], dtype=np.int64))
        counts = self.xp.zeros(MAX_BINS, dtype=np.uint64)
        digits = _DIGITS[8 * flat.itemsize]
        shift = sum(digits)
        for bits in digits:
            first = int(shift == sum(digits))
            shift -= bits
            self._stride(
                "histogram", flat, flat.size, flat, flat.size, shift, bits, first, state, counts
            )
            self._launch("choose", flat, 1, shift, bits, state, counts)
        bad_count = int(state[2])
        if bad_count:
            raise NonFiniteError(f"{bad_count} of {flat.size} entries are NaN or infinite")
        return flat, state

    def _tally(self, keys: Array, state: Array) -> tuple[Array, Array, int]:
        """Running counts by tile of the entries above a threshold and at it; number of tiles."""
        tiles = max(1, math.ceil(keys.size / TILE))
        above, equal = (self.xp.empty(tiles, dtype=np.int64) for _ in range(2))
        self._launch("count", keys, tiles, keys, keys.size, state, above, equal)
        return above.cumsum(), equal.cumsum(), tiles

    def _collect(
        self, keys: Array, count: int, state: Array, above: Array, equal: Array, tiles: int
    ) -> Array:
        """Ascending indices of `count` entries: those above a threshold, and the first at it."""
        indices = self.xp.empty(count, dtype=_index_dtype(keys.size))
        arguments = keys, keys.size, state, above, equal, indices, None
        self._launch("collect", keys, tiles, *arguments, wide=_is_wide(keys))
        return indices

    def _flags(self, keys: Array, state: Array, max_ties: int) -> Array:
        """Flags of the entries above a threshold, and of the first `max_ties` at it."""
        state = state.copy()
        state[1:2].fill(max_ties)
        above, equal, tiles = self._tally(keys, state)
        flags = self.xp.empty(keys.shape, dtype=np.bool_)
        self._launch("collect", keys, tiles, keys, keys.size, state, above, equal, None, flags)
        return flags

    def _break_ties(self, flat: Array, state: Array, ties: int, ranks: Ranks) -> Array:
        """Flags of the entries above a threshold, and of those at it with the largest ranks."""
        signed = np.dtype(f"i{flat.itemsize}")
        keys = flat.view(signed) & np.iinfo(signed).max
        positions = self.true_indices(keys == state[0].astype(signed), ties)
        tie_ranks, rank_state = self._threshold(_as_floats(ranks(positions)), int(state[1]))
        flags = self._flags(flat, state, 0)
        flags[positions] = self._flags(tie_ranks, rank_state, 1)
        return flags

    def _stride(
        self, name: str, like: Array, entries: int, *arguments: Any, wide: bool = False
    ) -> None:
        """Launch a kernel whose threads stride over this number of entries."""
        grid_size = min(_MAX_GRID_SIZE, math.ceil(entries / (THREADS * _PER_THREAD)))
        self._launch(name, like, max(1, grid_size), *arguments, wide=wide)

    def _launch(
        self, name: str, like: Array, grid_size: int, *arguments: Any, wide: bool = False
    ) -> None:
        """Launch a kernel that is compiled for the dtype of `like`."""
        self._check_device("an array", like)
        module = self._module(8 * like.itemsize, 64 if wide else 32)
        module.launch(name, grid_size, *arguments)


def _is_wide(flat: Array) -> bool:
    """Whether flat indices into a vector need 64 bits."""
    wide: bool = flat.size >= _MIN_WIDE_SIZE
    return wide


def _index_dtype(size: int) -> Any:
    return np.int64 if size >= _MIN_WIDE_SIZE else np.int32


def _as_floats(keys: Array) -> Array:
    """View integers as floats of the same bits, which have the same order."""
    if keys.dtype not in (np.int32, np.int64):
        return keys
    return keys.astype(np.int64).view(np.float64)
