"""From a pytree of weights to arrays by name, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path

from topkast import MismatchError, UnsupportedTensorError

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Tree:
    """A pytree without its arrays: where the weight of each name is.

    Attributes
    ----------
    paths
        Path of each floating-point leaf, by its name.
    names
        The name of each leaf, in the order of the leaves.
    """

    treedef: Any
    paths: Mapping[str, Path]
    names: tuple[str, ...]

    def weights(self, tree: Any, what: str) -> dict[str, jax.Array]:
        """The leaves of `tree` in the places of the weights, by name.

        In the places of other leaves there may be anything, as ``jax.grad`` leaves float0 or
        ``equinox.filter_grad`` leaves None.
        """
        try:
            leaves = self.treedef.flatten_up_to(tree)
        except (ValueError, TypeError, KeyError) as error:
            raise MismatchError(f"{what} and params have different trees: {error}") from None
        weights = {}
        for name, leaf in zip(self.names, leaves, strict=True):
            if name in self.paths:
                if not hasattr(leaf, "shape"):
                    raise MismatchError(f"{what} has no array for {name!r}: {leaf!r}")
                weights[name] = jnp.asarray(leaf)
        return weights

    def rebuild(self, arrays: Mapping[str, Any]) -> Any:
        """The pytree with `arrays` as its leaves, and None where there is none of a name."""
        return self.treedef.unflatten([arrays.get(name) for name in self.names])

    def is_like(self, value: Any, weights: Mapping[str, Any]) -> bool:
        """Whether `value` is a pytree of arrays like `weights`."""
        try:
            pairs = list(zip(self.names, self.treedef.flatten_up_to(value), strict=True))
        except (ValueError, TypeError, KeyError):
            return False
        return all(
            jnp.shape(leaf) == weights[name].shape for name, leaf in pairs if name in weights
        )

    def other_leaves(self, tree: Any) -> dict[str, Any]:
        """The leaves of `tree` that are no weights, by name."""
        leaves = zip(self.names, self.treedef.flatten_up_to(tree), strict=True)
        return {name: leaf for name, leaf in leaves if name not in self.paths}


def flatten_weights(params: Any, *, strict: bool = True) -> tuple[Tree, dict[str, jax.Array]]:
    """The pytree without its arrays, and its floating-point leaves by name.

    Leaves that are no arrays (functions of an Equinox module, say) are refused if `strict`.
    """
    flat, treedef = tree_flatten_with_path(params)
    variables = {
        path
        for path, node in tree_flatten_with_path(params, is_leaf=_is_variable)[0]
        if _is_variable(node)
    }
    flat = [(path[:-1] if path[:-1] in variables else path, leaf) for path, leaf in flat]
    names = tuple(keystr(path, simple=True, separator=".") for path, _ in flat)
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise MismatchError(f"several leaves of params go by one name: {twice}")
    paths, weights = {}, {}
    for name, (path, leaf) in zip(names, flat, strict=True):
        if isinstance(leaf, (float, complex)):
            leaf = jnp.asarray(leaf)
        if isinstance(leaf, (bool, int)):
            continue
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            if not strict:
                continue
            raise UnsupportedTensorError(
                f"{name}: a leaf of params must be an array, got {type(leaf).__name__}; pass the "
                "arrays alone, as from equinox.filter(model, equinox.is_inexact_array)"
            )
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            paths[name], weights[name] = path, jnp.asarray(leaf)
    if not weights:
        raise MismatchError("params has no floating-point leaf")
    return Tree(treedef, paths, names), weights


def as_arrays(tree: Any) -> Any:
    """`tree` with arrays in the places of NumPy's, and of the variables of Flax."""
    leaves = jax.tree.map(
        lambda leaf: leaf.get_value() if _is_variable(leaf) else leaf, tree, is_leaf=_is_variable
    )
    return jax.tree.map(jnp.asarray, leaves)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed key of random numbers, which has no zero to be added to it."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_variable(node: Any) -> bool:
    """Whether `node` is a variable of Flax, which wraps an array, and takes it out as it needs."""
    return any(
        base.__name__ == "Variable" and base.__module__.startswith("flax.nnx")
        for base in type(node).__mro__
    )
