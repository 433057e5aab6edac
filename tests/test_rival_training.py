"""The rivals in whole runs: every execution takes the same steps, whatever a loop does between."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rival_replica
import topkast_torch
import torch
from products import star
from sparse_training import assert_agree
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import conv2d, linear
from torch.utils.checkpoint import checkpoint

import topkast
from topkast import MismatchError, NonFiniteError
from topkast.methods import (
    ACDC,
    DNW,
    GSE,
    IHT,
    ITOP,
    SET,
    SMET,
    SNIP,
    GradualPruning,
    GraNet,
    Method,
    RigL,
    TopKAST,
)
from topkast.selection._distribution import exact_fraction, kept_count
from topkast.testing import to_numpy

FWD, EVERY, UPDATES = 0.8, 2, 14


CASES: dict[str, Method] = {
    "set": SET(0.3),
    "set, signed": SET(0.3, signed=True),
    "set, others": SET(0.3, regrow=False),
    "smet": SMET(until=12),
    "rigl": RigL(until=12),
    "rigl, others": RigL(regrow=False),
    "itop": ITOP(until=12),
    "gse": GSE(until=12),
    "gradual pruning": GradualPruning(start=2, end=8),
    "granet": GraNet(start=0, end=8, until=12),
    "acdc": ACDC(warm_up=2, sparse=4, dense=2, end=10),
    "acdc, sparse first": ACDC(warm_up=0, sparse=4, dense=2, end=10),
    "dnw": DNW(),
    "iht": IHT(end=6),
}
FIXED = [name for name, method in CASES.items() if not method.schedules]
FORGETTING = [name for name, method in CASES.items() if method.forgets]


def expected_count(method: Method, size: int, update: int) -> int:
    """|A| at an update, by the papers' formulas."""
    last, final = update - update % EVERY, kept_count(size, 1 - exact_fraction(FWD))
    match method:
        case GradualPruning(start=start, end=end, initial=initial):  # and GraNet
            progress = Fraction(min(max(last - start, 0), end - start), end - start)
            goal, begin = 1 - Fraction(final, size), Fraction(str(initial))
            sparsity = goal + (begin - goal) * (1 - progress) ** 3
            return size - math.floor(sparsity * size)
        case ACDC(warm_up=warm_up, sparse=sparse, dense=dense, end=end):
            phases = [*[0] * warm_up, *([1] * sparse + [0] * dense) * 9][:end] + [1] * 99
            return final if phases[last] else size
        case IHT(end=end):
            return final + (size - final) * max(end - last, 0) // end
    return final


@dataclass
class Problem:
    """A layer without bias, its weight and data."""

    make: Callable[[], nn.Module]
    apply: Callable[[Tensor, Tensor], Tensor]
    inputs: tuple[int, ...]

    def weight(self) -> Tensor:
        torch.manual_seed(0)
        module: Any = self.make()
        weight: Tensor = module.weight.detach()
        return weight

    def batch(self, update: int) -> Tensor:
        torch.manual_seed(update)
        return torch.randn(self.inputs, dtype=torch.float64)

    def loss(self, outputs: Tensor) -> Tensor:
        goal = torch.linspace(-1, 1, outputs[0].numel(), dtype=torch.float64)
        return (outputs - goal.view(outputs[0].shape)).square().sum() / len(outputs)


PROBLEMS = {
    "linear": Problem(
        lambda: nn.Linear(30, 20, bias=False).double(), lambda x, w: linear(x, w), (16, 30)
    ),
    "conv": Problem(
        lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2, bias=False).double(),
        lambda x, w: conv2d(x, w, stride=2, padding=1, groups=2),
        (4, 8, 6, 7),
    ),
}

OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], Any, Any]] = {
    "sgd": (lambda params: torch.optim.SGD(params, 0.02), topkast.SGD(0.02), optax.sgd(0.02)),
    "momentum": (
        lambda params: torch.optim.SGD(params, 0.01, momentum=0.9),
        topkast.SGD(0.01, momentum=0.9),
        optax.sgd(0.01, momentum=0.9),
    ),
    "adamw": (
        lambda params: torch.optim.AdamW(params, 0.02, weight_decay=0.1),
        topkast.AdamW(0.02, weight_decay=0.1),
        optax.adamw(0.02, weight_decay=0.1),
    ),
}

# After each update: A, and the forward view.
History = list[tuple[set[int], np.ndarray[Any, Any]]]


def options_of(method: Method, **options: Any) -> dict[str, Any]:
    bwd = FWD if method.backward == "equal" else 0.0
    return {"fwd": FWD, "bwd": bwd, "refresh_every": EVERY, "method": method} | options


def record(forward: Any, view: Any) -> tuple[set[int], np.ndarray[Any, Any]]:
    return set(np.flatnonzero(to_numpy(forward)).tolist()), to_numpy(view).copy()


def train_rule(method: Method, problem: Problem, rule: Any) -> History:
    """NumPy arrays, with the gradient of the dense layer at the forward view."""
    tx = topkast.wrap_optimizer(rule, **options_of(method))
    params: Any = {"0.weight": problem.weight().numpy().copy()}
    state, history = tx.init(params), []
    for update in range(UPDATES):
        view = torch.from_numpy(topkast.forward_params(params, state)["0.weight"])
        view.requires_grad_()
        problem.loss(problem.apply(problem.batch(update), view)).backward()
        assert view.grad is not None
        params, state = tx.step({"0.weight": view.grad.numpy()}, state, params)
        support = state.supports["0.weight"]
        size = params["0.weight"].size
        counts = expected_count(method, size, update + 1)
        backward = size if method.backward == "none" else counts
        assert (support.forward, support.backward) == (counts, backward)
        forward = topkast.masks(state, params)["0.weight"].forward
        history.append(record(forward, topkast.forward_params(params, state)["0.weight"]))
        if method.forgets and update % EVERY == EVERY - 1:
            assert not params["0.weight"][~np.asarray(forward)].any()
    return history


