"""Vectors over B moved to the next B, on all cores."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numba import carray, njit, types

from topkast.kernels.runtime._arguments import (
    Vector,
    array_at,
    check_writable,
    define_arguments,
    define_record,
    fill_record,
)
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._lanes import (
    EVERY,
    HAS_LANES,
    LANE_BYTES,
    LANES,
    below_unsigned,
    broadcast,
    first_of,
    gather,
    load,
    load_flags,
    load_short,
    look_up,
    look_up_short,
    select,
    splat,
    store,
    store_short,
    subtract,
)
from topkast.kernels.runtime._pool import run
from topkast.kernels.runtime._vector import as_pointer, fetch_add

_CHUNK = 1 << 14  # entries that a thread takes at a time

_MIGRATE = define_arguments("moves", "count", "source", "survives", "size")
_MOVE = define_record("entry", "old_size", "fresh", "step", "out", "itemsize")
_ITEMSIZES = 2, 4, 8
_LIMIT = 1 << 31  # more than the entries of a vector, which is read by address

Move: TypeAlias = tuple[Vector, Vector, Vector]


def migrate(source: Vector, survives: Vector, /, *moves: Move, threads: int | None = None) -> None:
    """Write ``where(survives, entry[source], fresh)`` into `out`, for several vectors at once.

    Parameters
    ----------
    source
        Positions in `entry`, int32 (m,), contiguous. They are not checked.
    survives
        Booleans (m,), contiguous.
    moves
        Triples of `entry`, `fresh` and `out`. `entry` (k,) is contiguous and of a dtype of 2, 4 or
        8 bytes; `fresh` (m,), or (1,) for one number, and `out` (m,) are contiguous and of the same
        dtype.
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        For other dtypes or shapes, and for arrays that are not contiguous.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import migrate
    >>> source, survives = np.asarray([1, 0, 0], np.int32), np.asarray([True, False, True])
    >>> first, second = np.empty(3), np.empty(3, np.int16)
    >>> migrate(
    ...     source,
    ...     survives,
    ...     (np.asarray([5.0, 7.0]), np.zeros(1), first),
    ...     (np.asarray([1, 2], np.int16), np.asarray([9], np.int16), second),
    ... )
    >>> first, second
    (array([7., 0., 5.]), array([2, 9, 1], dtype=int16))
    """
    if source.dtype != np.int32 or survives.dtype != np.bool_:
        raise TypeError(
            f"source must be int32 and survives boolean, got {source.dtype} and {survives.dtype}"
        )
    size = len(source)
    if len(survives) != size:
        raise ValueError(f"survives must have {size} entries as source has, got {len(survives)}")
    for name, array in {"source": source, "survives": survives}.items():
        _check_vector(name, array)
    records = []
    for entry, fresh, out in moves:
        _check_move(entry, fresh, out, size)
        if not len(entry):  # nothing can survive, and there is nothing to read
            out[:] = fresh
            continue
        step = int(len(fresh) > 1 or size == 1)
        records.append(
            fill_record(
                _MOVE,
                entry=entry,
                old_size=len(entry),
                fresh=fresh,
                step=step,
                out=out,
                itemsize=entry.dtype.itemsize,
            )
        )
    if not records:
        return
    together = np.concatenate(records)
    record = fill_record(
        _MIGRATE,
        next_item=0,
        next_thread=0,
        moves=together,
        count=len(records),
        source=source,
        survives=survives,
        size=size,
    )
    run(_migrate, record, threads)


def _check_move(entry: Vector, fresh: Vector, out: Vector, size: int) -> None:
    if not entry.dtype == fresh.dtype == out.dtype or entry.dtype.itemsize not in _ITEMSIZES:
        raise TypeError(
            f"entry, fresh and out must have one dtype of 2, 4 or 8 bytes, got {entry.dtype}, "
            f"{fresh.dtype} and {out.dtype}"
        )
    for name, array in {"fresh": fresh, "out": out, "entry": entry}.items():
        _check_vector(name, array)
    if len(out) != size or len(fresh) not in (1, size):
        raise ValueError(
            f"fresh and out must have {size} entries as source has, got {len(fresh)} and {len(out)}"
        )
    check_writable(out=out)


def _check_vector(name: str, array: Vector) -> None:
    if array.ndim != 1 or not array.flags.c_contiguous:
        raise ValueError(f"{name} must be a contiguous vector, got shape {array.shape}")


@njit  # type: ignore[untyped-decorator]
def _move(move: Any, source: Any, survives: Any, start: Any, size: Any, dtype: Any) -> None:
    """Move one part of one vector, whose first position is `start`."""
    stop = start + len(source)
    entry = array_at(move.entry, move.old_size, dtype)
    fresh = array_at(move.fresh, 1 + move.step * (size - 1), dtype)
    out = array_at(move.out, size, dtype)
    if move.step:
        _gather(entry, source, survives, out[start:stop], fresh[start:stop])
    else:
        _gather_or_fill(entry, source, survives, out[start:stop], fresh[0])


# Positions are never negative, which the compiler has to know to gather vectors.
@njit  # type: ignore[untyped-decorator]
def _gather(entry: Any, source: Any, survives: Any, out: Any, fresh: Any) -> None:
    for k in range(len(out)):
        moved = entry[np.uint32(source[k])]
        out[k] = moved if survives[k] else fresh[k]


@njit  # type: ignore[untyped-decorator]
def _gather_or_fill(entry: Any, source: Any, survives: Any, out: Any, fresh: Any) -> None:
    for k in range(len(out)):
        moved = entry[np.uint32(source[k])]
        out[k] = moved if survives[k] else fresh


@njit  # type: ignore[untyped-decorator]
def _move_any(move: Any, source: Any, survives: Any, start: Any, size: Any) -> None:
    if move.itemsize == 2:
        _move(move, source, survives, start, size, np.uint16)
    elif move.itemsize == 4:
        _move(move, source, survives, start, size, np.uint32)
    else:
        _move(move, source, survives, start, size, np.uint64)


@njit  # type: ignore[untyped-decorator]
def _move_part(moves: Any, source: Any, survives: Any, start: Any, stop: Any) -> None:
    for number in range(len(moves)):  # what they share stays in a cache
        _move_any(moves[number], source[start:stop], survives[start:stop], start, len(source))


@njit  # type: ignore[untyped-decorator]
def _find_leads(source: Any, survives: Any, leads: Any, end: Any) -> None:
    """For each block of lanes, the first of twice as many entries with its survivors, or -1."""
    window, address, flags = splat(np.int32(2 * LANES)), source.ctypes.data, survives.ctypes.data
    for number in range(len(leads)):
        first = number * LANES
        stays = load_flags(flags + first, EVERY)
        lead = np.int64(source[first + first_of(stays)]) if stays else 0
        offsets = subtract(load(address + LANE_BYTES * first, EVERY), splat(np.int32(lead)))
        near = (stays & ~below_unsigned(offsets, window)) == 0 and lead + 2 * LANES <= end
        leads[number] = lead if near else -1


@njit  # type: ignore[untyped-decorator]
def _move_words(
    entry: Any, fresh: Any, step: Any, out: Any, source: Any, survives: Any, leads: Any
) -> None:
    """Move entries of four bytes, a block at a time where they were neighbours; by addresses."""
    filling = broadcast(load(fresh, np.uint16(1)))
    for number in range(len(leads)):
        lead, first = leads[number], number * LANES
        stays = load_flags(survives + first, EVERY)
        positions = load(source + LANE_BYTES * first, EVERY)
        if lead >= 0:
            offsets = subtract(positions, splat(np.int32(lead)))
            moved = look_up(entry + LANE_BYTES * lead, offsets)
        else:
            moved = gather(entry, positions, stays)
        if step:
            filling = load(fresh + LANE_BYTES * first, EVERY)
        store(select(stays, moved, filling), out + LANE_BYTES * first, EVERY)


@njit  # type: ignore[untyped-decorator]
def _move_shorts(
    entry: Any, fresh: Any, step: Any, out: Any, source: Any, survives: Any, leads: Any
) -> None:
    """:func:`_move_words` for entries of two bytes."""
    size = len(leads) * LANES
    positions, flags = array_at(source, size, np.int32), array_at(survives, size, np.uint8)
    entries, moved_entries = array_at(entry, _LIMIT, np.int16), array_at(out, size, np.int16)
    fresh_entries = array_at(fresh, _LIMIT, np.int16)
    filling = broadcast(load_short(fresh, np.uint16(1)))
    for number in range(len(leads)):
        lead, first = leads[number], number * LANES
        if lead < 0:
            for k in range(first, first + LANES):
                one = entries[positions[k]] if flags[k] else fresh_entries[k * step]
                moved_entries[k] = one
            continue
        stays = load_flags(survives + first, EVERY)
        offsets = subtract(load(source + LANE_BYTES * first, EVERY), splat(np.int32(lead)))
        moved = look_up_short(entry + 2 * lead, offsets)
        if step:
            filling = load_short(fresh + 2 * first, EVERY)
        store_short(select(stays, moved, filling), out + 2 * first, EVERY)


@njit  # type: ignore[untyped-decorator]
def _move_part_in_lanes(moves: Any, source: Any, survives: Any, start: Any, stop: Any) -> None:
    """Move a block of entries at a time where those that survive were neighbours before."""
    end, size = moves[0].old_size, len(source)  # no window reaches beyond the shortest vector
    for number in range(1, len(moves)):
        end = min(end, moves[number].old_size)
    leads = np.empty((stop - start) // LANES, dtype=np.int64)
    _find_leads(source[start:stop], survives[start:stop], leads, end)
    source_at, survives_at = source[start:].ctypes.data, survives[start:].ctypes.data
    for number in range(len(moves)):
        move = moves[number]
        fresh, step = move.fresh + move.step * move.itemsize * start, move.step
        out = move.out + move.itemsize * start
        if move.itemsize == 4:
            _move_words(move.entry, fresh, step, out, source_at, survives_at, leads)
        elif move.itemsize == 2:
            _move_shorts(move.entry, fresh, step, out, source_at, survives_at, leads)
        else:
            _move_any(move, source[start:stop], survives[start:stop], start, size)
            continue
        first = start + len(leads) * LANES
        _move_any(move, source[first:stop], survives[first:stop], first, size)


@njit  # type: ignore[untyped-decorator]
def _migrate_all(address: Any, in_lanes: Any) -> None:
    """Move all vectors; `in_lanes` is True for lanes, or None."""
    arguments = carray(as_pointer(address), 1, _MIGRATE)[0]
    size = arguments.size
    moves = carray(as_pointer(arguments.moves), arguments.count, _MOVE)
    source = array_at(arguments.source, size, np.int32)
    survives = array_at(arguments.survives, size, np.uint8)
    while True:
        start = fetch_add(address) * _CHUNK
        if start >= size:
            break
        stop = min(start + _CHUNK, size)
        if in_lanes is None:
            _move_part(moves, source, survives, start, stop)
        else:
            _move_part_in_lanes(moves, source, survives, start, stop)


@kernel(types.void(types.intp))
def _migrate_entries(address: Any) -> None:
    _migrate_all(address, None)


@kernel(types.void(types.intp))
def _migrate_packed(address: Any) -> None:
    _migrate_all(address, True)


_migrate = _migrate_packed if HAS_LANES else _migrate_entries
