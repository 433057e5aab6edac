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
        self._has_nested_paths = _has_nested_paths(tree.paths)
        self._owners: dict[Path, str] = {}  # of entries that paths alone do not decide
        self._learned: set[Any] = set()  # signatures of params

    def init(self, params: Arrays, /) -> Any:
        self._learn_owners(params)
        return self._init(params)

    def _init(self, params: Arrays) -> Any:
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
                entry if (key := self.find_owner(path)) is None else visit(key, entry, initial)
            ),
            state,
            fresh,
        )

    def find_owner(self, path: Path) -> str | None:
        """Find the parameter that the entry of the state at `path` belongs to."""
        return self._owners.get(path) or find_key(self.tree.paths, path)

    def _learn_owners(self, params: Arrays) -> None:
        """Find the owners of entries whose paths end with the paths of several parameters.

        Of a model with a matrix ``weight`` and a layer ``mu``, the state of Adam has an entry
        ``mu.weight``, which can belong to either. Its owner is the parameter that it gets longer
        with.
        """
        if not self._has_nested_paths or (signature := _signature(params)) in self._learned:
            return
        same, longer = (
            {
                key: _resize(array, number * is_longer)
                for number, (key, array) in enumerate(params.items(), 1)
            }
            for is_longer in (False, True)
        )
        entries, longer_entries = (
            tree_flatten_with_path(jax.eval_shape(self._init, shapes))[0]
            for shapes in (same, longer)
        )
        for (path, entry), (_, longer_entry) in zip(entries, longer_entries, strict=True):
            keys = [key for key in _matching_keys(self.tree.paths, path) if key in params]
            for key in keys if len(keys) > 1 else ():
                shapes = same[key].shape, longer[key].shape
                if (entry.shape, longer_entry.shape) == shapes:
                    self._owners[path] = key
                    break
        self._learned.add(signature)

    def check(self, params: Arrays, sparse: Collection[str]) -> None:
        """Raise :class:`UnsupportedOptimizerError` unless the state can be migrated to a new B.

        `sparse` are the keys of the vectors on B in `params`. An entry of the state depends on
        these vectors if its shape changes with their length.
        """

        def state_entries(extra_length: int) -> list[tuple[Path, Any]]:
            shapes = {
                key: _resize(array, extra_length if key in sparse else 0)
                for key, array in params.items()
            }
            return tree_flatten_with_path(jax.eval_shape(self._init, shapes))[0]

        self._learn_owners(params)

        for (path, entry), (_, longer) in zip(state_entries(0), state_entries(1), strict=True):
            key = self.find_owner(path)
            is_migrated = key is not None and key in sparse and entry.shape == params[key].shape
            if entry.shape != longer.shape and not is_migrated:
                raise UnsupportedOptimizerError(
                    f"the state of the inner transformation has an entry of shape {entry.shape} "
                    f"at {keystr(path)} that belongs to no single tensor, so it cannot be "
                    "migrated when B changes: use a transformation with one entry per weight"
                )

    def check_state(self, params: Arrays, state: Any) -> None:
        """Raise :class:`topkast.MismatchError` unless `state` has the shapes that `params` need."""
        self._learn_owners(params)
        signature = _signature(params)
        if signature not in self._expected:
            shapes = jax.eval_shape(self._init, params)
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


def _signature(params: Arrays) -> Any:
    return tuple((key, leaf.shape, str(leaf.dtype)) for key, leaf in params.items())


def _resize(array: Any, extra_length: int) -> jax.ShapeDtypeStruct:
    """The description of an array whose last axis is longer, if it has one."""
    shape = (*array.shape[:-1], array.shape[-1] + extra_length) if array.shape else ()
    return jax.ShapeDtypeStruct(shape, array.dtype)


def find_key(paths: Mapping[str, Path], path: Path) -> str | None:
    """Find the parameter that an entry of the state belongs to, by the entry's path.

    optax mirrors the tree of the parameters wherever it keeps one entry for each. The entry's path
    then ends with the parameter's path, the longest if several match. The joint vector of several
    tensors goes by its key in a dictionary.
    """
    matches = _matching_keys(paths, path)
    if matches:
        return matches[0]
    if path and path[-1] == GetAttrKey("value"):  # of a Flax variable
        return find_key(paths, path[:-1])
    return str(path[-1].key) if path and isinstance(path[-1], DictKey) else None


def guess_owners(
    paths: Mapping[str, Path], state: Any, fits: Callable[[str, Any], bool]
) -> list[tuple[str | None, Any]]:
    """:func:`find_key` for all entries of a state whose transformation is not known.

    If several parameters match, ``fits(name, entry)`` decides, and then where in the state most of
    the parameters have entries beside this one. Returns each entry with its parameter.
    """
    entries = tree_flatten_with_path(state)[0]
    known = {path for path, _ in entries}
    owners = []
    for path, entry in entries:
        key, matches = find_key(paths, path), _matching_keys(paths, path)
        if len(matches) > 1:

            def rank(name: str, path: Path = path, entry: Any = entry) -> tuple[bool, int]:
                root = path[: len(path) - len(paths[name])]
                return fits(name, entry), sum(root + other in known for other in paths.values())

            key = max(matches, key=rank)
        owners.append((key, entry))
    return owners


def _matching_keys(paths: Mapping[str, Path], path: Path) -> list[str]:
    """The parameters whose paths end `path`, the longest first."""
    matches = [
        name for name, suffix in paths.items() if not suffix or path[-len(suffix) :] == suffix
    ]
    return sorted(matches, key=lambda name: -len(paths[name]))


def _has_nested_paths(paths: Mapping[str, Path]) -> bool:
    """Whether the path of a parameter ends with the path of another one."""
    suffixes = {*paths.values()}
    return any(path[start:] in suffixes for path in suffixes for start in range(1, len(path)))
