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
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from topkast.backends._threads import CORES, default_threads, executor, wait_for

_Region = Callable[[int, int, int, int], None]  # function, its argument, threads, flags


def run(kernel: Any, arguments: np.ndarray[Any, Any], threads: int | None = None) -> None:
    """Run a compiled ``numba.cfunc`` on `arguments`, whose first entry counts work items."""
    arguments[0] = 0
    count = threads or default_threads()
    region = _openmp_of_torch() if "torch" in sys.modules else None
    if count > 1 and region is not None:
        region(kernel.address, arguments.ctypes.data, count, 0)
        return
    call = kernel.ctypes  # releases the GIL
    futures: list[Future[None]] = []
    try:
        for _ in range(min(count, CORES) - 1):
            futures.append(executor().submit(call, arguments.ctypes.data))
        call(arguments.ctypes.data)
    finally:
        wait_for(futures)


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
