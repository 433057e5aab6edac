"""Top-KAST as an optax gradient transformation around another one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_flatten_with_path

from topkast import MismatchError, Support, UnsupportedOptimizerError, WeightsMovedWarning
from topkast._inspect import Inspection
from topkast._options import Options
from topkast._primitives import is_traced, may_hold, when
from topkast._state import count_bytes, forward_views, inspection
from topkast._transform import TopKASTTransform, apply_updates
from topkast_jax._probe import SHAPE, NotProbedError, describe, probe, refuse_skipping
from topkast_jax._rule import OptaxRule, find_key
from topkast_jax._sharding import (
    check_layout,
    is_array_tree,
    is_explicit,
    is_spread,
    layout_beside,
    layout_of,
    run,
)
from topkast_jax._tree import Tree, take_apart

Arrays = dict[str, jax.Array]
_Core: TypeAlias = Any  # a TopKASTTransform, for states of this module


class TopKASTState(NamedTuple):
    r"""State of a wrapped optax transformation: arrays alone, of fixed shapes and dtypes.

    Attributes
    ----------
    updates
        Number of updates so far; 0-d int32.
    supports
        The sets, by the name of the tensor.
    changed
        Entries that the last refresh made active, by the name of the tensor; int32 of shape (1,).
    inner
        State of the wrapped transformation, whose entries for a tensor have shape (1, …, \|B\|).
    chosen_from
        Checksum of the weights on B that the sets were chosen from; 0-d uint32.
    displaced
        How often the weights were not those at the update after a refresh; 0-d int32.
    """

    updates: jax.Array
    supports: dict[str, Support]
    changed: Arrays
    inner: Any
    chosen_from: jax.Array
    displaced: jax.Array

    def __topkast_inspect__(self, params: Any) -> Inspection:
        if params is None:
            raise MismatchError("a functional state does not hold the weights: pass params too")
        _warn_if(self.displaced)
        tree, weights = take_apart(params)
        state = self
        if is_spread(weights) or is_explicit(weights):
            state = self._replace(supports=jax.tree.map(_on_one_device, self.supports))
        held = dict.fromkeys({*weights, *self.supports}, 0)
        for path, entry in tree_flatten_with_path(self.inner)[0]:
            key = find_key(tree.paths, path)
            if key in held:
                held[key] += count_bytes(entry)
        return inspection(state, weights, held)

    def __topkast_forward__(self, params: Any) -> Any:
        tree, weights = take_apart(params)

        def view(params: Any, supports: dict[str, Support]) -> Any:
            weights = tree.weights(params, "params")
            return tree.rebuild(forward_views(weights, supports) | tree.rest(params))

        if is_spread(weights) or is_explicit(weights):
            return run(view, layout_of(params, weights), params, self.supports)
        return view(params, self.supports)


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

    def step(self, grads: Any, state: TopKASTState, params: Any, **extra: Any) -> tuple[Any, Any]:
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
        if options.probe:
            try:
                probe(tx, jax.ShapeDtypeStruct(SHAPE, jnp.float32))
            except NotProbedError as error:
                self._unprobed = error  # masks and labels may ask for the tree that init gets

    def init(self, params: Any) -> TopKASTState:
        tree, weights = take_apart(params)
        if self.options.probe:
            self._probe_on(tree, weights)
        if not (is_spread(weights) or is_explicit(weights)):
            return self._init(params)
        check_layout(weights)
        core, _ = self._on(tree)
        core.check_finite(weights)
        shapes = jax.eval_shape(self._init, jax.tree.map(_shape, params))
        layout = layout_beside(shapes, tree, weights)
        return run(self._init, layout, params)  # type: ignore[no-any-return]

    def update(
        self, grads: Any, state: TopKASTState, params: Any = None, **extra: Any
    ) -> tuple[Any, TopKASTState]:
        if params is None:
            raise MismatchError("update needs params: update(grads, state, params)")
        return self._run(grads, state, params, extra, fused=False)

    def step(
        self, grads: Any, state: TopKASTState, params: Any, **extra: Any
    ) -> tuple[Any, TopKASTState]:
        return self._run(grads, state, params, extra, fused=True)

    def _run(
        self, grads: Any, state: TopKASTState, params: Any, extra: dict[str, Any], *, fused: bool
    ) -> tuple[Any, TopKASTState]:
        """:meth:`_advance`, where the parameters are."""
        _, weights = take_apart(params)
        if not (is_spread(weights) or is_explicit(weights)):
            return self._advance(grads, state, params, extra, fused=fused)
        layout = layout_of((params, state), weights)
        arrays = {name: value for name, value in extra.items() if is_array_tree(value)}
        others = {name: value for name, value in extra.items() if name not in arrays}

        def with_others(grads: Any, state: Any, params: Any, arrays: Any) -> Any:
            return self._advance(grads, state, params, {**arrays, **others}, fused=fused)

        return run(with_others, layout, grads, state, params, arrays)  # type: ignore[no-any-return]

    def _init(self, params: Any) -> TopKASTState:
        tree, weights = take_apart(params)
        core, rule = self._on(tree)
        state = core.init(weights)
        compact = core.compact(weights, state.supports)
        rule.check(compact, state.supports)
        refuse_skipping(state.inner)
        chosen_from = _checksum(compact, state.supports)
        return TopKASTState(
            **state._asdict(), chosen_from=chosen_from, displaced=jnp.zeros((), jnp.int32)
        )

    def _advance(
        self,
        grads: Any,
        state: TopKASTState,
        params: Any,
        extra: Mapping[str, Any],
        *,
        fused: bool,
    ) -> tuple[Any, TopKASTState]:
        """Updates and the next state or, `fused`, the parameters after them and the state."""
        tree, weights = take_apart(params)
        core, rule = self._on(tree)
        slopes = tree.weights(grads, "grads")
        core.check(slopes, weights, state)
        passed = {
            name: rule.assemble(core.compact(tree.weights(value, name), state.supports))
            if tree.is_like(value, weights)
            else value
            for name, value in extra.items()
        }
        rest = tree.rest(params)
        if fused:
            found, following = core.step(slopes, state, weights, **passed)
            moved = found
        else:
            found, following = core.update(slopes, state, weights, **passed)
            moved = apply_updates(weights, found)
            rest = {name: jnp.zeros_like(leaf) for name, leaf in rest.items()}
        following = self._compare(core, state, following, weights, moved)
        return tree.rebuild(found | rest), following

    def _on(self, tree: Tree) -> tuple[_Core, OptaxRule]:
        rule = OptaxRule(self.tx, tree)
        return TopKASTTransform(rule, self.options), rule

    def _compare(
        self,
        core: _Core,
        state: TopKASTState,
        following: TopKASTState,
        weights: Arrays,
        moved: Arrays,
    ) -> TopKASTState:
        """Keep the checksum of the weights after a refresh; count it if they were others.

        `weights` are those before an update, `moved` those after it.
        """

        def compare(displaced: jax.Array, seen: Arrays, chosen_from: jax.Array) -> jax.Array:
            differs = (_checksum(seen, state.supports) != chosen_from).astype(jnp.int32)
            _warn_if(differs)
            return displaced + differs

        def remember(_: jax.Array, supports: Mapping[str, Support], moved: Arrays) -> jax.Array:
            return _checksum(core.compact(moved, supports), supports)

        displaced, chosen_from = state.displaced, state.chosen_from
        due = state.updates % self.options.refresh_every == 0
        if may_hold(due):
            # The values on B have been taken for the update already: XLA does not do it twice.
            seen = core.compact(weights, state.supports)
            displaced = when(due, compare, displaced, seen, chosen_from)
        due = following.updates % self.options.refresh_every == 0
        chosen_from = when(due, remember, chosen_from, following.supports, moved)
        return following._replace(displaced=displaced, chosen_from=chosen_from)

    def _probe_on(self, tree: Tree, weights: Arrays) -> None:
        """Probe once more: what the transformation does may depend on where a tensor is."""
        try:
            probe(self.tx, tree.rebuild(weights))
        except NotProbedError as error:
            if self._unprobed is not None:
                raise UnsupportedOptimizerError(
                    f"{describe(self.tx)} cannot take a plain step: {error}. Pass probe=False to "
                    "wrap it all the same"
                ) from error


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _on_one_device(array: jax.Array) -> jax.Array:
    return jnp.asarray(jax.device_get(array))


def _checksum(compact: Arrays, supports: Mapping[str, Support]) -> jax.Array:
    """Sum over B of a hash of place and bits, modulo 2**32: the same in whatever order."""
    total = jnp.zeros((), jnp.uint32)
    for key in supports:
        values = compact[key].reshape(-1)
        parts = (values.real, values.imag) if jnp.iscomplexobj(values) else (values,)
        for part in parts:
            integer = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
            part = jnp.where(part == 0, 0, part)  # -0 and what XLA may take for 0
            bits = jax.lax.bitcast_convert_type(part, integer[part.dtype.itemsize])
            if bits.dtype.itemsize == 8:
                bits ^= bits >> 32
            place = jnp.arange(part.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
            hashed = (bits.astype(jnp.uint32) ^ place) * jnp.uint32(0x85EBCA6B)
            hashed = (hashed ^ (hashed >> 15)) * jnp.uint32(0xC2B2AE35)
            total += jnp.sum(hashed ^ (hashed >> 13), dtype=jnp.uint32)
    return total


def _warn_if(displaced: jax.Array) -> None:
    """Warn if a count is not zero, where it can be looked at.

    Not by a call back from compiled functions: on a CPU, one can wait for ever for a thread that
    waits for it, and it keeps functions out of JAX's persistent cache of compilations.
    """
    if not is_traced(displaced) and displaced > 0:
        warnings.warn(
            "the weights are not those that the last refresh chose A and B from. Were the updates "
            "of the wrapped transformation changed before they were applied, as by "
            "optax.chain(wrapped, other)? It must be the outermost: put the others inside it. "
            "After changing weights yourself, init anew",
            WeightsMovedWarning,
            stacklevel=2,
        )
