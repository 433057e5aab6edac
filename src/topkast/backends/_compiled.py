"""Which functions work on candidates: the compiled kernels, or NumPy's."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

from topkast.backends import _candidates

_MIN_ENTRIES = 1 << 14  # below which a call of a kernel costs more than it saves


def functions(size: int) -> Any:
    """The module whose functions work on vectors of `size` entries."""
    return _candidates if size < _MIN_ENTRIES or not has_numba() else _kernels()


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("topkast.kernels")


@functools.cache
def has_numba() -> bool:
    """Whether kernels can be compiled."""
    is_disabled = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
    return not is_disabled and importlib.util.find_spec("numba") is not None
