"""Sparse execution of Equinox models; imports Equinox."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_map_with_path

from topkast import MismatchError
from topkast_jax.sparse._linear import sparse_linear
from topkast_jax.sparse._structure import Structure

Model = TypeVar("Model")


class SparseWeight(eqx.Module):
    r"""A sparse weight in place of a matrix W, for products; :func:`with_structures` makes it.

    ``W @ x``, ``x @ W`` and the same with ``W.T`` are the products of the forward view α. Other
    operations raise a TypeError.

    Attributes
    ----------
    values
        Values of the weight on B, (1, \|B\|).
    structure
        The sets of the weight.
    is_transposed
        Whether this is the transpose of the weight that `structure` describes.

    Examples
    --------
    >>> import jax.numpy as jnp, topkast, topkast_jax
    >>> from topkast_jax.equinox import SparseWeight
    >>> support = topkast.Support.of(
    ...     active=jnp.asarray([0, 3], "int32"), exploring=jnp.asarray([1], "int32"))
    >>> structure = topkast_jax.Structure.of(support, (2, 2))
    >>> weight = SparseWeight(jnp.asarray([[2.0, 3.0, 9.0]]), structure)
    >>> weight @ jnp.asarray([1.0, 10.0])
    Array([ 2., 30.], dtype=float32)
    """

    values: jax.Array
    structure: Structure
    is_transposed: bool = eqx.field(static=True, default=False)
    __array_ufunc__ = None  # a NumPy array on the left leaves the product to this class

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        rows, columns = self.structure.shape
        return (columns, rows) if self.is_transposed else (rows, columns)

    @property
    def ndim(self) -> int:
        """2."""
        return 2

    @property
    def dtype(self) -> Any:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def T(self) -> SparseWeight:  # noqa: N802 - the name of JAX
        """The transpose, which holds the same arrays."""
        return SparseWeight(self.values, self.structure, not self.is_transposed)

    def __matmul__(self, x: Any) -> jax.Array:
        """``W @ x`` for a vector (columns,), or matrices (…, columns, batch)."""
        x = jnp.asarray(x)
        if x.ndim < 2:
            return self.T.__rmatmul__(x)
        return jnp.swapaxes(self.T.__rmatmul__(jnp.swapaxes(x, -1, -2)), -1, -2)

    def __rmatmul__(self, x: Any) -> jax.Array:
        """``x @ W`` for a vector (rows,), or matrices (…, batch, rows)."""
        axis = 0 if self.is_transposed else 1
        return sparse_linear(self.values, self.structure, jnp.asarray(x), output_axis=axis)


def with_structures(model: Model, structures: Mapping[str, Structure], /) -> Model:
    """Replace the weights of a model that hold values on B by sparse ones.

    Layers stay as they are, those of your own too: ``self.weight @ x`` then runs the kernels. A
    layer that uses its weight in another way raises a TypeError that names :class:`SparseWeight`.

    Parameters
    ----------
    model
        A model of the weights ``topkast.forward_params(params, state)``.
    structures
        ``state.structures``. Where it is empty, the model is returned as it is.

    Raises
    ------
    MismatchError
        If a structure has the name of no weight of the model, or of an ``equinox.nn.Embedding``,
        which uses rows of its weight: that weight must stay masked.

    Examples
    --------
    >>> import equinox as eqx, jax, optax, topkast, topkast_jax
    >>> from topkast_jax.equinox import with_structures
    >>> model = eqx.nn.Linear(20, 30, key=jax.random.key(0))
    >>> theta, static = eqx.partition(model, eqx.is_inexact_array)
    >>> tx = topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.9, bwd=0.8)
    >>> state = topkast_jax.sparsify(theta, tx.init(theta))
    >>> alpha = topkast.forward_params(theta, state)
    >>> model = with_structures(eqx.combine(alpha, static), state.structures)
    >>> model.weight.shape, model.weight.values.shape, model(jax.numpy.ones(20)).shape
    ((30, 20), (1, 120), (30,))
    """
    missing = {*structures}

    def convert(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, eqx.nn.Embedding):
            return leaf
        name = keystr(path, simple=True, separator=".")
        if name not in structures:
            return leaf
        missing.remove(name)
        return SparseWeight(leaf, structures[name])

    converted: Model = tree_map_with_path(
        convert, model, is_leaf=lambda node: isinstance(node, eqx.nn.Embedding)
    )
    if missing:
        raise MismatchError(
            f"{', '.join(sorted(missing))} has sparse execution, but is not a weight of this "
            "model, or one of an equinox.nn.Embedding: leave it out by `only` of "
            "topkast_jax.sparsify"
        )
    return converted
