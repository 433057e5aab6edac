"""The check that an update rule keeps its contract with the training loop, found by running it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from topkast._errors import UnsupportedOptimizerError
from topkast._primitives import Array
from topkast._probe import HostArrays

if TYPE_CHECKING:
    from topkast.functional._wrapped_rule import WrappedRule

_ENTRIES = 16
_STEPS = 5
_TOLERANCE = 1e-4  # relative to the largest update: sums over a tensor round differently


def check_contract(
    rule: WrappedRule, dimensions: Mapping[str, int], sparse: Collection[str], name: str
) -> None:
    """Raise :class:`UnsupportedOptimizerError` for a rule that would train wrongly, silently.

    It returns a displacement of each tensor, reads nothing but its arguments, writes to neither
    parameters nor gradients, and keeps what it stores for each weight where the library finds it.
    `dimensions` are the numbers of dimensions of the tensors, by key, `sparse` the keys of the
    sparse ones; `name` is the rule's.
    """
    _Contract(rule, dimensions, sparse, name).check()


class _Contract:
    """Runs of a rule on small tensors, which stay where they are."""

    def __init__(
        self,
        rule: WrappedRule,
        dimensions: Mapping[str, int],
        sparse: Collection[str],
        name: str,
    ) -> None:
        self._rule, self._sparse, self._name = rule, sparse, name
        self._shapes = {key: (1,) * (count - 1) + (_ENTRIES,) for key, count in dimensions.items()}
        generator = np.random.default_rng(3)
        shape = _STEPS + 1, _ENTRIES
        self._grads = {key: generator.standard_normal(shape) for key in dimensions}
        signs = generator.choice([-1.0, 1.0], _ENTRIES)
        self._weights = dict.fromkeys(dimensions, signs * generator.uniform(0.5, 2, _ENTRIES))

    def check(self) -> None:
        self._check_arguments()
        self._check_displacements()
        self._check_state()
        self._check_entries()

    def _check_arguments(self) -> None:
        """Two steps, which return what they should, and change nothing that they were given."""
        params = self._arrays(self._weights)
        state = self._rule.init(params)
        for number in range(2):
            grads = self._gradient(number)
            given = dict(params), dict(grads)  # a rule may put other arrays into the dictionaries
            updates, state = self._rule.update(grads, state, params)
            params = given[0]
            self._check_shapes(updates)
            self._check_unchanged("params", params, self._weights)
            self._check_unchanged("grads", given[1], self._host_gradient(number))

    def _check_shapes(self, updates: Mapping[str, Array]) -> None:
        for key, shape in self._shapes.items():
            if key not in updates:
                self._refuse(f"returned no update of {key}: return one for each parameter")
            actual = tuple(np.shape(updates[key]))
            if actual != shape:
                self._refuse(
                    f"returned an update of shape {actual} for {key}, whose values have shape "
                    f"{shape}: return updates of the shape of the parameters"
                )

    def _check_unchanged(self, argument: str, arrays: Any, before: HostArrays) -> None:
        for key, shape in self._shapes.items():
            expected = before[key].astype(np.float32).reshape(shape)
            if not np.array_equal(np.asarray(arrays[key]), expected):
                self._refuse(
                    f"wrote into {argument}[{key!r}]: return new arrays, and leave those that it "
                    "gets unchanged"
                )

    def _check_displacements(self) -> None:
        """Without a gradient, an update is no multiple of the weights near 1."""
        params = self._arrays(self._weights)
        zeros = self._arrays({key: np.zeros(_ENTRIES) for key in self._shapes})
        with np.errstate(all="ignore"):  # a rule may divide by the norm of the gradient
            updates, _ = self._rule.update(zeros, self._rule.init(params), params)
        for key, weights in self._weights.items():
            update = np.asarray(updates[key], np.float64).reshape(-1)
            if (np.abs(update - weights) <= 0.5 * np.abs(weights)).all():
                self._refuse(
                    f"returned the new weights of {key}: return the update, which is added to them"
                )

    def _check_state(self) -> None:
        """Two runs in turn are as one alone."""
        params = self._arrays(self._weights)

        def run(*, disturbed: bool) -> HostArrays:
            state, other = self._rule.init(params), None
            if disturbed:
                other = self._rule.init(params)
            for number in range(2):
                _, state = self._rule.update(self._gradient(number), state, params)
                if disturbed:
                    _, other = self._rule.update(self._gradient(3 + number), other, params)
            return self._host(self._rule.update(self._gradient(2), state, params)[0])

        alone = run(disturbed=False)
        if self._differ(alone, run(disturbed=True)) or self._differ(alone, run(disturbed=False)):
            self._refuse(
                "does not depend on its arguments alone: keep all state in what init and update "
                "return, and none on the rule. Pass probe=False if it adds noise"
            )

    def _check_entries(self) -> None:
        """With all entries per weight as at the start, no weight's earlier gradients are left.

        Two runs have the same gradients at other weights, and weights that are all equal.
        """
        params = self._arrays({key: np.full(_ENTRIES, 0.5) for key in self._shapes})
        first, second = (self._run(params, order) for order in (slice(None), slice(None, None, -1)))

        def renew(key: str, entry: Array, initial: Array) -> Array:
            is_found = key in self._shapes and tuple(entry.shape) == self._shapes[key]
            return initial if is_found else entry

        states = [
            self._rule.map_entries(renew, state, self._rule.init(params), self._shapes)
            for state in (first, second)
        ]
        for number in range(_STEPS):
            results = [self._rule.update(self._gradient(number), own, params) for own in states]
            states = [state for _, state in results]
            # What is kept for a dense tensor may lie anywhere: its weights never change.
            first, second = (self._host(updates, self._sparse) for updates, _ in results)
            if self._differ(first, second):
                self._refuse(
                    "keeps numbers for each weight where they are not found, so that they would "
                    "belong to other weights when B changes: keep them in dictionaries whose keys "
                    "are the names of all parameters and whose entries are arrays of the "
                    "parameters' shapes, {name: array}, or add map_entries(visit, state, fresh)"
                )

    def _run(self, params: Any, order: slice) -> Any:
        state = self._rule.init(params)
        for number in range(1, _STEPS + 1):
            gradient = self._host_gradient(number)
            grads = self._arrays({key: vector[order] for key, vector in gradient.items()})
            _, state = self._rule.update(grads, state, params)
        return state

    def _host_gradient(self, number: int) -> HostArrays:
        return {key: vectors[number] for key, vectors in self._grads.items()}

    def _gradient(self, number: int) -> Any:
        return self._arrays(self._host_gradient(number))

    def _arrays(self, vectors: HostArrays) -> Any:
        return {
            key: self._rule.asarray(vector.astype(np.float32).reshape(self._shapes[key]))
            for key, vector in vectors.items()
        }

    def _host(
        self, updates: Mapping[str, Array], keys: Collection[str] | None = None
    ) -> HostArrays:
        chosen = self._shapes if keys is None else keys
        return {key: np.array(updates[key], np.float64) for key in chosen}

    @staticmethod
    def _differ(first: HostArrays, second: HostArrays) -> bool:
        """Whether finite updates differ."""
        pairs = [(first[key], second[key]) for key in first]
        return any(
            np.isfinite(one).all()
            and np.isfinite(other).all()
            and np.abs(one - other).max() > _TOLERANCE * np.abs(one).max()
            for one, other in pairs
        )

    def _refuse(self, problem: str) -> None:
        raise UnsupportedOptimizerError(f"the rule {self._name} {problem}")
