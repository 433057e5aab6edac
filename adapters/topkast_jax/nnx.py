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
_REMEDY = "leave it out by `only` of topkast_jax.sparsify"


def with_structures(model: Model, structures: Mapping[str, Structure], /) -> Model:
    """Let the linear layers of a model that hold values on B compute with these alone.

    Layers that share a kernel share its values. It sets `dot_general` of these layers, and changes
    the model in place: pass one that was merged for a single evaluation.

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
        If a structure has the name of no kernel of an ``nnx.Linear`` of the model, if another
        module holds that kernel too, or if the layer has a `dot_general` of its own: that weight
        must stay masked.

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
    names = {
        id(node): ".".join(map(str, path))
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable)
    }
    missing = {*structures}
    for path, module in nnx.iter_modules(model):
        for attribute, value in vars(module).items():
            name = names.get(id(value))
            if name is None or name not in structures:
                continue
            if not isinstance(module, nnx.Linear) or attribute != "kernel":
                raise MismatchError(
                    f"{name} has sparse execution, but {_format(path)} holds it as {attribute!r}, "
                    f"and only the kernel of an nnx.Linear can be sparse: {_REMEDY}"
                )
            if not _is_replaceable(module.dot_general):
                raise MismatchError(
                    f"{name} has sparse execution, but {_format(path)} has a dot_general of its "
                    f"own, which sparse products would replace: {_REMEDY}"
                )
            module.dot_general = nnx.static(_SparseDot(structures[name]))
            missing.discard(name)
    if missing:
        raise MismatchError(
            f"{', '.join(sorted(missing))} has sparse execution, but is not the kernel of an "
            f"nnx.Linear of this model: {_REMEDY}"
        )
    return model


def _is_replaceable(dot_general: Any) -> bool:
    return dot_general is jax.lax.dot_general or isinstance(dot_general, _SparseDot)


def _format(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path)) or "the model"


class _SparseDot:
    """``jax.lax.dot_general`` of activations and a kernel that holds its values on B."""

    def __init__(self, structure: Structure) -> None:
        self._structure = structure

    def __call__(
        self,
        x: jax.Array,
        kernel: jax.Array,
        dimensions: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        **_: Any,
    ) -> jax.Array:
        if dimensions != (((x.ndim - 1,), (0,)), ((), ())):
            raise MismatchError(
                f"a layer multiplies along the dimensions {dimensions}, but sparse products take "
                f"the last axis of x and the first of the kernel: {_REMEDY}"
            )
        output = sparse_linear(kernel, self._structure, x)
        return output if preferred_element_type is None else output.astype(preferred_element_type)
