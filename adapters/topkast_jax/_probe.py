"""Whether an optax transformation treats a tensor as a bag of coordinates, and its name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topkast import UnsupportedOptimizerError
from topkast.adapter import Betas, Shape, Traits, WrappedRule, check_joint, check_permutation
from topkast_jax._rule import OptaxRule

Arrays = dict[str, jax.Array]

_SKIPPING: dict[Any, str] = {
    optax.MultiStepsState: "MultiSteps",
    optax.ApplyIfFiniteState: "apply_if_finite",
}
_UNKNOWN = (  # what depends on traced values cannot be inspected
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.UnexpectedTracerError,
)
_STEPS = 8  # on small tensors; they run uncompiled
_QUICKLY: Any = {"xla_backend_optimization_level": "0"}  # what runs a few times is compiled so

# Names of factors of averages in optax.
_MEAN, _SQUARE = {"b1", "beta1"}, {"b2", "b3", "beta2", "beta3", "decay"}


class NotProbedError(Exception):
    """The transformation does not work on the tree that it was given."""


class TriedRule(WrappedRule):
    """A transformation as the loop sees it, and what trials of it on the user's tree show."""

    def __init__(self, rule: OptaxRule) -> None:
        super().__init__(rule, jnp.asarray)
        self._optax = rule
        self._compiling = False
        self._compiled: Any = None

    def probe(self, shapes: Mapping[str, Shape]) -> None:
        pass  # the adapter has its own reasons to probe, and not to

    def probe_joint(self, names: Sequence[str], joint: str) -> None:
        """See :class:`topkast.functional._wrapped_rule.WrappedRule`."""
        others = self._optax.tree.paths.keys() - set(names)
        self.fixed = {name: np.ones((1, 1)) for name in others}
        try:
            with jax.ensure_compile_time_eval():
                check_joint(self._start, names, joint, describe(self._optax.tx))
        except UnsupportedOptimizerError:
            raise
        except Exception:  # a transformation that trials cannot run, as probe_on has said
            return
        finally:
            self.fixed = {}

    def probe_on(self, shapes: Mapping[str, Shape], dense: Mapping[str, Shape]) -> None:
        """Raise :class:`UnsupportedOptimizerError` unless permuting coordinates permutes updates.

        `shapes` are those of the tensors to be sparsified and `dense` of the other weights. What
        depends on traced values cannot be inspected, and passes. Raises :class:`NotProbedError`
        where the transformation does not work on the tree.
        """
        self.fixed = {name: np.ones((1,) * len(shape)) for name, shape in dense.items()}
        try:
            with jax.ensure_compile_time_eval():
                check_permutation(self._start, shapes, describe(self._optax.tx), _STEPS)
        except _UNKNOWN:
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
        try:
            with jax.ensure_compile_time_eval():
                pairs = beta_pairs_of(self._optax.tx)
                self._compiling = bool(pairs)
                return self.observe_with(dict.fromkeys(dimensions, pairs), dimensions)
        except Exception:  # it needs other values than trials have, or depends on traced ones
            return {}, frozenset()
        finally:
            self._compiling, self._compiled = False, None

    def update(self, grads: Arrays, state: Any, params: Arrays) -> tuple[Arrays, Any]:
        """One step of a trial."""
        if not self._compiling:
            steps, state = self._run(grads, state, params)
        else:
            if self._compiled is None:
                lowered = jax.jit(self._run).lower(grads, state, params)
                self._compiled = lowered.compile(compiler_options=_QUICKLY)
            steps, state = self._compiled(grads, state, params)
        return steps, state

    def _run(self, grads: Arrays, state: Any, params: Arrays) -> tuple[Arrays, Any]:
        more = {"value": jnp.float32(1.0), "grad": self._optax.assemble(grads)}
        return self._optax.run(grads, state, params, **more)


def beta_pairs_of(tx: Any) -> list[Betas]:
    """Pairs of factors of averages that a transformation may use, from closures and state."""
    means, squares = {0.0}, set[float]()

    def add(name: str, value: Any) -> None:
        if isinstance(value, (int, float)) and 0 <= value < 1:
            (means if name in _MEAN else squares if name in _SQUARE else set()).add(float(value))

    for function in _functions(tx.update):
        for name, cell in _cells(function):
            add(name, cell)
    state = tx.init({"w": jnp.zeros((1, 2))})
    for path, entry in jax.tree_util.tree_flatten_with_path(state)[0]:
        if jax.tree_util.GetAttrKey("hyperparams") in path and jnp.ndim(entry) == 0:
            add(str(getattr(path[-1], "key", "")), float(entry))
    return [(mean, square) for square in sorted(squares) for mean in sorted(means, reverse=True)]


def _functions(value: Any, depth: int = 8) -> Iterator[Any]:
    """All functions in a value: itself, in containers, transformations, and closures."""
    if isinstance(value, optax.GradientTransformation):
        value = value.update
    if inspect.isfunction(value) and depth:
        yield value
        for _, content in _cells(value):
            yield from _functions(content, depth - 1)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _functions(part, depth)
    elif isinstance(value, dict):
        yield from _functions(list(value.values()), depth)


def _cells(function: Any) -> Iterator[tuple[str, Any]]:
    """Names and contents of a function's closure."""
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # it has none yet
            continue


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
