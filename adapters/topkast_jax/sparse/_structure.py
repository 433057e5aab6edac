"""Where the weights of A and B are in a matrix, in the order in which the kernels visit them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from topkast import MismatchError, Support
from topkast_jax.sparse._targets import like, register, target


@functools.partial(
    register_dataclass, data_fields=["vector"], meta_fields=["shape", "forward", "backward"]
)
@dataclass(frozen=True)
class Layouts:
    r"""The layouts of a sparse matrix, in one vector of int32 of fixed length; a pytree.

    Attributes
    ----------
    vector
        Arrays and their positions, in the format of the kernels; int32 (length,).
    shape
        Shape of the matrix.
    forward, backward
        \|A\| and \|B\|.

    Examples
    --------
    >>> import jax.numpy as jnp, topkast, topkast_jax
    >>> support = topkast.Support.of(
    ...     active=jnp.asarray([1, 2], "int32"), exploring=jnp.asarray([0], "int32"))
    >>> layouts = topkast_jax.Layouts.of(support, (2, 2))
    >>> layouts.shape, layouts.forward, layouts.backward
    ((2, 2), 2, 3)
    """

    vector: jax.Array
    shape: tuple[int, int]
    forward: int
    backward: int

    @classmethod
    def of(cls, support: Support, shape: tuple[int, int]) -> Layouts:
        """Build the layouts of the sets of a matrix; also inside ``jax.jit``, on a CPU."""
        plan = plan_of(shape, support.forward, support.backward)
        build = target("topkast_build", like((int(plan[1]),), jnp.int32))
        return cls(build(support.indices, plan), shape, support.forward, support.backward)

    def rebuild(self, support: Support) -> Layouts:
        """The layouts of other sets of the same matrix, with the same shapes."""
        length = int(plan_of(self.shape, self.forward, self.backward)[1])
        if self.vector.shape != (length,):
            raise MismatchError(
                f"layouts have {self.vector.shape[0]} numbers, but on this machine a matrix of "
                f"shape {self.shape} needs {length}: they depend on the number of cores. After "
                "loading a checkpoint of another machine, call "
                "topkast_jax.sparsify(params, topkast_jax.densify(state))"
            )
        return Layouts.of(support, self.shape)


@functools.partial(register_dataclass, data_fields=["indices", "layouts"], meta_fields=[])
@dataclass(frozen=True)
class Structure:
    r"""The sets A and B of one weight matrix, for :func:`sparse_linear`; a pytree of int32 arrays.

    All shapes are fixed by the shape of the matrix, \|A\| and \|B\|, so that a refresh changes
    contents alone. ``state.structures`` makes it; change none of its arrays.

    Attributes
    ----------
    indices
        Flat indices of A, ascending, then of B∖A, ascending; (\|B\|,).
    layouts
        The order in which the kernels visit the weights.

    Examples
    --------
    >>> import jax.numpy as jnp, topkast, topkast_jax
    >>> support = topkast.Support.of(
    ...     active=jnp.asarray([1, 2], "int32"), exploring=jnp.asarray([0], "int32"))
    >>> structure = topkast_jax.Structure.of(support, (2, 2))
    >>> structure.shape, structure.forward, structure.backward
    ((2, 2), 2, 3)
    """

    indices: jax.Array
    layouts: Layouts

    @classmethod
    def of(cls, support: Support, shape: tuple[int, int]) -> Structure:
        """Make the structure of a matrix from its sets.

        Raises
        ------
        MismatchError
            If the sets are not int32 indices of single weights.
        UnsupportedTensorError
            If no kernel serves: numba is missing, or jaxlib has another interface.
        """
        if support.blocks is not None or support.indices.dtype != jnp.int32:
            units = "blocks" if support.blocks is not None else str(support.indices.dtype)
            raise MismatchError(
                f"a structure needs sets of single weights with int32 indices, got {units}: leave "
                "the tensor masked"
            )
        return cls(support.indices, Layouts.of(support, shape))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        return self.layouts.shape

    @property
    def forward(self) -> int:
        r"""\|A\|."""
        return self.layouts.forward

    @property
    def backward(self) -> int:
        r"""\|B\|."""
        return self.layouts.backward


@functools.cache
def plan_of(shape: tuple[int, int], forward: int, backward: int) -> np.ndarray[Any, Any]:
    """The header of the layouts of a matrix."""
    register()
    from topkast.kernels.xla import plan_structure

    plan = plan_structure(shape, forward, backward)
    plan.flags.writeable = False  # it is shared
    return plan


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def read_values(forward: int, indices: jax.Array, weight: jax.Array) -> jax.Array:
    r"""The values of a matrix on B, (1, \|B\|); `forward` is \|A\|."""
    read = target("topkast_gather", like((1, indices.shape[0]), weight.dtype))
    values: jax.Array = read(indices, np.asarray([forward], np.int32), weight)
    return values


@read_values.defjvp
def _(forward: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return read_values(forward, *primals), _take(primals[0], tangents[1])


def _take(indices: jax.Array, weight: jax.Array) -> jax.Array:
    r"""The values of a matrix at `indices`, (1, \|B\|), by operations that JAX differentiates."""
    values = weight.reshape(-1).at[indices].get(unique_indices=True, mode="promise_in_bounds")
    return values.reshape(1, -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def read_forward_values(forward: int, indices: jax.Array, weight: jax.Array) -> jax.Array:
    """:func:`read_values` as a function of the forward view, which does not depend on B∖A."""
    return read_values(forward, indices, weight)


@read_forward_values.defjvp
def _(forward: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    tangent = _take(primals[0], tangents[1])
    # The values by this function, not by `read_values`: second derivatives differentiate them.
    values = read_forward_values(forward, *primals)
    return values, jnp.where(jnp.arange(values.shape[1]) < forward, tangent, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def write_values(
    forward: int, indices: jax.Array, weight: jax.Array, values: jax.Array
) -> jax.Array:
    r"""A matrix with `values` (\|B\| elements) on B, in its own memory if that is donated."""
    write = target("topkast_put", like(weight.shape, weight.dtype), aliases={2: 0})
    written: jax.Array = write(indices, np.asarray([forward], np.int32), weight, values)
    return written


@write_values.defjvp
def _(forward: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    indices, weight, _ = primals
    flat = tangents[1].reshape(-1)
    flat = flat.at[indices].set(
        tangents[2].reshape(-1), unique_indices=True, mode="promise_in_bounds"
    )
    return write_values(forward, *primals), flat.reshape(weight.shape)
