"""The largest magnitudes of a tensor, and how its sets change, on all cores.

Without its sign a float is ordered as its bits are, read as an unsigned integer: these bits are
the *key* of an entry. NaN and infinity have the largest keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, types

from topkast.kernels.runtime._arguments import (
    THREAD_COUNTER,
    Vector,
    array_at,
    define_arguments,
    fill_record,
)
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._pool import default_threads, run
from topkast.kernels.runtime._vector import as_pointer, fetch_add

_CHUNK = 1 << 15  # entries that a thread takes at a time
_RANGES = 8  # parts of the tensor for each thread: some have more candidates than others
_DIGIT = 16  # bits of a key that one pass counts; the counts stay in a second-level cache

_COUNT = define_arguments(
    "values", "size", "digits", "prefix", "prefix_shift", "digit_shift", "digit_bits"
)
_COLLECT = define_arguments("flat", "size", "bound", "starts", "writes", "indices", "values")
_DIVIDE = define_arguments(
    "active_indices",
    "active_values",
    "active_size",
    "exploring_indices",
    "exploring_values",
    "exploring_size",
    "reserve_indices",
    "reserve_values",
    "reserve_size",
    "edges",
    "starts",
    "ranges",
    "writes",
    "forward_key",
    "backward_key",
    "bound_key",
    "forward_ties",
    "forward_ties_size",
    "backward_ties",
    "backward_ties_size",
    "indices",
    "values",
    "source",
)


class Threshold(NamedTuple):
    """The smallest of the largest magnitudes.

    Attributes
    ----------
    magnitude
        Of the last entry that is counted.
    surplus
        Number of entries with this magnitude that are too many.
    """

    magnitude: float
    surplus: int


class Division(NamedTuple):
    """Candidates in their new order: A, B∖A, those outside B, those below the bound.

    Attributes
    ----------
    indices, values
        Of all candidates, ascending within each of the four parts.
    source
        Position that each had in the old B, -1 for those that were outside; int32.
    sizes
        Lengths of the four parts.
    """

    indices: Vector
    values: Vector
    source: Vector
    sizes: tuple[int, int, int, int]


def count_not_finite(parts: Sequence[Vector], /, *, threads: int | None = None) -> int:
    """Number of NaN and infinite entries in contiguous float vectors of one dtype."""
    dtype = parts[0].dtype
    shift = _width(dtype) - _DIGIT
    digits = _count_digits(parts, 0, _width(dtype), shift, _DIGIT, threads)
    return int(digits[_key_of(np.inf, dtype) >> shift :].sum())


def find_threshold(
    parts: Sequence[Vector], count: int, /, *, threads: int | None = None
) -> Threshold:
    """The `count`-th largest magnitude of several vectors taken as one.

    It is found digit by digit: the keys are counted by their first 16 bits, then those that share
    the digit of the entry in question by the next 16 bits, until all bits are known.

    Parameters
    ----------
    parts
        Contiguous vectors of float32, or of float64.
    count
        From 1 to the number of all entries.
    threads
        As for :func:`multiply`.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import find_threshold
    >>> find_threshold([np.asarray([0.5, -2.0]), np.asarray([1.0, -1.0])], 2)
    Threshold(magnitude=1.0, surplus=1)
    """
    dtype = parts[0].dtype
    unknown = _width(dtype)
    key, rank, tied = 0, count, 0
    while unknown:
        bits = min(_DIGIT, unknown)
        digits = _count_digits(parts, key, unknown, unknown - bits, bits, threads)
        reached = np.cumsum(digits[::-1])
        steps = int(np.searchsorted(reached, rank))
        digit = len(digits) - 1 - steps
        tied = int(digits[digit])
        rank -= int(reached[steps]) - tied
        key, unknown = key << bits | digit, unknown - bits
    return Threshold(float(np.asarray(key, _unsigned(dtype)).view(dtype)), tied - rank)


def collect(flat: Vector, bound: float, /, *, threads: int | None = None) -> tuple[Vector, Vector]:
    """Ascending indices of the entries of `flat` (n,) of magnitude `bound` or more, and these.

    The indices are int32 where n is below 2³¹, else int64.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import collect
    >>> collect(np.asarray([0.5, -2.0, 1.0, 0.0]), 1.0)
    (array([1, 2], dtype=int32), array([-2.,  1.]))
    """
    index_dtype = np.dtype(np.int64 if len(flat) >= 1 << 31 else np.int32)
    starts = np.zeros(-(-len(flat) // _CHUNK) + 1, dtype=np.int64)
    indices, values = np.empty(0, index_dtype), np.empty(0, flat.dtype)
    for writes in (0, 1):
        _run(
            _COLLECT_KERNELS[flat.dtype, index_dtype],
            _COLLECT,
            threads,
            flat=flat,
            size=len(flat),
            bound=_key_of(bound, flat.dtype),
            starts=starts,
            writes=writes,
            indices=indices,
            values=values,
        )
        if not writes:
            np.cumsum(starts, out=starts)
            count = int(starts[-1])
            indices, values = np.empty(count, index_dtype), np.empty(count, flat.dtype)
    return indices, values


def divide(
    active: tuple[Vector, Vector],
    exploring: tuple[Vector, Vector],
    reserve: tuple[Vector, Vector],
    /,
    *,
    size: int,
    forward: float,
    backward: float,
    bound: float,
    ties: tuple[Vector, Vector] | None = None,
    threads: int | None = None,
) -> Division:
    """Divide the candidates for B into the next A, B∖A and reserve.

    Parameters
    ----------
    active, exploring, reserve
        Ascending indices and values of the entries of the old A, of the old B∖A, and of others. No
        index is in two of them.
    size
        Number of entries of the tensor.
    forward, backward
        The smallest magnitudes in the next A and B.
    bound
        Magnitude below which entries outside B are no candidates any more.
    ties
        Ascending indices of entries of magnitude `forward` that are not in A, and of those of
        magnitude `backward` that are not in B; int64.
    threads
        As for :func:`multiply`.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import divide
    >>> indices, values = np.asarray([1, 4, 0, 3], np.int32), np.asarray([2.0, 1.0, 3.0, 0.5])
    >>> active, exploring, reserve = ((indices[one], values[one]) for one in np.s_[:1, 1:2, 2:])
    >>> division = divide(active, exploring, reserve, size=6, forward=3, backward=2, bound=0.5)
    >>> division.indices, division.source, division.sizes
    (array([0, 1, 3, 4], dtype=int32), array([-1,  0, -1,  1], dtype=int32), (1, 1, 2, 0))
    """
    parts = active, exploring, reserve
    index_dtype, dtype = active[0].dtype, active[1].dtype
    ranges = _RANGES * (threads or default_threads())
    cuts = np.linspace(0, size, ranges + 1).astype(index_dtype)
    edges = np.stack([np.searchsorted(indices, cuts) for indices, _ in parts]).astype(np.int64)
    starts = np.zeros((4, ranges), dtype=np.int64)
    nothing = np.zeros(0, dtype=np.int64)
    forward_ties, backward_ties = ties or (nothing, nothing)
    total = sum(len(indices) for indices, _ in parts)
    indices, values = np.empty(total, index_dtype), np.empty(total, dtype)
    source = np.empty(total, np.int32)
    for writes in (0, 1):
        _run(
            _DIVIDE_KERNELS[dtype, index_dtype],
            _DIVIDE,
            threads,
            active_indices=active[0],
            active_values=active[1],
            active_size=len(active[0]),
            exploring_indices=exploring[0],
            exploring_values=exploring[1],
            exploring_size=len(exploring[0]),
            reserve_indices=reserve[0],
            reserve_values=reserve[1],
            reserve_size=len(reserve[0]),
            edges=edges,
            starts=starts,
            ranges=ranges,
            writes=writes,
            forward_key=_key_of(forward, dtype),
            backward_key=_key_of(backward, dtype),
            bound_key=_key_of(bound, dtype),
            forward_ties=forward_ties,
            forward_ties_size=len(forward_ties),
            backward_ties=backward_ties,
            backward_ties_size=len(backward_ties),
            indices=indices,
            values=values,
            source=source,
        )
        if not writes:
            sizes = starts.sum(axis=1)
            counts = starts.reshape(-1)
            starts = np.ascontiguousarray((np.cumsum(counts) - counts).reshape(4, ranges))
    return Division(indices, values, source, tuple(sizes.tolist()))


def _key_of(magnitude: float, dtype: Any) -> int:
    return int(np.asarray(magnitude, dtype).view(_unsigned(dtype)))


def _unsigned(dtype: Any) -> Any:
    return np.uint32 if np.dtype(dtype).itemsize == 4 else np.uint64


def _width(dtype: Any) -> int:
    """Number of bits in a key."""
    return 8 * int(np.dtype(dtype).itemsize) - 1


def _count_digits(
    parts: Sequence[Vector],
    prefix: int,
    prefix_shift: int,
    digit_shift: int,
    digit_bits: int,
    threads: int | None,
) -> Vector:
    """Number of keys with each digit among those with a prefix; (2 ** digit_bits,)."""
    counts = np.zeros((threads or default_threads(), 1 << digit_bits), dtype=np.int32)
    for values in parts:
        _run(
            _COUNT_KERNELS[values.dtype],
            _COUNT,
            threads,
            values=values,
            size=len(values),
            digits=counts,
            prefix=prefix,
            prefix_shift=prefix_shift,
            digit_shift=digit_shift,
            digit_bits=digit_bits,
        )
    digits: Vector = counts.sum(axis=0, dtype=np.int64)
    return digits


def _run(entry_point: Any, record: np.dtype[Any], threads: int | None, /, **arguments: Any) -> None:
    run(entry_point, fill_record(record, next_item=0, next_thread=0, **arguments), threads)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _key(bits: Any, unsigned: Any) -> Any:
    return unsigned(bits & unsigned(~unsigned(0)) >> unsigned(1))


@njit  # type: ignore[untyped-decorator]
def _count(address: Any, unsigned: Any) -> None:
    arguments = carray(as_pointer(address), 1, _COUNT)[0]
    values = array_at(arguments.values, arguments.size, unsigned)
    thread = fetch_add(address + THREAD_COUNTER)
    digits = array_at(
        arguments.digits + (thread << (arguments.digit_bits + 2)),
        1 << arguments.digit_bits,
        np.int32,
    )
    prefix = unsigned(arguments.prefix)
    prefix_shift, digit_shift = unsigned(arguments.prefix_shift), unsigned(arguments.digit_shift)
    mask = unsigned((1 << arguments.digit_bits) - 1)
    while True:
        start = fetch_add(address) * _CHUNK
        if start >= len(values):
            break
        for entry in range(start, min(start + _CHUNK, len(values))):
            key = _key(values[entry], unsigned)
            if key >> prefix_shift == prefix:
                digits[key >> digit_shift & mask] += 1


@njit  # type: ignore[untyped-decorator]
def _collect(address: Any, unsigned: Any, index: Any) -> None:
    arguments = carray(as_pointer(address), 1, _COLLECT)[0]
    flat = array_at(arguments.flat, arguments.size, unsigned)
    chunks = (arguments.size + _CHUNK - 1) // _CHUNK
    starts = array_at(arguments.starts, chunks + 1, np.int64)
    bound = unsigned(arguments.bound)
    while True:
        chunk = fetch_add(address)
        if chunk >= chunks:
            break
        first = chunk * _CHUNK
        if arguments.writes == 0:
            count = 0
            for entry in range(first, min(first + _CHUNK, len(flat))):
                count += _key(flat[entry], unsigned) >= bound
            starts[chunk + 1] = count
            continue
        indices = array_at(arguments.indices, starts[chunks], index)
        values = array_at(arguments.values, starts[chunks], unsigned)
        # Every entry is written, and the next one over it unless it is kept: there is no branch.
        kept, entry = starts[chunk], first
        while kept < starts[chunk + 1]:
            bits = flat[entry]
            indices[kept], values[kept] = entry, bits
            kept += np.int64(_key(bits, unsigned) >= bound)
            entry += 1


@njit  # type: ignore[untyped-decorator]
def _is_tie(index: Any, ties: Any) -> Any:
    place = np.searchsorted(ties, index)
    return place < len(ties) and ties[place] == index


@njit(inline="always")  # type: ignore[untyped-decorator]
def _part(key: Any, index: Any, keys: Any, forward_ties: Any, backward_ties: Any) -> Any:
    """0 for A, 1 for B∖A, 2 for what stays outside B, 3 for what is below the bound."""
    if key >= keys[0] and not (
        key == keys[0] and len(forward_ties) and _is_tie(index, forward_ties)
    ):
        return 0
    if key >= keys[1] and not (
        key == keys[1] and len(backward_ties) and _is_tie(index, backward_ties)
    ):
        return 1
    return 2 if key >= keys[2] else 3


@njit  # type: ignore[untyped-decorator]
def _divide(address: Any, unsigned: Any, index: Any) -> None:
    arguments = carray(as_pointer(address), 1, _DIVIDE)[0]
    keys = (
        unsigned(arguments.forward_key),
        unsigned(arguments.backward_key),
        unsigned(arguments.bound_key),
    )
    forward_ties = array_at(arguments.forward_ties, arguments.forward_ties_size, np.int64)
    backward_ties = array_at(arguments.backward_ties, arguments.backward_ties_size, np.int64)
    a_indices = array_at(arguments.active_indices, arguments.active_size, index)
    a_values = array_at(arguments.active_values, arguments.active_size, unsigned)
    e_indices = array_at(arguments.exploring_indices, arguments.exploring_size, index)
    e_values = array_at(arguments.exploring_values, arguments.exploring_size, unsigned)
    r_indices = array_at(arguments.reserve_indices, arguments.reserve_size, index)
    r_values = array_at(arguments.reserve_values, arguments.reserve_size, unsigned)
    total = len(a_indices) + len(e_indices) + len(r_indices)
    indices = array_at(arguments.indices, total, index)
    values = array_at(arguments.values, total, unsigned)
    source = array_at(arguments.source, total, np.int32)
    ranges = arguments.ranges
    edges = carray(as_pointer(arguments.edges), (3, ranges + 1), np.int64)
    starts = carray(as_pointer(arguments.starts), (4, ranges), np.int64)
    behind = np.iinfo(index).max
    while True:
        part = fetch_add(address)
        if part >= ranges:
            break
        a, e, r = edges[0, part], edges[1, part], edges[2, part]
        a_stop, e_stop, r_stop = edges[0, part + 1], edges[1, part + 1], edges[2, part + 1]
        first, second = starts[0, part], starts[1, part]
        third, fourth = starts[2, part], starts[3, part]
        # The three ascending lists become one: the smallest of their next indices follows.
        a_index = a_indices[a] if a < a_stop else behind
        e_index = e_indices[e] if e < e_stop else behind
        r_index = r_indices[r] if r < r_stop else behind
        for _ in range(a_stop - a + e_stop - e + r_stop - r):
            if a_index < e_index and a_index < r_index:
                entry, bits, position = a_index, a_values[a], a
                a += 1
                a_index = a_indices[a] if a < a_stop else behind
            elif e_index < r_index:
                entry, bits, position = e_index, e_values[e], len(a_indices) + e
                e += 1
                e_index = e_indices[e] if e < e_stop else behind
            else:
                entry, bits, position = r_index, r_values[r], -1
                r += 1
                r_index = r_indices[r] if r < r_stop else behind
            chosen = _part(_key(bits, unsigned), entry, keys, forward_ties, backward_ties)
            if chosen == 0:
                target = first
                first += 1
            elif chosen == 1:
                target = second
                second += 1
            elif chosen == 2:
                target = third
                third += 1
            else:
                target = fourth
                fourth += 1
            if arguments.writes:
                indices[target], values[target], source[target] = entry, bits, position
        if not arguments.writes:
            starts[0, part], starts[1, part] = first, second
            starts[2, part], starts[3, part] = third, fourth


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _count_single(address: Any) -> None:
    _count(address, np.uint32)


@kernel(_KERNEL)
def _count_double(address: Any) -> None:
    _count(address, np.uint64)


@kernel(_KERNEL)
def _collect_single(address: Any) -> None:
    _collect(address, np.uint32, np.int32)


@kernel(_KERNEL)
def _collect_single_wide(address: Any) -> None:
    _collect(address, np.uint32, np.int64)


@kernel(_KERNEL)
def _collect_double(address: Any) -> None:
    _collect(address, np.uint64, np.int32)


@kernel(_KERNEL)
def _collect_double_wide(address: Any) -> None:
    _collect(address, np.uint64, np.int64)


@kernel(_KERNEL)
def _divide_single(address: Any) -> None:
    _divide(address, np.uint32, np.int32)


@kernel(_KERNEL)
def _divide_single_wide(address: Any) -> None:
    _divide(address, np.uint32, np.int64)


@kernel(_KERNEL)
def _divide_double(address: Any) -> None:
    _divide(address, np.uint64, np.int32)


@kernel(_KERNEL)
def _divide_double_wide(address: Any) -> None:
    _divide(address, np.uint64, np.int64)


_SINGLE, _DOUBLE, _NARROW, _WIDE = map(np.dtype, ("float32", "float64", "int32", "int64"))
_COUNT_KERNELS = {_SINGLE: _count_single, _DOUBLE: _count_double}
_COLLECT_KERNELS = {
    (_SINGLE, _NARROW): _collect_single,
    (_SINGLE, _WIDE): _collect_single_wide,
    (_DOUBLE, _NARROW): _collect_double,
    (_DOUBLE, _WIDE): _collect_double_wide,
}
_DIVIDE_KERNELS = {
    (_SINGLE, _NARROW): _divide_single,
    (_SINGLE, _WIDE): _divide_single_wide,
    (_DOUBLE, _NARROW): _divide_double,
    (_DOUBLE, _WIDE): _divide_double_wide,
}
