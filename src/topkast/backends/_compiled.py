"""Which functions work on candidates: the compiled kernels, or NumPy's."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

from topkast.backends import _candidates

# From as many entries on, a call of a kernel saves more than it costs. Those that take seconds to
# compile have to save more.
_MIN_ENTRIES = {
    "collect": 1 << 15,
    "divide": 1 << 13,
    "find_thresholds": 1 << 15,
    "generate": 1 << 14,
    "migrate": 1 << 13,
    "put": 1 << 12,
}


def function(name: str, size: int) -> Any:
    """The function of this name that works on vectors of `size` entries."""
    return getattr(_kernels() if has_kernel(name, size) else _candidates, name)


def has_kernel(name: str, size: int) -> bool:
    """Whether a kernel works on vectors of `size` entries."""
    return size >= _MIN_ENTRIES[name] and has_numba()


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("topkast.kernels")


@functools.cache
def has_numba() -> bool:
    """Whether kernels can be compiled."""
    is_disabled = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
    return not is_disabled and importlib.util.find_spec("numba") is not None
