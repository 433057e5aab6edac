"""How sets change: candidates divided into the next A, B∖A and reserve, on all cores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.backends._candidates import Division
from topkast.backends._threads import default_threads
from topkast.kernels.refresh._magnitudes import key_of_magnitude
from topkast.kernels.refresh._parts import count_parts, write_parts
from topkast.kernels.runtime._arguments import Vector, array_at, define_arguments, run_kernel
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import as_pointer, fetch_add

_DTYPES = {np.dtype(np.float32), np.dtype(np.float64)}
_INDEX_DTYPES = {np.dtype(np.int32), np.dtype(np.int64)}
_RANGES = 8  # least number of ranges for each thread: some have more candidates than others
_SPANS = 4  # of consecutive ranges, for each thread: threads that write side by side wait
_CANDIDATES = 1 << 12  # of a range: what is known of them stays in the L1 cache

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
    "ranges",
    "span",
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
        magnitude `backward` that are not in B; int64.
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
    ranges = max(_RANGES * threads, total // _CANDIDATES)
    words = max(1, -(-size // (64 * ranges)))  # of a bitmap of a range
    ranges = -(-size // (64 * words))
    edges = np.empty((ranges, 3, 2), dtype=np.int64)  # first entry and end, by range and list
    none = np.zeros(0, dtype=np.int64)
    forward_ties, backward_ties = ties or (none, none)
    counts = np.zeros((ranges, 3, 4), dtype=np.int64)  # entries, by range, list and next part
    arguments: dict[str, Any] = {
        "inside_indices": inside[0],
        "inside_values": inside[1],
        "inside_size": len(inside[0]),
        "reserve_indices": reserve[0],
        "reserve_values": reserve[1],
        "reserve_size": len(reserve[0]),
        "edges": edges,
        "counts": counts,
        "ranges": ranges,
        "span": -(-ranges // (_SPANS * threads)),
        "words": words,
        "size": size,
        "split": split,
        "forward_key": key_of_magnitude(forward, dtype),
        "backward_key": key_of_magnitude(backward, dtype),
        "bound_key": key_of_magnitude(bound, dtype),
        "forward_ties": forward_ties,
        "forward_ties_size": len(forward_ties),
        "backward_ties": backward_ties,
        "backward_ties_size": len(backward_ties),
    }
    unused = dict.fromkeys((*_OUTPUTS, "starts"), 0)
    run_kernel(kernels, dtype, threads, _DIVIDE, writes=0, **arguments, **unused)
    in_parts = counts.sum(axis=1)
    dtypes = index_dtype, dtype, np.int32, np.bool_
    outputs = {name: np.empty(total, one) for name, one in zip(_OUTPUTS, dtypes, strict=True)}
    arguments |= outputs | {"starts": _find_starts(in_parts)}
    run_kernel(kernels, dtype, threads, _DIVIDE, writes=1, **arguments)
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
    """First place of each range's entries of each part (ranges, parts), ordered by part first."""
    by_part = counts.T.ravel()
    starts = (np.cumsum(by_part) - by_part).reshape(counts.T.shape)
    return np.ascontiguousarray(starts.T)


@njit  # type: ignore[untyped-decorator]
def _divide(address: Any, unsigned: Any, integer: Any) -> None:
    """Count the entries of each range and list that go to each part, or write them."""
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
    ranges, words, span = arguments.ranges, arguments.words, arguments.span
    edges = carray(as_pointer(arguments.edges), (ranges, 3, 2), np.int64)
    counts = carray(as_pointer(arguments.counts), (ranges, 3, 4), np.int64)
    starts = carray(as_pointer(arguments.starts), (ranges, 4), np.int64)
    while True:
        start = fetch_add(address) * span
        if start >= ranges:
            break
        for number in range(start, min(start + span, ranges)):
            first, edge = 64 * words * number, edges[number]
            if arguments.writes == 0:
                stop = min(first + 64 * words, arguments.size)
                for part in range(3):
                    indices, values = lists[part]
                    edge[part, 0] = np.searchsorted(indices, integer(first))
                    edge[part, 1] = len(indices)
                    if stop < arguments.size:
                        edge[part, 1] = np.searchsorted(indices, integer(stop))
                    own = slice(edge[part, 0], edge[part, 1])
                    count_parts(
                        indices[own], values[own], keys, ties, counts[number, part], unsigned
                    )
                continue
            write_parts(
                _entries_between(lists, edge),
                (edge[0, 0], arguments.split + edge[1, 0], np.int64(-1)),
                integer(first),
                words,
                starts[number],
                keys,
                ties,
                outputs,
                unsigned,
            )


@njit  # type: ignore[untyped-decorator]
def _entries_between(lists: Any, edge: Any) -> Any:
    """The entries of the three lists from one edge to the next."""
    return (
        (lists[0][0][edge[0, 0] : edge[0, 1]], lists[0][1][edge[0, 0] : edge[0, 1]]),
        (lists[1][0][edge[1, 0] : edge[1, 1]], lists[1][1][edge[1, 0] : edge[1, 1]]),
        (lists[2][0][edge[2, 0] : edge[2, 1]], lists[2][1][edge[2, 0] : edge[2, 1]]),
    )


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _divide_single(address: Any) -> None:
    _divide(address, np.uint32, np.int32)


@kernel(_KERNEL)
def _divide_double(address: Any) -> None:
    _divide(address, np.uint64, np.int32)


@kernel(_KERNEL)
def _divide_wide_single(address: Any) -> None:
    _divide(address, np.uint32, np.int64)


@kernel(_KERNEL)
def _divide_wide_double(address: Any) -> None:
    _divide(address, np.uint64, np.int64)


_KERNELS = _divide_single, _divide_double
_WIDE_KERNELS = _divide_wide_single, _divide_wide_double
