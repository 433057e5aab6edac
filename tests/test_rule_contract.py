"""Update rules of one's own that would train wrongly without an error are refused, and named."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import topkast
from topkast.adapter import Options, TopKASTTransform

LR, MOMENTUM = 0.3, 0.9
OPTIONS: dict[str, Any] = {"fwd": 0.9, "bwd": 0.8, "refresh_every": 1, "penalty": 0.0}
Arrays = dict[str, Any]


class Momentum:
    """A correct rule, as :class:`topkast.SGD` has it."""

    def init(self, params: Arrays, /) -> Any:
        return {key: 0 * array for key, array in params.items()}

    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        velocity = {key: MOMENTUM * state[key] + grads[key] for key in grads}
        return {key: -LR * array for key, array in velocity.items()}, velocity


class InTuple(Momentum):
    """State in nested containers, with a counter."""

    def init(self, params: Arrays, /) -> Any:
        return 0, {"velocity": super().init(params)}

    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        updates, velocity = super().update(grads, state[1]["velocity"], params)
        return updates, (state[0] + 1, {"velocity": velocity})


class InList(Momentum):
    """State in a list, which the library cannot attribute."""

    def init(self, params: Arrays, /) -> Any:
        return [0 * array for array in params.values()]

    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        named = dict(zip(grads, state, strict=True))
        updates, velocity = super().update(grads, named, params)
        return updates, list(velocity.values())


class Mapped(Momentum):
    """Pairs in a list, with the third function."""

    def init(self, params: Arrays, /) -> Any:
        return list(super().init(params).items())

    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        updates, velocity = super().update(grads, dict(state), params)
        return updates, list(velocity.items())

    def map_entries(self, visit: Callable[..., Any], state: Any, fresh: Any) -> Any:
        initial = dict(fresh)
        return [(key, visit(key, entry, initial[key])) for key, entry in state]


class IntoItsState(Momentum):
    """Moments that are changed in place are the rule's own business."""

    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        for key, grad in grads.items():
            state[key] *= MOMENTUM
            state[key] += grad
        return {key: -LR * state[key] for key in grads}, state


class Elementwise(Momentum):
    elementwise = True


class IdleMap(InList):
    def map_entries(self, visit: Callable[..., Any], state: Any, fresh: Any) -> Any:
        return state


class InObject(Momentum):
    def init(self, params: Arrays, /) -> Any:
        return SimpleNamespace(velocity=super().init(params))

    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        updates, velocity = super().update(grads, state.velocity, params)
        return updates, SimpleNamespace(velocity=velocity)


class ByTensor(Momentum):
    """A dictionary for each tensor, as PyTorch keeps its state."""

    def init(self, params: Arrays, /) -> Any:
        return {key: {"velocity": 0 * array} for key, array in params.items()}

    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        named = {key: entry["velocity"] for key, entry in state.items()}
        updates, velocity = super().update(grads, named, params)
        return updates, {key: {"velocity": array} for key, array in velocity.items()}


class OtherNames(Momentum):
    def init(self, params: Arrays, /) -> Any:
        return {f"velocity/{key}": 0 * array for key, array in params.items()}

    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        named = {key: state[f"velocity/{key}"] for key in grads}
        updates, velocity = super().update(grads, named, params)
        return updates, {f"velocity/{key}": array for key, array in velocity.items()}


class Flattened(Momentum):
    def init(self, params: Arrays, /) -> Any:
        return {key: np.zeros(array.size, array.dtype) for key, array in params.items()}

    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        named = {key: state[key].reshape(grad.shape) for key, grad in grads.items()}
        updates, velocity = super().update(grads, named, params)
        return updates, {key: array.reshape(-1) for key, array in velocity.items()}


class Stacked(Momentum):
    def init(self, params: Arrays, /) -> Any:
        return {key: np.stack([0 * array, 0 * array]) for key, array in params.items()}

    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        named = {key: state[key][0] for key in grads}
        updates, velocity = super().update(grads, named, params)
        return updates, {key: np.stack([array, array]) for key, array in velocity.items()}


class OnItself(Momentum):
    """State on the rule, as an optimizer has it, anew with each init."""

    def init(self, params: Arrays, /) -> Any:
        self.velocity = super().init(params)
        return {}

    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        updates, self.velocity = super().update(grads, self.velocity, params)
        return updates, {}


class Lasting(OnItself):
    """The same, made when it is first needed, or when the number of values changes."""

    def init(self, params: Arrays, /) -> Any:
        return {}

    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        known = getattr(self, "velocity", {})
        if {key: array.shape for key, array in known.items()} != {
            key: grad.shape for key, grad in grads.items()
        }:
            self.velocity = {key: 0 * grad for key, grad in grads.items()}
        return super().update(grads, state, params)


class Noisy(Momentum):
    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        noise = np.random.default_rng()
        noisy = {key: grad + noise.standard_normal(grad.shape) for key, grad in grads.items()}
        return super().update(noisy, state, params)


class IntoParams(Momentum):
    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        updates, velocity = super().update(grads, state, params)
        for key, update in updates.items():
            params[key] += update
        return updates, velocity


class IntoGrads(Momentum):
    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        for key, grad in grads.items():
            grad += MOMENTUM * state[key]
        velocity = {key: grad.copy() for key, grad in grads.items()}
        return {key: -LR * grad for key, grad in grads.items()}, velocity


