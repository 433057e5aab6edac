"""How the kernels are compiled: kept in a cache where one can be written, which notices all edits.

numba keeps what it compiled beside the file of a function, and compiles anew when that file
changes. The kernels are made of functions of several files, so that all of them count here. Where
no cache can be written (a read-only image, a container without a home), each process compiles for
itself.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import caching

_FOLDER = Path(__file__).parent.parent  # all kernels


@functools.cache
def _sources() -> str:
    """A hash of all files of the kernels' folder and of those inside, their names among it."""
    digest = hashlib.sha256()
    files = [path for path in _FOLDER.rglob("*") if path.is_file()]
    for path in sorted(path for path in files if path.parent.name != "__pycache__"):
        contents = path.read_bytes()
        name = path.relative_to(_FOLDER).as_posix()
        digest.update(f"{name}\0{len(contents)}\0".encode())
        digest.update(contents)
    return digest.hexdigest()


class FolderLocator(caching._CacheLocator):  # type: ignore[misc]
    """Where numba would keep a function of the kernels, with a stamp of the whole folder."""

    def __init__(self, locator: Any) -> None:
        self._locator = locator

    def get_cache_path(self) -> Any:
        return self._locator.get_cache_path()

    def get_source_stamp(self) -> str:
        return _sources()

    def get_disambiguator(self) -> Any:
        return self._locator.get_disambiguator()

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        if _FOLDER not in Path(py_file).parents:
            return None
        for standard in caching.CacheImpl._locator_classes:
            if standard is not cls:
                locator = standard.from_function(py_func, py_file)
                if locator is not None:
                    return cls(locator)
        return None


caching.CacheImpl._locator_classes.insert(0, FolderLocator)


@functools.cache
def can_cache() -> bool:
    """Whether there is a folder for compiled kernels that can be written to."""
    try:
        return FolderLocator.from_function(_sources.__wrapped__, __file__) is not None
    except OSError:
        return False


def compiled(function: Callable[..., Any]) -> Any:
    """``numba.njit``, cached where that is possible."""
    return numba.njit(cache=can_cache())(function)


def kernel(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.cfunc``, cached where that is possible."""
    decorator: Callable[[Callable[..., Any]], Any] = numba.cfunc(signature, cache=can_cache())
    return decorator
