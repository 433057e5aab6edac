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
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

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
        for _ in range(min(count, _CORES) - 1):
            futures.append(_python_threads().submit(call, arguments.ctypes.data))
        call(arguments.ctypes.data)
    finally:
        _wait_for(futures)


def _wait_for(futures: list[Future[None]]) -> None:
    """Wait for all threads, even if interrupted: they write to memory that the caller frees."""
    interrupt: BaseException | None = None
    for future in futures:
        while not future.done():
            try:
                future.exception()
            except KeyboardInterrupt as error:
                interrupt = error
    if interrupt is not None:
        raise interrupt
    for future in futures:
        future.result()


def default_threads() -> int:
    """The number of threads of PyTorch; if it is not loaded, one for each core."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else _CORES


_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


@functools.cache
def _python_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_CORES, thread_name_prefix="topkast")


if hasattr(os, "register_at_fork"):  # a child process has none of its parent's threads
    os.register_at_fork(after_in_child=_python_threads.cache_clear)
