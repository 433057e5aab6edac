"""Top-KAST as an optax gradient transformation around another one."""

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
    TopKASTState,
    UnsupportedOptimizerError,
    UnsupportedTensorError,
)
from topkast.adapter import Options, TensorInfo, TopKASTTransform, apply_updates, kept_dense
from topkast_jax._probe import NotProbedError, TriedRule, describe, refuse_skipping
from topkast_jax._rule import OptaxRule
from topkast_jax._sharding import (
    check_layout,
    is_array_tree,
    is_explicit,
    is_spread,
    layout_beside,
    layout_of,
    run,
)
from topkast_jax._stale import checksum, compare_at_refreshes
from topkast_jax._state import CheckedState
from topkast_jax._tree import Tree, flatten_weights, is_key

Arrays = dict[str, jax.Array]
_Core: TypeAlias = Any  # a TopKASTTransform, for states of this module


class TopKASTGradientTransformation(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """An optax transformation that trains sparse weights; made by ``topkast.wrap_optimizer``.

    Differentiate the loss at :func:`topkast.forward_params` of the parameters and the state, and
    add the updates with ``optax.apply_updates``. It must be the outermost transformation: what
    changes its updates afterwards makes A and B those of other weights, which is told in a
    :class:`topkast.WeightsMovedWarning`; after compiled steps, by :func:`topkast.summary`. The
    exceptions are those that keep or drop an update whole: ``optax.MultiSteps`` and
    ``optax.apply_if_finite`` go around it.

    ``init(params)`` raises :class:`topkast.NonFiniteError` for NaN or infinity in what is
    sparsified, :class:`topkast.UnsupportedTensorError` for leaves that are no arrays and layouts
    over devices that cannot be followed, and :class:`topkast.UnsupportedOptimizerError` where the
    state of the wrapped transformation cannot follow B. ``update(grads, state, params)`` raises
    :class:`topkast.MismatchError` without `params`, and if the trees, shapes or dtypes of `grads`
    and `params` are not those that ``init`` was given.

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
        r"""The next parameters and state: ``update`` and ``optax.apply_updates`` in one.

        It writes the values on B into θ and never forms updates as large as θ. Inside ``jax.jit``
        with `params` and `state` donated, what it writes is of the size of B.

        Parameters
        ----------
        grads
            Gradient at the forward view; a pytree like `params`.
        state
            As returned by ``init``, ``update`` or ``step``.
        params
            θ.
        extra
            For the wrapped transformation.

        Returns
        -------
        tuple
            θ after the update, and the state.

        Raises
        ------
        MismatchError
            As ``update``: if the trees, shapes or dtypes of `grads` and `params` are not those
            that ``init`` was given.

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
    """The adapter for optax; see :func:`topkast.wrap_optimizer`."""
    if isinstance(tx, TopKASTGradientTransformation):
        raise UnsupportedOptimizerError("the transformation is wrapped already")
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    if not isinstance(tx, optax.GradientTransformation):
        raise UnsupportedOptimizerError(
            f"expected an optax.GradientTransformation, got {type(tx).__name__}"
        )
    transform = _Transform(tx, options)
    return TopKASTGradientTransformation(transform.init, transform.update)


class _Transform:
    """The functions of the wrapped transformation."""

    def __init__(self, tx: optax.GradientTransformation, options: Options) -> None:
        self.tx = tx
        self.options = options
        self._unprobed: NotProbedError | None = None
        self._cores: dict[Any, tuple[_Core, OptaxRule, TriedRule]] = {}
        self._probed: set[Any] = set()
        if options.probe:
            tree, _ = flatten_weights(jnp.zeros((1, 1)))
            try:
                TriedRule(OptaxRule(tx, tree)).probe_on({"": (1, 1)}, {})
            except NotProbedError as error:
                self._unprobed = error  # masks and labels may ask for the tree that init gets

    def init(self, params: Any) -> CheckedState:
        if type(params).__name__ == "_ParamsPlaceholder":
            return self._placeholder(params)
        tree, weights = flatten_weights(params)
        if self.options.probe:
            self._probe_on(tree, weights)
        if not (is_spread(weights) or is_explicit(weights)):
            return self._init(params)
        check_layout(weights)
        core, _ = self._core_of(tree)
        core.check_finite(weights)
        shapes = jax.eval_shape(self._init, jax.tree.map(_shape, params))
        layout = layout_beside(shapes, tree, weights)
        return run(self._init, layout, params)  # type: ignore[no-any-return]

    def _placeholder(self, params: Any) -> CheckedState:
        """What ``optax.tree_utils.tree_map_params`` asks for: where the state mirrors params."""
        none = jnp.zeros(())
        fields: Any = dict.fromkeys(TopKASTState._fields, none)
        core = TopKASTState(**fields | {"inner": self.tx.init(params)})
        return CheckedState(core, none, none)

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
        """:meth:`_advance`, where the parameters are."""
        if not isinstance(state, CheckedState):
            raise MismatchError(
                f"update needs the state that init returned, got {type(state).__name__}: restore "
                "what comes from a file into the form of tx.init(params)"
            )
        if any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(state)):
            state = jax.tree.map(jnp.asarray, state)
        _, weights = flatten_weights(params)
        if not (is_spread(weights) or is_explicit(weights)):
            return self._advance(grads, state, params, extra, fused=fused)
        layout = layout_of((params, state), weights)
        arrays = {name: value for name, value in extra.items() if is_array_tree(value)}
        others = {name: value for name, value in extra.items() if name not in arrays}

        def with_others(grads: Any, state: Any, params: Any, arrays: Any) -> Any:
            return self._advance(grads, state, params, {**arrays, **others}, fused=fused)

        return run(with_others, layout, grads, state, params, arrays)  # type: ignore[no-any-return]

    def _init(self, params: Any) -> CheckedState:
        tree, weights = flatten_weights(params)
        core, rule = self._core_of(tree)
        state = core.init(weights)
        compact = core.compact(weights, state.supports)
        rule.check(compact, state.supports)
        refuse_skipping(state.inner)
        weights_checksum = checksum(compact, state.supports, weights)
        return CheckedState(state, weights_checksum, jnp.zeros((), jnp.int32))

    def _advance(
        self,
        grads: Any,
        state: CheckedState,
        params: Any,
        extra: Mapping[str, Any],
        *,
        fused: bool,
    ) -> tuple[Any, CheckedState]:
        """Updates and the next state or, `fused`, the parameters after them and the state."""
        tree, weights = flatten_weights(params)
        core, rule = self._core_of(tree)
        gradients = tree.weights(grads, "grads")
        core.check(gradients, weights, state.core)
        passed = {
            name: rule.assemble(core.compact(tree.weights(value, name), state.supports))
            if tree.is_like(value, weights)
            else value
            for name, value in extra.items()
        }
        others = tree.other_leaves(params)
        if fused:
            output, following = core.step(gradients, state.core, weights, **passed)
            moved = output
        else:
            output, following = core.update(gradients, state.core, weights, **passed)
            moved = apply_updates(weights, output)
            others = {name: _no_update(name, leaf) for name, leaf in others.items()}
        interval = self._interval(core, weights)
        following = compare_at_refreshes(core, interval, state, following, weights, moved)
        return tree.rebuild(output | others), following

    def _core_of(self, tree: Tree) -> tuple[_Core, OptaxRule]:
        """The core's transform for a tree: what follows from names and shapes is found once."""
        try:
            key = hash((tree.treedef, tree.names))
        except TypeError:  # something static in it that has no hash
            key = None
        if key is None or key not in self._cores:
            rule = OptaxRule(self.tx, tree)
            tried = TriedRule(rule)
            core = TopKASTTransform(rule, self.options, tried), rule, tried
            if key is None:
                return core[:2]
            self._cores[key] = core
        return self._cores[key][:2]

    @staticmethod
    def _interval(core: _Core, weights: Arrays) -> int:
        """The number of updates between refreshes at which the sets of all tensors are chosen."""
        plan = core.plan(weights)
        intervals = (options.refresh_every for options in plan.options.values())
        return math.lcm(*intervals)

    def _probe_on(self, tree: Tree, weights: Arrays) -> None:
        """Probe once more: what the transformation does may depend on where a tensor is."""
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
            TriedRule(OptaxRule(self.tx, tree)).probe_on(
                {name: shape for name, shape in shapes.items() if name not in dense},
                {name: shape for name, shape in shapes.items() if name in dense},
            )
        except NotProbedError as error:
            if self._unprobed is not None:
                raise UnsupportedOptimizerError(
                    f"{describe(self.tx)} cannot take a plain step: {error}. Pass probe=False to "
                    "wrap it all the same"
                ) from error
        self._probed.add(signature)


def _no_update(name: str, leaf: Any) -> Any:
    if is_key(leaf):
        raise UnsupportedTensorError(
            f"{name} is a typed key of random numbers, which nothing can be added to: keep it out "
            "of params, or use tx.step, which leaves it as it is"
        )
    return jnp.zeros_like(leaf)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
