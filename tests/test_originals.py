"""The rivals over many refreshes, beside their authors' algorithms on dense arrays and masks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import originals
import pytest
import torch
from originals import Group, Original
from torch import nn

import topkast
from topkast.methods import (
    ACDC,
    DNW,
    DSR,
    GSE,
    IHT,
    ITOP,
    SET,
    SMET,
    SNFS,
    DeepRewiring,
    GradualPruning,
    GraNet,
    Method,
    RigL,
    View,
)
from topkast.testing import to_numpy

Array = Any

RATES, UPDATES, FWD = (0.01, 0.8), 40, 0.7
SHAPES = {"0.weight": (12, 10), "2.weight": (9, 12)}
RANDOM = np.random.default_rng(3)
WEIGHTS = {name: RANDOM.standard_normal(shape).round(1) for name, shape in SHAPES.items()}  # ties
INPUTS = RANDOM.standard_normal((UPDATES, 8, 10)) * (np.arange(10) > 1)  # zero gradients
GOALS = RANDOM.standard_normal((UPDATES, 8, 9))

EVERY = 3


def drawn(refresh: originals.Refresh) -> Original:
    return Original(originals.draw_first, refresh)


def whole(group: Group) -> int:
    return group.theta.size


def half(group: Group) -> int:
    return group.theta.size - group.theta.size // 2


def last(group: Group) -> int:
    return group.count


ALL, HALF = originals.magnitude_first(whole), originals.magnitude_first(half)
CASES: dict[str, tuple[Method, Original]] = {
    "set": (SET(0.3), drawn(originals.evolve(0.3))),
    "set, until": (SET(0.5, until=20), drawn(originals.evolve(0.5, until=20))),
    "set, signed": (SET(0.3, signed=True), drawn(originals.evolve(0.3, signed=True))),
    "smet": (SMET(until=33), drawn(originals.evolve(0.2, until=33, again=False))),
    "rigl": (RigL(until=30), drawn(originals.grow_largest(0.3, until=30))),
    "itop": (ITOP(until=40), drawn(originals.grow_largest(0.5, until=40))),
    "gse": (
        GSE(until=24, samples=0.5),
        drawn(originals.grow_largest(0.2, until=24, again=False, samples=0.5)),
    ),
    "snfs": (
        SNFS(until=40, fraction=0.8, momentum=0.5),
        drawn(originals.grow_largest(0.8, until=40, momentum=True)),
    ),
    "dsr": (DSR(0.2), drawn(originals.reparameterize(0.2))),
    "deep rewiring": (
        DeepRewiring(noise=0.1),
        Original(originals.rewire_first, originals.rewire, noise=0.1, l1=1e-5),
    ),
    "gradual pruning": (
        GradualPruning(start=4, end=25),
        Original(originals.magnitude_first(whole, rests=True), originals.prune(4, 25)),
    ),
    "granet": (
        GraNet(start=0, end=25, until=38),
        Original(HALF, originals.regenerate(0, 25, fraction=0.5, until=38)),
    ),
    "granet, late": (
        GraNet(start=11, end=25, fraction=0.3),
        Original(HALF, originals.regenerate(11, 25, fraction=0.3, until=None)),
    ),
    "acdc": (
        ACDC(warm_up=6, sparse=6, dense=3, end=30),
        Original(ALL, originals.alternate(6, 6, 3, 30)),
    ),
    "iht": (IHT(end=20), Original(ALL, originals.threshold(20), moves_all=True)),
    "dnw": (
        DNW(),
        Original(originals.magnitude_first(last, rests=True), originals.largest, moves_all=True),
    ),
}


# Where few weights are outside A. What is dropped may not return at once.
FULL: dict[str, tuple[Method, Original]] = {
    "set": (SET(0.3, regrow=False), drawn(originals.evolve(0.3, again=False))),
    "set, signed": (
        SET(0.3, signed=True, regrow=False),
        drawn(originals.evolve(0.3, signed=True, again=False)),
    ),
    "smet": (SMET(until=90), drawn(originals.evolve(0.2, until=90, again=False))),
    "rigl": (RigL(regrow=False), drawn(originals.grow_largest(0.3, again=False))),
    "gse": (GSE(samples=0.5), drawn(originals.grow_largest(0.2, again=False, samples=0.5))),
    "snfs": (
        SNFS(momentum=0.5, regrow=False),
        drawn(originals.grow_largest(0.5, again=False, momentum=True)),
    ),
}
STEPWISE = ("deep rewiring", "dnw", "iht")  # they refresh after each step


def gradients(alphas: dict[str, Array], update: int) -> dict[str, Array]:
    """Dense gradients of a network of two layers."""
    first, second = (
        torch.tensor(to_numpy(alphas[name]).reshape(shape), requires_grad=True)
        for name, shape in SHAPES.items()
    )
    outputs = torch.tanh(torch.tensor(INPUTS[update]) @ first.T) @ second.T
    (outputs - torch.tensor(GOALS[update])).square().sum().backward()
    return dict(zip(SHAPES, (to_numpy(first.grad), to_numpy(second.grad)), strict=True))


def groups(distribution: str, fwd: float) -> list[Group]:
    """Tensors as vectors: each on its own, or all as one."""
    names = [tuple(SHAPES)] if distribution == "global" else [(name,) for name in SHAPES]
    made = []
    for members in names:
        bounds, start = {}, 0
        for name in members:
            bounds[name] = (start, start + WEIGHTS[name].size)
            start += WEIGHTS[name].size
        theta = np.concatenate([WEIGHTS[name].reshape(-1) for name in members])
        made.append(Group(bounds, theta, start - int(fwd * start)))
    return made


def train_original(
    original: Original, distribution: str, fwd: float, every: int
) -> Iterator[dict[str, tuple[Array, Array, Array]]]:
    """After each update, masks, weights and momentum of each tensor."""
    made = groups(distribution, fwd)
    for group in made:
        original.start(group)
    for update in range(UPDATES):
        alphas = {
            name: (group.theta * group.mask)[start:stop]
            for group in made
            for name, (start, stop) in group.bounds.items()
        }
        dense = gradients(alphas, update)
        for group in made:
            joined = np.concatenate([dense[name].reshape(-1) for name in group.bounds])
            original.step(group, joined, update, RATES, every)
        yield {
            name: (group.mask[start:stop], group.theta[start:stop], group.buffer[start:stop])
            for group in made
            for name, (start, stop) in group.bounds.items()
        }


def options_of(method: Method, distribution: str, fwd: float, every: int) -> dict[str, Any]:
    bwd = 0.0 if method.backward == "none" else fwd
    options = {"fwd": fwd, "bwd": bwd, "distribution": distribution, "refresh_every": every}
    return options | {"method": method, "probe": False}


def train_arrays(
    method: Method, distribution: Any, fwd: float, every: int, *, rule: Any = None
) -> Iterator[dict[str, tuple[Array, Array, Any]]]:
    """The same by the rules for arrays; momentum if the rule is SGD."""
    rule = topkast.SGD(RATES[0], momentum=RATES[1]) if rule is None else rule
    tx: Any = topkast.wrap_optimizer(rule, **options_of(method, distribution, fwd, every))
    params: Any = {name: weight.copy() for name, weight in WEIGHTS.items()}
    state = tx.init(params)
    for update in range(UPDATES):
        grads = gradients(topkast.forward_params(params, state), update)
        params, state = tx.step(grads, state, params)
        masks = topkast.masks(state, params)
        buffers = {}
        for key, support in state.supports.items():
            buffer = np.zeros(sum(params[name].size for name in key.split(" + ")))
            if isinstance(rule, topkast.SGD):
                buffer[support.entries] = state.inner.velocity[key].reshape(-1)
            start = 0
            for name in key.split(" + "):
                buffers[name] = buffer[start : start + params[name].size]
                start += params[name].size
        yield {
            name: (masks[name].forward.reshape(-1), params[name].reshape(-1), buffers[name])
            for name in SHAPES
        }


def network() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(10, 12, bias=False), nn.Tanh(), nn.Linear(12, 9, bias=False)
    ).double()
    model.load_state_dict({name: torch.tensor(weight) for name, weight in WEIGHTS.items()})
    return model


def train_torch(
    method: Method, distribution: Any, fwd: float, every: int, *, sparse: bool
) -> Iterator[dict[str, tuple[Array, Array, None]]]:
    model = network()
    inner = torch.optim.SGD(model.named_parameters(), RATES[0], momentum=RATES[1])
    opt = topkast.wrap_optimizer(inner, **options_of(method, distribution, fwd, every))
    if sparse:
        topkast.sparsify(model, opt)
    for update in range(UPDATES):
        opt.zero_grad()
        outputs = model(torch.tensor(INPUTS[update]))
        (outputs - torch.tensor(GOALS[update])).square().sum().backward()
        opt.step()
        masks, dense = topkast.masks(opt), topkast.dense_params(opt)
        yield {
            name: (to_numpy(masks[name].forward).reshape(-1), to_numpy(dense[name]).ravel(), None)
            for name in SHAPES
        }


def assert_same_run(ours: Any, theirs: Any, rests: bool) -> None:
    sets = set()
    for update, (own, other) in enumerate(zip(ours, theirs, strict=True), 1):
        for name in SHAPES:
            mask, weights, buffer = own[name]
            expected, theta, momentum = other[name]
            np.testing.assert_array_equal(mask, expected, f"{name} after {update} updates")
            seen = np.ones_like(expected) if rests else expected
            np.testing.assert_allclose(weights[seen], theta[seen], rtol=1e-9, atol=1e-12)
            if buffer is not None:
                np.testing.assert_allclose(
                    buffer[expected], momentum[expected], rtol=1e-9, atol=1e-12
                )
            sets.add((name, expected.tobytes()))
    assert len(sets) >= 4


def run(name: str, distribution: str, fwd: float, train: Any, **settings: Any) -> None:
    method, original = (CASES | FULL)[name]
    every = 1 if name in STEPWISE else EVERY
    ours = train(method, distribution, fwd, every, **settings)
    theirs = train_original(original, distribution, fwd, every)
    assert_same_run(ours, theirs, not method.forgets)


@pytest.mark.parametrize("distribution", ["uniform", "global"])
@pytest.mark.parametrize("name", CASES)
def test_arrays(name: str, distribution: str) -> None:
    run(name, distribution, FWD, train_arrays)


@pytest.mark.parametrize("distribution", ["uniform", "global"])
@pytest.mark.parametrize("name", FULL)
def test_fewer_weights_outside_than_the_share(name: str, distribution: str) -> None:
    """The smallest leave, as many as there is room for; none of the others does."""
    run(name, distribution, 0.1, train_arrays)


@pytest.mark.parametrize(("name", "distribution", "sparse"), [
    *((name, "global", False) for name in CASES),
    *((name, "uniform", True) for name in CASES if name != "snfs"),
    ("snfs", "uniform", False),
])  # fmt: skip
def test_torch(name: str, distribution: str, sparse: bool) -> None:
    run(name, distribution, FWD, train_torch, sparse=sparse)


def test_each_entry_counts_its_own_steps_of_adam() -> None:
    """SMET's optimizer; it is that of all methods whose weights start at zero."""
    replacing = [name for name, (method, _) in CASES.items() if method.forgets]
    for name in replacing:
        if name in STEPWISE:
            continue
        method, original = CASES[name]
        by_entry = originals.ByEntry(original.start, original.refresh)
        ours = train_arrays(method, "uniform", FWD, EVERY, rule=topkast.Adam(RATES[0], eps=1e-30))
        theirs = train_original(by_entry, "uniform", FWD, EVERY)
        for own, other in zip(ours, theirs, strict=True):
            for key in SHAPES:
                mask, theta, _ = other[key]
                np.testing.assert_array_equal(own[key][0], mask, name)
                np.testing.assert_allclose(own[key][1][mask], theta[mask], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("by_group", [False, True])
def test_methods_of_single_tensors_resume(by_group: bool, sparse: bool) -> None:
    """Each tensor has a method and an interval; gradients add up over two backward passes."""
    names, intervals = list(CASES), (3, 4)
    for first, second in zip(names[::4], [*names[5:], *names[:5]][::4], strict=True):
        pair = CASES[first], CASES[second]
        every = [
            1 if name in STEPWISE else interval
            for name, interval in zip((first, second), intervals, strict=True)
        ]
        made = groups("uniform", FWD)
        options = {}
        for group, (method, original), interval in zip(made, pair, every, strict=True):
            original.start(group)
            own = options_of(method, "uniform", FWD, interval)
            own |= {"penalty": method.default_penalty, "penalty_kind": method.default_penalty_kind}
            options[group.name] = {
                key: own[key] for key in own if key not in ("distribution", "probe")
            }
        model, opt = make_torch(options, by_group=by_group, sparse=sparse)
        for update in range(24):
            if update == 11:
                saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
                model, opt = make_torch(options, by_group=by_group, sparse=sparse)
                model.load_state_dict(saved[0])
                opt.load_state_dict(saved[1])
            dense = gradients({group.name: group.theta * group.mask for group in made}, update)
            for group, (_, original), interval in zip(made, pair, every, strict=True):
                original.step(group, dense[group.name].reshape(-1), update, RATES, interval)
            opt.zero_grad()
            for part in (slice(0, 3), slice(3, 8)):
                outputs = model(torch.tensor(INPUTS[update][part]))
                (outputs - torch.tensor(GOALS[update][part])).square().sum().backward()
            opt.step()
            masks, weights = topkast.masks(opt), topkast.dense_params(opt)
            for group, (method, _) in zip(made, pair, strict=True):
                mask = to_numpy(masks[group.name].forward).reshape(-1)
                np.testing.assert_array_equal(mask, group.mask, f"{first}, {second}, {update}")
                seen = mask if method.forgets else np.ones_like(mask)
                theta = to_numpy(weights[group.name]).reshape(-1)
                np.testing.assert_allclose(theta[seen], group.theta[seen], rtol=1e-8, atol=1e-11)


def make_torch(options: Any, *, by_group: bool, sparse: bool) -> tuple[nn.Module, Any]:
    """The network, with options by tensor: of parameter groups, or as overrides."""
    model = network()
    named = dict(model.named_parameters())
    whole: Any = {"fwd": 0.9, "bwd": 0.9, "probe": False}
    if by_group:
        params = [{"params": [(name, named[name])], **options[name]} for name in named]
        inner: Any = torch.optim.SGD(params, RATES[0], momentum=RATES[1])
        opt = topkast.wrap_optimizer(inner, **whole)
    else:
        inner = torch.optim.SGD(list(named.items()), RATES[0], momentum=RATES[1])
        opt = topkast.wrap_optimizer(inner, **whole, overrides=options)
    if sparse:
        topkast.sparsify(model, opt)
    return model, opt


@pytest.mark.parametrize("name", ["set, signed", "smet"])
def test_few_weights_outside_inside_jit(name: str) -> None:
    """Counts that depend on the update, or on the weights, are read from tables there."""
    method = (CASES | FULL)[name][0]
    rng = np.random.default_rng(1)
    weights, gradient = rng.standard_normal((2, 60)).astype(np.float32).round(1)
    active = np.sort(rng.permutation(60)[:55]).astype(np.int32)

    def choose(weights: Any, gradient: Any, active: Any, draw: Any) -> Any:
        support = topkast.Support(active, 55)
        view = View(weights, 55, 55, name="w", draw=draw, support=support, gradient=gradient)
        return method.choose(replace(view, values=weights[active])).indices

    compiled = jax.jit(choose)
    for draw in (3, 12, 18, 70):
        expected = choose(weights, gradient, active, draw)
        arguments: list[Any] = [jnp.asarray(array) for array in (weights, gradient, active)]
        np.testing.assert_array_equal(compiled(*arguments, jnp.asarray(draw)), expected)
        left = np.setdiff1d(active, expected)
        assert len(left) <= 5
        if "signed" not in name and draw < 18:  # no larger one has left
            assert abs(weights[left]).max() <= np.sort(abs(weights[active]))[:28].max()


def test_dsr_of_many_tensors() -> None:
    """Ties, zeros, tensors that would lose all, and more to grow than there is room for."""
    rng, compared = np.random.default_rng(0), 0
    for draw in range(400):
        sizes = rng.integers(1, 14, rng.integers(1, 5)).tolist()
        ends = np.cumsum(sizes).tolist()
        bounds = {f"t{end}": (end - size, end) for size, end in zip(sizes, ends, strict=True)}
        count = int(rng.integers(1, ends[-1] + 1))
        active = np.sort(rng.permutation(ends[-1])[:count]).astype(np.int32)
        weights = np.zeros(ends[-1])
        weights[active] = rng.integers(-3, 4, count)
        group = Group(bounds, weights, count)
        group.mask[active] = True
        fraction = float(rng.choice([0.1, 0.3, 0.5, 0.9, 1.0]))
        support = topkast.Support(active, count)
        seen = View(weights, count, count, name=group.name, draw=draw, support=support)
        seen = replace(seen, values=weights[active], members=bounds)
        indices = DSR(fraction).choose(seen).indices
        assert len(np.unique(indices)) == len(indices) == count
        originals.reparameterize(fraction)(group, weights, draw)
        if group.mask.sum() == count:  # no tensor had too little room for its share
            np.testing.assert_array_equal(indices, np.flatnonzero(group.mask))
            compared += 1
    assert compared > 200


def test_granet_ranks_what_is_equal_as_all_tensors_together_do() -> None:
    """A weight ranks by the hash of its position among all, in the regrowth of each tensor too."""
    rng, bounds = np.random.default_rng(2), {"a": (0, 20), "b": (20, 60)}
    for draw in range(1, 8):
        weights, gradient = rng.integers(-2, 3, (2, 60)).astype(float)
        order = rng.permutation(60)
        units = np.concatenate([np.sort(order[:30]), np.sort(order[30:])])
        group = Group(bounds, np.where(np.isin(np.arange(60), order[:30]), weights, 0), 12)
        group.mask[order[:30]] = True
        support = topkast.Support(units, 30)
        seen = View(weights, 12, 60, name=group.name, draw=draw, support=support, members=bounds)
        seen = replace(seen, values=weights[units], gradient=gradient)
        chosen = GraNet(start=0, end=10).choose(seen)
        originals.regenerate(0, 10, fraction=0.5, until=None)(group, gradient, draw)
        np.testing.assert_array_equal(np.sort(chosen.active), np.flatnonzero(group.mask))
