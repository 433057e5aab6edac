"""Running a kernel on several threads: PyTorch's own, where PyTorch is loaded.

Two pools of threads in one process wait for each other's cores: the idle threads of OpenMP spin
for milliseconds. So kernels run on the threads of the OpenMP runtime that PyTorch uses, by the
entry point that compilers call for a parallel region. Elsewhere Python's threads do.

A kernel takes the address of its arguments, int64 numbers of which the first is a counter, and
takes tickets from it until none is left: it may run on any number of threads at once.
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
    """Run a compiled ``numba.cfunc`` on `arguments`, whose first entry counts tickets from 0."""
    arguments[0] = 0
    count = threads or default_threads()
    region = _openmp_of_torch() if "torch" in sys.modules else None
    if count > 1 and region is not None:
        region(kernel.address, arguments.ctypes.data, count, 0)
        return
    call = kernel.ctypes  # releases the interpreter's lock
    others: list[Future[None]] = []
    try:
        for _ in range(min(count, _CORES) - 1):
            others.append(_python_threads().submit(call, arguments.ctypes.data))
        call(arguments.ctypes.data)
    finally:
        _wait_for(others)


def _wait_for(others: list[Future[None]]) -> None:
    """Until all have ended, interrupted or not: they write to memory that the caller would free."""
    interrupt: BaseException | None = None
    for other in others:
        while not other.done():
            try:
                other.exception()
            except KeyboardInterrupt as error:
                interrupt = error
    if interrupt is not None:
        raise interrupt
    for other in others:
        other.result()


def default_threads() -> int:
    """As many as PyTorch uses, or one for each core."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else _CORES


_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _openmp_of_torch() -> _Region | None:
    """``GOMP_parallel`` as PyTorch's library sees it, whichever runtime it was built with."""
    folder = Path(sys.modules["torch"].__file__ or "").parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            region = ctypes.CDLL(str(folder / name)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        region.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        region.restype = None
        found: _Region = region
        return found
    return None


@functools.cache
def _python_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_CORES, thread_name_prefix="topkast")


if hasattr(os, "register_at_fork"):  # the threads of a process are not those of its child
    os.register_at_fork(after_in_child=_python_threads.cache_clear)
