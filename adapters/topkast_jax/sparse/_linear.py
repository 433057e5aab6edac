"""The sparse linear layer as a function."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from topkast import MismatchError, UnsupportedTensorError
from topkast_jax.sparse._products import multiply
from topkast_jax.sparse._structure import Structure


def sparse_linear(
    values: jax.Array,
    structure: Structure | None,
    x: jax.Array,
    bias: jax.Array | None = None,
    /,
    *,
    output_axis: int = 1,
) -> jax.Array:
    r"""``x @ w + bias`` with a sparse weight, whose gradient is computed on B alone.

    The output and the gradient of `x` are those of the forward view α. The gradient of `values` is
    that of the dense product at α, read on B. On a CPU no dense weight and no dense gradient is
    formed. ``jit``, ``scan`` and reverse-mode derivatives run the kernels, and under ``vmap``,
    batches of `x` become rows of one product. Forward-mode and second derivatives form the dense
    weight.

    Parameters
    ----------
    values
        The weight's values on B, (1, …, \|B\|), float32 or float64, as in
        ``topkast.forward_params(params, state)``. Without a structure, the dense α.
    structure
        ``state.structures.get(name)`` of the state that `values` come from: another state has its
        values in another order, which cannot be noticed. None: the weight is dense or masked, and
        the product too.
    x
        Activations (…, features).
    bias
        (output features,).
    output_axis
        The axis of the weight that numbers output features: 1 for weights (in, out), as in Flax, 0
        for weights (out, in), as in Equinox.

    Returns
    -------
    array
        (…, output features).

    Raises
    ------
    MismatchError
        If shapes or dtypes do not fit, with the names of the arguments.
    UnsupportedTensorError
        Inside ``jax.shard_map`` with ``check_vma=True``: gradients would be those of one device.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, topkast, topkast_jax
    >>> support = topkast.Support.of(
    ...     active=jnp.asarray([0, 3], "int32"), exploring=jnp.asarray([1], "int32"))
    >>> structure = topkast_jax.Structure.of(support, (2, 2))
    >>> values, x = jnp.asarray([[2.0, 3.0, 9.0]]), jnp.asarray([[1.0, 10.0]])
    >>> topkast_jax.sparse_linear(values, structure, x)
    Array([[ 2., 30.]], dtype=float32)
    >>> jax.grad(lambda values: topkast_jax.sparse_linear(values, structure, x).sum())(values)
    Array([[ 1., 10.,  1.]], dtype=float32)
    """
    if output_axis not in (0, 1):
        raise MismatchError(f"output_axis must be 0 or 1, got {output_axis!r}")
    if structure is None:
        output = x @ (values if output_axis == 1 else values.T)
        return output if bias is None else output + bias
    _check(values, structure, x, bias, output_axis)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    values = values.reshape(1, values.size)
    output = multiply(values, rows, structure, transposed=output_axis == 1)
    output = output.reshape(*x.shape[:-1], output.shape[-1])
    return output if bias is None else output + bias


def _check(
    values: jax.Array,
    structure: Structure,
    x: jax.Array,
    bias: jax.Array | None,
    output_axis: int,
) -> None:
    """Raise :class:`topkast.MismatchError` unless all arguments fit the structure."""
    if any(map(_varies, (values, x, structure.indices, structure.layouts.vector))):
        # The types of the products do not say so, and JAX would leave out the sum over devices.
        raise UnsupportedTensorError(
            "sparse products do not track which values differ between the devices of a "
            "jax.shard_map: pass it check_vma=False, and add up gradients by jax.lax.psum"
        )
    features, outputs = structure.shape if output_axis == 1 else structure.shape[::-1]
    if values.size != structure.backward:
        raise MismatchError(
            f"values has the shape {values.shape}, but the structure holds |B| = "
            f"{structure.backward} weights: pass the leaf of topkast.forward_params(params, state) "
            "that has the name of the structure, with the same state"
        )
    if x.ndim < 1 or x.shape[-1] != features:
        raise MismatchError(
            f"x has the shape {x.shape}, but a weight of shape {structure.shape} with "
            f"output_axis={output_axis} takes {features} features in the last axis: transpose x, "
            f"or pass output_axis={1 - output_axis}"
        )
    if bias is not None and bias.shape != (outputs,):
        raise MismatchError(f"bias has the shape {bias.shape}, expected ({outputs},)")
    dtypes = [jnp.dtype(array.dtype) for array in (values, x)]
    if dtypes[0] != dtypes[1] or dtypes[0] not in (jnp.float32, jnp.float64):
        raise MismatchError(
            f"values are {dtypes[0]} and x is {dtypes[1]}, but sparse products need one dtype, "
            "float32 or float64: convert x, for example by x.astype(values.dtype)"
        )


def _varies(array: Any) -> bool:
    """Whether the type of an array says that its values differ between devices."""
    array_type = jax.typeof(array)
    axes = getattr(array_type, "manual_axis_type", array_type)  # since JAX 0.10
    return bool(getattr(axes, "varying", getattr(axes, "vma", ())))
