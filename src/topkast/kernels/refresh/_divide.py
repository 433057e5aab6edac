"""How sets change: candidates divided into the next A, B∖A and reserve, on all cores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.backends._candidates import Candidates, Division
from topkast.backends._threads import default_threads
from topkast.kernels.refresh._magnitudes import key_of_magnitude
from topkast.kernels.refresh._parts import count_parts, entries_of, write_parts
from topkast.kernels.runtime._arguments import Vector, array_at, define_arguments, run_kernel
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import as_pointer, fetch_add

_DTYPES = {np.dtype(np.float32), np.dtype(np.float64)}
_INDEX_DTYPES = {np.dtype(np.int32), np.dtype(np.int64)}
_RANGES = 8  # ranges of the tensor for each thread: some have more candidates than others

_LIST = ("indices", "values", "size")
_LISTS = ("active", "exploring", "reserve")
_OUTPUTS = (
    "inside_indices",
    "inside_values",
    "inside_source",
    "inside_size",
    "outside_indices",
    "outside_values",
    "outside_source",
    "outside_size",
    "moved_indices",
    "moved_values",
    "moved_source",
    "gone",
    "moved_size",
    "starts",
    "moved_starts",
    "gone_starts",
)
_DIVIDE = define_arguments(
    *(f"{of}_{what}" for of in _LISTS for what in _LIST),
    "edges",
    "counts",
    "ranges",
    "writes",
    "forward_key",
    "backward_key",
    "bound_key",
    "forward_ties",
    "forward_ties_size",
    "backward_ties",
    "backward_ties_size",
    *_OUTPUTS,
)


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
        index is in two of them. Indices are int32 or int64.
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
        For other dtypes or shapes, and for arrays that are not contiguous.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import divide
    >>> indices, values = np.asarray([1, 4, 0, 3], np.int32), np.asarray([2.0, 1.0, 3.0, 0.5])
    >>> active, exploring, reserve = ((indices[one], values[one]) for one in np.s_[:1, 1:2, 2:])
    >>> division = divide(active, exploring, reserve, size=6, forward=3, backward=2, bound=0.5)
    >>> division.inside.indices, division.outside.indices, division.sizes
    (array([0, 1], dtype=int32), array([3, 4], dtype=int32), (1, 1, 2, 0))
    """
    lists = dict(zip(_LISTS, (active, exploring, reserve), strict=True))
    _check(lists)
    index_dtype, dtype = active[0].dtype, active[1].dtype
    kernels = _KERNELS if index_dtype == np.int32 else _WIDE_KERNELS
    ranges = _RANGES * (threads or default_threads())
    cuts = np.linspace(0, size, ranges + 1).astype(index_dtype)
    edges = [np.searchsorted(indices, cuts) for indices, _ in lists.values()]
    none = np.zeros(0, dtype=np.int64)
    forward_ties, backward_ties = ties or (none, none)
    counts = np.zeros((ranges, 3, 4), dtype=np.int64)  # entries, by range, list and next part
    arguments: dict[str, Any] = {
        "edges": np.asarray(edges, dtype=np.int64),
        "counts": counts,
        "ranges": ranges,
        "forward_key": key_of_magnitude(forward, dtype),
        "backward_key": key_of_magnitude(backward, dtype),
        "bound_key": key_of_magnitude(bound, dtype),
        "forward_ties": forward_ties,
        "forward_ties_size": len(forward_ties),
        "backward_ties": backward_ties,
        "backward_ties_size": len(backward_ties),
    }
    for name, (indices, values) in lists.items():
        arguments[f"{name}_indices"], arguments[f"{name}_values"] = indices, values
        arguments[f"{name}_size"] = len(indices)
    unused = dict.fromkeys(_OUTPUTS, 0)
    run_kernel(kernels, dtype, threads, _DIVIDE, writes=0, **arguments, **unused)
    in_parts = counts.sum(axis=1)
    sizes = in_parts.sum(axis=0)
    inside_size, outside_size = int(sizes[:2].sum()), int(sizes[2:].sum())
    starts = _find_starts(in_parts)
    starts[:, 2:] -= inside_size
    moved = counts * (1 - np.eye(3, 4, dtype=np.int64))
    gone = moved.sum(axis=2)
    dtypes = index_dtype, dtype, np.dtype(np.int32)
    arrays = {"gone": np.empty(gone.sum(), dtype=np.int32)}
    for name, length in (
        ("inside", inside_size),
        ("outside", outside_size),
        ("moved", int(moved.sum())),
    ):
        arguments[f"{name}_size"] = length
        for what, one in zip(("indices", "values", "source"), dtypes, strict=True):
            arrays[f"{name}_{what}"] = np.empty(length, one)
    arguments |= {"starts": starts, "moved_starts": _find_starts(moved)}
    arguments |= {"gone_starts": _find_starts(gone)}
    run_kernel(kernels, dtype, threads, _DIVIDE, writes=1, **arguments, **arrays)
    inside, outside = (
        Candidates(*(arrays[f"{name}_{what}"] for what in ("indices", "values", "source")))
        for name in ("inside", "outside")
    )
    return Division(inside, outside, tuple(sizes.tolist()))


