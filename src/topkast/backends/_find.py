"""From an array to the backend of its library."""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import entry_points
from typing import Any

from topkast.backends._base import Backend

# The group of entry points by which other packages bring the backend of a library.
ENTRY_POINTS = "topkast.backends"

# The module of this package for arrays whose type is of a package.
_OWN = {"numpy": "numpy", "torch": "torch", "jax": "jax", "jaxlib": "jax"}


def backend_of(array: Any) -> Backend:
    """The backend for the library of an array; that of the standard where it has none."""
    kind: Any = type(array)
    return load_backend(kind)


@functools.cache
def load_backend(kind: type[Any]) -> Backend:
    """The backend for arrays of a type: by the package of the type, or of one that it inherits."""
    for base in kind.__mro__:
        root = base.__module__.partition(".")[0]
        for entry in entry_points(group=ENTRY_POINTS, name=root):
            found: Backend = entry.load()()
            return found
        if root in _OWN:
            return load_own(_OWN[root])
    return _standard()


@functools.cache
def load_own(name: str) -> Backend:
    """The backend that a module of this package has."""
    backend: Backend = importlib.import_module(f"topkast.backends.{name}").BACKEND
    return backend


@functools.cache
def _standard() -> Backend:
    return Backend()
