"""The products of a sparse matrix W as primitives of JAX, linear in each of two arguments.

``multiply`` computes with W on A. Its derivative with respect to the values is that of the dense
product on all of B: ``sample``, and ``multiply_on_backward`` for tangents. A training step consists
of ``multiply`` and ``sample``, which have kernels. ``multiply_on_backward``, for forward-mode and
second derivatives, and all of them on other devices than CPUs, compute with a dense matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from topkast_jax.sparse._structure import Structure
from topkast_jax.sparse._targets import like, register, target

# Operands: values or y, x, and the arrays of the structure.
multiply_p = Primitive("topkast_multiply")
multiply_on_backward_p = Primitive("topkast_multiply_on_backward")
sample_p = Primitive("topkast_sample")


def multiply(
    values: jax.Array, x: jax.Array, structure: Structure, *, transposed: bool
) -> jax.Array:
    r"""``x · Wᵀ`` or, transposed, ``x · W``, with W on A.

    `values` has the shape (1, \|B\|), `x` (batch, features).
    """
    meta = _meta(structure, transposed)
    output: jax.Array = multiply_p.bind(values, x, *_arrays(structure), **meta)
    return output


def _arrays(structure: Structure) -> tuple[jax.Array, jax.Array]:
    return structure.indices, structure.layouts.vector


def _meta(structure: Structure, transposed: bool) -> dict[str, Any]:
    return {"shape": structure.shape, "forward": structure.forward, "transposed": transposed}


# Shapes


def _product_type(values: Any, x: Any, *_: Any, shape: Any, transposed: bool, **__: Any) -> Any:
    return jax.core.ShapedArray((x.shape[0], shape[1 if transposed else 0]), x.dtype)


def _sample_type(y: Any, x: Any, indices: Any, *_: Any, **__: Any) -> Any:
    return jax.core.ShapedArray((1, indices.shape[0]), x.dtype)


# Lowering


def _pack(x: jax.Array) -> jax.Array:
    from topkast.kernels import tile_width

    batch, features = x.shape
    width = tile_width(batch, x.dtype)
    packed: jax.Array = target(
        "topkast_pack", like((-(-batch // width), features, width), x.dtype)
    )(x)
    return packed


def _multiply_by_kernel(
    values: Any, x: Any, indices: Any, vector: Any, *, shape: Any, forward: int, transposed: bool
) -> Any:
    register()
    result = like((x.shape[0], shape[1 if transposed else 0]), x.dtype)
    name = "topkast_multiply_transposed" if transposed else "topkast_multiply"
    return target(name, result)(vector, indices, values, _pack(x))


def _sample_by_kernel(y: Any, x: Any, indices: Any, vector: Any, **_: Any) -> Any:
    register()
    result = like((1, indices.shape[0]), x.dtype)
    return target("topkast_sample", result)(vector, indices, _pack(y), _pack(x))


def _multiply_dense(
    values: Any, x: Any, indices: Any, _: Any, *, shape: Any, forward: int, transposed: bool
) -> Any:
    flat = jnp.zeros(shape[0] * shape[1], values.dtype)
    flat = flat.at[indices[:forward]].set(values.reshape(-1)[:forward], unique_indices=True)
    weight = flat.reshape(shape)
    return x @ weight if transposed else x @ weight.T


def _multiply_dense_on_backward(*operands: Any, forward: int, **meta: Any) -> Any:
    return _multiply_dense(*operands, forward=operands[2].shape[0], **meta)


def _sample_dense(y: Any, x: Any, indices: Any, _: Any, **__: Any) -> Any:
    return (y.T @ x).reshape(-1)[indices].reshape(1, -1)


# Derivatives


def _product_jvp(primitive: Any, primals: Any, tangents: Any, **meta: Any) -> Any:
    values, x, *arrays = primals
    values_tangent, x_tangent, *_ = tangents
    output, terms = primitive.bind(values, x, *arrays, **meta), []
    if not isinstance(values_tangent, ad.Zero):
        terms.append(multiply_on_backward_p.bind(values_tangent, x, *arrays, **meta))
    if not isinstance(x_tangent, ad.Zero):
        terms.append(primitive.bind(values, x_tangent, *arrays, **meta))
    return output, _sum(terms, output)


def _product_transpose(
    primitive: Any,
    cotangent: Any,
    values: Any,
    x: Any,
    *arrays: Any,
    transposed: bool,
    **meta: Any,
) -> Any:
    if isinstance(cotangent, ad.Zero):
        return (None,) * (2 + len(arrays))
    if ad.is_undefined_primal(values):
        pair = (x, cotangent) if transposed else (cotangent, x)
        gradient = sample_p.bind(*pair, *arrays, transposed=False, **meta)
        return gradient.astype(values.aval.dtype), None, *([None] * len(arrays))
    gradient = primitive.bind(values, cotangent, *arrays, transposed=not transposed, **meta)
    return None, gradient, *([None] * len(arrays))


def _sample_jvp(primals: Any, tangents: Any, **meta: Any) -> Any:
    y, x, *arrays = primals
    y_tangent, x_tangent, *_ = tangents
    output, terms = sample_p.bind(y, x, *arrays, **meta), []
    if not isinstance(y_tangent, ad.Zero):
        terms.append(sample_p.bind(y_tangent, x, *arrays, **meta))
    if not isinstance(x_tangent, ad.Zero):
        terms.append(sample_p.bind(y, x_tangent, *arrays, **meta))
    return output, _sum(terms, output)


def _sample_transpose(cotangent: Any, y: Any, x: Any, *arrays: Any, **meta: Any) -> Any:
    if isinstance(cotangent, ad.Zero):
        return (None,) * (2 + len(arrays))
    is_y, rest = ad.is_undefined_primal(y), [None] * len(arrays)
    meta["transposed"] = not is_y
    other = x if is_y else y
    gradient = multiply_on_backward_p.bind(cotangent, other, *arrays, **meta)
    return (gradient, None, *rest) if is_y else (None, gradient, *rest)


def _sum(terms: list[Any], like_output: Any) -> Any:
    if not terms:
        return ad.Zero(jax.typeof(like_output))
    return functools.reduce(ad.add_jaxvals, terms)


# Batching


def _fold(primitive: Any, operands: Any, axes: Any, **meta: Any) -> Any:
    """Batches of x alone become rows of one product; all else runs one by one."""
    not_mapped = None
    if [axis is not_mapped for axis in axes] != [True, False, True, True]:
        return _one_by_one(primitive, operands, axes, **meta)
    values, x, *arrays = operands
    x = jnp.moveaxis(x, axes[1], 0)
    rows = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
    output = primitive.bind(values, rows, *arrays, **meta)
    return output.reshape(*x.shape[:2], output.shape[-1]), 0


def _one_by_one(primitive: Any, operands: Any, axes: Any, **meta: Any) -> Any:
    mapped = [
        jnp.moveaxis(operand, axis, 0)
        for operand, axis in zip(operands, axes, strict=True)
        if axis is not None
    ]

    def run(slices: Any) -> Any:
        remaining = iter(slices)
        arguments = [
            operand if axis is None else next(remaining)
            for operand, axis in zip(operands, axes, strict=True)
        ]
        return primitive.bind(*arguments, **meta)

    return jax.lax.map(run, mapped), 0


def _define(
    primitive: Any, output_type: Any, dense: Callable[..., Any], kernel: Callable[..., Any] | None
) -> None:
    primitive.def_abstract_eval(output_type)
    names = ("shape", "forward", "transposed")
    primitive.def_impl(jax.jit(primitive.bind, static_argnames=names))
    mlir.register_lowering(primitive, mlir.lower_fun(dense, multiple_results=False))
    if kernel is not None:
        by_kernel = mlir.lower_fun(kernel, multiple_results=False)
        mlir.register_lowering(primitive, by_kernel, platform="cpu")


_define(multiply_p, _product_type, _multiply_dense, _multiply_by_kernel)
_define(multiply_on_backward_p, _product_type, _multiply_dense_on_backward, None)
_define(sample_p, _sample_type, _sample_dense, _sample_by_kernel)
for _product in (multiply_p, multiply_on_backward_p):
    ad.primitive_jvps[_product] = functools.partial(_product_jvp, _product)
    ad.primitive_transposes[_product] = functools.partial(_product_transpose, _product)
    batching.primitive_batchers[_product] = functools.partial(_fold, _product)
ad.primitive_jvps[sample_p] = _sample_jvp
ad.primitive_transposes[sample_p] = _sample_transpose
batching.primitive_batchers[sample_p] = functools.partial(_one_by_one, sample_p)