def _check(lists: dict[str, tuple[Vector, Vector]]) -> None:
    dtypes = {values.dtype for _, values in lists.values()}
    index_dtypes = {indices.dtype for indices, _ in lists.values()}
    if (len(dtypes), len(index_dtypes)) != (1, 1) or not (
        dtypes <= _DTYPES and index_dtypes <= _INDEX_DTYPES
    ):
        raise TypeError(
            "candidates must have indices of one dtype, int32 or int64, and values of one dtype, "
            f"float32 or float64, got {sorted(map(str, index_dtypes))} and "
            f"{sorted(map(str, dtypes))}"
        )
    for name, (indices, values) in lists.items():
        contiguous = indices.flags.c_contiguous and values.flags.c_contiguous
        if indices.ndim != 1 or indices.shape != values.shape or not contiguous:
            raise ValueError(
                f"candidates must be contiguous vectors of one length, got indices of shape "
                f"{indices.shape} and values of shape {values.shape} for {name}"
            )


def _find_starts(counts: Vector) -> Vector:
    """First position of each group of entries (ranges, …), in order of group, then of range."""
    by_group = np.moveaxis(counts, 0, -1)
    flat = by_group.reshape(-1)
    starts = (np.cumsum(flat) - flat).reshape(by_group.shape)
    return np.ascontiguousarray(np.moveaxis(starts, -1, 0))


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
    lists = (
        (
            array_at(arguments.active_indices, arguments.active_size, integer),
            array_at(arguments.active_values, arguments.active_size, unsigned),
        ),
        (
            array_at(arguments.exploring_indices, arguments.exploring_size, integer),
            array_at(arguments.exploring_values, arguments.exploring_size, unsigned),
        ),
        (
            array_at(arguments.reserve_indices, arguments.reserve_size, integer),
            array_at(arguments.reserve_values, arguments.reserve_size, unsigned),
        ),
    )
    inside = (
        array_at(arguments.inside_indices, arguments.inside_size, integer),
        array_at(arguments.inside_values, arguments.inside_size, unsigned),
        array_at(arguments.inside_source, arguments.inside_size, np.int32),
    )
    outside = (
        array_at(arguments.outside_indices, arguments.outside_size, integer),
        array_at(arguments.outside_values, arguments.outside_size, unsigned),
        array_at(arguments.outside_source, arguments.outside_size, np.int32),
    )
    moved = (
        array_at(arguments.moved_indices, arguments.moved_size, integer),
        array_at(arguments.moved_values, arguments.moved_size, unsigned),
        array_at(arguments.moved_source, arguments.moved_size, np.int32),
    )
    gone = array_at(arguments.gone, arguments.moved_size, np.int32)
    ranges = arguments.ranges
    edges = carray(as_pointer(arguments.edges), (3, ranges + 1), np.int64)
    counts = carray(as_pointer(arguments.counts), (ranges, 3, 4), np.int64)
    starts = carray(as_pointer(arguments.starts), (ranges, 4), np.int64)
    moved_starts = carray(as_pointer(arguments.moved_starts), (ranges, 3, 4), np.int64)
    gone_starts = carray(as_pointer(arguments.gone_starts), (ranges, 3), np.int64)
    while True:
        number = fetch_add(address)
        if number >= ranges:
            break
        if arguments.writes:
            write_parts(
                lists,
                edges,
                number,
                counts[number],
                starts[number],
                moved_starts[number],
                gone_starts[number],
                keys,
                ties,
                moved,
                gone,
                inside,
                outside,
                unsigned,
            )
            continue
        for part in range(3):
            indices, values, _, _ = entries_of(lists, edges, part, number)
            count_parts(indices, values, keys, ties, counts[number, part], unsigned)


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
