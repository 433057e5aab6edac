"""The functions of an optax transformation, and what their closures hold."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from types import CellType, FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import optax

_DEPTH = 8  # of closures in closures


def functions_in(value: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """Yield all functions in a value, its containers, transformations and closures."""
    if isinstance(value, optax.GradientTransformation):
        value = value.update
    if inspect.isfunction(value) and depth:
        yield value
        for _, content in cells_of(value):
            yield from functions_in(content, depth - 1)
    elif isinstance(value, (tuple, list)):
        for element in value:
            yield from functions_in(element, depth)
    elif isinstance(value, dict):
        yield from functions_in(list(value.values()), depth)


def cells_of(function: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and contents of a function's closure."""
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # the cell is empty
            continue


def replace_tracers(
    value: Any, number: float, keep: Collection[str] = (), depth: int = _DEPTH
) -> Any:
    """Return `value` with `number` in place of every traced scalar in its functions' closures.

    Variables of the names in `keep` stay traced.

    >>> import jax, optax
    >>> def first_step(learning_rate):
    ...     tx = replace_tracers(optax.sgd(learning_rate), -0.5)
    ...     return tx.update(1.0, tx.init(0.0))[0]
    >>> float(jax.jit(first_step)(0.1))  # optax keeps the rate with its sign
    -0.5
    """
    if isinstance(value, jax.core.Tracer):
        is_rate = jnp.ndim(value) == 0 and jnp.issubdtype(value.dtype, jnp.floating)
        return number if is_rate else value
    if isinstance(value, optax.GradientTransformation):
        functions = [replace_tracers(function, number, keep, depth) for function in value]
        changed = any(new is not old for new, old in zip(functions, value, strict=True))
        return type(value)(*functions) if changed else value
    if isinstance(value, FunctionType) and value.__closure__ and depth:
        contents = dict(cells_of(value))
        replaced = {
            name: content if name in keep else replace_tracers(content, number, keep, depth - 1)
            for name, content in contents.items()
        }
        if all(replaced[name] is content for name, content in contents.items()):
            return value
        function = FunctionType(
            value.__code__,
            value.__globals__,
            value.__name__,
            value.__defaults__,
            tuple(
                CellType(replaced[name]) if name in replaced else cell
                for name, cell in zip(value.__code__.co_freevars, value.__closure__, strict=True)
            ),
        )
        function.__kwdefaults__, function.__qualname__ = value.__kwdefaults__, value.__qualname__
        return function
    if type(value) in (tuple, list):
        elements = [replace_tracers(element, number, keep, depth) for element in value]
        changed = any(new is not old for new, old in zip(elements, value, strict=True))
        return type(value)(elements) if changed else value
    if type(value) is dict:
        entries = {key: replace_tracers(entry, number, keep, depth) for key, entry in value.items()}
        return entries if any(entries[key] is not value[key] for key in value) else value
    return value
