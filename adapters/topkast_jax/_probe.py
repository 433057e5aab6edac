"""Probes of an optax transformation on the user's tree, and its name in messages."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topkast import UnsupportedOptimizerError
from topkast.adapter import Betas, Shape, Traits, WrappedRule, check_joint, check_permutation
from topkast_jax._closures import cells_of, functions_in, replace_tracers
from topkast_jax._rule import OptaxRule

Arrays = dict[str, jax.Array]

_SKIPPING: dict[Any, str] = {  # by type of their state
    optax.MultiStepsState: "MultiSteps",
    optax.ApplyIfFiniteState: "apply_if_finite",
    optax.ApplyEvery: "apply_every",
}
_AROUND = {"apply_every": "MultiSteps"}  # what does the same around the wrapper
_TRACER_ERRORS = (  # a transformation that depends on traced values cannot be probed
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.UnexpectedTracerError,
)
_STEPS = 8  # on small tensors; few, because they run uncompiled
_COUNTS = 1, 100, 10_000  # of updates; a warmup starts at a learning rate of 0
_LEARNING_RATE = 1e-3  # in place of a traced one, and of an injected 0
# Trials take few steps, so compiling them costs more than running them.
_COMPILER_OPTIONS: Any = {"xla_backend_optimization_level": "0"}

# optax's names for the decay factors of moments.
_FIRST_MOMENT, _SECOND_MOMENT = {"b1", "beta1"}, {"b2", "b3", "beta2", "beta3", "decay"}


class NotProbedError(Exception):
    """The transformation fails on the tree that a trial gives it."""


class ProbedRule(WrappedRule):
    """An optax transformation in the training loop, probed by trials on the user's tree."""

    def __init__(self, rule: OptaxRule) -> None:
        super().__init__(rule, jnp.asarray)
        self._optax = rule
        self._compiling = False
        self._compiled: Any = None
        self._held_count: int | None = None

    def check_contract(self, dimensions: Mapping[str, int], sparse: Collection[str]) -> None:
        pass  # optax's functions are pure, and OptaxRule.check finds their entries

    def probe(self, shapes: Mapping[str, Shape]) -> None:
        pass  # init calls probe_on, which gets the dense tensors too

    def probe_joint(self, names: Sequence[str], joint: str) -> None:
        """See :class:`topkast.functional._wrapped_rule.WrappedRule`."""
        other_names = self._optax.tree.paths.keys() - set(names)
        self.fixed = {name: np.ones((1, 1)) for name in other_names}
        try:
            with jax.ensure_compile_time_eval():
                check_joint(self._start, names, joint, describe(self._optax.tx))
        except UnsupportedOptimizerError:
            raise
        except Exception:  # trials cannot run it: probe_on reports that
            return
        finally:
            self.fixed = {}

    def probe_on(self, shapes: Mapping[str, Shape], dense: Mapping[str, Shape]) -> None:
        """Raise :class:`UnsupportedOptimizerError` unless permuting coordinates permutes updates.

        `shapes` are the shapes of the tensors to sparsify, `dense` those of the other weights. A
        transformation that depends on traced values cannot be probed, and passes. Raises
        :class:`NotProbedError` if the transformation fails on the tree.
        """
        self.fixed = {name: np.ones((1,) * len(shape)) for name, shape in dense.items()}
        try:
            with jax.ensure_compile_time_eval():
                check_permutation(self._start, shapes, describe(self._optax.tx), _STEPS)
        except _TRACER_ERRORS:
            return
        except UnsupportedOptimizerError as error:
            if "did not move" in str(error):
                raise NotProbedError("its updates are zero or not finite") from None
            raise
        except Exception as error:
            raise NotProbedError(str(error)) from error
        finally:
            self.fixed = {}

    def observe(self, dimensions: Mapping[str, int]) -> tuple[dict[str, Traits], frozenset[int]]:
        """See :class:`topkast.functional._wrapped_rule.WrappedRule`."""
        tx = replace_tracers(self._optax.tx, _LEARNING_RATE, _FIRST_MOMENT | _SECOND_MOMENT)
        try:
            if tx is self._optax.tx:
                return self._observe(dimensions)
            # A traced learning rate changes no betas. Its sign is unknown.
            traits, copies = ProbedRule(OptaxRule(tx, self._optax.tree))._observe(dimensions)
            return {key: Traits(betas) for key, (betas, _) in traits.items()}, copies
        except Exception:  # it needs inputs that trials lack, or depends on other traced values
            return {}, frozenset()

    def _observe(self, dimensions: Mapping[str, int]) -> tuple[dict[str, Traits], frozenset[int]]:
        """:meth:`observe`; raises what the transformation raises in a trial."""
        shapes = {key: (1,) * (count - 1) + (2,) for key, count in dimensions.items()}
        try:
            with jax.ensure_compile_time_eval():
                params = {key: jnp.ones(shape) for key, shape in shapes.items()}
                state = self.init(params)
                pairs = beta_pairs_of(self._optax.tx, state)
                self._held_count = self._find_count(params, state)
                self._compiling = bool(pairs)
                return self.observe_with(dict.fromkeys(dimensions, pairs), dimensions)
        finally:
            self._compiling, self._compiled, self._held_count = False, None, None

    def _find_count(self, params: Arrays, state: Any) -> int | None:
        """Find a number of updates at which schedules let the weights move.

        Learning rates are held there in the trial: one that changes looks like a bias correction.
        """
        if hold_schedules(state, 0) is None:
            return None
        for count in _COUNTS:
            displacements, _ = self._run(params, hold_schedules(state, count), params)
            if any(bool(jnp.any(step != 0)) for step in displacements.values()):
                return count
        return None

    def init(self, params: Arrays) -> Any:
        """See :class:`topkast.functional._wrapped_rule.WrappedRule`."""
        return self._hold(with_moving_weights(super().init(params)))

    def _hold(self, state: Any) -> Any:
        return state if self._held_count is None else hold_schedules(state, self._held_count)

    def update(self, grads: Arrays, state: Any, params: Arrays) -> tuple[Arrays, Any]:
        """Take one step of a trial."""
        if not self._compiling:
            displacements, state = self._run(grads, state, params)
        else:
            if self._compiled is None:
                lowered = jax.jit(self._run).lower(grads, state, params)
                self._compiled = lowered.compile(compiler_options=_COMPILER_OPTIONS)
            displacements, state = self._compiled(grads, state, params)
        return displacements, state

    def _run(self, grads: Arrays, state: Any, params: Arrays) -> tuple[Arrays, Any]:
        extra = {"value": jnp.float32(1.0), "grad": self._optax.unflatten(grads)}
        displacements, state = self._optax.run(grads, state, params, **extra)
        return displacements, self._hold(state)