def make_torch(
    method: Method, problem: Problem, make: Any, *, sparse: bool, **options: Any
) -> tuple[nn.Sequential, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(problem.make())
    opt = topkast.wrap_optimizer(
        make(model.named_parameters()), **options_of(method, probe=False, **options)
    )
    if sparse:
        report = topkast.sparsify(model, opt)
        assert all(layer.execution == "sparse" for layer in report.layers), str(report)
    return model, opt


def step_torch(model: nn.Module, opt: Any, problem: Problem, update: int) -> None:
    opt.zero_grad()
    problem.loss(model(problem.batch(update))).backward()
    opt.step()


def train_torch(method: Method, problem: Problem, make: Any, *, sparse: bool) -> History:
    model, opt = make_torch(method, problem, make, sparse=sparse)
    layer: Any = model[0]
    history = []
    for update in range(UPDATES):
        step_torch(model, opt, problem, update)
        masks = topkast.masks(opt)["0.weight"]
        forward = masks.forward
        counts = expected_count(method, forward.numel(), update + 1)
        backward = forward.numel() if method.backward == "none" else counts
        assert (int(forward.sum()), int(masks.backward.sum())) == (counts, backward)
        history.append(record(forward, layer.weight.detach()))
        if method.forgets and update % EVERY == EVERY - 1:
            assert not topkast.dense_params(opt)["0.weight"][~forward].any()
    return history


def train_optax(method: Method, tx: Any, *, fused: bool) -> History:
    problem = PROBLEMS["linear"]
    wrapped: Any = topkast.wrap_optimizer(tx, **options_of(method))
    params: Any = {"0.weight": jnp.asarray(problem.weight().numpy())}
    state, history = wrapped.init(params), []
    goal = jnp.linspace(-1, 1, 20)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        def loss(view: Any) -> Any:
            return ((batch @ view["0.weight"].T - goal) ** 2).sum() / len(batch)

        grads = jax.grad(loss)(topkast.forward_params(params, state))
        if fused:
            return wrapped.step(grads, state, params)
        updates, state = wrapped.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for update in range(UPDATES):
        params, state = step(params, state, jnp.asarray(problem.batch(update).numpy()))
        (forward,) = (masks.forward for masks in topkast.masks(state, params).values())
        history.append(record(forward, topkast.forward_params(params, state)["0.weight"]))
        if method.forgets and update % EVERY == EVERY - 1:
            assert not np.asarray(params["0.weight"])[~np.asarray(forward)].any()
    return history


def assert_same_run(first: History, second: History) -> None:
    for update, (one, other) in enumerate(zip(first, second, strict=True), 1):
        assert one[0] == other[0], f"A differs after {update} updates"
        np.testing.assert_allclose(one[1], other[1], rtol=1e-6, atol=1e-9)


class TestExecutionsAgree:
    @pytest.mark.parametrize(
        ("layer", "optimizer", "name"), star(list(PROBLEMS), list(OPTIMIZERS), list(CASES))
    )
    def test_torch_agrees_with_numpy(self, layer: str, optimizer: str, name: str) -> None:
        method, problem, (make, rule, _) = CASES[name], PROBLEMS[layer], OPTIMIZERS[optimizer]
        expected = train_rule(method, problem, rule)
        assert len({frozenset(active) for active, _ in expected}) > 1  # the sets do change
        for sparse in (False, True):
            assert_same_run(train_torch(method, problem, make, sparse=sparse), expected)

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize(
        ("name", "optimizer", "fused"),
        [
            *((name, "momentum", True) for name in FIXED),
            *((name, "adamw", False) for name in ("set", "rigl", "gse", "dnw")),
        ],
    )
    def test_jax_agrees_with_numpy(self, name: str, optimizer: str, fused: bool) -> None:
        _, rule, tx = OPTIMIZERS[optimizer]
        expected = train_rule(CASES[name], PROBLEMS["linear"], rule)
        assert_same_run(train_optax(CASES[name], tx, fused=fused), expected)

    def test_dnw_is_topkast(self) -> None:
        problem, (make, *_) = PROBLEMS["linear"], OPTIMIZERS["adamw"]
        dnw = train_torch(DNW(), problem, make, sparse=False)
        model: Any
        model, opt = make_torch(TopKAST(), problem, make, sparse=False, bwd=0.0, penalty=0.0)
        for update, (active, view) in enumerate(dnw):
            step_torch(model, opt, problem, update)
            forward = topkast.masks(opt)["0.weight"].forward
            assert set(np.flatnonzero(forward).tolist()) == active
            np.testing.assert_array_equal(model[0].weight.detach(), view)

    @pytest.mark.parametrize("sparse", [False, True])
    def test_constant_gradual_pruning_is_topk_once(self, sparse: bool) -> None:
        problem, (make, *_) = PROBLEMS["linear"], OPTIMIZERS["sgd"]
        method = GradualPruning(start=0, end=1, initial=FWD)
        model, opt = make_torch(method, problem, make, sparse=sparse)
        weight = problem.weight().abs().flatten()
        largest = set(weight.topk(120).indices.tolist())
        for update in range(8):
            forward = topkast.masks(opt)["0.weight"].forward
            assert set(np.flatnonzero(forward).tolist()) == largest
            step_torch(model, opt, problem, update)

    @pytest.mark.parametrize("distribution", ["erk", "global"])
    @pytest.mark.parametrize("name", ["set", "rigl", "gse", "granet", "gradual pruning", "acdc"])
    def test_distributions(self, name: str, distribution: Any) -> None:
        """Several tensors: counts per tensor or in total, and the same sets in NumPy."""
        method = CASES[name]
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 10)).double()
        params = {key: p.detach().numpy().copy() for key, p in model.named_parameters()}
        options = options_of(method, distribution=distribution)
        tx = topkast.wrap_optimizer(topkast.SGD(0.1, momentum=0.9), **options)
        opt = topkast.wrap_optimizer(
            torch.optim.SGD(model.named_parameters(), 0.1, momentum=0.9), **options
        )
        state: Any = tx.init(params)
        totals: set[Any] = set()
        for update in range(10):
            opt.zero_grad()
            inputs = PROBLEMS["linear"].batch(update)
            (model(inputs) - 1).square().mean().backward()
            grads = {key: to_numpy(p.grad).copy() for key, p in model.named_parameters()}
            opt.step()
            params, state = tx.step(grads, state, params)
            masks = topkast.masks(opt)
            for key, mask in topkast.masks(state, params).items():
                np.testing.assert_array_equal(masks[key].forward, mask.forward)
            counts = tuple(int(mask.forward.sum()) for mask in masks.values())
            totals.add(sum(counts) if distribution == "global" else counts)
            if not method.schedules:
                assert len(totals) == 1
        if distribution == "global" and not method.schedules:
            assert totals == {kept_count(800, Fraction(1, 5))}


