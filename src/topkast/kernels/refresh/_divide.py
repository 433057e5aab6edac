"""How sets change: candidates divided into the next A, B∖A and reserve, on all cores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.backends._candidates import Division
from topkast.backends._threads import default_threads
from topkast.kernels.refresh._magnitudes import key_of_magnitude
from topkast.kernels.refresh._packed import count_packed, write_packed
from topkast.kernels.refresh._parts import count_parts, write_parts
from topkast.kernels.runtime._arguments import Vector, array_at, define_arguments, run_kernel
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._lanes import HAS_LANES
from topkast.kernels.runtime._vector import as_pointer, fetch_add

_DTYPES = {np.dtype(np.float32), np.dtype(np.float64)}
_INDEX_DTYPES = {np.dtype(np.int32), np.dtype(np.int64)}
# A tensor is divided into spans, which threads take one by one, and these into ranges.
_SPANS = 4  # for each thread, since some have more candidates than others
_CANDIDATES = 1 << 12  # of a range: what is known of them stays in the L1 cache
_PACKED_CANDIDATES = 1 << 16  # in lanes, by which long ranges are read and written faster
_MAX_PACKED = 16 * _PACKED_CANDIDATES  # entries of a list in a range

_OUTPUTS = "indices", "values", "source", "survives"
_DIVIDE = define_arguments(
    "inside_indices",
    "inside_values",
    "inside_size",
    "reserve_indices",
    "reserve_values",
    "reserve_size",
    "edges",
    "counts",
    "spans",
    "ranges",
    "words",
    "size",
    "split",
    "writes",
    "forward_key",
    "backward_key",
    "bound_key",
    "forward_ties",
    "forward_ties_size",
    "backward_ties",
    "backward_ties_size",
    "starts",
    *_OUTPUTS,
)


def divide(
    inside: tuple[Vector, Vector],
    reserve: tuple[Vector, Vector],
    /,
    *,
    split: int,
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
    inside
        Indices and values of the entries of the old B: those of A in ascending order, then those of
        B∖A in ascending order. Indices are int32 or int64.
    reserve
        Ascending indices and values of other entries.
    split
        Number of entries of the old A.
    size
        Number of entries of the tensor; below 2³¹ if indices are int32.
    forward, backward
        The smallest magnitudes in the next A and B.
    bound
        Magnitude below which entries outside B are no candidates any more.
    ties
        Ascending indices of entries of magnitude `forward` that are not in A, and of those of
        magnitude `backward` that are not in B; int64. If both magnitudes are equal, the former hold
        the latter.
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        For other dtypes or shapes, for arrays that are not contiguous, and if `split`, or the first
        or the last index of a list, is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import divide
    >>> inside = np.asarray([1, 4], np.int32), np.asarray([2.0, 1.0])
    >>> reserve = np.asarray([0, 3], np.int32), np.asarray([3.0, 0.5])
    >>> division = divide(inside, reserve, split=1, size=6, forward=3, backward=2, bound=0.5)
    >>> division.indices, division.sizes
    (array([0, 1, 3, 4], dtype=int32), (1, 1, 2, 0))
    """
    _check(inside, reserve)
    _check_ends(inside[0], reserve[0], split, size)
    index_dtype, dtype = inside[0].dtype, inside[1].dtype
    kernels = _KERNELS if index_dtype == np.int32 else _WIDE_KERNELS
    total, threads = len(inside[0]) + len(reserve[0]), threads or default_threads()
    is_packed = dtype == np.float32 and kernels[0] is _divide_packed
    candidates = _PACKED_CANDIDATES if is_packed else _CANDIDATES
    words = max(1, -(-size // (64 * max(_SPANS * threads, total // candidates))))
    ranges = -(-size // (64 * words))
    spans = min(_SPANS * threads, ranges)
    edges = np.empty((spans, 3, 2), dtype=np.int64)  # first entry and end, by span and list
    none = np.zeros(0, dtype=np.int64)
    forward_ties, backward_ties = ties or (none, none)
    counts = np.zeros((spans, 3, 4), dtype=np.int64)  # entries, by span, list and next part
    run_again = run_kernel(
        kernels,
        dtype,
        threads,
        _DIVIDE,
        inside_indices=inside[0],
        inside_values=inside[1],
        inside_size=len(inside[0]),
        reserve_indices=reserve[0],
        reserve_values=reserve[1],
        reserve_size=len(reserve[0]),
        edges=edges,
        counts=counts,
        spans=spans,
        ranges=ranges,
        words=words,
        size=size,
        split=split,
        writes=0,
        forward_key=key_of_magnitude(forward, dtype),
        backward_key=key_of_magnitude(backward, dtype),
        bound_key=key_of_magnitude(bound, dtype),
        forward_ties=forward_ties,
        forward_ties_size=len(forward_ties),
        backward_ties=backward_ties,
        backward_ties_size=len(backward_ties),
        **dict.fromkeys((*_OUTPUTS, "starts"), 0),
    )
    in_parts = counts.sum(axis=1)
    dtypes = index_dtype, dtype, np.int32, np.bool_
    outputs = {name: np.empty(total, one) for name, one in zip(_OUTPUTS, dtypes, strict=True)}
    starts = _find_starts(in_parts)
    run_again(writes=1, starts=starts, **outputs)
    entered = int(counts[:, 1:, 0].sum())
    return Division(sizes=tuple(in_parts.sum(axis=0).tolist()), entered=entered, **outputs)


def _check(inside: tuple[Vector, Vector], reserve: tuple[Vector, Vector]) -> None:
    dtypes = {values.dtype for _, values in (inside, reserve)}
    index_dtypes = {indices.dtype for indices, _ in (inside, reserve)}
    if (len(dtypes), len(index_dtypes)) != (1, 1) or not (
        dtypes <= _DTYPES and index_dtypes <= _INDEX_DTYPES
    ):
        raise TypeError(
            "candidates must have indices of one dtype, int32 or int64, and values of one dtype, "
            f"float32 or float64, got {sorted(map(str, index_dtypes))} and "
            f"{sorted(map(str, dtypes))}"
        )
    for name, (indices, values) in {"inside": inside, "reserve": reserve}.items():
        contiguous = indices.flags.c_contiguous and values.flags.c_contiguous
        if indices.ndim != 1 or indices.shape != values.shape or not contiguous:
            raise ValueError(
                f"candidates must be contiguous vectors of one length, got indices of shape "
                f"{indices.shape} and values of shape {values.shape} for {name}"
            )


def _check_ends(inside: Vector, reserve: Vector, split: int, size: int) -> None:
    """Raise ValueError for indices out of range: kernels would write outside of their bitmaps."""
    if not 0 <= split <= len(inside):
        raise ValueError(f"split must lie in [0, {len(inside)}], got {split}")
    for indices in (inside[:split], inside[split:], reserve):
        if len(indices) and not 0 <= indices[0] <= indices[-1] < size:
            raise ValueError(
                f"indices of candidates must ascend in [0, {size}), got {indices[0]} to "
                f"{indices[-1]}"
            )


def _find_starts(counts: Vector) -> Vector:
    """First place of each span's entries of each part (spans, parts), ordered by part first."""
    by_part = counts.T.ravel()
    starts = (np.cumsum(by_part) - by_part).reshape(counts.T.shape)
    return np.ascontiguousarray(starts.T)


@njit  # type: ignore[untyped-decorator]
def _find_near(indices: Any, index: Any, bounds: Any, expected: Any) -> Any:
    """Position, within bounds, of the first index that is as large.

    It is searched around the entry that is `expected` entries behind the first bound.
    """
    low, high = bounds
    guess, step = low + expected, 16
    while guess < high and indices[guess] < index:
        low, guess, step = guess + 1, guess + step, 2 * step
    high, step = min(guess, high), 16
    while high - step > low and indices[high - step] >= index:
        high, step = high - step, 2 * step
    low = max(low, high - step)
    while low < high:
        middle = (low + high) // 2
        if indices[middle] < index:
            low = middle + 1
        else:
            high = middle
    return low


@njit  # type: ignore[untyped-decorator]
def _divide_span(lists: Any, edge: Any, ranges: Any, length: Any, integer: Any) -> Any:
    """First entry and end of each list (ranges, 3, 2) in the ranges of a span, of this length."""
    first, stop = ranges
    bounds = np.empty((stop - first, 3, 2), dtype=np.int64)
    for part in range(3):
        low, high = edge[part]
        expected = (high - low) // (stop - first)
        for number in range(stop - first):
            end = high
            if first + number + 1 < stop:
                index = integer((first + number + 1) * length)
                end = _find_near(lists[part][0], index, (low, high), expected)
            bounds[number, part, 0], bounds[number, part, 1] = low, end
            low = end
    return bounds


@njit  # type: ignore[untyped-decorator]
def _divide(address: Any, unsigned: Any, integer: Any, in_lanes: Any) -> None:
    """Count the entries of each span and list that go to each part, or write them.

    `in_lanes` is True to do so in lanes, else None: the compiler leaves the other way out.
    """
    arguments = carray(as_pointer(address), 1, _DIVIDE)[0]
    keys = (
        unsigned(arguments.forward_key),
        unsigned(arguments.backward_key),
        unsigned(arguments.bound_key),
    )
    ties = (
        array_at(arguments.forward_ties, arguments.forward_ties_size, np.int64),
        array_at(arguments.backward_ties, arguments.backward_ties_size, np.int64),
    )
    inside = (
        array_at(arguments.inside_indices, arguments.inside_size, integer),
        array_at(arguments.inside_values, arguments.inside_size, unsigned),
    )
    reserve = (
        array_at(arguments.reserve_indices, arguments.reserve_size, integer),
        array_at(arguments.reserve_values, arguments.reserve_size, unsigned),
    )
    size = arguments.inside_size + arguments.reserve_size
    outputs = (
        array_at(arguments.indices, size, integer),
        array_at(arguments.values, size, unsigned),
        array_at(arguments.source, size, np.int32),
        array_at(arguments.survives, size, np.uint8),
    )
    lists = (
        (inside[0][: arguments.split], inside[1][: arguments.split]),
        (inside[0][arguments.split :], inside[1][arguments.split :]),
        reserve,
    )
    ranges, spans, words = arguments.ranges, arguments.spans, arguments.words
    edges = carray(as_pointer(arguments.edges), (spans, 3, 2), np.int64)
    counts = carray(as_pointer(arguments.counts), (spans, 3, 4), np.int64)
    starts = carray(as_pointer(arguments.starts), (spans, 4), np.int64)
    while True:
        span = fetch_add(address)
        if span >= spans:
            break
        edge, length = edges[span], 64 * words  # of a range
        first, stop = span * ranges // spans, (span + 1) * ranges // spans
        if arguments.writes == 0:
            for part in range(3):
                indices, values = lists[part]
                every = 0, len(indices)
                edge[part, 0], edge[part, 1] = every
                if first > 0:
                    expected = len(indices) * first // ranges
                    edge[part, 0] = _find_near(indices, integer(first * length), every, expected)
                if stop < ranges:
                    expected = len(indices) * stop // ranges
                    edge[part, 1] = _find_near(indices, integer(stop * length), every, expected)
                own = slice(edge[part, 0], edge[part, 1])
                if in_lanes is None:
                    count_parts(indices[own], values[own], keys, ties, counts[span, part], unsigned)
                else:
                    count_packed(
                        indices[own], values[own], keys, ties, counts[span, part], unsigned
                    )
            continue
        bounds = _divide_span(lists, edge, (first, stop), length, integer)
        others = lists, bounds, (first, words), starts[span], keys, ties, outputs, unsigned
        if in_lanes is None:
            write_parts(*others)
        elif (bounds[:, :, 1] - bounds[:, :, 0]).max() <= _MAX_PACKED:
            write_packed(*others)
        else:  # nearly all candidates are in few ranges, and would take much memory
            write_parts(*others)


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _divide_single(address: Any) -> None:
    _divide(address, np.uint32, np.int32, None)


@kernel(_KERNEL)
def _divide_packed(address: Any) -> None:
    _divide(address, np.uint32, np.int32, True)


@kernel(_KERNEL)
def _divide_double(address: Any) -> None:
    _divide(address, np.uint64, np.int32, None)


@kernel(_KERNEL)
def _divide_wide_single(address: Any) -> None:
    _divide(address, np.uint32, np.int64, None)


@kernel(_KERNEL)
def _divide_wide_double(address: Any) -> None:
    _divide(address, np.uint64, np.int64, None)


_KERNELS = _divide_packed if HAS_LANES else _divide_single, _divide_double
_WIDE_KERNELS = _divide_wide_single, _divide_wide_double
