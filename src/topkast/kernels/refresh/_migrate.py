"""Vectors over B moved to the next B, on all cores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels.runtime._arguments import Vector, array_at, define_arguments, fill_record
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._pool import run
from topkast.kernels.runtime._vector import as_pointer, fetch_add

_CHUNK = 1 << 14  # entries that a thread takes at a time

_MIGRATE = define_arguments(
    "entry", "old_size", "source", "survives", "size", "fresh", "step", "out"
)


def migrate(
    entry: Vector,
    source: Vector,
    survives: Vector,
    fresh: Vector,
    out: Vector,
    /,
    *,
    threads: int | None = None,
) -> None:
    """Write ``where(survives, entry[source], fresh)`` into `out`.

    Parameters
    ----------
    entry
        (k,), contiguous, of a dtype of 2, 4 or 8 bytes.
    source
        Positions in `entry`, int32 (m,), contiguous.
    survives
        Booleans (m,), contiguous.
    fresh
        (m,), or (1,) for one number, contiguous, of the dtype of `entry`.
    out
        (m,), contiguous, of the dtype of `entry`.
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
    >>> out, survives = np.empty(3), np.asarray([True, False, True])
    >>> source = np.asarray([1, 0, 0], np.int32)
    >>> migrate(np.asarray([5.0, 7.0]), source, survives, np.zeros(1), out)
    >>> out
    array([7., 0., 5.])
    """
    if not entry.dtype == fresh.dtype == out.dtype or entry.dtype.itemsize not in _KERNELS:
        raise TypeError(
            f"entry, fresh and out must have one dtype of 2, 4 or 8 bytes, got {entry.dtype}, "
            f"{fresh.dtype} and {out.dtype}"
        )
    if source.dtype != np.int32 or survives.dtype != np.bool_:
        raise TypeError(
            f"source must be int32 and survives boolean, got {source.dtype} and {survives.dtype}"
        )
    arrays = {"source": source, "survives": survives, "fresh": fresh, "out": out, "entry": entry}
    for name, array in arrays.items():
        if array.ndim != 1 or not array.flags.c_contiguous:
            raise ValueError(f"{name} must be a contiguous vector, got shape {array.shape}")
    size = len(out)
    if not len(source) == len(survives) == size or len(fresh) not in (1, size):
        raise ValueError(
            f"source, survives and fresh must have {size} entries as out has, got {len(source)}, "
            f"{len(survives)} and {len(fresh)}"
        )
    if not len(entry):  # nothing can survive, and there is nothing to read
        out[:] = fresh
        return
    record = fill_record(
        _MIGRATE,
        next_item=0,
        next_thread=0,
        entry=entry,
        old_size=len(entry),
        source=source,
        survives=survives,
        size=size,
        fresh=fresh,
        step=int(len(fresh) > 1 or size == 1),
        out=out,
    )
    run(_KERNELS[entry.dtype.itemsize], record, threads)


@njit  # type: ignore[untyped-decorator]
def _migrate(address: Any, dtype: Any) -> None:
    arguments = carray(as_pointer(address), 1, _MIGRATE)[0]
    size, step = arguments.size, arguments.step
    entry = array_at(arguments.entry, arguments.old_size, dtype)
    source = array_at(arguments.source, size, np.int32)
    survives = array_at(arguments.survives, size, np.uint8)
    fresh = array_at(arguments.fresh, 1 + step * (size - 1), dtype)
    out = array_at(arguments.out, size, dtype)
    while True:
        start = fetch_add(address) * _CHUNK
        if start >= size:
            break
        stop = min(start + _CHUNK, size)
        parts = source[start:stop], survives[start:stop], out[start:stop]
        if step:
            _gather(entry, *parts, fresh[start:stop])
        else:
            _gather_or_fill(entry, *parts, fresh[0])


# Positions inside a part are never negative, which the compiler has to know to gather vectors.
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


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _migrate_2(address: Any) -> None:
    _migrate(address, np.uint16)


@kernel(_KERNEL)
def _migrate_4(address: Any) -> None:
    _migrate(address, np.uint32)


@kernel(_KERNEL)
def _migrate_8(address: Any) -> None:
    _migrate(address, np.uint64)


_KERNELS = {2: _migrate_2, 4: _migrate_4, 8: _migrate_8}