def beta_pairs_of(tx: Any, state: Any) -> list[Betas]:
    """Find the decay factors that a transformation may use, in its closures and a state of it."""
    first, second = {0.0}, set[float]()

    def add(name: str, value: Any) -> None:
        if isinstance(value, (int, float)) and 0 <= value < 1:
            factors = (
                first if name in _FIRST_MOMENT else second if name in _SECOND_MOMENT else set()
            )
            factors.add(float(value))

    for function in functions_in(tx.update):
        for name, cell in cells_of(function):
            add(name, cell)
    for path, entry in jax.tree_util.tree_flatten_with_path(state)[0]:
        if jax.tree_util.GetAttrKey("hyperparams") in path and jnp.ndim(entry) == 0:
            add(str(getattr(path[-1], "key", "")), float(entry))
    return [(beta1, beta2) for beta2 in sorted(second) for beta1 in sorted(first, reverse=True)]


def with_moving_weights(state: Any) -> Any:
    """Return a state whose injected learning rates are not 0, as they are before a warmup."""

    def replace_rate(path: Any, leaf: Any) -> Any:
        is_rate = jax.tree_util.GetAttrKey("hyperparams") in path and (
            getattr(path[-1], "key", "") == "learning_rate"
        )
        if not is_rate or isinstance(leaf, jax.core.Tracer) or jnp.any(leaf != 0):
            return leaf
        return jnp.full_like(leaf, _LEARNING_RATE)

    return jax.tree_util.tree_map_with_path(replace_rate, state)


def hold_schedules(state: Any, count: int) -> Any:
    """Return a state in which schedules have been called `count` times; None if it has none."""
    found = False

    def hold(node: Any) -> Any:
        nonlocal found
        if not _is_schedule(node):
            return node
        found = True
        return node._replace(count=jnp.full_like(node.count, count))

    held = jax.tree.map(hold, state, is_leaf=_is_schedule)
    return held if found else None


def _is_schedule(node: Any) -> bool:
    """Whether a node of a state counts the calls of a schedule, and nothing else."""
    return getattr(node, "_fields", ()) == ("count",) and "Schedule" in type(node).__name__


def refuse_skipping(state: Any) -> None:
    """Raise :class:`UnsupportedOptimizerError` if a transformation with this state skips updates.

    A skipped update looks like an update of zeros, so the count of updates, on which
    refreshes depend, would be wrong.
    """
    state_types = tuple(_SKIPPING)
    for entry in jax.tree.leaves(state, is_leaf=lambda entry: isinstance(entry, state_types)):
        if isinstance(entry, state_types):
            name = _SKIPPING[type(entry)]
            raise UnsupportedOptimizerError(
                f"{name} skips steps, and inside the wrapped transformation they would count as "
                f"updates: use optax.{_AROUND.get(name, name)}(topkast.wrap_optimizer(...), ...)"
            )


def describe(tx: Any) -> str:
    """Name a transformation by its factory and its components: ``chain(clip, scale_by_adam)``.

    optax stores no names, so they are read from the qualified names of functions.
    """
    name = _factory_name(tx.update)
    descriptions = [describe(component) for component in _components(tx.update)]
    components = [description for description in descriptions if description]
    if len(components) == 1 and name in ("", "with_extra_args_support"):
        return components[0]
    return f"{name}({', '.join(components)})" if components else name


def _factory_name(function: Any) -> str:
    name: str = getattr(inspect.unwrap(function), "__qualname__", type(function).__name__)
    return name.partition(".")[0]


def _components(function: Any) -> Iterator[Any]:
    """Yield the transformations in the closure of a function."""
    for cell in getattr(function, "__closure__", None) or ():
        content = cell.cell_contents
        if isinstance(content, optax.GradientTransformation) or not isinstance(
            content, (tuple, list, dict)
        ):
            content = [content]
        for value in content.values() if isinstance(content, dict) else content:
            if isinstance(value, optax.GradientTransformation):
                yield value
            elif inspect.isfunction(value) and ".update" in value.__qualname__:
                yield optax.GradientTransformation(value, value)