class TestEntrants:
    """What enters A starts at zero, as in a fresh optimizer; what stays keeps its state."""

    @pytest.mark.parametrize("sparse", [False, True])
    @pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
    @pytest.mark.parametrize(
        "name", ["set", "rigl, others", "gse", "granet", "acdc", "acdc, sparse first"]
    )
    def test_state_in_torch(self, name: str, optimizer: str, sparse: bool) -> None:
        problem, (make, *_) = PROBLEMS["linear"], OPTIMIZERS[optimizer]
        model, opt = make_torch(CASES[name], problem, make, sparse=sparse)
        (execution,) = opt._wrapper_state.executions
        param = next(model.parameters())
        seen = 0
        for update in range(UPDATES):
            before = set(execution.support.active.tolist())
            step_torch(model, opt, problem, update)
            active = execution.support.active
            enters = torch.tensor([int(index) not in before for index in active])
            if not enters.any():
                continue
            seen += int(enters.sum())
            values = execution.values.detach().view(-1)[: len(active)]
            assert not values[enters].any()
            assert values[~enters].count_nonzero() > 0.9 * len(values[~enters]) - 60
            state = {key: entry for key, entry in opt.state[param].items() if key != "step"}
            assert state
            for entry in state.values():
                entries = entry.view(-1)[: len(active)]
                assert not entries[enters].any()
                assert entries[~enters].all()
            if optimizer == "adamw":
                ages = execution.young.current_ages()[: len(active)]
                assert not ages[enters].any()
                assert (ages[~enters] > 0).all()
        assert seen > 10

    @pytest.mark.parametrize("name", ["set", "rigl, others", "granet", "acdc, sparse first"])
    def test_state_in_numpy(self, name: str) -> None:
        problem = PROBLEMS["linear"]
        tx = topkast.wrap_optimizer(topkast.SGD(0.1, momentum=0.9), **options_of(CASES[name]))
        params: Any = {"w": problem.weight().numpy().copy()}
        state, gradient = tx.init(params), np.random.default_rng(0).standard_normal((20, 30))
        seen = 0
        for _ in range(UPDATES):
            before = state.supports["w"].active
            params, state = tx.step({"w": gradient}, state, params)
            active = state.supports["w"].active
            enters = ~np.isin(active, before)
            seen += enters.sum()
            velocity = state.inner.velocity["w"].reshape(-1)[: len(active)]
            assert not params["w"].reshape(-1)[active][enters].any()
            assert not velocity[enters].any()
            assert velocity[~enters].all()
        assert seen > 10

    @pytest.mark.parametrize("sparse", [False, True])
    def test_pruned_weights_rest(self, sparse: bool) -> None:
        """Under gradual pruning, weights outside A keep their bits, under AdamW's decay too."""
        problem, (make, *_) = PROBLEMS["linear"], OPTIMIZERS["adamw"]
        model, opt = make_torch(CASES["gradual pruning"], problem, make, sparse=sparse)
        for update in range(UPDATES):
            before = topkast.dense_params(opt)["0.weight"].clone()
            resting = ~topkast.masks(opt)["0.weight"].forward
            step_torch(model, opt, problem, update)
            after = topkast.dense_params(opt)["0.weight"]
            assert torch.equal(after[resting], before[resting])
            if not resting.any():
                continue
            assert after[resting].count_nonzero() == resting.sum()

    def test_iht_moves_what_it_has_wiped(self) -> None:
        """All weights get a step from zero, and the largest then stay."""
        layer = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[8.0, 7, 6, 5], [4, 3, 2, 1]]))
        opt = topkast.wrap_optimizer(
            torch.optim.SGD(layer.named_parameters(), 1.0), fwd=0.75, bwd=0, method=IHT()
        )
        layer.weight.grad = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, -9]])
        opt.step()  # 7 6 5 4 | 4 3 2 10
        expected = torch.tensor([[7.0, 0, 0, 0], [0, 0, 0, 10]])
        assert torch.equal(topkast.dense_params(opt)["weight"], expected)
        layer.weight.grad = torch.tensor([[0.0, 0, 0, 0], [-8, 0, 0, 4]])
        opt.step()  # 7 0 0 0 | 8 0 0 6
        expected = torch.tensor([[7.0, 0, 0, 0], [8, 0, 0, 0]])
        assert torch.equal(topkast.dense_params(opt)["weight"], expected)


def two_layers(method: Method | None, *, sparse: bool, **options: Any) -> tuple[nn.Module, Any]:
    """A convolution and a linear layer under AdamW."""
    torch.manual_seed(options.pop("start", 0))
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 12)
    ).double()
    settings = {"fwd": FWD, "bwd": FWD, "method": method, "refresh_every": 4, "probe": False}
    if method is not None:
        settings |= options_of(method, refresh_every=4, probe=False)
    make = options.pop("optimizer", lambda params: torch.optim.AdamW(params, 0.02))
    opt = topkast.wrap_optimizer(make(model.named_parameters()), **settings | options)
    if sparse:
        topkast.sparsify(model, opt)
    return model, opt


