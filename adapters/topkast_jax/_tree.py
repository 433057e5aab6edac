"""Conversion of a pytree of weights to arrays by name, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path

from topkast import MismatchError, UnsupportedTensorError

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Tree:
    """The structure of a pytree, with the names and paths of its weights.

    Attributes
    ----------
    paths
        Path of each weight (floating-point leaf), by name.
    names
        Names of all leaves, in the order of the leaves.
    """

    treedef: Any
    paths: Mapping[str, Path]
    names: tuple[str, ...]

    def weights(self, tree: Any, label: str) -> dict[str, jax.Array]:
        """Return the leaves of `tree` at the paths of the weights, by name.

        Other leaves can be anything: ``jax.grad`` returns float0 there, ``equinox.filter_grad``
        None. `label` names `tree` in errors.
        """
        try:
            leaves = self.treedef.flatten_up_to(tree)
        except (ValueError, TypeError, KeyError) as error:
            raise MismatchError(f"{label} and params have different trees: {error}") from None
        weights = {}
        for name, leaf in zip(self.names, leaves, strict=True):
            if name in self.paths:
                if not hasattr(leaf, "shape") and not isinstance(leaf, (float, complex)):
                    raise MismatchError(f"{label} must have an array for {name!r}, got {leaf!r}")
                weights[name] = jnp.asarray(leaf)
        return weights

    def unflatten(self, arrays: Mapping[str, Any]) -> Any:
        """Build the pytree with `arrays` as its leaves, and None for names without an array."""
        return self.treedef.unflatten([arrays.get(name) for name in self.names])

    def is_like(self, value: Any, shapes: Mapping[str, Collection[tuple[int, ...]]]) -> bool:
        """Whether `value` is such a pytree, whose weights have one of these `shapes` each."""
        try:
            pairs = list(zip(self.names, self.treedef.flatten_up_to(value), strict=True))
        except (ValueError, TypeError, KeyError):
            return False
        return all(
            getattr(leaf, "shape", ()) in shapes[name] for name, leaf in pairs if name in shapes
        )

    def other_leaves(self, tree: Any) -> dict[str, Any]:
        """Return the leaves of `tree` that are not weights, by name."""
        leaves = zip(self.names, self.treedef.flatten_up_to(tree), strict=True)
        return {name: leaf for name, leaf in leaves if name not in self.paths}


def flatten_weights(params: Any, *, strict: bool = True) -> tuple[Tree, dict[str, jax.Array]]:
    """Split a pytree into its structure and its floating-point leaves by name.

    If `strict`, leaves that are not arrays, such as functions in an Equinox module, are refused.
    """
    leaves, treedef = tree_flatten_with_path(params)
    variables = {
        path
        for path, node in tree_flatten_with_path(params, is_leaf=_is_variable)[0]
        if _is_variable(node)
    }
    leaves = [(path[:-1] if path[:-1] in variables else path, leaf) for path, leaf in leaves]
    names = tuple(keystr(path, simple=True, separator=".") for path, _ in leaves)
    if len(set(names)) < len(names):
        duplicates = sorted({name for name in names if names.count(name) > 1})
        raise MismatchError(f"several leaves of params have one name: {duplicates}; rename them")
    paths, weights = {}, {}
    for name, (path, leaf) in zip(names, leaves, strict=True):
        if isinstance(leaf, (float, complex)):
            leaf = jnp.asarray(leaf)
        if isinstance(leaf, (bool, int)):
            continue
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            if not strict:
                continue
            raise UnsupportedTensorError(
                f"{name}: a leaf of params must be an array, got {type(leaf).__name__}; pass only "
                "the arrays, as from equinox.filter(model, equinox.is_inexact_array)"
            )
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            paths[name], weights[name] = path, jnp.asarray(leaf)
    if not weights:
        raise MismatchError("params has no floating-point leaf")
    return Tree(treedef, paths, names), weights


def as_arrays(tree: Any) -> Any:
    """Convert the NumPy arrays and Flax variables in `tree` to JAX arrays."""
    leaves = jax.tree.map(
        lambda leaf: leaf.get_value() if _is_variable(leaf) else leaf, tree, is_leaf=_is_variable
    )
    return jax.tree.map(jnp.asarray, leaves)


def is_prng_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key, to which no update can be added."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_variable(node: Any) -> bool:
    """Whether `node` is a Flax variable, which wraps an array and unwraps it on use."""
    return any(
        base.__name__ == "Variable" and base.__module__.startswith("flax.nnx")
        for base in type(node).__mro__
    )
