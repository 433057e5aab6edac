"""Initial weights generated on all cores: the bits of :mod:`topkast.reservoirs`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels.runtime._arguments import (
    Vector,
    array_at,
    check_arrays,
    define_arguments,
    run_kernel,
)
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import as_pointer, fetch_add

_CHUNK = 1 << 14  # weights that a thread takes at a time

_GENERATE = define_arguments(
    "out", "size", "start", "key", "table", "table_size", "cell_bits", "unit"
)


def generate(
    out: Vector,
    start: int,
    key: tuple[int, int, int, int],
    table: Vector | None,
    unit: float,
    /,
    *,
    threads: int | None = None,
) -> None:
    """Write the weights of consecutive flat indices, as :class:`topkast.reservoirs.Generated` does.

    Parameters
    ----------
    out
        The weights (n,), contiguous, float32 or float64; overwritten.
    start
        Flat index of the first one.
    key
        Key of the random numbers: four words of 32 bits.
    table
        Quantiles at the edges of 2ᵏ cells, int32 (2ᵏ + 1,); None: uniform weights.
    unit
        The weight that the number 1 stands for.
    threads
        As for :func:`multiply`.

    Raises
    ------
    TypeError, ValueError
        If `out` has another dtype, or is not contiguous.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.kernels import generate
    >>> out = np.empty(3, np.float32)
    >>> generate(out, 0, (1, 2, 3, 4), None, 2**-24)
    >>> bool((abs(out) < 1).all()), len({*out.tolist()})
    (True, 3)
    """
    check_arrays(out.dtype, ("out", out, (out.size,)))
    table = np.zeros(0, np.int32) if table is None else table
    run_kernel(
        _KERNELS,
        out.dtype,
        threads,
        _GENERATE,
        out=out,
        size=out.size,
        start=start,
        key=np.asarray(key, dtype=np.uint32),
        table=table,
        table_size=table.size,
        cell_bits=max(table.size - 1, 1).bit_length() - 1,
        unit=np.asarray([unit], dtype=out.dtype),
    )


@njit(inline="always")  # type: ignore[untyped-decorator]
def _mix(word: Any) -> Any:
    word = np.uint32(word ^ (word >> np.uint32(16)))
    word = np.uint32(word * np.uint32(0x7FEB352D))
    word = np.uint32(word ^ (word >> np.uint32(15)))
    word = np.uint32(word * np.uint32(0x846CA68B))
    return np.uint32(word ^ (word >> np.uint32(16)))


@njit(inline="always")  # type: ignore[untyped-decorator]
def _word_of(index: Any, keys: Any) -> Any:
    """The random word of an index: see ``random_words``."""
    first, second, third, fourth = keys
    word = _mix(np.uint32(index) ^ first) ^ np.uint32(index >> 32)
    word = _mix(np.uint32(word ^ second))
    word = _mix(np.uint32(word ^ third))
    return _mix(_mix(np.uint32(word ^ fourth)))


@njit  # type: ignore[untyped-decorator]
def _write_uniform(out: Any, words: Any, unit: Any) -> None:
    for position in range(len(out)):
        word = words[position]
        out[position] = np.int32((word >> np.uint32(8)) * 2 + 1 - (1 << 24)) * unit


@njit  # type: ignore[untyped-decorator]
def _write_normal(out: Any, words: Any, table: Any, cell_bits: Any, unit: Any) -> None:
    cell_shift = np.uint32(31 - cell_bits)
    fraction_shift = np.uint32(cell_shift - np.uint32(8))
    cell_mask = np.uint32((1 << cell_bits) - 1)
    for position in range(len(out)):
        word = words[position]
        cell = (word >> cell_shift) & cell_mask
        fraction = np.int32((word >> fraction_shift) & np.uint32(255))
        low, high = table[cell], table[cell + 1]
        step = np.int32((high - low) * fraction) >> np.int32(8)
        magnitude = np.int32((low + step) * 2 + 1)
        negative = np.int32(word >> np.uint32(31))
        out[position] = np.int32((magnitude ^ -negative) + negative) * unit


@njit  # type: ignore[untyped-decorator]
def _generate(address: Any, dtype: Any) -> None:
    arguments = carray(as_pointer(address), 1, _GENERATE)[0]
    out = array_at(arguments.out, arguments.size, dtype)
    key = array_at(arguments.key, 4, np.uint32)
    keys = key[0], key[1], key[2], key[3]
    table = array_at(arguments.table, arguments.table_size, np.int32)
    unit = array_at(arguments.unit, 1, dtype)[0]
    words = np.empty(_CHUNK, dtype=np.uint32)
    while True:
        first = fetch_add(address) * _CHUNK
        if first >= len(out):
            break
        part = out[first : min(first + _CHUNK, len(out))]
        start = arguments.start + first
        for position in range(len(part)):  # a loop of its own, which the compiler vectorises
            words[position] = _word_of(start + position, keys)
        if len(table):
            _write_normal(part, words, table, arguments.cell_bits, unit)
        else:
            _write_uniform(part, words, unit)


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _generate_single(address: Any) -> None:
    _generate(address, np.float32)


@kernel(_KERNEL)
def _generate_double(address: Any) -> None:
    _generate(address, np.float64)


_KERNELS = _generate_single, _generate_double
