"""An optax transformation as the core's update rule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey, GetAttrKey, keystr, tree_flatten_with_path, tree_map_with_path

from topkast import MismatchError, UnsupportedOptimizerError
from topkast_jax._tree import Path, Tree

Arrays = dict[str, jax.Array]


class OptaxRule:
    """An optax transformation that gets the user's tree, with the values on B as its leaves.

    If all tensors are ranked as one, their joint vector fits no leaf of that tree; the
    transformation gets a dictionary instead.
    """

    def __init__(self, tx: optax.GradientTransformation, tree: Tree) -> None:
        self.tx = optax.with_extra_args_support(tx)
        self.tree = tree
        self._expected: dict[Any, Any] = {}  # a state's shapes, by signature of params

    def init(self, params: Arrays, /) -> Any:
        # Copies: a state that keeps parameters must survive the donation of `params`.
        return self.tx.init(self.unflatten({key: jnp.array(leaf) for key, leaf in params.items()}))

    def update(
        self, updates: Arrays, state: Any, params: Any = None, /, **extra: Any
    ) -> tuple[Arrays, Any]:
        self.check_state(params, state)
        return self.run(updates, state, params, **extra)

    def run(self, updates: Arrays, state: Any, params: Arrays, **extra: Any) -> tuple[Arrays, Any]:
        """:meth:`update` without the check."""
        displacements, state = self.tx.update(
            self.unflatten(updates), state, self.unflatten(params), **extra
        )
        if self._has_all_leaves(params):
            return self.tree.weights(displacements, "the inner updates"), state
        return displacements, state

    def map_entries(self, visit: Callable[[str, Any, Any], Any], state: Any, fresh: Any) -> Any:
        """Replace each entry per parameter in `state` by ``visit(key, entry, initial)``."""
        return tree_map_with_path(
            lambda path, entry, initial: (
                entry
                if (key := find_key(self.tree.paths, path)) is None
                else visit(key, entry, initial)
            ),
            state,
            fresh,
        )

    def check(self, params: Arrays, sparse: Collection[str]) -> None:
        """Raise :class:`UnsupportedOptimizerError` unless the state can be migrated to a new B.

        `sparse` are the keys of the vectors on B in `params`. An entry of the state depends on
        these vectors if its shape changes with their length.
        """

        def state_entries(extra_length: int) -> list[tuple[Path, Any]]:
            shapes = {
                key: jax.ShapeDtypeStruct(
                    (*array.shape[:-1], array.shape[-1] + extra_length), array.dtype
                )
                if key in sparse
                else jax.ShapeDtypeStruct(array.shape, array.dtype)
                for key, array in params.items()
            }
            return tree_flatten_with_path(jax.eval_shape(self.init, shapes))[0]

        for (path, entry), (_, longer) in zip(state_entries(0), state_entries(1), strict=True):
            key = find_key(self.tree.paths, path)
            is_migrated = key is not None and key in sparse and entry.shape == params[key].shape
            if entry.shape != longer.shape and not is_migrated:
                raise UnsupportedOptimizerError(
                    f"the state of the inner transformation has an entry of shape {entry.shape} "
                    f"at {keystr(path)} that belongs to no single tensor, so it cannot be "
                    "migrated when B changes: use a transformation with one entry per weight"
                )

    def check_state(self, params: Arrays, state: Any) -> None:
        """Raise :class:`topkast.MismatchError` unless `state` has the shapes that `params` need."""
        signature = tuple((key, leaf.shape, str(leaf.dtype)) for key, leaf in params.items())
        if signature not in self._expected:
            shapes = jax.eval_shape(self.init, params)
            self._expected[signature] = tree_flatten_with_path(shapes)[0]
        entries = {path: jnp.asarray(entry) for path, entry in tree_flatten_with_path(state)[0]}
        for path, entry in self._expected[signature]:
            actual = entries.get(path)
            if (
                actual is None
                or actual.shape != entry.shape
                or _dtype_class(actual) != _dtype_class(entry)  # optax may have promoted floats
            ):
                description = "nothing" if actual is None else f"{actual.dtype}{actual.shape}"
                raise MismatchError(
                    "params differ from those given to init: they need "
                    f"{entry.dtype}{entry.shape} at {keystr(path)} of the inner state, which has "
                    f"{description}"
                )

    def _has_all_leaves(self, arrays: Arrays) -> bool:
        return arrays.keys() == self.tree.paths.keys()

    def unflatten(self, arrays: Arrays) -> Any:
        return self.tree.unflatten(arrays) if self._has_all_leaves(arrays) else arrays


def _dtype_class(entry: Any) -> str:
    return "float" if jnp.issubdtype(entry.dtype, jnp.floating) else str(entry.dtype)


def find_key(paths: Mapping[str, Path], path: Path) -> str | None:
    """Find the parameter that an entry of the state belongs to, by the entry's path.

    optax mirrors the tree of the parameters wherever it keeps one entry for each. The entry's path
    then ends with the parameter's path, the longest if several match. The joint vector of several
    tensors goes by its key in a dictionary.
    """
    matches = [
        name for name, suffix in paths.items() if not suffix or path[-len(suffix) :] == suffix
    ]
    if matches:
        return max(matches, key=lambda name: len(paths[name]))
    if path and path[-1] == GetAttrKey("value"):  # of a Flax variable
        return find_key(paths, path[:-1])
    return str(path[-1].key) if path and isinstance(path[-1], DictKey) else None
