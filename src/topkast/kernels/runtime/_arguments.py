"""What compiled kernels are given: records of numbers and addresses, read by name.

A record is one array of int64. Caller and kernel share its dtype, which names each slot, so that an
argument that is added, moved or forgotten cannot take the place of another.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit

from topkast.kernels.runtime._pool import run
from topkast.kernels.runtime._vector import VECTOR_BYTES, as_pointer

Vector = np.ndarray[Any, Any]

_COUNTERS = ("ticket", "thread")
THREAD = 8  # bytes from the start of a record to the counter of its threads


def slots(*names: str) -> np.dtype[Any]:
    """The dtype of a kernel's arguments: a counter of tickets, one of threads, and `names`."""
    return record_of(*_COUNTERS, *names)


def record_of(*names: str) -> np.dtype[Any]:
    """The dtype of a record of int64 numbers."""
    return np.dtype([(name, np.int64) for name in names])


def fill(dtype: np.dtype[Any], /, **values: Any) -> Vector:
    """A record: numbers as they are, of arrays their addresses; these must outlive its use.

    Raises
    ------
    TypeError
        Unless `values` name each slot of `dtype`, and nothing else.
    """
    names = dtype.names or ()
    try:
        ordered = [values[name] for name in names]
    except KeyError:
        ordered = []
    if not len(ordered) == len(values) == len(names):
        wrong = sorted({*names} ^ {*values})
        raise TypeError(f"a record of {names} was given without, or with too many of, {wrong}")
    numbers = [one if isinstance(one, int) else one.ctypes.data for one in ordered]
    return np.asarray(numbers, dtype=np.int64)


def start(
    kernels: tuple[Any, Any],
    dtype: Any,
    threads: int | None,
    slots: np.dtype[Any],
    /,
    **values: Any,
) -> None:
    """Run the kernel for float32 or the one for float64 on the arguments that `values` name."""
    values["ticket"] = values["thread"] = 0
    run(kernels[0] if dtype == np.float32 else kernels[1], fill(slots, **values), threads)


def transform(
    kernels: tuple[Any, Any],
    source: Vector,
    target: Vector,
    threads: int | None,
    slots: np.dtype[Any],
    /,
    **values: Any,
) -> None:
    """:func:`start` with two arrays more, of which one is read and all of the other is written."""
    if source.dtype != target.dtype or source.dtype not in (np.float32, np.float64):
        raise TypeError(f"expected float32 or float64, got {source.dtype} and {target.dtype}")
    if not (source.flags.c_contiguous and target.flags.c_contiguous):
        raise ValueError("both arrays must be contiguous")
    if not target.flags.writeable:
        raise ValueError("the target is read-only: pass a writable array")
    start(kernels, source.dtype, threads, slots, source=source, target=target, **values)


def check(dtype: Any, *arrays: tuple[str, Vector, tuple[int, ...]]) -> None:
    """The kernels trust addresses: refuse arrays that are not as large as they think."""
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"products are of float32 or float64, got {dtype}")
    for name, array, shape in arrays:
        if array.dtype != dtype:
            raise TypeError(f"{name} is {array.dtype}, the compact vector {dtype}")
        if name == "out" and not array.flags.writeable:
            raise ValueError("out is read-only: pass a writable array")
        if array.shape != shape or not array.flags.c_contiguous:
            raise ValueError(
                f"{name} must be contiguous and of shape {shape}, got {array.shape} with strides "
                f"{array.strides}"
            )


def empty(shape: tuple[int, ...], dtype: Any) -> Vector:
    """An array that begins at a multiple of a vector's length, as those of PyTorch do."""
    dtype = np.dtype(dtype)
    memory = np.empty(math.prod(shape) * dtype.itemsize + VECTOR_BYTES, dtype=np.uint8)
    return np.ndarray(shape, dtype, memory, -memory.ctypes.data % VECTOR_BYTES)


@njit(inline="always")  # type: ignore[untyped-decorator]
def vector(address: Any, count: Any, dtype: Any) -> Any:
    """The array of `count` entries at an address."""
    return carray(as_pointer(address), count, dtype)
