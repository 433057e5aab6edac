"""The array libraries on which the core is tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import torch

from topkast.testing import to_numpy


@dataclass(frozen=True)
class Library:
    """An array library, and the way to run functions in it."""

    name: str
    asarray: Callable[[np.ndarray[Any, Any]], Any]
    compile: Callable[[Any], Any] = lambda function: function

    @property
    def traces(self) -> bool:
        return self.name == "jax-jit"

    def __str__(self) -> str:
        return self.name


def _read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array = array.copy()
    array.flags.writeable = False
    return array


LIBRARIES = [
    Library("numpy", np.array),
    Library("numpy-readonly", _read_only),
    Library("array-api-strict", array_api_strict.asarray),
    Library("torch", lambda array: torch.asarray(array.copy())),
    Library("jax", jnp.asarray),
    Library("jax-jit", jnp.asarray, jax.jit),
]


def host(tree: Any) -> Any:
    """Convert arrays of any library, in tuples and dictionaries, to NumPy arrays."""
    if isinstance(tree, dict):
        return {key: host(value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        values = [host(value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return to_numpy(tree)
