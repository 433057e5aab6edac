"""Sparse execution of Flax nnx models; imports Flax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from topkast import MismatchError
from topkast_jax.sparse._linear import sparse_linear
from topkast_jax.sparse._structure import Structure

Model = TypeVar("Model", bound=nnx.Module)


def with_structures(model: Model, structures: Mapping[str, Structure], /) -> Model:
    """Let the linear layers of a model that hold values on B compute with these alone.

    It sets `dot_general` of these layers, and changes the model in place: pass one that was merged
    for a single evaluation.

    Parameters
    ----------
    model
        A model merged from the weights ``topkast.forward_params(params, state)``.
    structures
        ``state.structures``. Where it is empty, nothing changes.

    Returns
    -------
    object
        The model.

    Raises
    ------
    MismatchError
        If a structure has the name of no ``nnx.Linear`` of the model: that weight must stay masked.

    Examples
    --------
    >>> import jax, optax, topkast, topkast_jax
    >>> from flax import nnx
    >>> from topkast_jax.nnx import with_structures
    >>> graph, theta = nnx.split(nnx.Linear(20, 30, rngs=nnx.Rngs(0)), nnx.Param)
    >>> tx = topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.9, bwd=0.8)
    >>> state = topkast_jax.sparsify(theta, tx.init(theta))
    >>> alpha = topkast.forward_params(theta, state)
    >>> model = with_structures(nnx.merge(graph, alpha), state.structures)
    >>> model.kernel.shape, model(jax.numpy.ones((4, 20))).shape
    ((1, 120), (4, 30))
    """
    missing = {*structures}
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, (*path, "kernel")))
        if isinstance(module, nnx.Linear) and name in structures:
            module.dot_general = nnx.static(_SparseDot(structures[name]))
            missing.remove(name)
    if missing:
        raise MismatchError(
            f"{', '.join(sorted(missing))} has sparse execution, but is not the kernel of an "
            "nnx.Linear of this model: leave it out by `only` of topkast_jax.sparsify"
        )
    return model


class _SparseDot:
    """``jax.lax.dot_general`` of activations and a kernel that holds its values on B."""

    def __init__(self, structure: Structure) -> None:
        self._structure = structure

    def __call__(self, x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
        return sparse_linear(kernel, self._structure, x)