def batch(update: int) -> Tensor:
    torch.manual_seed(100 + update)
    return torch.randn(6, 4, 3, 3, dtype=torch.float64)


def loss_of(model: nn.Module, update: int) -> Tensor:
    loss: Tensor = (model(batch(update)) - 1).square().mean()
    return loss


def plain(model: nn.Module, opt: Any, update: int) -> None:
    opt.zero_grad()
    loss_of(model, update).backward()
    opt.step()


class TestResumption:
    @pytest.mark.parametrize("stop", [6, 7], ids=["in mid-interval", "before a due step"])
    @pytest.mark.parametrize("sparse", [False, True])
    @pytest.mark.parametrize(
        "name", ["rigl", "set", "gse", "gradual pruning", "granet", "acdc", "iht"]
    )
    def test_bits(self, name: str, sparse: bool, stop: int) -> None:
        method = CASES[name]
        model, opt = two_layers(method, sparse=sparse)
        for update in range(stop):
            plain(model, opt, update)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
        other_model, other = two_layers(method, sparse=sparse, start=1)
        plain(other_model, other, 50)  # nothing of it must be left
        saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        other_model.load_state_dict(saved["model"])
        other.load_state_dict(saved["opt"])
        for update in range(stop, stop + 7):
            plain(model, opt, update)
            plain(other_model, other, update)
            self.assert_same_bits(model, opt, other_model, other)

    @staticmethod
    def assert_same_bits(model: nn.Module, opt: Any, other_model: nn.Module, other: Any) -> None:
        pairs = [
            *zip(
                topkast.dense_params(opt).values(),
                topkast.dense_params(other).values(),
                strict=True,
            ),
            *zip(model.parameters(), other_model.parameters(), strict=True),
        ]
        for mask, other_mask in zip(
            topkast.masks(opt).values(), topkast.masks(other).values(), strict=True
        ):
            pairs += zip(mask, other_mask, strict=True)
        for param, second in zip(model.parameters(), other_model.parameters(), strict=True):
            states = opt.state[param], other.state[second]
            pairs += [(states[0][key], states[1][key]) for key in states[0]]
        assert all(torch.equal(one, second) for one, second in pairs)

    @pytest.mark.parametrize("sparse", [False, True])
    @pytest.mark.parametrize("name", ["rigl", "granet"])
    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_copies_that_await_a_gradient(self, how: str, name: str, sparse: bool) -> None:
        model, opt = two_layers(CASES[name], sparse=sparse)
        for update in range(3):
            plain(model, opt, update)
        if how == "deepcopy":
            other_model, other = copy.deepcopy((model, opt))
        else:
            other_model, other = pickle.loads(pickle.dumps((model, opt)))
        for update in range(3, 9):
            plain(model, opt, update)
            plain(other_model, other, update)
            self.assert_same_bits(model, opt, other_model, other)

    def test_a_copy_of_the_model_alone_records_nothing(self) -> None:
        model, opt = two_layers(RigL(), sparse=True, refresh_every=1)
        layers: Any = copy.deepcopy(model)
        for update in range(3):
            plain(model, opt, update)
            loss_of(layers, update).backward()
        assert layers[0].recording is None
        assert layers[3].recording is None


def accumulated(model: nn.Module, opt: Any, update: int) -> None:
    opt.zero_grad()
    for part in range(2):
        (loss_of(model, 10 * update + part) / 2).backward()
    opt.step()


def restarted(set_to_none: bool) -> Callable[[nn.Module, Any, int], None]:
    """A backward pass whose gradient is dropped without a step."""

    def run(model: nn.Module, opt: Any, update: int) -> None:
        opt.zero_grad(set_to_none=set_to_none)
        (1000 * loss_of(model, 10 * update + 1)).backward()
        opt.zero_grad(set_to_none=set_to_none)
        plain_without_zeroing(model, opt, update)

    return run


def plain_without_zeroing(model: nn.Module, opt: Any, update: int) -> None:
    loss_of(model, update).backward()
    opt.step()


def scaled(model: nn.Module, opt: Any, update: int) -> None:
    opt.zero_grad()
    (loss_of(model, update) * 2.0**16).backward()
    for param in model.parameters():
        assert param.grad is not None
        param.grad /= 2.0**16
    opt.step()


def interrupted(model: nn.Module, opt: Any, update: int) -> None:
    """A step that is skipped, as after an overflow."""
    if update % 3 == 0:
        opt.zero_grad()
        (loss_of(model, 10 * update + 1) * 1e3).backward()
    plain(model, opt, update)


def differentiated(model: nn.Module, opt: Any, update: int) -> None:
    """Other gradients are computed in between, which accumulate nothing."""
    opt.zero_grad()
    torch.autograd.grad(1000 * loss_of(model, 10 * update + 1), list(model.parameters()))
    loss_of(model, update).backward()
    torch.autograd.grad(1000 * loss_of(model, 10 * update + 2), list(model.parameters()))
    opt.step()


def penalised(model: nn.Module, opt: Any, update: int) -> None:
    """A penalty on the gradient of the inputs: weights have a gradient by two ways."""
    opt.zero_grad()
    inputs = batch(update).requires_grad_()
    output = model(inputs)
    (gradient,) = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
    ((output - 1).square().mean() + gradient.square().mean()).backward()
    opt.step()


def checkpointed(reentrant: bool) -> Callable[[nn.Module, Any, int], None]:
    def run(model: nn.Module, opt: Any, update: int) -> None:
        opt.zero_grad()
        inputs = batch(update).requires_grad_()
        output = checkpoint(model, inputs, use_reentrant=reentrant)
        assert output is not None
        (output - 1).square().mean().backward()
        opt.step()

    return run


