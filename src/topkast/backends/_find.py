"""Dispatch from an array to the backend of its library."""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import entry_points
from typing import Any

import numpy as np

from topkast._errors import UnsupportedTensorError
from topkast.backends._base import Backend

# The entry-point group in which other packages register the backend of a library.
ENTRY_POINTS = "topkast.backends"

# The module of this package, by the root package of an array's type.
_BUILTIN = {"numpy": "numpy", "torch": "torch", "jax": "jax", "jaxlib": "jax"}


def backend_of(array: Any) -> Backend:
    """The backend of an array's library, or the standard one if the library has none."""
    array_type: Any = type(array)
    return load_backend(array_type)


@functools.cache
def load_backend(array_type: type[Any]) -> Backend:
    """Load the backend for arrays of a type, by the package of the type or of one of its bases.

    Raises :class:`topkast.UnsupportedTensorError` for NumPy's masked arrays, whose masks most
    operations drop or spread, and for its matrices, which have no vectors.
    """
    if issubclass(array_type, np.ma.MaskedArray):
        raise UnsupportedTensorError(
            "numpy.ma arrays are not supported: pass array.filled(0), or another number"
        )
    if issubclass(array_type, np.matrix):
        raise UnsupportedTensorError("numpy.matrix is not supported: pass numpy.asarray(array)")
    for base in array_type.__mro__:
        root = base.__module__.partition(".")[0]
        for entry in entry_points(group=ENTRY_POINTS, name=root):
            backend: Backend = entry.load()()
            return backend
        if root in _BUILTIN:
            return load_builtin(_BUILTIN[root])
    return _standard()


@functools.cache
def load_builtin(name: str) -> Backend:
    """Load the backend of a module of this package."""
    backend: Backend = importlib.import_module(f"topkast.backends.{name}").BACKEND
    return backend


@functools.cache
def _standard() -> Backend:
    return Backend()
