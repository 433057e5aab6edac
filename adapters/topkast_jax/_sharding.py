"""Parameters sharded over several devices: the layout of the state, and running under it."""

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
from topkast_jax._hosts import spans_processes
from topkast_jax._tree import Path


def is_sharded(weights: Mapping[str, jax.Array]) -> bool:
    """Whether an array that is not traced lies on several devices."""
    return any(
        not is_traced(array) and len(array.sharding.device_set) > 1 for array in weights.values()
    )


def has_explicit_axes(weights: Mapping[str, jax.Array]) -> bool:
    """Whether shardings are part of the types, so that JAX does not derive them."""
    return any(_is_explicit(array) for array in weights.values())


def run_sharded(function: Callable[..., Any], layout: Any, *arguments: Any) -> Any:
    """Call ``function(*arguments)``, compiled for many devices, with results in `layout`."""
    meshes = [leaf.mesh for leaf in jax.tree.leaves(layout) if isinstance(leaf, NamedSharding)]
    axes = {
        name
        for mesh in meshes
        for name, axis_type in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if axis_type == AxisType.Explicit
    }
    if axes:
        function = jax.sharding.auto_axes(function, axes=tuple(axes), out_sharding=layout)
        if spans_processes(arguments):  # outside jit, processes would wait at each operation
            function = jax.jit(function)
        return function(*arguments)
    return jax.jit(function, out_shardings=layout)(*arguments)


def layout_of(tree: Any, weights: Mapping[str, jax.Array]) -> Any:
    """Return the sharding of each array of `tree`; leaves without one are replicated."""
    replicated = NamedSharding(mesh_of(weights), PartitionSpec())

    def choose_sharding(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or _sharding_of(leaf).mesh.empty:
            return replicated
        return _sharding_of(leaf)

    return jax.tree.map(choose_sharding, tree)


def is_array_tree(value: Any) -> bool:
    """Whether all leaves of `value` can be arguments of a compiled function."""
    return all(isinstance(leaf, (jax.Array, float, int)) for leaf in jax.tree.leaves(value))


def check_layout(weights: Mapping[str, jax.Array]) -> None:
    """Raise :class:`topkast.UnsupportedTensorError` for a layout that the state cannot follow."""
    mesh = None
    for name, array in weights.items():
        if is_traced(array) or len(array.sharding.device_set) == 1:
            continue
        if not isinstance(array.sharding, NamedSharding):
            raise UnsupportedTensorError(
                f"{name} is sharded by a {type(array.sharding).__name__}, which the state cannot "
                "follow: use a jax.sharding.NamedSharding"
            )
        if mesh is not None and array.sharding.mesh != mesh:
            raise UnsupportedTensorError(
                f"{name} lies on the mesh {array.sharding.mesh}, others lie on {mesh}: all "
                "parameters must lie on one mesh"
            )
        mesh = array.sharding.mesh


def mesh_of(weights: Mapping[str, jax.Array]) -> Any:
    """The mesh that parameters lie on; some of them may lie on none."""
    return next(
        _sharding_of(array).mesh for array in weights.values() if not _sharding_of(array).mesh.empty
    )


def layout_of_state(
    shapes: Any, find_owner: Callable[[Path], str | None], weights: Mapping[str, jax.Array]
) -> Any:
    """Return shardings for a state with these `shapes`; its entries follow their tensors.

    Vectors on B are sharded over all mesh axes that their tensor is sharded over. `find_owner`
    names the tensor of an entry by its path in the inner state.
    """
    mesh = mesh_of(weights)
    axes = {
        key: _axes_of(key, support.backward, weights, mesh)
        for key, support in shapes.supports.items()
    }

    def choose_sharding(path: Any, entry: Any) -> NamedSharding:
        key = find_owner(path)
        if key is None:
            return NamedSharding(mesh, PartitionSpec())
        if key in axes and entry.ndim and entry.shape[-1] == shapes.supports[key].backward_size:
            return NamedSharding(mesh, PartitionSpec(*[None] * (entry.ndim - 1), axes[key]))
        lies_on_mesh = key in weights and not _sharding_of(weights[key]).mesh.empty
        if lies_on_mesh and entry.shape == weights[key].shape:
            sharding: NamedSharding = _sharding_of(weights[key])
            return sharding
        return NamedSharding(mesh, PartitionSpec())

    replicated = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes)
    core = replicated.core._replace(
        ages={key: NamedSharding(mesh, PartitionSpec(axes[key])) for key in shapes.ages},
        supports={
            key: jax.tree.map(
                lambda _, key=key: NamedSharding(mesh, PartitionSpec(axes[key])), support
            )
            for key, support in shapes.supports.items()
        },
        inner=tree_map_with_path(choose_sharding, shapes.inner),
    )
    return replicated._replace(core=core)


def _axes_of(
    key: str, backward: int, weights: Mapping[str, jax.Array], mesh: Any
) -> tuple[str, ...] | None:
    """Find the mesh axes that a vector on B is sharded over; None if it is replicated."""
    names: list[str] = []
    for name in members(key, weights):
        for axis in getattr(_sharding_of(weights[name]), "spec", ()):
            names += [axis] if isinstance(axis, str) else list(axis or ())
    axes = tuple(dict.fromkeys(names))
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if backward % shards:
        warnings.warn(
            f"{key}: |B| = {backward} does not divide into {shards} equal parts, so its optimizer "
            "state is replicated on every device: choose bwd so that it does (0.75, 0.875)",
            stacklevel=2,
        )
        return None
    return axes or None


def _is_explicit(array: Any) -> bool:
    mesh = jax.typeof(array).sharding.mesh
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def _sharding_of(array: Any) -> Any:
    if is_traced(array):
        return jax.typeof(array).sharding
    if isinstance(array.sharding, NamedSharding):
        return array.sharding
    return jax.typeof(array).sharding