class NewWeights(Momentum):
    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        updates, velocity = super().update(grads, state, params)
        return {key: params[key] + update for key, update in updates.items()}, velocity


class OneMissing(Momentum):
    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        updates, velocity = super().update(grads, state, params)
        return {"w": updates["w"]}, velocity


class OtherShape(Momentum):
    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> tuple[Any, Any]:
        updates, velocity = super().update(grads, state, params)
        return {key: update.reshape(-1) for key, update in updates.items()}, velocity


class UpdatesAlone(Momentum):
    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> Any:
        return super().update(grads, state, params)[0]


RIGHT = [Momentum, InTuple, Mapped, IntoItsState, Elementwise]
NOT_FOUND = "keeps numbers for each weight where they are not found.*map_entries"
IMPURE = "does not depend on its arguments alone"
WRONG: dict[type[Momentum], str] = {
    InList: NOT_FOUND,
    IdleMap: NOT_FOUND,
    InObject: NOT_FOUND,
    ByTensor: NOT_FOUND,
    OtherNames: NOT_FOUND,
    Flattened: NOT_FOUND,
    Stacked: NOT_FOUND,
    OnItself: IMPURE,
    Lasting: IMPURE,
    Noisy: IMPURE,
    IntoParams: r"wrote into params\['w'\]",
    IntoGrads: r"wrote into grads\['w'\]",
    NewWeights: "returned the new weights of w: return the update, which is added",
    OneMissing: "returned no update of b",
    OtherShape: r"returned an update of shape \(16,\) for w, whose values have shape \(1, 16\)",
    UpdatesAlone: r"UpdatesAlone returned a dict from update, expected a tuple \(updates, state\)",
}


def train(rule: Any, **options: Any) -> Arrays:
    tx: Any = topkast.wrap_optimizer(rule, **OPTIONS | options)
    params: Arrays = {"w": np.random.default_rng(1).standard_normal((20, 10)), "b": np.zeros(3)}
    state = tx.init(params)
    for step in range(6):
        generator = np.random.default_rng(step)
        grads = {key: generator.standard_normal(array.shape) for key, array in params.items()}
        params, state = tx.step(grads, state, params)
    return params


@pytest.mark.parametrize("rule", RIGHT)
def test_right_rules_train_as_the_librarys_own(rule: type[Momentum]) -> None:
    expected, actual = train(topkast.SGD(LR, momentum=MOMENTUM)), train(rule())
    for key, array in expected.items():
        np.testing.assert_allclose(actual[key], array, rtol=1e-12)


@pytest.mark.parametrize("rule", WRONG)
def test_wrong_rules_are_refused_by_name(rule: type[Momentum]) -> None:
    with pytest.raises(topkast.UnsupportedOptimizerError, match=WRONG[rule]) as caught:
        train(rule())
    assert f"rule {rule.__name__}" in str(caught.value)


def test_elementwise_rules_are_checked_too() -> None:
    class Claimed(InList):
        elementwise = True

    with pytest.raises(topkast.UnsupportedOptimizerError, match=NOT_FOUND):
        train(Claimed())


@pytest.mark.parametrize("rule", [InList, OnItself, NewWeights])
def test_the_check_is_of_faults_that_would_train_on(rule: type[Momentum]) -> None:
    """Without it, weights are silently others."""
    expected, actual = train(topkast.SGD(LR, momentum=MOMENTUM)), train(rule(), probe=False)
    assert not np.allclose(actual["w"], expected["w"], atol=0.1)


def test_noise_is_possible_without_the_probe() -> None:
    train(Noisy(), probe=False)


def test_tensors_that_are_ranked_as_one_pass() -> None:
    params = {"v": np.ones((4, 4)), "w": np.arange(20.0).reshape(4, 5)}
    tx = TopKASTTransform(InTuple(), Options(**OPTIONS, distribution="global"))
    assert tx.init(params).supports.keys() == {"v + w"}


def test_a_missing_gradient_is_named() -> None:
    tx: Any = topkast.wrap_optimizer(topkast.SGD(0.1), **OPTIONS)
    params = {"w": np.ones((20, 10)), "b": np.zeros(3)}
    grads = {"w": None, "b": np.zeros(3)}
    with pytest.raises(topkast.MismatchError, match="w has no gradient, None: pass zeros"):
        tx.step(grads, tx.init(params), params)


class OnBiases(Momentum):
    """Momentum for tensors of one dimension alone, which stay dense; it gets other arrays, too."""

    def init(self, params: Arrays, /) -> Any:
        return {key: 0 * array for key, array in params.items() if array.ndim < 2}

    def update(self, grads: Arrays, state: Any, params: Any = None, /) -> Any:
        for key in grads:
            grads[key] = 1.0 * grads[key] / (1e-9 + np.linalg.norm(grads[key]))
        velocity = {key: MOMENTUM * state[key] + grads[key] for key in state}
        return [{key: -LR * array for key, array in (grads | velocity).items()}, velocity]


def test_what_a_rule_may_do() -> None:
    """State of dense tensors anywhere, other arrays in the dictionaries, a list as the result."""
    params = {"w": np.linspace(-1, 1, 200).reshape(10, 20), "b": np.ones(20)}
    tx: Any = topkast.wrap_optimizer(OnBiases(), **OPTIONS | {"probe": True})
    with np.errstate(all="raise"):
        params, _ = tx.step({"w": params["w"], "b": params["b"]}, tx.init(params), params)
    assert np.isfinite(params["w"]).all()
