"""Parameters spread over several devices: where the state goes, and how it is computed there."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import tree_map_with_path

from topkast import UnsupportedTensorError
from topkast.adapter import is_traced, members
from topkast_jax._rule import find_key
from topkast_jax._tree import Tree


def is_spread(weights: Mapping[str, jax.Array]) -> bool:
    """Whether arrays that can be looked at lie on several devices."""
    return any(
        not is_traced(array) and len(array.sharding.device_set) > 1 for array in weights.values()
    )


def is_explicit(weights: Mapping[str, jax.Array]) -> bool:
    """Whether shardings are part of the types, so that JAX derives none by itself."""
    return any(_explicit_axes(array) for array in weights.values())


def run(function: Callable[..., Any], layout: Any, *arguments: Any) -> Any:
    """``function(*arguments)`` compiled for many devices, its results laid out as `layout` says."""
    meshes = [leaf.mesh for leaf in jax.tree.leaves(layout) if isinstance(leaf, NamedSharding)]
    axes = {
        name
        for mesh in meshes
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }
    if axes:
        function = jax.sharding.auto_axes(function, axes=tuple(axes), out_sharding=layout)
        return function(*arguments)
    return jax.jit(function, out_shardings=layout)(*arguments)


def layout_of(tree: Any, weights: Mapping[str, jax.Array]) -> Any:
    """The sharding of each array, and whole on each device of `weights` what has none."""
    everywhere = NamedSharding(_mesh(weights), PartitionSpec())

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or _sharding(leaf).mesh.empty:
            return everywhere
        return _sharding(leaf)

    return jax.tree.map(place, tree)


def is_array_tree(value: Any) -> bool:
    """Whether all leaves of `value` may be arguments of a compiled function."""
    return all(isinstance(leaf, (jax.Array, float, int)) for leaf in jax.tree.leaves(value))


def check_layout(weights: Mapping[str, jax.Array]) -> None:
    """Raise :class:`topkast.UnsupportedTensorError` for a layout that cannot be served."""
    mesh = None
    for name, array in weights.items():
        if is_traced(array) or len(array.sharding.device_set) == 1:
            continue
        if not isinstance(array.sharding, NamedSharding):
            raise UnsupportedTensorError(
                f"{name} is spread over devices by {type(array.sharding).__name__}: only a "
                "jax.sharding.NamedSharding can be followed"
            )
        if mesh is not None and array.sharding.mesh != mesh:
            raise UnsupportedTensorError(
                f"{name} lies on the mesh {array.sharding.mesh}, others on {mesh}: all parameters "
                "must lie on one mesh"
            )
        mesh = array.sharding.mesh


def layout_beside(shapes: Any, tree: Tree, weights: Mapping[str, jax.Array]) -> Any:
    """Shardings for a state with these `shapes`: what belongs to a tensor is spread as it is.

    The vectors on B are cut into equal parts over the axes of the mesh that the tensor is cut over.
    """
    mesh = _mesh(weights)
    axes = {
        key: _axes(key, support.backward, weights, mesh) for key, support in shapes.supports.items()
    }

    def place(path: Any, entry: Any) -> NamedSharding:
        key = find_key(tree.paths, path)
        if key is None:
            return NamedSharding(mesh, PartitionSpec())
        if key in axes and entry.ndim and entry.shape[-1] == shapes.supports[key].backward_size:
            return NamedSharding(mesh, PartitionSpec(*[None] * (entry.ndim - 1), axes[key]))
        spread = key in weights and not _sharding(weights[key]).mesh.empty
        if spread and entry.shape == weights[key].shape:
            own: NamedSharding = _sharding(weights[key])
            return own
        return NamedSharding(mesh, PartitionSpec())

    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes)
    core = everywhere.core._replace(
        ages={key: NamedSharding(mesh, PartitionSpec(axes[key])) for key in shapes.ages},
        supports={
            key: jax.tree.map(lambda _, key=key: NamedSharding(mesh, PartitionSpec(axes[key])), one)
            for key, one in shapes.supports.items()
        },
        inner=tree_map_with_path(place, shapes.inner),
    )
    return everywhere._replace(core=core)


def _axes(
    key: str, backward: int, weights: Mapping[str, jax.Array], mesh: Any
) -> tuple[str, ...] | None:
    """Axes of the mesh that a vector on B is spread over, None if it is on every device."""
    cut: list[str] = []
    for name in members(key, weights):
        for axis in getattr(_sharding(weights[name]), "spec", ()):
            cut += [axis] if isinstance(axis, str) else list(axis or ())
    axes = tuple(dict.fromkeys(cut))
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if backward % parts:
        warnings.warn(
            f"{key}: |B| = {backward} does not divide into {parts} equal parts: what the optimizer "
            "holds for it is kept whole on every device. Choose bwd so that it does (0.75, 0.875)",
            stacklevel=2,
        )
        return None
    return axes or None


def _mesh(weights: Mapping[str, jax.Array]) -> Any:
    return next(
        _sharding(array).mesh for array in weights.values() if not _sharding(array).mesh.empty
    )


def _explicit_axes(array: Any) -> bool:
    mesh = jax.typeof(array).sharding.mesh
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def _sharding(array: Any) -> Any:
    if is_traced(array):
        return jax.typeof(array).sharding
    if isinstance(array.sharding, NamedSharding):
        return array.sharding
    return jax.typeof(array).sharding
