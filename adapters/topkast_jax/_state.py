"""The state of a wrapped optax transformation, and its inspection."""

from __future__ import annotations

import sys
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import astuple, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from topkast import MismatchError, Support, TopKASTState, WeightsMovedWarning
from topkast.adapter import (
    Inspection,
    count_bytes,
    forward_views,
    inspection,
    is_traced,
    members,
)
from topkast_jax._hosts import UnreadableSupports
from topkast_jax._rule import guess_owners
from topkast_jax._sharding import has_explicit_axes, is_sharded, layout_of, run_sharded
from topkast_jax._tree import as_arrays, flatten_weights
from topkast_jax.sparse._structure import Layouts, Structure, read_forward_values

Arrays = dict[str, jax.Array]


class CheckedState(NamedTuple):
    """State of a wrapped optax transformation: only arrays, of fixed shapes and dtypes.

    The fields of ``core`` can be read from the state itself: ``state.supports`` is
    ``state.core.supports``.

    Attributes
    ----------
    core
        State of the method; see :class:`topkast.TopKASTState`. The name of a tensor is the name of
        its leaf, such as ``"dense.kernel"``.
    weights_checksum
        Checksum of the shapes and of the weights on B from which the sets were chosen; 0-d uint32.
    stale_refreshes
        Number of refreshes after which the weights changed before the next update, and of compiled
        updates of a state that was made for other sets; 0-d int32.
    sets_checksum
        Checksum of the names and shapes of sparse tensors and of the sizes of their sets; 0-d
        uint32.
    layouts
        For tensors with sparse execution (:func:`topkast_jax.sparsify`), the order in which kernels
        visit the weights, by name of the tensor. Empty: masked execution.

    Examples
    --------
    >>> import jax.numpy as jnp, optax, topkast
    >>> tx = topkast.wrap_optimizer(optax.adam(0.1), fwd=0.75, bwd=0.5)
    >>> state = tx.init({"w": jnp.asarray([[4.0, 3.0], [2.0, 1.0]])})
    >>> state.supports["w"].indices
    Array([0, 1], dtype=int32)
    """

    core: TopKASTState
    weights_checksum: jax.Array
    stale_refreshes: jax.Array
    sets_checksum: jax.Array
    layouts: dict[str, Layouts] = {}  # noqa: RUF012 - never written to

    @property
    def structures(self) -> dict[str, Structure]:
        """What :func:`topkast_jax.sparse_linear` needs to know of A and B, by name of the tensor.

        Only tensors with sparse execution have one.
        """
        return {
            name: Structure(self.supports[name].indices, layouts)
            for name, layouts in self.layouts.items()
        }

    @property
    def updates(self) -> jax.Array:
        """Number of updates so far; 0-d int32."""
        updates: jax.Array = self.core.updates
        return updates

    @property
    def supports(self) -> dict[str, Support]:
        """The sets A and B, by name of the tensor."""
        return self.core.supports

    @property
    def entered_active(self) -> Arrays:
        """Number of entries that entered A at the last refresh, by name of the tensor."""
        return self.core.entered_active

    @property
    def ages(self) -> Arrays:
        """Number of updates since each entry entered B, by name of the tensor."""
        return self.core.ages

    @property
    def inner(self) -> Any:
        r"""State of the wrapped transformation, whose entries for a tensor have \|B\| elements."""
        return self.core.inner

    def __topkast_inspect__(self, params: Any) -> Inspection:
        if params is None:
            raise MismatchError("a functional state does not hold the weights: pass params too")
        self = as_arrays(self)
        self.check_single()
        warn_if_stale(self.stale_refreshes)
        tree, weights = flatten_weights(params, strict=False)
        state = self.core
        is_readable = all(map(_is_readable, jax.tree.leaves(state.supports)))
        if is_readable and (is_sharded(weights) or has_explicit_axes(weights)):
            state = state._replace(
                updates=_to_one_device(state.updates),
                supports=jax.tree.map(_to_one_device, state.supports),
                entered_active=jax.tree.map(_to_one_device, state.entered_active),
            )
        nbytes = dict.fromkeys({*weights, *self.supports}, 0)

        def fits(name: str, entry: Any) -> bool:
            if name not in self.supports:
                return bool(jnp.shape(entry) == weights[name].shape)
            return jnp.shape(entry)[-1:] == (self.supports[name].backward_size,)

        for key, entry in guess_owners(tree.paths, self.inner, fits):
            if key in nbytes:
                nbytes[key] += count_bytes(entry)
        data = inspection(state, weights, nbytes)
        self.check_sets(weights)
        held = {name: dict(parts) for name, parts in data.held.items()}
        model_bytes = data.model_bytes
        for name, layouts in self.layouts.items():
            held[name]["layouts"] = count_bytes(layouts.vector)
            # The gradient and the forward view are on B.
            unused = weights[name].size - self.supports[name].backward
            model_bytes -= 2 * unused * weights[name].dtype.itemsize
        supports = data.supports if is_readable else UnreadableSupports(iter(self.supports))
        return replace(data, held=held, model_bytes=model_bytes, supports=supports)

    def check_single(self) -> None:
        """Raise :class:`topkast.MismatchError` for a batch of states."""
        if jnp.ndim(self.updates):
            raise MismatchError(
                f"the state is a batch of {jnp.shape(self.updates)[0]} states, as from jax.vmap: "
                "pass one of them, jax.tree.map(lambda leaf: leaf[0], state), with its params, or "
                "apply jax.vmap to this call too"
            )

    def check_sets(self, weights: Arrays) -> None:
        """Raise :class:`topkast.MismatchError` if the state was made for other sets or shapes.

        Other leaves do not show that: |A| and the shapes of tensors are no arrays, so that a state
        can be restored into one with others. Nothing is raised while the state is traced.
        """
        known, expected = as_arrays(self.sets_checksum), checksum_sets(self.supports, weights)
        if not is_traced(known) and jax.device_get(known) != expected:
            raise MismatchError(
                "the state belongs to other tensors or other sets: names or shapes of params, |A|, "
                "|B| or blocks are not those at init. Restore a state into tx.init(params) of a "
                "transformation with the options with which it was saved; to go on with other "
                "options, call init with the restored params"
            )

    def __topkast_forward__(self, params: Any) -> Any:
        self.check_single()
        tree, weights = flatten_weights(params, strict=False)
        supports = as_arrays(self.supports)

        def view(weights: Arrays, supports: dict[str, Support]) -> Arrays:
            return forward_views(weights, supports)

        if is_sharded(weights) or has_explicit_axes(weights):
            views = run_sharded(view, layout_of(weights, weights), weights, supports)
        else:
            masked = {key: support for key, support in supports.items() if key not in self.layouts}
            views = view(weights, masked)
            for name, layouts in self.layouts.items():
                shape = weights[name].shape if name in weights else "nothing"
                if shape != layouts.shape:
                    raise MismatchError(
                        f"{name} is {shape} in params, but {layouts.shape} in the state: pass the "
                        "dense params that belong to the state"
                    )
                support = supports[name]
                views[name] = read_forward_values(support.forward, support.indices, weights[name])
        self.check_sets(weights)
        return tree.unflatten(views | tree.other_leaves(params))


