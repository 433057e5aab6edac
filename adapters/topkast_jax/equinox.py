"""Sparse execution of Equinox models; imports Equinox."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
from jax.tree_util import keystr, tree_map_with_path

from topkast import MismatchError
from topkast_jax.sparse._linear import sparse_linear
from topkast_jax.sparse._structure import Structure

Model = TypeVar("Model")


class SparseLinear(eqx.Module):
    r"""``equinox.nn.Linear`` with a sparse weight; :func:`with_structures` makes it.

    Attributes
    ----------
    weight
        Values of the weight on B, (1, \|B\|).
    bias
        (out_features,), or None.
    structure
        The sets of the weight, of shape (out_features, in_features).
    """

    weight: jax.Array
    bias: jax.Array | None
    structure: Structure

    def __call__(self, x: jax.Array, *, key: Any = None) -> jax.Array:
        """Apply the layer to one example (in_features,); `key` is not used."""
        return sparse_linear(self.weight, self.structure, x, self.bias, output_axis=0)


def with_structures(model: Model, structures: Mapping[str, Structure], /) -> Model:
    """Replace the linear layers of a model that hold values on B by sparse ones.

    Parameters
    ----------
    model
        A model of the weights ``topkast.forward_params(params, state)``.
    structures
        ``state.structures``. Where it is empty, the model is returned as it is.

    Raises
    ------
    MismatchError
        If a structure has the name of no ``equinox.nn.Linear`` of the model: that weight must stay
        masked.

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
    >>> type(model).__name__, model.weight.shape, model(jax.numpy.ones(20)).shape
    ('SparseLinear', (1, 120), (30,))
    """
    missing = {*structures}

    def convert(path: Any, node: Any) -> Any:
        name = keystr((*path, jax.tree_util.GetAttrKey("weight")), simple=True, separator=".")
        if not _is_linear(node) or name not in structures:
            return node
        missing.remove(name)
        return SparseLinear(node.weight, node.bias, structures[name])

    converted: Model = tree_map_with_path(convert, model, is_leaf=_is_linear)
    if missing:
        raise MismatchError(
            f"{', '.join(sorted(missing))} has sparse execution, but is not the weight of an "
            "equinox.nn.Linear of this model: leave it out by `only` of topkast_jax.sparsify"
        )
    return converted


def _is_linear(node: Any) -> bool:
    return isinstance(node, eqx.nn.Linear)
