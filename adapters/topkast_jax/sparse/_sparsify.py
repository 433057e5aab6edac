"""Switch the state of a wrapped transformation between masked and sparse execution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from topkast import MismatchError, UnsupportedTensorError
from topkast.adapter import check_patterns, has_numba, is_traced, matches
from topkast_jax._sharding import has_explicit_axes, is_sharded
from topkast_jax._state import CheckedState
from topkast_jax._tree import flatten_weights
from topkast_jax.sparse._structure import Layouts


def sparsify(
    params: Any, state: CheckedState, /, *, only: str | Sequence[str] | None = None
) -> CheckedState:
    r"""Give tensors sparse execution: the state then holds their layouts too.

    ``topkast.forward_params(params, state)`` returns the values on B of these tensors, (1, \|B\|),
    for :func:`sparse_linear` with ``state.structures[name]``. ``update`` and ``step`` take their
    gradients in that shape, and build the layouts again at each refresh, without recompilation.
    `params` stay the dense θ, and sets, moments and trajectories are those of masked execution.

    Matrices of single weights in float32 or float64 on one CPU device have kernels. All others stay
    masked (:func:`find_obstacles` says why), and the same loss serves both.

    Parameters
    ----------
    params
        θ.
    state
        The state that ``init``, ``update`` or ``step`` of the wrapped transformation returned.
    only
        Names or globs of the tensors to make sparse; None: all that have kernels.

    Returns
    -------
    CheckedState
        The state with layouts. Carry it through ``jit`` and ``scan`` like any state.

    Raises
    ------
    MismatchError
        If `state` is not the state of a wrapped transformation itself.
    OptionError
        If `only` matches no sparse tensor.
    UnsupportedTensorError
        If a tensor that `only` names has no kernel, if numba is not installed, or if jaxlib has
        another foreign function interface.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax, topkast, topkast_jax
    >>> params = {"w": jax.random.normal(jax.random.key(0), (20, 30)), "b": jnp.zeros(30)}
    >>> tx = topkast.wrap_optimizer(optax.adamw(1e-2), fwd=0.9, bwd=0.8)
    >>> state = topkast_jax.sparsify(params, tx.init(params))
    >>> def loss(alpha, structures):
    ...     hidden = topkast_jax.sparse_linear(
    ...         alpha["w"], structures.get("w"), jnp.ones((4, 20)), alpha["b"])
    ...     return jnp.mean((hidden - 1) ** 2)
    >>> @jax.jit
    ... def train(params, state):
    ...     grads = jax.grad(loss)(topkast.forward_params(params, state), state.structures)
    ...     return tx.step(grads, state, params)
    >>> for _ in range(3):
    ...     params, state = train(params, state)
    >>> topkast.forward_params(params, state)["w"].shape
    (1, 120)
    >>> topkast.forward_params(params, topkast_jax.densify(state))["w"].shape
    (20, 30)
    """
    obstacles = find_obstacles(params, state)
    names = [*state.supports]
    check_patterns(names, "only", only)
    _, weights = flatten_weights(params)
    layouts = {}
    for name in names:
        is_named = only is None or matches(name, only)
        if is_named and name not in obstacles:
            support, (height, width) = state.supports[name], weights[name].shape
            layouts[name] = Layouts.of(support, (height, width))
        elif is_named and only is not None:
            raise UnsupportedTensorError(
                f"{name} has no kernel for sparse execution: {obstacles[name]}. Take it out of "
                f"only={only!r}"
            )
    return state._replace(layouts=layouts)


def densify(state: CheckedState, /) -> CheckedState:
    """Return to masked execution: undo :func:`sparsify`.

    ``topkast.forward_params(params, densify(state))`` is the dense α, for evaluation and export.

    Parameters
    ----------
    state
        A state of a wrapped transformation.

    Returns
    -------
    CheckedState
        The same state without layouts.

    Examples
    --------
    >>> import jax, optax, topkast, topkast_jax
    >>> params = {"w": jax.random.normal(jax.random.key(0), (20, 30))}
    >>> tx = topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.9, bwd=0.8)
    >>> state = topkast_jax.sparsify(params, tx.init(params))
    >>> [*state.structures], [*topkast_jax.densify(state).structures]
    (['w'], [])
    """
    _check_state(state)
    return state._replace(layouts={})


def find_obstacles(params: Any, state: CheckedState, /) -> dict[str, str]:
    """Why tensors stay masked.

    Parameters
    ----------
    params, state
        As for :func:`sparsify`.

    Returns
    -------
    dict of str to str
        The reason, by name of a tensor that has no kernel.

    Examples
    --------
    >>> import jax, optax, topkast, topkast_jax
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 8))}
    >>> tx = topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.9, bwd=0.8)
    >>> topkast_jax.find_obstacles(params, tx.init(params))
    {'kernel': 'it has 4 dimensions, and kernels serve matrices'}
    """
    _check_state(state)
    state.check_single()
    _, weights = flatten_weights(params)
    reasons = {name: _find_obstacle(name, weights, state) for name in state.supports}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _find_obstacle(name: str, weights: dict[str, jax.Array], state: CheckedState) -> str | None:
    if name not in weights:
        return "it is ranked with others: distribution='global'"
    weight, support = weights[name], state.supports[name]
    if weight.ndim != 2:
        return f"it has {weight.ndim} dimensions, and kernels serve matrices"
    if support.blocks is not None:
        return "its units are blocks of weights"
    if weight.dtype not in (jnp.float32, jnp.float64):
        return f"it is {weight.dtype}, and kernels serve float32 and float64"
    if support.indices.dtype != jnp.int32:
        return "it has more than 2³¹ entries"
    if is_sharded(weights) or has_explicit_axes(weights):
        return "it lies on several devices"
    platform = _platform_of(weight)
    if platform != "cpu":
        return f"it is on a {platform}, and kernels serve CPUs"
    return None if has_numba() else "numba is not installed: pip install 'topkast[cpu]'"


def _platform_of(weight: jax.Array) -> str:
    if is_traced(weight):
        return jax.default_backend()
    (device,) = weight.devices()
    platform: str = device.platform
    return platform


def _check_state(state: Any) -> None:
    if not isinstance(state, CheckedState):
        raise MismatchError(
            f"expected the state that init of topkast.wrap_optimizer(...) returned, got "
            f"{type(state).__name__}: sparse execution needs the wrapped transformation alone, "
            "without MultiSteps or others around it"
        )
