"""Whether an optax transformation treats a tensor as a bag of coordinates, and its name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topkast import UnsupportedOptimizerError

SHAPE = (128, 130)  # what factors tensors does so from 128 rows and columns on
_TOLERANCE = 1e-4  # of the largest update; a reduction over the tensor rounds in another order
_SKIPPING: dict[Any, str] = {
    optax.MultiStepsState: "MultiSteps",
    optax.ApplyIfFiniteState: "apply_if_finite",
}


class NotProbedError(Exception):
    """The transformation does not work on the tree that it was given."""


def probe(tx: Any, shapes: Any) -> None:
    """Raise :class:`UnsupportedOptimizerError` unless permuting coordinates permutes the update.

    In the place of each tensor of the pytree `shapes` with two dimensions or more there is one
    that is large enough to be factored. What depends on traced values cannot be looked at, and
    passes.
    """
    generator = np.random.default_rng(0)
    likes: list[Any]
    treedef: Any
    likes, treedef = jax.tree.flatten(shapes)
    sizes = [
        (1,) * (len(like.shape) - 2) + SHAPE if len(like.shape) > 1 else like.shape
        for like in likes
    ]
    orders = [generator.permutation(int(np.prod(size))) for size in sizes]
    start, *gradients = (
        [jnp.asarray(generator.standard_normal(size), jnp.float32) for size in sizes]
        for _ in range(3)
    )

    def permuted(tensors: list[Any]) -> list[Any]:
        return [
            tensor.reshape(-1)[order].reshape(size)
            for tensor, order, size in zip(tensors, orders, sizes, strict=True)
        ]

    def updates(start: list[Any], gradients: list[list[Any]]) -> list[Any]:
        params, found = treedef.unflatten(start), []
        state = accepting.init(params)
        for gradient in gradients:
            grads = treedef.unflatten(gradient)
            step, state = accepting.update(grads, state, params, value=jnp.float32(1.0), grad=grads)
            params = optax.apply_updates(params, step)
            found += [np.asarray(tensor) for tensor in treedef.flatten_up_to(step)]
        return found

    accepting = optax.with_extra_args_support(tx)
    try:
        with jax.ensure_compile_time_eval():
            plain = updates(start, gradients)
            mixed = updates(permuted(start), [permuted(gradient) for gradient in gradients])
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        return
    except Exception as error:
        raise NotProbedError(str(error)) from error
    if not all(np.isfinite(update).all() for update in [*plain, *mixed]):
        raise NotProbedError("its updates are not finite")
    if not any(update.any() for update in plain):
        raise NotProbedError("its first two updates are zero")
    for update, order, other in zip(plain, orders * len(gradients), mixed, strict=True):
        largest = np.abs(update).max(initial=0.0)
        difference = np.abs(update.reshape(-1)[order] - other.reshape(-1)).max(initial=0.0)
        if difference > _TOLERANCE * largest:
            raise UnsupportedOptimizerError(
                f"{describe(tx)} does not treat a tensor as a bag of coordinates: permuting them "
                f"changes its update by {difference / largest:.1e} of its size. It looks at rows, "
                "columns or the whole matrix (as Muon, Shampoo and Adafactor do), which the vector "
                "of the weights that Top-KAST updates does not have. Wrap an elementwise "
                "transformation (adam, sgd, ...), or pass probe=False if it adds noise"
            )


def refuse_skipping(state: Any) -> None:
    """Raise :class:`UnsupportedOptimizerError` if a transformation with this state skips updates.

    From outside an update that was skipped looks like one of zero: the count of updates, on which
    refreshes depend, would be wrong.
    """
    kinds = tuple(_SKIPPING)
    for entry in jax.tree.leaves(state, is_leaf=lambda entry: isinstance(entry, kinds)):
        if isinstance(entry, kinds):
            name = _SKIPPING[type(entry)]
            raise UnsupportedOptimizerError(
                f"{name} must be around the wrapped transformation and not inside it, where its "
                f"skipped steps would count as updates: optax.{name}(topkast.wrap_optimizer(...))"
            )


def describe(tx: Any) -> str:
    """What a transformation was made by, with its parts: ``chain(clip, scale_by_adam)``.

    optax gives them no name: it is read off their functions.
    """
    name, parts = _maker(tx.update), [describe(part) for part in _parts(tx.update)]
    known = [part for part in parts if part]
    if len(known) == 1 and name in ("", "with_extra_args_support"):
        return known[0]
    return f"{name}({', '.join(known)})" if known else name


def _maker(function: Any) -> str:
    name: str = getattr(inspect.unwrap(function), "__qualname__", type(function).__name__)
    return name.partition(".")[0]


def _parts(function: Any) -> Iterator[Any]:
    """The transformations in the closure of a function."""
    for cell in getattr(function, "__closure__", None) or ():
        content = cell.cell_contents
        if isinstance(content, optax.GradientTransformation) or not isinstance(
            content, (tuple, list, dict)
        ):
            content = [content]
        for part in content.values() if isinstance(content, dict) else content:
            if isinstance(part, optax.GradientTransformation):
                yield part
            elif inspect.isfunction(part) and ".update" in part.__qualname__:
                yield optax.GradientTransformation(part, part)
