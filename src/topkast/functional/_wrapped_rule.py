"""The update rule inside a transform: its entries per tensor, and its probes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from topkast._age import Betas
from topkast._errors import UnsupportedOptimizerError
from topkast._primitives import Array
from topkast._probe import (
    HostArray,
    HostArrays,
    Traits,
    beta_pairs,
    check_joint,
    check_permutation,
    observe,
)
from topkast.functional._contract import check_contract
from topkast.functional._rules import SGD, Adam
from topkast.functional._state import Arrays, Visit, map_dictionaries
from topkast.selection._distribution import Shape


class UpdateRule(Protocol):
    """A rule that can be wrapped: optax's two functions, on a dictionary of arrays.

    A rule whose state does not keep entries per parameter in dictionaries with the parameters' keys
    needs a third function, ``map_entries(visit, state, fresh)``. It replaces each such entry by
    ``visit(key, entry, initial)``, where `initial` is the entry of `fresh`, a state that ``init``
    returned. A rule of the Adam family has its factors as ``betas``. A rule with
    ``elementwise = True`` is not probed for rows and columns.
    """

    def init(self, params: Any, /) -> Any: ...

    def update(self, updates: Any, state: Any, params: Any = None, /) -> tuple[Any, Any]: ...


class WrappedRule:
    """An update rule with the operations that the training loop needs.

    Parameters
    ----------
    rule
        The rule.
    asarray
        Converts a NumPy array to the library that the rule works on.
    """

    def __init__(
        self, rule: UpdateRule, asarray: Callable[[HostArray], Array] = np.asarray
    ) -> None:
        self._rule, self.asarray = rule, asarray
        self.fixed: HostArrays = {}  # tensors that trials contain but do not observe

    def init(self, params: Arrays) -> Any:
        """Initialise the state of a trial."""
        return self._rule.init(params)

    def update(self, grads: Arrays, state: Any, params: Arrays) -> tuple[Arrays, Any]:
        """Take one step of a trial."""
        result: Any = self._rule.update(grads, state, params)
        is_pair = isinstance(result, (tuple, list)) and len(result) == 2
        if not (is_pair and isinstance(result[0], Mapping)):
            raise UnsupportedOptimizerError(
                f"the rule {type(self._rule).__name__} returned a {type(result).__name__} from "
                "update, expected a tuple (updates, state), the updates a dictionary by name"
            )
        displacements, state = result
        return dict(displacements), state

    def map_entries(self, visit: Visit, state: Any, fresh: Any, keys: Collection[str]) -> Any:
        """Apply `visit` to the rule's entries per parameter, by its own function or by `keys`."""
        if hasattr(self._rule, "map_entries"):
            return self._rule.map_entries(visit, state, fresh)
        return map_dictionaries(visit, state, fresh, set(keys))

    def check_contract(self, dimensions: Mapping[str, int], sparse: Collection[str]) -> None:
        """Raise :class:`topkast.UnsupportedOptimizerError` if the rule would train wrongly.

        `dimensions` are the numbers of dimensions of all tensors, by key, `sparse` the keys of the
        sparse ones.
        """
        if not isinstance(self._rule, (SGD, Adam)):
            check_contract(self, dimensions, sparse, type(self._rule).__name__)

    def probe(self, shapes: Mapping[str, Shape]) -> None:
        """Raise :class:`topkast.UnsupportedOptimizerError` unless the rule is elementwise."""
        if not getattr(self._rule, "elementwise", False):
            check_permutation(self._start, shapes, type(self._rule).__name__)

    def probe_joint(self, names: Sequence[str], joint: str) -> None:
        """Raise :class:`topkast.UnsupportedOptimizerError` if the rule normalises by tensor."""
        if not getattr(self._rule, "elementwise", False):
            check_joint(self._start, names, joint, type(self._rule).__name__)

    def observe(self, dimensions: Mapping[str, int]) -> tuple[dict[str, Traits], frozenset[int]]:
        """Determine the rule's traits by tensor, and the entries of its state that copy a tensor.

        `dimensions` are the numbers of dimensions of all tensors, by key.
        """
        pairs = beta_pairs(getattr(self._rule, "betas", ()))
        candidates = dict.fromkeys(dimensions, pairs)
        if isinstance(self._rule, (SGD, Adam)):
            # A learning rate that changes looks like a bias correction.
            plain = replace(self._rule, lr=1e-3)
            return WrappedRule(plain, self.asarray).observe_with(candidates, dimensions)
        return self.observe_with(candidates, dimensions)

    def observe_with(
        self, candidates: Mapping[str, list[Betas]], dimensions: Mapping[str, int]
    ) -> tuple[dict[str, Traits], frozenset[int]]:
        """:meth:`observe` for given candidate betas, by key."""
        trials: list[_RuleTrial] = []

        def start(params: HostArrays) -> _RuleTrial:
            trials.append(_RuleTrial(self, params, at_rest=True))
            return trials[-1]

        return observe(start, candidates, dimensions), trials[0].copies

    def _start(self, params: HostArrays) -> _RuleTrial:
        return _RuleTrial(self, params)


