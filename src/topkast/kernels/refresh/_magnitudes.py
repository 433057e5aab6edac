"""The entries of a tensor that reach a magnitude.

Without its sign a float is ordered as its bits are, read as an unsigned integer: these bits are
the *key* of an entry. NaN and infinity have the largest keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels.runtime._arguments import (
    Vector,
    array_at,
    define_arguments,
    run_kernel,
)
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._lanes import (
    EVERY,
    HAS_LANES,
    LANE_BYTES,
    LANES,
    add,
    append,
    at_least,
    count,
    first_lanes,
    load,
    numbers,
    splat,
    without_sign,
)
from topkast.kernels.runtime._pool import address_of
from topkast.kernels.runtime._vector import as_pointer, fetch_add

_CHUNK = 1 << 15  # entries that a thread takes at a time
_BLOCK = 1 << 6  # entries of a chunk that are skipped together if none is kept
_COLLECT = define_arguments(
    "flat",
    "size",
    "bound",
    "span",
    "starts",
    "writes",
    "numbers",
    "without",
    "edges",
    "runs",
    "indices",
    "values",
)


def collect(
    flat: Vector,
    bound: float,
    limit: float | None = None,
    /,
    *,
    indices: Vector | None = None,
    without: Sequence[Vector] = (),
    threads: int | None = None,
) -> tuple[Vector, Vector]:
    """Indices of the entries of `flat` (n,) of magnitude `bound` or more, and these entries.

    Parameters
    ----------
    flat
        Entries, contiguous, float32 or float64.
    bound, limit
        The smallest and the largest magnitude that are kept; None: there is no largest.
    indices
        Indices of all entries (n,), int32 or int64. By default they are positions, int32: n must be
        below 2³¹.
    without
        Vectors of ascending positions, int32, of entries that are left out. `bound` must be above 0
        if there are any.
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        For other dtypes and shapes, for a vector that is not contiguous, and for a longer one.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import collect
    >>> collect(np.asarray([0.5, -2.0, 1.0, 0.0]), 1.0)
    (array([1, 2], dtype=int32), array([-2.,  1.]))
    >>> collect(np.asarray([0.5, -2.0]), 1.0, indices=np.asarray([7, 3]))
    (array([3]), array([-2.]))
    >>> collect(np.asarray([0.5, -2.0, 1.0]), 0.5, without=[np.asarray([0, 2], np.int32)])
    (array([1], dtype=int32), array([-2.]))
    """
    check_magnitudes(flat, flat.dtype)
    if len(flat) >= 1 << 31:
        raise ValueError(f"the vector must have fewer than 2**31 entries, got {len(flat)}")
    is_short = indices is None or indices.dtype == np.int32
    if indices is not None:
        _check_indices(indices, flat)
    chunks = -(-len(flat) // _CHUNK)
    starts = np.zeros(chunks + 1, dtype=np.int64)
    first = key_of_magnitude(bound, flat.dtype)
    addresses: Any = 0
    edges: Any = 0
    if without:
        _check_positions(without, len(flat), first)
        addresses = np.asarray([address_of(run) for run in without], dtype=np.int64)
        ends = (np.arange(chunks + 1) * _CHUNK).clip(max=len(flat)).astype(np.int32)
        edges = np.concatenate([np.searchsorted(run, ends) for run in without])
    last = (1 << (8 * flat.dtype.itemsize - 1)) - 1
    if limit is not None:
        last = key_of_magnitude(limit, flat.dtype)
    if last < first:
        return np.empty(0, np.int32 if indices is None else indices.dtype), flat[:0].copy()
    run_again = run_kernel(
        (_COLLECT_SINGLE, _collect_double),
        flat.dtype,
        threads,
        _COLLECT,
        flat=flat,
        size=len(flat),
        bound=first,
        span=last - first,
        starts=starts,
        writes=0,
        numbers=0 if indices is None or not is_short else indices,
        without=addresses,
        edges=edges,
        runs=len(without),
        indices=0,
        values=0,
    )
    np.cumsum(starts, out=starts)
    count = int(starts[-1])
    found, values = np.empty(count, np.int32), np.empty(count, flat.dtype)
    if count:
        run_again(writes=1, indices=found, values=values)
    return (found if indices is None or is_short else indices.take(found)), values


def _check_indices(indices: Vector, flat: Vector) -> None:
    if indices.dtype not in (np.int32, np.int64):
        raise TypeError(f"indices must be int32 or int64, got {indices.dtype}")
    if indices.shape != flat.shape or not indices.flags.c_contiguous:
        raise ValueError(f"indices must be contiguous {flat.shape}, got shape {indices.shape}")


def _check_positions(without: Sequence[Vector], size: int, key: int) -> None:
    if not key:
        raise ValueError("bound must be above 0 if entries are left out, got 0")
    for run in without:
        if run.dtype != np.int32 or run.ndim != 1 or not run.flags.c_contiguous:
            raise TypeError(
                f"the positions of `without` must be contiguous vectors of int32, got {run.dtype} "
                f"of shape {run.shape}"
            )
        if len(run) and not 0 <= run[0] <= run[-1] < size:
            raise ValueError(
                f"the positions of `without` must ascend in [0, {size}), got {run[0]} to {run[-1]}"
            )


def check_magnitudes(vector: Vector, dtype: Any) -> None:
    """Raise TypeError or ValueError unless this is a contiguous vector of floats of this dtype."""
    if vector.dtype not in (np.float32, np.float64) or vector.dtype != dtype:
        raise TypeError(
            f"expected vectors of one dtype, float32 or float64, got {vector.dtype} and {dtype}"
        )
    if vector.ndim != 1 or not vector.flags.c_contiguous:
        raise ValueError(f"expected contiguous vectors, got shape {vector.shape}")


def key_of_magnitude(magnitude: float, dtype: Any) -> int:
    """Return the key of a magnitude, rounded to `dtype`: of infinity if it exceeds all numbers."""
    if not 1e-37 < magnitude < 3e38:  # not a normal number in each precision: NumPy may complain
        with np.errstate(over="ignore", under="ignore"):
            return int(np.asarray(magnitude, dtype).view(unsigned_of(dtype)))
    return int(np.asarray(magnitude, dtype).view(unsigned_of(dtype)))


def unsigned_of(dtype: Any) -> Any:
    """The unsigned integers as long as floats of this dtype."""
    return np.uint32 if np.dtype(dtype).itemsize == 4 else np.uint64


@njit(inline="always")  # type: ignore[untyped-decorator]
def key_of(bits: Any, unsigned: Any) -> Any:
    """Clear the sign of a float, given as an unsigned integer."""
    return unsigned(bits & unsigned(~unsigned(0)) >> unsigned(1))


@njit  # type: ignore[untyped-decorator]
def _collect(address: Any, unsigned: Any, in_lanes: Any) -> None:
    """Count the entries of each chunk, or write them; `in_lanes` is True for lanes, or None."""
    arguments = carray(as_pointer(address), 1, _COLLECT)[0]
    flat = array_at(arguments.flat, arguments.size, unsigned)
    chunks, runs = (arguments.size + _CHUNK - 1) // _CHUNK, arguments.runs
    starts = array_at(arguments.starts, chunks + 1, np.int64)
    bound, span = unsigned(arguments.bound), unsigned(arguments.span)
    without = array_at(arguments.without, runs, np.int64)
    edges = carray(as_pointer(arguments.edges), (runs, chunks + 1), np.int64)
    scratch = np.empty(_CHUNK if runs else 0, unsigned)
    while True:
        chunk = fetch_add(address)
        if chunk >= chunks:
            break
        first = chunk * _CHUNK
        part = flat[first : min(first + _CHUNK, len(flat))]
        if runs:  # a copy with zeros stays in a cache
            scratch[: len(part)] = part
            part = scratch[: len(part)]
            for run in range(runs):
                start, stop = edges[run, chunk], edges[run, chunk + 1]
                _clear(part, array_at(without[run] + 4 * start, stop - start, np.int32), first)
        if arguments.writes == 0:
            if in_lanes is None:
                starts[chunk + 1] = count_inside(part, bound, span, unsigned)
            else:
                starts[chunk + 1] = _count_inside_lanes(part, bound, span)
            continue
        size = starts[chunk + 1] - starts[chunk]
        indices = array_at(arguments.indices + 4 * starts[chunk], size, np.int32)
        values = array_at(arguments.values + part.itemsize * starts[chunk], size, unsigned)
        if in_lanes is None:
            write_inside(part, first, bound, span, indices, values, unsigned)
        elif size:
            write_inside_lanes(part, first, bound, span, indices, values, None)
        if arguments.numbers:
            numbers_of = array_at(arguments.numbers, arguments.size, np.int32)
            for position in range(size):
                indices[position] = numbers_of[np.uint32(indices[position])]


@njit  # type: ignore[untyped-decorator]
def _clear(entries: Any, positions: Any, first: Any) -> None:
    """Write 0 at some positions, counted from `first` on."""
    for number in range(len(positions)):
        place = np.uint32(positions[number] - first)
        if place < len(entries):
            entries[place] = 0


@njit  # type: ignore[untyped-decorator]
def count_inside(entries: Any, bound: Any, span: Any, unsigned: Any) -> Any:
    """Number of entries with a key in [bound, bound + span]."""
    count = 0
    for position in range(len(entries)):  # an iterator over the array would not be vectorised
        count += unsigned(key_of(entries[position], unsigned) - bound) <= span
    return count


@njit  # type: ignore[untyped-decorator]
def write_inside(
    entries: Any, first: Any, bound: Any, span: Any, indices: Any, values: Any, unsigned: Any
) -> None:
    """Write the entries with a key in [bound, bound + span], and their indices from `first` on."""
    kept: Any = 0
    start: Any = 0
    while kept < len(indices):
        block = entries[start : start + _BLOCK]
        stop = kept + count_inside(block, bound, span, unsigned)
        # Every entry is written, and the next one over it unless it is kept: there is no branch.
        position = 0
        while kept < stop:
            bits = block[position]
            indices[kept], values[kept] = first + start + position, bits
            kept += np.int64(unsigned(key_of(bits, unsigned) - bound) <= span)
            position += 1
        start += _BLOCK


@njit(inline="always")  # type: ignore[untyped-decorator]
def _find_inside(bits: Any, valid: Any, ends: Any) -> Any:
    """Mask of the lanes between two ends."""
    key = without_sign(bits)
    return at_least(key, ends[0]) & at_least(ends[1], key) & valid


@njit  # type: ignore[untyped-decorator]
def _count_inside_lanes(entries: Any, bound: Any, span: Any) -> Any:
    """:func:`count_inside` in lanes."""
    ends = splat(np.int32(bound)), splat(np.int32(bound + span))
    source, size, found = np.int64(entries.ctypes.data), len(entries), 0
    for _ in range(size // LANES):  # processors read ahead of loads without a mask only
        found += count(_find_inside(load(source, EVERY), EVERY, ends))
        source += LANE_BYTES * LANES
    valid = first_lanes(size % LANES)
    return found + count(_find_inside(load(source, valid), valid, ends))


@njit(inline="always")  # type: ignore[untyped-decorator]
def _pack_inside(
    bits: Any, valid: Any, positions: Any, ends: Any, place: Any, stop: Any, are_few: Any
) -> Any:
    """Write the lanes between two ends, and their positions; return the next two addresses."""
    mask = _find_inside(bits, valid, ends)
    if are_few is not None and not mask:
        return place
    index_place, value_place = place
    append(positions, mask, index_place, stop[0])
    append(bits, mask, value_place, stop[1])
    size = LANE_BYTES * count(mask)
    return index_place + size, value_place + size


@njit  # type: ignore[untyped-decorator]
def write_inside_lanes(
    entries: Any, first: Any, bound: Any, span: Any, indices: Any, values: Any, are_few: Any
) -> None:
    """:func:`write_inside` in lanes; `are_few` is True if few are written, or None.

    If so, a branch skips lanes without any. Otherwise no processor could predict it.
    """
    ends = splat(np.int32(bound)), splat(np.int32(bound + span))
    positions, step = add(splat(np.int32(first)), numbers()), splat(np.int32(LANES))
    place = np.int64(indices.ctypes.data), np.int64(values.ctypes.data)
    source, size, written = np.int64(entries.ctypes.data), len(entries), LANE_BYTES * len(indices)
    stop = place[0] + written, place[1] + written
    for _ in range(size // LANES):
        place = _pack_inside(load(source, EVERY), EVERY, positions, ends, place, stop, are_few)
        source += LANE_BYTES * LANES
        positions = add(positions, step)
    valid = first_lanes(size % LANES)
    _pack_inside(load(source, valid), valid, positions, ends, place, stop, are_few)


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _collect_single(address: Any) -> None:
    _collect(address, np.uint32, None)


@kernel(_KERNEL)
def _collect_packed(address: Any) -> None:
    _collect(address, np.uint32, True)


@kernel(_KERNEL)
def _collect_double(address: Any) -> None:
    _collect(address, np.uint64, None)


_COLLECT_SINGLE = _collect_packed if HAS_LANES else _collect_single
