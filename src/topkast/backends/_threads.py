"""Python threads for work in host memory that releases the GIL."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """The number of threads of PyTorch; if it is not loaded, one for each core."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else CORES


def wait_for(futures: Sequence[Future[T]]) -> None:
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


@functools.cache
def executor() -> ThreadPoolExecutor:
    """The threads, one for each core."""
    return ThreadPoolExecutor(CORES, thread_name_prefix="topkast")


if hasattr(os, "register_at_fork"):  # a child process has none of its parent's threads
    os.register_at_fork(after_in_child=executor.cache_clear)
