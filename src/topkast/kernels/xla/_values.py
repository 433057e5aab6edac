"""Values on B read from a weight and written into it, in one pass over the weight.

Entries of A and of B∖A lie in the same cache lines. A thread takes a range of the weight and copies
the entries of both sets there, while these lines are in its cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from topkast.kernels.runtime._arguments import array_at, define_arguments
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._vector import as_pointer, fetch_add
from topkast.kernels.xla._native import link, symbol_address

RANGE = 1 << 15  # entries of a weight that a thread takes at a time: they fit in the L2 cache

COPY = define_arguments("flat", "size", "indices", "values", "count", "forward")


def link_values() -> None:
    """Link the kernels."""
    for name, function in _KERNELS.items():
        link(name, function.address)


@njit  # type: ignore[untyped-decorator]
def _copy(address: Any, dtype: Any, is_reading: Any) -> None:
    arguments = carray(as_pointer(address), 1, COPY)[0]
    flat = array_at(arguments.flat, arguments.size, dtype)
    indices = array_at(arguments.indices, arguments.count, np.int32)
    values = array_at(arguments.values, arguments.count, dtype)
    forward = arguments.forward
    while True:
        start = fetch_add(address) * RANGE
        if start >= len(flat):
            break
        stop = min(start + RANGE, len(flat))
        for first, last in ((0, forward), (forward, len(indices))):
            entries = indices[first:last]
            begin = first + np.searchsorted(entries, np.int32(start))
            end = first + np.searchsorted(entries, np.int32(stop - 1), side="right")
            if is_reading:
                for k in range(begin, end):
                    values[k] = flat[np.uint32(indices[k])]
            else:
                for k in range(begin, end):
                    flat[np.uint32(indices[k])] = values[k]


_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _read_single(address: Any) -> None:
    _copy(address, np.float32, True)


@kernel(_KERNEL)
def _read_double(address: Any) -> None:
    _copy(address, np.float64, True)


@kernel(_KERNEL)
def _write_single(address: Any) -> None:
    _copy(address, np.float32, False)


@kernel(_KERNEL)
def _write_double(address: Any) -> None:
    _copy(address, np.float64, False)


_KERNELS = {
    "topkast_xla_read_single": _read_single,
    "topkast_xla_read_double": _read_double,
    "topkast_xla_write_single": _write_single,
    "topkast_xla_write_double": _write_double,
}
read_single_address, read_double_address, write_single_address, write_double_address = (
    symbol_address(name) for name in _KERNELS
)
