"""Random combinations of options: arrays, PyTorch and JAX agree in sets, weights and moments.

Weights, gradients, learning rates and penalties are small multiples of powers of two: no library
rounds, and all have the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from libraries import host
from optimizer_runs import save_and_load
from torch import nn

import topkast
from topkast.methods import (
    ACDC,
    DNW,
    DSR,
    GSE,
    IHT,
    SET,
    SNFS,
    GradualPruning,
    GraNet,
    Mixed,
    RigL,
    Static,
)

Array = np.ndarray[Any, Any]
# "a" is the weight of a convolution, "b" of a linear layer. The order is not the alphabet's.
SHAPES = {"b": (8, 16), "a": (4, 4, 3, 1), "c": (2, 8, 4)}
STEPS = 6
IN_GROUPS: list[Any] = [None, None, Mixed(by_magnitude=0.5), Static()]
SINGLE: list[Any] = [
    SET(0.5),
    RigL(fraction=0.5),
    GSE(fraction=0.5),
    SNFS(fraction=0.5, momentum=0.5),
    DSR(0.3),
    GradualPruning(start=1, end=4),
    GraNet(start=0, end=4),
    ACDC(warm_up=1, sparse=2, dense=1, end=5),
    DNW(),
    IHT(end=4),
]


class Case(NamedTuple):
    """Options, those that change before a step, and the seed of weights and gradients."""

    options: dict[str, Any]
    changes: dict[str, Any]
    changed_at: int
    seed: int

    @property
    def weights(self) -> dict[str, Array]:
        rng = np.random.default_rng(self.seed)
        return {name: rng.integers(-8, 9, shape) / 4 for name, shape in SHAPES.items()}

    def gradient(self, name: str, alpha: Any, step: int, xp: Any = np) -> Any:
        """A gradient that depends on the forward view and the step."""
        rng = np.random.default_rng([self.seed, len(name), ord(name[0])])
        target, shift = (rng.integers(-12, 13, SHAPES[name]) / 4 for _ in range(2))
        sign = xp.asarray([0.0, 1.0, -1.0, 2.0, -0.5, 1.0])[step]
        return xp.round((alpha - target) * 4) / 4 + sign * shift

    def options_at(self, step: int) -> dict[str, Any]:
        changes = self.changes if step >= self.changed_at else {}
        return self.options | {name: changes[name] for name in changes if name != "lr"}

    def lr_at(self, step: int) -> float:
        lr: float = (self.changes if step >= self.changed_at else {}).get("lr", 0.5)
        return lr

    def forgets(self, name: str) -> bool:
        """Whether nothing is kept outside B in PyTorch."""
        method = self.options["overrides"].get(name, self.options).get("method")
        method = self.options["method"] if method is None else method
        return method is not None and method.forgets


def _optional(**choices: list[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {}, optional={name: st.sampled_from(values) for name, values in choices.items()}
    )


@st.composite
def cases(draw: Callable[[Any], Any], *, traced: bool = False) -> Case:
    """Cases; if `traced`, those that work inside ``jax.jit``."""
    units = draw(st.sampled_from([{}, {"block": (2, 1)}, {"block": (2, 2)}, {"pattern": (2, 4)}]))
    singles = [method for method in SINGLE if not (traced and method.schedules)]
    method = draw(st.sampled_from(IN_GROUPS if units else IN_GROUPS + singles))
    fwd = 0.5 if "pattern" in units else draw(st.sampled_from([0.5, 0.75]))
    backward = "any" if method is None else method.backward
    bwd = {"any": draw(st.sampled_from([0.0, 0.25, 0.5])), "equal": fwd, "none": 0.0}[backward]
    options = {"fwd": fwd, "bwd": bwd, "method": method, "overrides": {}, "probe": False} | units
    distribution = "uniform" if units else draw(st.sampled_from(["uniform", "erk", "global"]))
    options["distribution"] = distribution
    # The densities of ERK are no powers of two.
    penalty = [0.0] if distribution == "erk" else [0.0, 0.25]
    own: dict[str, list[Any]] = {
        "refresh_every": [1, 2, 3],
        "explore_until": [0, 2, 4],
        "penalty": penalty,
    }
    options |= draw(_optional(**own, penalty_kind=["l1", "l2"], seed=[1, 2]))
    options.setdefault("penalty", 0.0)
    if distribution != "global":
        names = ["b", "a", "c"]
        options |= draw(_optional(dense=names, block_score=["max"]))
        if method is None or not (method.needs & {"sets", "gradient"} or method.schedules):
            # The rows of the layers of "a" have 3 weights.
            in_threes = not units or units.get("block") == (2, 1)
            stacked = ["c", "a", ["a", "c"]] if in_threes else ["c"]
            options |= draw(_optional(stacked=stacked))
        options["overrides"] = {
            name: overrides
            for name in draw(st.sets(st.sampled_from(names), max_size=2))
            if (overrides := draw(_optional(**own)))
        }
    changes = draw(_optional(**own, lr=[0.25]))
    if traced:  # a changed interval looks like weights that were changed
        changes.pop("refresh_every", None)
    if "explore_until" in changes and draw(st.booleans()):
        changes["explore_until"] = None
    return Case(options, changes, draw(st.integers(1, STEPS - 1)), draw(st.integers(0, 999)))


class Snapshot(NamedTuple):
    masks: dict[str, Any]
    theta: dict[str, Array]
    alpha: dict[str, Array]


def by_arrays(case: Case, names: Iterable[str] = SHAPES) -> list[Snapshot]:
    """Train arrays; `names` are in the order in which "global" ranks equal magnitudes."""
    params: Any = {name: case.weights[name] for name in names}
    state: Any = None
    trajectory = []
    for step in range(STEPS + 1):
        at = min(step, STEPS - 1)
        rule = topkast.SGD(case.lr_at(at), momentum=0.5)
        tx = topkast.wrap_optimizer(rule, **case.options_at(at))
        state = tx.init(params) if state is None else state
        alpha = topkast.forward_params(params, state)
        trajectory.append(Snapshot(topkast.masks(state, params), params, alpha))
        if step < STEPS:
            grads = {name: case.gradient(name, view, step) for name, view in alpha.items()}
            params, state = tx.step(grads, state, params)
    return trajectory


class Model(nn.Module):
    """A convolution, a linear layer and a plain Parameter."""

    def __init__(self, weights: dict[str, Array]) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, (3, 1), bias=False, dtype=torch.float64)
        self.b = nn.Linear(16, 8, bias=False, dtype=torch.float64)
        self.c = nn.Parameter(torch.tensor(weights["c"]))
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor(weights["a"]))
            self.b.weight.copy_(torch.tensor(weights["b"]))

    def backward(self, case: Case, step: int) -> None:
        """Give each weight its gradient, through the forward pass on single inputs."""
        weights = {"a": self.a.weight, "b": self.b.weight, "c": self.c}
        a, b, c = (torch.tensor(case.gradient(name, host(weights[name]), step)) for name in "abc")
        unit = torch.eye(12, dtype=torch.float64).reshape(12, 4, 3, 1)
        loss = (self.a(unit).reshape(12, 4) * a.reshape(4, 12).T).sum()
        loss = loss + (self.b(torch.eye(16, dtype=torch.float64)) * b.T).sum()
        (loss + (self.c * c).sum()).backward()


def make_torch(
    case: Case, weights: dict[str, Array], reservoir: Any, *, sparse: bool
) -> tuple[Model, Any]:
    model = Model(weights)
    named = {"b": model.b.weight, "a": model.a.weight, "c": model.c}
    inner = torch.optim.SGD(named.items(), 0.5, momentum=0.5)
    optimizer = topkast.wrap_optimizer(inner, reservoir=reservoir, **case.options)
    if sparse:
        topkast.sparsify(model, optimizer)
    return model, optimizer


def by_torch(case: Case, reservoir: str, resumed_at: int, *, sparse: bool) -> list[Snapshot]:
    """Train in PyTorch, in other objects from a checkpoint at a step on."""
    model, optimizer = make_torch(case, case.weights, reservoir, sparse=sparse)
    trajectory = []
    for step in range(STEPS + 1):
        views = {"b": model.b.weight, "a": model.a.weight, "c": model.c}
        summary = {row.name: row for row in topkast.summary(optimizer).tensors}
        masks = host(topkast.masks(optimizer))
        for name, mask in masks.items():
            assert (summary[name].forward, summary[name].backward) == (mask[0].sum(), mask[1].sum())
        theta = host(topkast.dense_params(optimizer))
        trajectory.append(Snapshot(masks, theta, copy.deepcopy(host(views))))
        if step == STEPS:
            break
        if step == resumed_at:
            saved = save_and_load([model.state_dict(), optimizer.state_dict()])
            others = case._replace(seed=1000).weights
            model, optimizer = make_torch(case, others, reservoir, sparse=sparse)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        if step == case.changed_at:
            optimizer.param_groups[0].update(case.changes)
        optimizer.zero_grad()
        model.backward(case, step)
        optimizer.step()
    inner = topkast.unwrap(optimizer, weights="dense")
    for name, param in zip(("b", "a", "c"), inner.param_groups[0]["params"], strict=True):
        np.testing.assert_array_equal(host(param), trajectory[-1].theta[name])
    return trajectory


def by_optax(case: Case) -> list[Snapshot]:
    params: Any = {name: jnp.asarray(array) for name, array in case.weights.items()}
    state: Any = None
    trajectory = []
    for step in range(STEPS + 1):
        at = min(step, STEPS - 1)
        inner = optax.sgd(case.lr_at(at), momentum=0.5)
        tx: Any = topkast.wrap_optimizer(inner, **case.options_at(at))
        state = tx.init(params) if state is None else state
        alpha = topkast.forward_params(params, state)
        trajectory.append(Snapshot(*map(host, (topkast.masks(state, params), params, alpha))))
        if step < STEPS:
            grads = {name: case.gradient(name, view, step, jnp) for name, view in alpha.items()}
            params, state = jax.jit(tx.step)(grads, state, params)
    return trajectory


def assert_same(case: Case, expected: list[Snapshot], actual: list[Snapshot]) -> None:
    for step, (one, other) in enumerate(zip(expected, actual, strict=True)):
        assert one.masks.keys() == other.masks.keys()
        for name, masks in one.masks.items():
            for mask, other_mask in zip(masks, other.masks[name], strict=True):
                np.testing.assert_array_equal(other_mask, mask, f"{name}, step {step}")
        for name, theta in one.theta.items():
            known = one.masks[name].backward if case.forgets(name) and name in one.masks else True
            np.testing.assert_array_equal(
                np.where(known, other.theta[name], 0), np.where(known, theta, 0), f"{name}, {step}"
            )
            np.testing.assert_array_equal(other.alpha[name], one.alpha[name], f"{name}, {step}")


OPTIONS: dict[str, Any] = {"fwd": 0.75, "bwd": 0.25, "method": None, "overrides": {}}
STACKED = Case(OPTIONS | {"block": (2, 1), "stacked": "a"}, {}, 1, 0)
EXPLORES_AGAIN = Case(OPTIONS | {"explore_until": 1}, {"explore_until": None}, 3, 0)


@pytest.mark.parametrize("sparse", [False, True], ids=["masked", "sparse"])
@settings(suppress_health_check=[*HealthCheck])
@given(cases(), st.sampled_from(["device", "host"]), st.integers(0, STEPS - 1))
@example(STACKED, "device", 2)
@example(EXPLORES_AGAIN, "device", 5)
def test_torch_follows_the_arrays(
    sparse: bool, case: Case, reservoir: str, resumed_at: int
) -> None:
    assert_same(case, by_arrays(case), by_torch(case, reservoir, resumed_at, sparse=sparse))


@pytest.mark.slow
@settings(suppress_health_check=[*HealthCheck], max_examples=8)  # which are compiled
@given(case=cases(traced=True))
def test_optax_follows_the_arrays(x64: None, case: Case) -> None:
    # JAX sorts the names of a dictionary.
    assert_same(case, by_arrays(case, sorted(SHAPES)), by_optax(case))