def by_closure(model: nn.Module, opt: Any, update: int) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model, update)
        loss.backward()
        return loss

    opt.step(closure)


def clipped(model: nn.Module, opt: Any, update: int) -> None:
    opt.zero_grad()
    loss_of(model, update).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e9)  # in place, by a factor of 1
    opt.step()


LOOPS: dict[str, Callable[[nn.Module, Any, int], None]] = {
    "plain": plain,
    "accumulated": accumulated,
    "dropped, None": restarted(True),
    "dropped, zeros": restarted(False),
    "scaled": scaled,
    "interrupted": interrupted,
    "differentiated": differentiated,
    "penalised": penalised,
    "checkpointed": checkpointed(False),
    "checkpointed, reentrant": checkpointed(True),
    "closure": by_closure,
    "clipped": clipped,
}


class Repeated(nn.Module):
    """A layer that is used twice, and one that every other batch uses."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(36, 36)
        self.rarely = nn.Linear(36, 36)
        self.turn = 0

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.twice(images.flatten(1)))
        hidden = torch.tanh(self.twice(hidden + 0.1))
        self.turn += 1
        return self.rarely(hidden) if self.turn % 2 else hidden


class TestGradients:
    """Masked layers keep the dense gradient, sparse ones record their passes."""

    @pytest.mark.parametrize("every", [1, 2])
    @pytest.mark.parametrize("loop", LOOPS)
    def test_loops(self, loop: str, every: int) -> None:
        method, models = RigL(fraction=0.3, regrow=False), []
        for sparse in (False, True):
            model, opt = two_layers(method, sparse=sparse, refresh_every=every)
            start = topkast.masks(opt)["3.weight"].forward.clone()
            for update in range(5):
                LOOPS[loop](model, opt, update)
            assert not torch.equal(topkast.masks(opt)["3.weight"].forward, start)
            models.append(opt)
        assert_agree(models[0], models[1], 1e-9)

    @pytest.mark.parametrize("name", ["rigl, others", "gse", "granet"])
    def test_accumulation_in_other_methods(self, name: str) -> None:
        opts = []
        for sparse in (False, True):
            model, opt = two_layers(CASES[name], sparse=sparse, refresh_every=2)
            for update in range(8):
                accumulated(model, opt, update)
            opts.append(opt)
        assert_agree(opts[0], opts[1], 1e-9)

    @pytest.mark.parametrize("set_to_none", [True, False])
    @pytest.mark.parametrize("every", [1, 2, 3])
    def test_layers_used_twice_or_not_at_all(self, every: int, set_to_none: bool) -> None:
        """A layer without a gradient keeps its sets; one with zeros grows by hash."""
        opts = []
        for sparse in (False, True):
            torch.manual_seed(0)
            model = Repeated().double()
            inner = torch.optim.SGD(model.named_parameters(), 0.1, momentum=0.9)
            opt = topkast.wrap_optimizer(inner, **options_of(RigL(), refresh_every=every))
            if sparse:
                topkast.sparsify(model, opt)
            for update in range(6):
                opt.zero_grad(set_to_none=set_to_none)
                loss_of(model, update).backward()
                before = topkast.masks(opt)["rarely.weight"].forward.clone()
                unused = model.rarely.bias.grad is None
                opt.step()
                if unused:
                    assert torch.equal(topkast.masks(opt)["rarely.weight"].forward, before)
            opts.append(opt)
        assert_agree(opts[0], opts[1], 1e-9)

    @pytest.mark.parametrize("sparse", [False, True])
    def test_frozen_layers_keep_their_sets(self, sparse: bool) -> None:
        model, opt = two_layers(RigL(), sparse=sparse, refresh_every=1)
        for param in list(model.parameters())[:2]:
            param.requires_grad_(False)
        before = topkast.dense_params(opt)["0.weight"].clone()
        for update in range(3):
            plain(model, opt, update)
        assert torch.equal(topkast.dense_params(opt)["0.weight"], before)

    def test_growth_by_the_dense_gradient(self) -> None:
        """By hand: the two largest gradients outside A enter for the two smallest weights."""
        weight = torch.tensor([[4.0, 0.1, 0, 0], [0.2, 3, 0, 0]])
        inputs = torch.tensor([[1.0, 1, 5, 2], [1, 1, 5, 2]])
        target = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        for sparse in (False, True):
            layer = nn.Linear(4, 2, bias=False)
            model = nn.Sequential(layer)
            with torch.no_grad():
                layer.weight.copy_(weight)
            inner = torch.optim.SGD(model.named_parameters(), 1e-3)
            method = RigL(fraction=0.5)
            opt = topkast.wrap_optimizer(inner, fwd=0.5, bwd=0.5, method=method, refresh_every=1)
            state = opt.state_dict()
            state["state"][0]["topkast"]["indices"] = torch.tensor([0, 1, 4, 5], dtype=torch.int32)
            state["state"][0]["topkast"]["values"] = torch.tensor([4.0, 0.1, 0.2, 3.0])
            opt.load_state_dict(state)
            if sparse:
                topkast.sparsify(model, opt)
            # Outputs are 4.1 and 3.2: errors 4.1 and 2.2, so that gradients of row 0 are larger.
            (model(inputs) - target).square().mean().backward()
            opt.step()
            forward = topkast.masks(opt)["0.weight"].forward
            expected = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
            assert torch.equal(forward, expected)
            assert int((dict(topkast.dense_params(opt))["0.weight"] != 0).sum()) == 2

    def test_masked_gradients_are_dense_before_refreshes_only(self) -> None:
        model, opt = two_layers(RigL(), sparse=False, refresh_every=3)
        for update in range(7):
            opt.zero_grad()
            loss_of(model, update).backward()
            for name, mask in topkast.masks(opt).items():
                grad = dict(model.named_parameters())[name].grad
                assert grad is not None
                outside = grad[~mask.backward]
                assert bool(outside.any()) == (update % 3 == 2)
            opt.step()

    @pytest.mark.parametrize("every", [1, 3])
    def test_recorded_passes_are_dropped(self, every: int) -> None:
        """At the end of the step, before gradients are zeroed."""
        model, opt = two_layers(RigL(), sparse=True, refresh_every=every)
        layers: Any = model
        references: list[weakref.ref[Tensor]] = []
        for update in range(7):
            opt.zero_grad()
            loss_of(model, update).backward()
            for layer in (layers[0], layers[3]):
                assert (layer.recording is None) == (update % every != every - 1)
                if layer.recording is not None:
                    ((x, grad_output),) = layer.recording.passes_in(layer.values.grad)
                    references += [weakref.ref(x), weakref.ref(grad_output)]
                    del x, grad_output
            opt.step()
            assert all(reference() is None for reference in references)
        assert len(references) == 4 * (7 // every)

    def test_blocks_of_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Blocks that end inside groups of a convolution lead to the same sets."""
        opts = []
        for entries in (1 << 22, 200, 1):
            monkeypatch.setattr("topkast_torch.execution._recorded._BLOCK", entries)
            model, opt = two_layers(RigL(), sparse=True, refresh_every=1)
            for update in range(3):
                plain(model, opt, update)
            opts.append(opt)
        for opt in opts[1:]:
            assert_agree(opts[0], opt, 1e-9)

    @pytest.mark.parametrize(
        "settings",
        [
            {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
            {"kernel_size": (1, 3), "padding": (0, 2), "dilation": (1, 2)},
            {"kernel_size": 2, "stride": (2, 3), "padding": 1, "groups": 4},
            {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
            {"kernel_size": (2, 3), "padding": "same", "dilation": 2},
        ],
        ids=str,
    )
    def test_convolutions(self, settings: dict[str, Any]) -> None:
        opts = []
        for sparse in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(8, 12, **settings)).double()
            inner = torch.optim.SGD(model.named_parameters(), 0.1)
            opt = topkast.wrap_optimizer(inner, **options_of(RigL(fraction=0.6), refresh_every=1))
            if sparse:
                topkast.sparsify(model, opt)
            for update in range(4):
                opt.zero_grad()
                torch.manual_seed(update)
                model(torch.randn(3, 8, 7, 8, dtype=torch.float64)).square().mean().backward()
                opt.step()
            opts.append(opt)
        assert_agree(opts[0], opts[1], 1e-9)

    def test_clipping_does_not_change_what_is_grown(self) -> None:
        forwards = []
        for limit, sparse in itertools.product((1e-4, None), (False, True)):
            model, opt = two_layers(
                RigL(),
                sparse=sparse,
                refresh_every=1,
                optimizer=lambda params: torch.optim.SGD(params, 1e-9),
            )
            loss_of(model, 0).backward()
            if limit is not None:
                nn.utils.clip_grad_norm_(model.parameters(), limit)
            opt.step()
            forwards.append(topkast.masks(opt)["3.weight"].forward)
        assert all(torch.equal(forward, forwards[0]) for forward in forwards)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("name", ["rigl", "set, signed", "gse", "granet", "acdc", "iht"])
    def test_masked_dtypes(self, name: str, dtype: torch.dtype) -> None:
        method = CASES[name]
        torch.manual_seed(0)
        layer = nn.Linear(30, 20, bias=False).to(dtype)
        inner = torch.optim.SGD([("w", layer.weight)], 0.01, momentum=0.9)
        opt = topkast.wrap_optimizer(inner, **options_of(method))
        for update in range(8):
            opt.zero_grad()
            layer(PROBLEMS["linear"].batch(update).to(dtype)).square().mean().backward()
            opt.step()
            masks = topkast.masks(opt)["w"]
            assert int(masks.forward.sum()) == expected_count(method, 600, update + 1)
            assert layer.weight.dtype == dtype
            assert not layer.weight[~masks.forward].any()


class TestSwitches:
    """Sparse execution that begins in the middle of training."""

    @pytest.mark.parametrize("name", ["rigl", "set", "granet", "gradual pruning", "acdc"])
    @pytest.mark.parametrize("start", [2, 3, 4])
    def test_sparsify_in_the_middle(self, name: str, start: int) -> None:
        opts = []
        for sparse in (False, True):
            model, opt = two_layers(CASES[name], sparse=False)
            for update in range(10):
                if sparse and update == start:
                    topkast.sparsify(model, opt)
                plain(model, opt, update)
            opts.append(opt)
        assert_agree(opts[0], opts[1], 1e-9)

    def test_sparsify_between_backward_and_a_due_step(self) -> None:
        """The gradient outside B is lost: the step is refused, and nothing has moved."""
        model, opt = two_layers(RigL(), sparse=False)
        for update in range(3):
            plain(model, opt, update)
        opt.zero_grad()
        loss_of(model, 3).backward()
        topkast.sparsify(model, opt)
        before = [param.detach().clone() for param in model.parameters()]
        with pytest.raises(MismatchError, match=r"0\.weight recorded no .* RigL .* Run a new one"):
            opt.step()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        self.assert_continues(model, opt)

    @pytest.mark.parametrize("sparse", [False, True])
    def test_an_interval_that_changes_between_backward_and_step(self, sparse: bool) -> None:
        model, opt = two_layers(RigL(), sparse=sparse)
        plain(model, opt, 0)
        plain(model, opt, 1)
        opt.zero_grad()
        loss_of(model, 2).backward()
        opt.param_groups[0]["refresh_every"] = 3
        before = [param.detach().clone() for param in model.parameters()]
        with pytest.raises(MismatchError, match="outside B"):
            opt.step()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        self.assert_continues(model, opt)

    @pytest.mark.parametrize("sparse", [False, True])
    @pytest.mark.parametrize("every", [2, 3])
    def test_an_interval_that_changes_before_the_gradient_is_zeroed(
        self, every: int, sparse: bool
    ) -> None:
        model, opt = two_layers(RigL(), sparse=sparse, refresh_every=2)
        for update in range(2):
            plain(model, opt, update)
        start = topkast.masks(opt)["3.weight"].forward.clone()
        opt.param_groups[0]["refresh_every"] = every
        plain(model, opt, 2)
        assert torch.equal(topkast.masks(opt)["3.weight"].forward, start) == (every == 2)
        opt.param_groups[0]["refresh_every"] = 0
        opt.zero_grad()
        with pytest.raises(topkast.OptionError, match="refresh_every must be an integer"):
            opt.step()

    @staticmethod
    def assert_continues(model: nn.Module, opt: Any) -> None:
        start = topkast.masks(opt)["3.weight"].forward.clone()
        plain(model, opt, 3)
        assert not torch.equal(topkast.masks(opt)["3.weight"].forward, start)

    def test_densify_and_unwrap(self) -> None:
        """Nothing of the recording is left behind."""
        for end in (lambda model, _: topkast.densify(model), lambda _, opt: topkast.unwrap(opt)):
            model, opt = two_layers(RigL(), sparse=True, refresh_every=1)
            plain(model, opt, 0)
            loss_of(model, 1).backward()
            end(model, opt)
            loss_of(model, 2).backward()
            for module in model.modules():
                assert getattr(module, "recording", None) is None

    def test_overrides_and_groups(self) -> None:
        """Methods of single tensors and of groups, in both executions."""
        opts = []
        for sparse in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Linear(36, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 12)
            ).double()
            named = list(model.named_parameters())
            groups: list[Any] = [
                {"params": named[:4]},
                {"params": named[4:], "method": GraNet(start=0, end=6), "bwd": 0.0},
            ]
            opt = topkast.wrap_optimizer(
                torch.optim.AdamW(groups, 0.02),
                fwd=0.8,
                bwd=0.5,
                overrides={"0.weight": {"method": RigL(), "bwd": 0.8, "penalty": 0.0}},
                refresh_every=2,
            )
            if sparse:
                topkast.sparsify(model, opt)
            for update in range(8):
                opt.zero_grad()
                (model(batch(update).flatten(1)) - 1).square().mean().backward()
                opt.step()
            masks = topkast.masks(opt)
            counts = [[int(mask.sum()) for mask in masks[key]] for key in masks]
            assert counts == [[144, 144], [80, 200], [48, 240]]
            opts.append(opt)
        assert_agree(opts[0], opts[1], 1e-9)

    @pytest.mark.parametrize("name", ["rigl", "granet", "gradual pruning", "set"])
    def test_averages(self, name: str) -> None:
        """An average has as many weights as A now, its largest."""
        model, opt = two_layers(CASES[name], sparse=False, refresh_every=2)
        average = topkast_torch.WeightAverage(opt, decay=0.5)
        for update in range(5):
            plain(model, opt, update)
            average.update()
        dense, views = average.dense_params(), average.forward_params()
        for key, mask in topkast.masks(opt).items():
            count = int(mask.forward.sum())
            largest = set(dense[key].abs().flatten().topk(count).indices.tolist())
            assert set(views[key].flatten().nonzero().flatten().tolist()) == largest


