"""Compilation of the kernels, with an on-disk cache that notices edits to any of their files.

numba caches compiled code next to the file of a function, and recompiles it when that file changes.
A kernel calls functions from several files, so here an edit to any file of the folder invalidates
the cache. The cache is never needed: where none can be written (a read-only image, a container
without a home, a full disk, a zip file), each process compiles for itself, and a damaged cache is
written anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import caching, sigutils
from numba.core.ccallback import CFunc

_FOLDER = Path(__file__).parent.parent  # of all kernels


@functools.cache
def _hash_sources() -> str:
    """Hash the names and contents of all files in the kernels' folder and its subfolders."""
    digest = hashlib.sha256()
    files = [path for path in _FOLDER.rglob("*") if path.is_file()]
    for path in sorted(path for path in files if path.parent.name != "__pycache__"):
        contents = path.read_bytes()
        name = path.relative_to(_FOLDER).as_posix()
        digest.update(f"{name}\0{len(contents)}\0".encode())
        digest.update(contents)
    return digest.hexdigest()


class FolderLocator(caching._CacheLocator):  # type: ignore[misc]
    """numba's own cache locator, stamped with the hash of the kernels' folder."""

    def __init__(self, locator: Any) -> None:
        self._locator = locator
        # numba names them when it does not cache a function.
        self._py_file = getattr(locator, "_py_file", "")
        self._lineno = getattr(locator, "_lineno", 0)

    def get_cache_path(self) -> Any:
        return self._locator.get_cache_path()

    def get_source_stamp(self) -> str:
        return _hash_sources()

    def get_disambiguator(self) -> Any:
        return self._locator.get_disambiguator()

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        if _FOLDER not in Path(py_file).parents or not _FOLDER.is_dir():
            return None  # inside a zip file there is no folder to hash
        for locator_class in caching.CacheImpl._locator_classes:
            if locator_class is not cls:
                locator = locator_class.from_function(py_func, py_file)
                if locator is not None:
                    return cls(locator)
        return None


caching.CacheImpl._locator_classes.insert(0, FolderLocator)


@functools.cache
def can_cache() -> bool:
    """Whether compiled kernels can be written to a cache folder."""
    try:
        return FolderLocator.from_function(_hash_sources.__wrapped__, __file__) is not None
    except OSError:
        return False


class OptionalCache(caching.FunctionCache):  # type: ignore[misc]
    """A cache of one function that does without the files it cannot read or write."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # unpickling a damaged file raises anything
            self._remove_index()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError:
            # numba writes the index first: it may name a file that holds older code.
            self._remove_index()

    def _remove_index(self) -> None:
        with contextlib.suppress(OSError):
            Path(self._cache_file._index_path).unlink()


def compiled(function: Callable[..., Any]) -> Any:
    """``numba.njit`` that releases the GIL, cached where possible."""
    dispatcher = numba.njit(nogil=True)(function)
    if can_cache() and dispatcher is not function:  # NUMBA_DISABLE_JIT leaves functions as they are
        dispatcher._cache = OptionalCache(function)
    return dispatcher


class Kernel:
    """A ``numba.cfunc`` that is compiled when it is first needed, cached where possible."""

    def __init__(self, function: Callable[..., Any], signature: Any) -> None:
        self._function, self._signature = function, signature

    @functools.cached_property
    def _compiled(self) -> Any:
        signature = sigutils.normalize_signature(self._signature)
        callback: Any = CFunc(self._function, signature, locals={}, options={})
        if can_cache():
            callback._cache = OptionalCache(self._function)
        callback.compile()
        return callback

    @functools.cached_property
    def address(self) -> int:
        """Address of the compiled function."""
        address: int = self._compiled.address
        return address

    @functools.cached_property
    def ctypes(self) -> Any:
        """The function as a callable that releases the GIL."""
        return self._compiled.ctypes


def kernel(signature: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a function to become a :class:`Kernel` of this signature."""
    return functools.partial(Kernel, signature=signature)
