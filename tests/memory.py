"""JAX keeps all that it ever compiled in memory: tests let go of it when they have grown."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from pathlib import Path

import jax

# Bytes of memory that a process may use, and by which it may grow, before it lets go.
LIMIT = 3e9
GROWTH = 0.5e9
resident_after_release = 0


def release() -> None:
    """Forget what JAX compiled if that fills the memory; JAX finds it again on disk."""
    global resident_after_release
    if resident() > max(LIMIT, resident_after_release + GROWTH):
        jax.clear_caches()
        gc.unfreeze()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # not on every system
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        resident_after_release = resident()


def resident() -> int:
    """Bytes of memory in use; 0 where the system does not tell in this way."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