class TestNonFinite:
    @staticmethod
    def make(sparse: bool) -> tuple[nn.Module, Any, list[int]]:
        """A layer, and the inputs that A does not read."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 4, bias=False))
        inner = torch.optim.SGD(model.named_parameters(), 0.01)
        method = RigL(fraction=0.5, regrow=False)
        opt = topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.9, method=method, refresh_every=2)
        if sparse:
            topkast.sparsify(model, opt)
        forward = topkast.masks(opt)["0.weight"].forward
        return model, opt, (~forward.any(0)).nonzero().flatten().tolist()

    @pytest.mark.parametrize("sparse", [False, True])
    def test_gradient_outside_of_b(self, sparse: bool) -> None:
        """It is refused by name; the next step, with another gradient, grows by that one."""
        model, opt, unread = self.make(sparse)
        layer: Any = model[0]  # type: ignore[index]
        inputs = torch.linspace(-1, 1, 150).view(5, 30)
        layer_inputs = inputs.clone()
        model(inputs).sum().backward()
        opt.step()
        before = topkast.masks(opt)["0.weight"].forward.clone()
        opt.zero_grad()
        if sparse:
            layer_inputs[:, unread[0]] = math.nan
            model(layer_inputs).sum().backward()
        else:
            model(inputs).sum().backward()
            layer.weight.grad[:, unread[0]] = math.nan
        with pytest.raises(NonFiniteError, match=r"0\.weight: 4 of 120 entries are NaN"):
            opt.step()
        assert torch.equal(topkast.masks(opt)["0.weight"].forward, before)
        opt.zero_grad()
        inputs = torch.where(
            torch.arange(30) == unread[0], 100.0, inputs
        )  # its gradient is largest
        model(inputs).sum().backward()
        opt.step()
        after = topkast.masks(opt)["0.weight"].forward
        assert after[:, unread[0]].all()
        assert int(after.sum()) == 12

    @pytest.mark.parametrize("sparse", [False, True])
    @pytest.mark.parametrize("renew", [True, False])
    def test_weights(self, renew: bool, sparse: bool) -> None:
        """After a repair, step may be called with the same gradient or with a new one."""
        model, opt, _ = self.make(sparse)
        inputs = torch.linspace(-1, 1, 150).view(5, 30)
        model(inputs).sum().backward()
        opt.step()
        before = topkast.masks(opt)["0.weight"].forward.clone()
        opt.zero_grad()
        model(inputs).sum().backward()
        param = next(model.parameters())
        with torch.no_grad():
            values = param.detach().clone()
            position = values.flatten().nonzero()[0]
            param.view(-1)[position] = math.nan
        with pytest.raises(NonFiniteError, match=r"0\.weight: 1 of 12 entries .* call step again"):
            opt.step()
        with torch.no_grad():
            param.view(-1)[position] = 0.5
        if renew:
            opt.zero_grad()
            model(inputs).sum().backward()
        opt.step()
        after = topkast.masks(opt)["0.weight"].forward
        assert int((after & ~before).sum()) == 6

    def test_functional(self) -> None:
        params = {"w": np.linspace(-1, 1, 40).reshape(5, 8)}
        tx = topkast.wrap_optimizer(topkast.SGD(0.1), **options_of(RigL(), refresh_every=1))
        state = tx.init(params)
        gradient = np.ones((5, 8))
        outside = np.setdiff1d(np.arange(40), state.supports["w"].indices)
        gradient.reshape(-1)[outside[0]] = math.inf
        with pytest.raises(NonFiniteError, match="w: 1 of 40 entries"):
            tx.step({"w": gradient}, state, params)

    def test_gradients_written_by_hand(self) -> None:
        model, opt = two_layers(RigL(), sparse=True, refresh_every=1)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        with pytest.raises(MismatchError, match=r"recorded no backward pass, but RigL .* by hand"):
            opt.step()


class TestOtherForms:
    def test_snip(self) -> None:
        """The same sensitivities in every form; the sets never change."""
        problem = PROBLEMS["linear"]
        weight = problem.weight()
        view = weight.clone().requires_grad_()
        problem.loss(problem.apply(problem.batch(0), view)).backward()
        assert view.grad is not None
        product = view.grad * weight
        largest = set(product.abs().flatten().topk(120).indices.tolist())
        for sparse in (False, True):
            method = SNIP({"0.weight": product})
            model, opt = make_torch(method, problem, OPTIMIZERS["sgd"][0], sparse=sparse)
            for update in range(4):
                forward = topkast.masks(opt)["0.weight"].forward
                assert set(np.flatnonzero(forward).tolist()) == largest
                step_torch(model, opt, problem, update)
        params = {"layer": {"kernel": jnp.asarray(weight.numpy())}}
        for key in topkast.masks(
            topkast.wrap_optimizer(optax.sgd(0.1), fwd=FWD, bwd=FWD).init(params), params
        ):
            method = SNIP({key: jnp.asarray(product.numpy())})
            tx = topkast.wrap_optimizer(optax.sgd(0.1), fwd=FWD, bwd=FWD, method=method)
            forward = topkast.masks(tx.init(params), params)[key].forward
            assert set(np.flatnonzero(forward).tolist()) == largest

    def test_updates_of_another_dtype(self) -> None:
        """In optax, updates may be wider than the weights that they set to zero."""
        tx = topkast.wrap_optimizer(
            optax.adam(1e-2, mu_dtype=jnp.float32), **options_of(RigL(), refresh_every=1)
        )
        params = {"w": jnp.linspace(-1, 1, 600, dtype=jnp.bfloat16).reshape(20, 30)}
        state = tx.init(params)
        for number in range(3):
            grads = {"w": jax.random.normal(jax.random.key(number), (20, 30), jnp.bfloat16)}
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
            assert int(jnp.count_nonzero(params["w"])) <= 120
        assert params["w"].dtype == jnp.bfloat16

    @pytest.mark.parametrize("name", FORGETTING)
    def test_updates_and_steps_agree(self, name: str) -> None:
        """`update` plus `apply_updates` is `step`, and leaves exact zeros outside A."""
        options = options_of(CASES[name])
        tx = topkast.wrap_optimizer(topkast.AdamW(0.01), **options)
        params: Any = {"w": PROBLEMS["linear"].weight().numpy().astype(np.float32)}
        state = tx.init(params)
        other, other_state = params, state
        for number in range(10):
            grads = {"w": np.random.default_rng(number).standard_normal((20, 30), np.float32)}
            params, state = tx.step(grads, state, params)
            updates, other_state = tx.update(grads, other_state, other)
            other = topkast.apply_updates(other, updates)
            np.testing.assert_array_equal(params["w"], other["w"])
            np.testing.assert_array_equal(
                state.supports["w"].indices, other_state.supports["w"].indices
            )

    def test_defaults_of_methods(self) -> None:
        layer = nn.Linear(30, 20, bias=False)
        for method, every, penalty in [(RigL(), 100, 0.0), (ITOP(), 4000, 0.0), (None, 1, 1e-4)]:
            inner = torch.optim.SGD([("w", layer.weight)], 0.1)
            opt = topkast.wrap_optimizer(inner, fwd=FWD, bwd=FWD, method=method)
            group = opt.param_groups[0]
            assert (group["refresh_every"], group["penalty"]) == (every, penalty)
            topkast.unwrap(opt)


def test_processes(tmp_path: Path) -> None:
    """Masked layers grow by the mean gradient; sparse ones would each grow by their own."""
    spawn(rival_replica.run, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for name in ("rigl", "set"):
        (theta, masks), (other, others) = first[name], second[name]
        for key, weight in theta.items():
            assert torch.equal(weight, other[key]), (name, key)
        for key, mask in masks.items():
            assert torch.equal(mask.forward, others[key].forward), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["set", "rigl", "gse", "granet"])
def test_large_layers(name: str) -> None:
    """Two million weights: several blocks of the gradient."""
    opts = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3000, 2000, bias=False)).double()
        inner = torch.optim.SGD(model.named_parameters(), 0.1)
        opt = topkast.wrap_optimizer(inner, **options_of(CASES[name]) | {"refresh_every": 1})
        if sparse:
            topkast.sparsify(model, opt)
        for update in range(3):
            opt.zero_grad()
            torch.manual_seed(update)
            model(torch.randn(8, 3000, dtype=torch.float64)).square().mean().backward()
            opt.step()
        opts.append(opt)
    assert_agree(opts[0], opts[1], 1e-9)
