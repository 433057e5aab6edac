"""Top-KAST as an optax gradient transformation that wraps another one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topkast import (
    MismatchError,
    OptionError,
    TopKASTState,
    UnsupportedOptimizerError,
    UnsupportedTensorError,
)
from topkast.adapter import Options, TensorInfo, TopKASTTransform, apply_updates, kept_dense
from topkast_jax._hosts import check_agreement, spans_processes
from topkast_jax._probe import NotProbedError, ProbedRule, describe, refuse_skipping
from topkast_jax._rule import OptaxRule
from topkast_jax._sharding import (
    check_layout,
    has_explicit_axes,
    is_array_tree,
    is_sharded,
    layout_of,
    layout_of_state,
    mesh_of,
    run_sharded,
)
from topkast_jax._stale import checksum, compare_at_refreshes
from topkast_jax._state import CheckedState, checksum_sets, register_with_flax
from topkast_jax._tree import Tree, flatten_weights, is_prng_key
from topkast_jax.sparse._transform import SparseTransform, rebuild_layouts

Arrays = dict[str, jax.Array]
_MAX_TREES = 32  # that a transformation remembers
_CoreTransform: TypeAlias = Any  # a TopKASTTransform, typed for the containers of JAX


class TopKASTGradientTransformation(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """An optax transformation that trains sparse weights; made by ``topkast.wrap_optimizer``.

    Differentiate the loss at :func:`topkast.forward_params` of the parameters and the state, and
    add the updates with ``optax.apply_updates``. It must be the outermost transformation: if its
    updates are changed afterwards, A and B belong to other weights. A
    :class:`topkast.WeightsMovedWarning` then follows, from :func:`topkast.summary` if the steps are
    compiled. Only ``optax.MultiSteps`` and ``optax.apply_if_finite``, which keep or drop whole
    updates, go around it.

    ``init(params)`` raises :class:`topkast.NonFiniteError` for NaN or infinity in a sparsified
    tensor, :class:`topkast.UnsupportedTensorError` for leaves that are not arrays and for shardings
    that the state cannot follow, and :class:`topkast.UnsupportedOptimizerError` if the state of the
    wrapped transformation cannot be migrated when B changes. On devices of several processes,
    it raises :class:`topkast.MismatchError` unless all of them pass the same options and the same
    values of what they hold copies of. ``update(grads, state, params)``
    raises :class:`topkast.MismatchError` without `params`, if the trees or shapes of `grads` and
    `params` are not those of ``init``, and if a gradient is no float.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax, topkast
    >>> params = {"w": jax.random.normal(jax.random.key(0), (20, 30)), "b": jnp.zeros(30)}
    >>> tx = topkast.wrap_optimizer(optax.adamw(1e-2), fwd=0.9, bwd=0.8)
    >>> state = tx.init(params)
    >>> def loss(alpha):
    ...     return jnp.mean((jnp.ones((4, 20)) @ alpha["w"] + alpha["b"] - 1) ** 2)
    >>> @jax.jit
    ... def train(params, state):
    ...     grads = jax.grad(loss)(topkast.forward_params(params, state))
    ...     updates, state = tx.update(grads, state, params)
    ...     return optax.apply_updates(params, updates), state
    >>> for _ in range(3):
    ...     params, state = train(params, state)
    >>> int(jnp.sum(topkast.forward_params(params, state)["w"] != 0))
    60
    """

    @property
    def _transform(self) -> _Transform:
        transform: _Transform = self.update.__self__
        return transform

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe(self._transform.tx)}, {self._transform.options})"

    def step(self, grads: Any, state: CheckedState, params: Any, **extra: Any) -> tuple[Any, Any]:
        r"""Compute the next θ and state: ``update`` and ``optax.apply_updates`` in one.

        It writes the values on B into θ and never forms updates as large as θ. Inside ``jax.jit``
        with `params` and `state` donated, it writes only arrays of the size of B.

        Parameters
        ----------
        grads
            Gradient at the forward view; a pytree like `params`.
        state
            As returned by ``init``, ``update`` or ``step``.
        params
            θ.
        extra
            Further arguments of the wrapped transformation.

        Returns
        -------
        tuple
            θ after the update, and the state.

        Raises
        ------
        MismatchError
            As ``update``: if the trees or shapes of `grads` and `params` are not those of
            ``init``, or a gradient is no float.

        Examples
        --------
        >>> import jax, jax.numpy as jnp, optax, topkast
        >>> params = {"w": jnp.asarray([[4.0, 3.0], [2.0, 1.0]])}
        >>> tx = topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.75, bwd=0.5, penalty=0.0)
        >>> step = jax.jit(tx.step, donate_argnums=(1, 2))
        >>> params, state = step({"w": jnp.ones((2, 2))}, tx.init(params), params)
        >>> params["w"]
        Array([[3.9, 2.9],
               [2. , 1. ]], dtype=float32)
        """
        return self._transform.step(grads, state, params, **extra)


def wrap(tx: Any, options: Options) -> TopKASTGradientTransformation:
    """Wrap an optax transformation; see :func:`topkast.wrap_optimizer`."""
    if isinstance(tx, TopKASTGradientTransformation):
        raise UnsupportedOptimizerError(
            "the transformation is wrapped already: use the one that wrap_optimizer returned"
        )
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    if not isinstance(tx, optax.GradientTransformation):
        raise UnsupportedOptimizerError(
            f"expected an optax.GradientTransformation, got {type(tx).__name__}"
        )
    options.check_functional()
    for method in options.methods:
        if method.schedules:
            raise OptionError(
                f"{type(method).__name__} changes the number of weights in A, but the shapes of "
                "JAX's arrays are fixed: train with it in PyTorch, or by the rules of topkast on "
                "NumPy arrays"
            )
    transform = _Transform(tx, options)
    return TopKASTGradientTransformation(transform.init, transform.update)


class _Transform:
    """``init``, ``update`` and ``step`` of the wrapped transformation."""

    def __init__(self, tx: optax.GradientTransformation, options: Options) -> None:
        self.tx = tx
        self.options = options
        self._probe_error: NotProbedError | None = None
        self._transforms: dict[Any, tuple[_CoreTransform, OptaxRule, ProbedRule]] = {}
        self._probed: set[Any] = set()
        if options.probe:
            tree, _ = flatten_weights(jnp.zeros((1, 1)))
            try:
                ProbedRule(OptaxRule(tx, tree)).probe_on({"": (1, 1)}, {})
            except NotProbedError as error:
                self._probe_error = error  # masks and labels may need the tree that init gets

    def init(self, params: Any) -> CheckedState:
        if type(params).__name__ == "_ParamsPlaceholder":
            return self._placeholder(params)
        tree, weights = flatten_weights(params)
        register_with_flax()
        if self.options.probe:
            self._probe_on(tree, weights)
        if not (is_sharded(weights) or has_explicit_axes(weights)):
            return self._init(params)
        check_layout(weights)
        if spans_processes(weights):
            check_agreement(weights, self.options, mesh_of(weights))
        transform, rule = self._transform_for(tree)
        transform.check_finite(weights)
        shapes = jax.eval_shape(self._init, jax.tree.map(_shape_of, params))
        layout = layout_of_state(shapes, rule.find_owner, weights)
        return run_sharded(self._init, layout, params)  # type: ignore[no-any-return]

    def _placeholder(self, params: Any) -> CheckedState:
        """Mark where the state mirrors params, for ``optax.tree_utils.tree_map_params``."""
        filler = jnp.zeros(())
        fields: Any = dict.fromkeys(TopKASTState._fields, filler)
        core = TopKASTState(**fields | {"inner": self.tx.init(params)})
        return CheckedState(core, filler, filler, filler)

    def update(
        self, grads: Any, state: CheckedState, params: Any = None, **extra: Any
    ) -> tuple[Any, CheckedState]:
        if params is None:
            raise MismatchError("update needs params: update(grads, state, params)")
        return self._run(grads, state, params, extra, fused=False)

    def step(
        self, grads: Any, state: CheckedState, params: Any, **extra: Any
    ) -> tuple[Any, CheckedState]:
        return self._run(grads, state, params, extra, fused=True)

    def _run(
        self, grads: Any, state: CheckedState, params: Any, extra: dict[str, Any], *, fused: bool
    ) -> tuple[Any, CheckedState]:
        """Call :meth:`_advance`, compiled if the parameters are sharded."""
        if not isinstance(state, CheckedState):
            raise MismatchError(
                f"update needs the state that init returned, got {type(state).__name__}: restore "
                "a checkpoint into the structure of tx.init(params)"
            )
        if any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(state)):
            state = jax.tree.map(jnp.asarray, state)
        _, weights = flatten_weights(params)
        if not (is_sharded(weights) or has_explicit_axes(weights)):
            return self._advance(grads, state, params, extra, fused=fused)
        layout = layout_of((params, state), weights)
        arrays = {name: value for name, value in extra.items() if is_array_tree(value)}
        static = {name: value for name, value in extra.items() if name not in arrays}

        def advance(grads: Any, state: Any, params: Any, arrays: Any) -> Any:
            return self._advance(grads, state, params, {**arrays, **static}, fused=fused)

        advanced = run_sharded(advance, layout, grads, state, params, arrays)
        state.check_sets(weights)  # inside, it is traced
        return advanced  # type: ignore[no-any-return]

    def _init(self, params: Any) -> CheckedState:
        tree, weights = flatten_weights(params)
        transform, rule = self._transform_for(tree)
        state = transform.init(weights)
        compact = transform.compact(weights, state.supports)
        rule.check(compact, state.supports)
        refuse_skipping(state.inner)
        weights_checksum = checksum(compact, state.supports, weights)
        sets_checksum = jnp.asarray(checksum_sets(state.supports, weights), jnp.uint32)
        return CheckedState(state, weights_checksum, jnp.zeros((), jnp.int32), sets_checksum)

    def _advance(
        self,
        grads: Any,
        state: CheckedState,
        params: Any,
        extra: Mapping[str, Any],
        *,
        fused: bool,
    ) -> tuple[Any, CheckedState]:
        """Compute the updates, or the next parameters if `fused`, and the next state."""
        tree, weights = flatten_weights(params)
        transform, rule = self._transform_for(tree)
        if state.layouts:
            transform = SparseTransform(transform, state.layouts.keys())
        gradients = tree.weights(grads, "grads")
        plan = transform.check(gradients, weights, state.core)
        shapes = {name: {leaf.shape, gradients[name].shape} for name, leaf in weights.items()}
        compact_extra = {
            name: rule.unflatten(transform.read(plan, tree.weights(value, name), state.supports))
            if tree.is_like(value, shapes)
            else value
            for name, value in extra.items()
        }
        other_leaves = tree.other_leaves(params)
        if fused:
            output, core = transform.step(gradients, state.core, weights, **compact_extra)
            next_weights = output
        else:
            output, core = transform.update(gradients, state.core, weights, **compact_extra)
            next_weights = apply_updates(weights, output)
            other_leaves = {name: _zero_update(name, leaf) for name, leaf in other_leaves.items()}
        interval = self._common_interval(transform, weights)
        next_state = compare_at_refreshes(transform, interval, state, core, weights, next_weights)
        if state.layouts:
            layouts = rebuild_layouts(plan, state.layouts, core)
            next_state = next_state._replace(layouts=layouts)
        return tree.unflatten(output | other_leaves), next_state

    def _transform_for(self, tree: Tree) -> tuple[_CoreTransform, OptaxRule]:
        """Return the core's transform for a tree, cached with the plans that it makes."""
        key: Any = (tree.treedef, tree.names)
        try:
            cached = self._transforms.get(key)
        except (TypeError, ValueError):  # static content of the tree cannot be compared
            key, cached = None, None
        if cached is None:
            rule = OptaxRule(self.tx, tree)
            probed = ProbedRule(rule)
            cached = TopKASTTransform(rule, self.options, probed), rule, probed
            if key is not None:
                if len(self._transforms) >= _MAX_TREES:
                    self._transforms.clear()
                self._transforms[key] = cached
        return cached[:2]

    @staticmethod
    def _common_interval(transform: _CoreTransform, weights: Arrays) -> int:
        """Return the number of updates between refreshes of all tensors at once."""
        plan = transform.plan(weights)
        intervals = (options.refresh_every for options in plan.options.values())
        return math.lcm(*intervals)

    def _probe_on(self, tree: Tree, weights: Arrays) -> None:
        """Probe on the user's tree: the transformation may depend on a tensor's path."""
        signature = str([(name, leaf.shape) for name, leaf in weights.items()]), tree.names
        if signature in self._probed:
            return
        dense = kept_dense(
            {name: TensorInfo(leaf.shape, leaf.dtype) for name, leaf in weights.items()},
            self.options.dense,
            self.options.stacked,
        )
        shapes = {name: leaf.shape for name, leaf in weights.items()}
        try:
            ProbedRule(OptaxRule(self.tx, tree)).probe_on(
                {name: shape for name, shape in shapes.items() if name not in dense},
                {name: shape for name, shape in shapes.items() if name in dense},
            )
        except NotProbedError as error:
            if self._probe_error is not None:
                raise UnsupportedOptimizerError(
                    f"{describe(self.tx)} cannot take a plain step: {error}. Pass probe=False to "
                    "wrap it anyway"
                ) from error
        self._probed.add(signature)


def _zero_update(name: str, leaf: Any) -> Any:
    if is_prng_key(leaf):
        raise UnsupportedTensorError(
            f"{name} is a typed PRNG key, to which no update can be added: keep it out of params, "
            "or use tx.step, which leaves it unchanged"
        )
    return jnp.zeros_like(leaf)


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
