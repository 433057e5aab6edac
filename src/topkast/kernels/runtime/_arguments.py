"""Arguments of compiled kernels: records of int64 numbers and addresses, read by name.

A record is one array of int64. Caller and kernel share its dtype, which names each slot, so that an
argument that is added, moved or forgotten cannot be read as another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit

from topkast.kernels.runtime._pool import address_of, run
from topkast.kernels.runtime._vector import VECTOR_BYTES, as_pointer

Vector = np.ndarray[Any, Any]

_COUNTERS = ("next_item", "next_thread")
THREAD_COUNTER = 8  # byte offset of `next_thread` in a record


def define_arguments(*names: str) -> np.dtype[Any]:
    """The dtype of a kernel's arguments: counters of work items and of threads, then `names`."""
    return define_record(*_COUNTERS, *names)


def define_record(*names: str) -> np.dtype[Any]:
    """The dtype of a record of int64 numbers."""
    return np.dtype([(name, np.int64) for name in names])


def fill_record(dtype: np.dtype[Any], /, **values: Any) -> Vector:
    """A record of integers and of the addresses of arrays, which must outlive it.

    Raises
    ------
    TypeError
        If `values` lack a slot of `dtype`, or name one that it does not have.
    """
    names = dtype.names or ()
    try:
        ordered = [values[name] for name in names]
    except KeyError:
        ordered = []
    if not len(ordered) == len(values) == len(names):
        wrong = sorted({*names} ^ {*values})
        raise TypeError(f"slots {wrong} of a record are missing or unknown: pass exactly {names}")
    numbers = [value if isinstance(value, int) else address_of(value) for value in ordered]
    return np.asarray(numbers, dtype=np.int64)


def update_record(record: Vector, dtype: np.dtype[Any], /, **values: Any) -> None:
    """Change some slots of a record, for the next run of a kernel."""
    slots: Any = dtype.fields
    for name, value in values.items():
        slot = slots[name][1] // record.itemsize
        record[slot] = value if isinstance(value, int) else address_of(value)


def run_kernel(
    kernels: tuple[Any, Any],
    dtype: Any,
    threads: int | None,
    record_dtype: np.dtype[Any],
    /,
    **values: Any,
) -> Callable[..., None]:
    """Run the float32 or the float64 kernel of a pair on the arguments `values`.

    Returns a function that changes some arguments, and runs the kernel again: the arrays of the
    first run must live until then.
    """
    values["next_item"] = values["next_thread"] = 0
    kernel = kernels[0] if dtype == np.float32 else kernels[1]
    record = fill_record(record_dtype, **values)
    run(kernel, record, threads)

    def run_again(**changed: Any) -> None:
        update_record(record, record_dtype, next_thread=0, **changed)
        run(kernel, record, threads)

    return run_again


def run_transform(
    kernels: tuple[Any, Any],
    source: Vector,
    target: Vector,
    threads: int | None,
    record_dtype: np.dtype[Any],
    /,
    **values: Any,
) -> None:
    """:func:`run_kernel` for a kernel that reads `source` and writes all of `target`."""
    if source.dtype != target.dtype or source.dtype not in (np.float32, np.float64):
        raise TypeError(
            "source and target must have the same dtype, float32 or float64, got "
            f"{source.dtype} and {target.dtype}"
        )
    if not (source.flags.c_contiguous and target.flags.c_contiguous):
        raise ValueError("source and target must be contiguous")
    check_writable(target=target)
    run_kernel(kernels, source.dtype, threads, record_dtype, source=source, target=target, **values)


def check_arrays(dtype: Any, *arrays: tuple[str, Vector, tuple[int, ...]]) -> None:
    """Check name, array and expected shape: kernels read memory by address, without bounds."""
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"products need float32 or float64, got {dtype}")
    for name, array, shape in arrays:
        if array.dtype != dtype:
            raise TypeError(f"{name} is {array.dtype}, but the compact vector is {dtype}")
        if name == "out":
            check_writable(out=array)
        if array.shape != shape or not array.flags.c_contiguous:
            raise ValueError(
                f"{name} must be contiguous and of shape {shape}, got shape {array.shape} with "
                f"strides {array.strides}"
            )


def check_writable(**arrays: Vector) -> None:
    """Raise ValueError for a read-only array: kernels would write to its memory all the same."""
    for name, array in arrays.items():
        if not array.flags.writeable:
            raise ValueError(f"{name} is read-only: pass a writable array")


def empty_aligned(shape: tuple[int, ...], dtype: Any) -> Vector:
    """An uninitialized array aligned to the length of a vector, as PyTorch aligns its own."""
    dtype = np.dtype(dtype)
    memory = np.empty(math.prod(shape) * dtype.itemsize + VECTOR_BYTES, dtype=np.uint8)
    return np.ndarray(shape, dtype, memory, -memory.ctypes.data % VECTOR_BYTES)


@njit(inline="always")  # type: ignore[untyped-decorator]
def array_at(address: Any, count: Any, dtype: Any) -> Any:
    """The array of `count` entries at an address."""
    return carray(as_pointer(address), count, dtype)