def checksum_sets(supports: Mapping[str, Support], weights: Mapping[str, Any]) -> int:
    """Checksum of the names and shapes of sparse tensors, and of the sizes of their sets."""
    sets = [
        (
            [(name, jnp.shape(weights[name])) for name in members(key, weights) if name in weights],
            (support.forward, support.backward, support.group_size),
            None if support.blocks is None else astuple(support.blocks),
        )
        for key, support in sorted(supports.items())
    ]
    return zlib.crc32(repr(sets).encode())


def register_with_flax() -> None:
    """Let ``flax.serialization`` save the sets, if Flax is imported: it knows no dataclasses."""
    serialization = sys.modules.get("flax.serialization")
    if serialization is None:
        return

    def save(node: Any) -> dict[str, Any]:
        return {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(node))}

    def restore(node: Any, saved: dict[str, Any]) -> Any:
        leaves, structure = jax.tree.flatten(node)
        restored = [
            serialization.from_state_dict(leaf, saved[str(number)])
            for number, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, restored)

    for kind in (Support, Layouts):
        serialization.register_serialization_state(kind, save, restore, override=True)


def warn_if_stale(stale_refreshes: jax.Array) -> None:
    """Warn if a count is not zero, unless it is traced.

    A compiled function does not warn: a callback can deadlock with a thread that waits for it on a
    CPU, and keeps the function out of JAX's persistent compilation cache.
    """
    if not is_traced(stale_refreshes) and jax.device_get(stale_refreshes) > 0:
        warnings.warn(
            "the weights are not those from which the last refresh chose A and B. If another "
            "transformation changes the updates, as in optax.chain(wrapped, other), put it inside "
            "the wrapped one, which must be the outermost. If you changed weights yourself, or "
            "restored a state that was saved with other options, call init again",
            WeightsMovedWarning,
            stacklevel=2,
        )


def _is_readable(array: jax.Array) -> bool:
    """Whether this process can read all of an array, or the array is traced."""
    return is_traced(array) or array.is_fully_addressable or array.is_fully_replicated


def _to_one_device(array: jax.Array) -> jax.Array:
    if is_traced(array):
        sharding = jax.typeof(array).sharding
        if sharding.mesh.empty:
            return array
        replicated = NamedSharding(sharding.mesh, PartitionSpec())
        return jax.sharding.reshard(array, replicated)  # type: ignore[no-any-return]
    return jnp.asarray(jax.device_get(array))