class _RuleTrial:
    """A run of an update rule on its own tensors; see :class:`topkast._probe.Trial`."""

    def __init__(self, wrapped: WrappedRule, params: HostArrays, *, at_rest: bool = False) -> None:
        self._wrapped, self._at_rest = wrapped, at_rest
        self._params = self._arrays(params | wrapped.fixed)
        self._state = wrapped.init(self._params)
        # Numbers of the visited entries that started as copies of their tensor.
        self.copies = self._find_copies()

    def step(self, grads: HostArrays) -> list[HostArrays]:
        grads = grads | {key: np.ones_like(array) for key, array in self._wrapped.fixed.items()}
        steps, state = self._wrapped.update(self._arrays(grads), self._state, self._params)
        observed = self._params.keys() - self._wrapped.fixed.keys()
        displacements = [{key: np.asarray(steps[key], dtype=np.float64) for key in observed}]

        def compare(number: int, key: str, entry: Array, previous: Array) -> None:
            if number in self.copies:
                step = np.asarray(entry, np.float64) - np.asarray(previous, np.float64)
                displacements.append({key: step})

        self._visit(compare, state, self._state)
        self._state = state
        if self.copies or not self._at_rest:  # decay of large weights would hide the rest
            self._params = {key: param + steps[key] for key, param in self._params.items()}
        return displacements

    def renew(self, entrants: HostArray) -> None:
        fresh = self._wrapped.init(self._params)

        def reset(key: str, entry: Array, initial: Array) -> Array:
            if key not in self._params or tuple(entry.shape) != self._params[key].shape:
                return entry
            renewed = np.asarray(entry).copy().reshape(-1)
            renewed[entrants] = np.asarray(initial).reshape(-1)[entrants]
            return self._wrapped.asarray(renewed.reshape(entry.shape))

        self._state = self._wrapped.map_entries(reset, self._state, fresh, self._params)

    def _find_copies(self) -> frozenset[int]:
        copies: list[int] = []

        def compare(number: int, key: str, entry: Array, _: Array) -> None:
            if np.array_equal(np.asarray(entry), np.asarray(self._params[key])):
                copies.append(number)

        self._visit(compare, self._state, self._state)
        return frozenset(copies)

    def _visit(
        self, inspect: Callable[[int, str, Array, Array], None], state: Any, other: Any
    ) -> None:
        """Call `inspect` with number, key and both states' values of each entry per parameter."""
        numbers = iter(range(1 << 30))

        def visit(key: str, entry: Array, second: Array) -> Array:
            number = next(numbers)
            if key in self._params and tuple(entry.shape) == self._params[key].shape:
                inspect(number, key, entry, second)
            return entry

        self._wrapped.map_entries(visit, state, other, self._params)

    def _arrays(self, arrays: Mapping[str, HostArray]) -> Arrays:
        converted = {
            id(array): self._wrapped.asarray(np.asarray(array, np.float32))
            for array in arrays.values()
        }
        return {key: converted[id(array)] for key, array in arrays.items()}
