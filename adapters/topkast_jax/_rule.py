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
    """Hands an optax transformation the user's tree, with the vectors on B as its leaves.

    Where all tensors are ranked as one, their common vector has no place in that tree: then it is
    handed a dictionary.
    """

    def __init__(self, tx: optax.GradientTransformation, tree: Tree) -> None:
        self.tx = optax.with_extra_args_support(tx)
        self.tree = tree
        self._expected: dict[Any, Any] = {}  # entries of a state, by the signature of parameters

    def init(self, params: Arrays, /) -> Any:
        # Copies: a state that keeps parameters must survive the donation of theirs.
        return self.tx.init(self.assemble({key: jnp.array(leaf) for key, leaf in params.items()}))

    def update(
        self, updates: Arrays, state: Any, params: Any = None, /, **extra: Any
    ) -> tuple[Arrays, Any]:
        self.check_state(params, state)
        return self.run(updates, state, params, **extra)

    def run(self, updates: Arrays, state: Any, params: Arrays, **extra: Any) -> tuple[Arrays, Any]:
        """:meth:`update` without the check."""
        steps, state = self.tx.update(self.assemble(updates), state, self.assemble(params), **extra)
        if self._is_whole(params):
            return self.tree.weights(steps, "the inner updates"), state
        return steps, state

    def map_entries(self, visit: Callable[[str, Any, Any], Any], state: Any, fresh: Any) -> Any:
        """`state` with ``visit(key, entry, initial)`` in the place of what mirrors a parameter."""
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
        """Raise :class:`UnsupportedOptimizerError` unless its state can follow B.

        Of the compact vectors in `params`, those with the keys `sparse` change what they hold at
        a refresh. Whatever changes its shape when they are longer depends on them.
        """

        def entries(longer: int) -> list[tuple[Path, Any]]:
            shapes = {
                key: jax.ShapeDtypeStruct(
                    (*array.shape[:-1], array.shape[-1] + longer), array.dtype
                )
                if key in sparse
                else jax.ShapeDtypeStruct(array.shape, array.dtype)
                for key, array in params.items()
            }
            return tree_flatten_with_path(jax.eval_shape(self.init, shapes))[0]

        for (path, entry), (_, other) in zip(entries(0), entries(1), strict=True):
            key = find_key(self.tree.paths, path)
            follows = key is not None and key in sparse and entry.shape == params[key].shape
            if entry.shape != other.shape and not follows:
                raise UnsupportedOptimizerError(
                    f"the state of the inner transformation has at {keystr(path)} an entry of "
                    f"shape {entry.shape} that belongs to no single tensor: it cannot be carried "
                    "over when B changes"
                )

    def check_state(self, params: Arrays, state: Any) -> None:
        """Raise :class:`topkast.MismatchError` unless `state` is one for such `params`."""
        signature = tuple((key, leaf.shape, str(leaf.dtype)) for key, leaf in params.items())
        if signature not in self._expected:
            shapes = jax.eval_shape(self.init, params)
            self._expected[signature] = tree_flatten_with_path(shapes)[0]
        entries = {path: jnp.asarray(entry) for path, entry in tree_flatten_with_path(state)[0]}
        for path, entry in self._expected[signature]:
            other = entries.get(path)
            # Floats may have been promoted, as optax promotes them.
            if other is None or other.shape != entry.shape or _kind(other) != _kind(entry):
                present = "nothing" if other is None else f"{other.dtype}{other.shape}"
                raise MismatchError(
                    "params differ from those given to init: the inner state would have "
                    f"{entry.dtype}{entry.shape} at {keystr(path)}, and has {present}"
                )

    def _is_whole(self, arrays: Arrays) -> bool:
        return arrays.keys() == self.tree.paths.keys()

    def assemble(self, arrays: Arrays) -> Any:
        return self.tree.rebuild(arrays) if self._is_whole(arrays) else arrays


def _kind(entry: Any) -> str:
    return "float" if jnp.issubdtype(entry.dtype, jnp.floating) else str(entry.dtype)


def find_key(paths: Mapping[str, Path], path: Path) -> str | None:
    """The parameter that an entry of the state belongs to, by the path of the entry.

    optax mirrors the tree of the parameters wherever it keeps something for each, so that the path
    ends with the parameter's own (the longest of several); a vector that several tensors share
    goes by its key in a dictionary.
    """
    ends = [name for name, end in paths.items() if not end or path[-len(end) :] == end]
    if ends:
        return max(ends, key=lambda name: len(paths[name]))
    if path and path[-1] == GetAttrKey("value"):  # of a variable of Flax
        return find_key(paths, path[:-1])
    return str(path[-1].key) if path and isinstance(path[-1], DictKey) else None
