"""Running a kernel on several threads: PyTorch's own where PyTorch is loaded.

Two thread pools in one process compete for cores: idle OpenMP threads spin for milliseconds. So
kernels run on the OpenMP runtime of PyTorch, through the entry point that compilers call for a
parallel region. Without PyTorch they run on Python's threads.

A kernel takes the address of its arguments, a record of int64. The first is an atomic counter from
which each thread takes work items until none is left, so any number of threads may run a kernel.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from topkast.backends._threads import CORES, default_threads, executor, wait_for

_CACHE_LINE = 64  # bytes
_view_of, _address_of = ctypes.c_char.from_buffer, ctypes.addressof  # looked up once
_SCRATCH = threading.local()  # a call returns before its thread makes another one

_Region = Callable[[int, int, int, int], None]  # function, its argument, threads, flags


def run(kernel: Any, arguments: np.ndarray[Any, Any], threads: int | None = None) -> None:
    """Run a compiled ``numba.cfunc`` on `arguments`, whose first entry counts work items."""
    arguments[0] = 0
    run_at(kernel, address_of(arguments), threads or default_threads())


def address_of(array: np.ndarray[Any, Any]) -> int:
    """Address of the memory of an array: ``array.ctypes.data``, which takes longer."""
    try:
        return _address_of(_view_of(array))  # type: ignore[arg-type]
    except (BufferError, TypeError, ValueError):  # it is read-only, empty or not contiguous
        return int(array.ctypes.data)


def run_at(kernel: Any, address: int, threads: int) -> None:
    """Run a kernel on the arguments at an address, which must stay valid until it returns."""
    if threads == 1:
        kernel.ctypes(address)
        return
    region = _openmp_of_torch() if "torch" in sys.modules else None
    if region is not None:
        region(kernel.address, address, threads, 0)
        return
    call = kernel.ctypes  # releases the GIL
    futures: list[Future[None]] = []
    try:
        for _ in range(min(threads, CORES) - 1):
            futures.append(executor().submit(call, address))
        call(address)
    finally:
        wait_for(futures)


def scratch_at(size: int) -> int:
    """Address of memory for a kernel, aligned to a cache line, until this thread's next call."""
    memory: np.ndarray[Any, Any] | None = getattr(_SCRATCH, "memory", None)
    if memory is None or len(memory) < size + _CACHE_LINE:
        memory = _SCRATCH.memory = np.empty(size + _CACHE_LINE, dtype=np.uint8)
        _SCRATCH.address = memory.ctypes.data + -memory.ctypes.data % _CACHE_LINE
    address: int = _SCRATCH.address
    return address


@functools.cache
def _openmp_of_torch() -> _Region | None:
    """``GOMP_parallel`` as PyTorch's library resolves it, in whichever runtime it links to."""
    folder = Path(sys.modules["torch"].__file__ or "").parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            region = ctypes.CDLL(str(folder / name)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        region.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        region.restype = None
        typed_region: _Region = region
        return typed_region
    return None
