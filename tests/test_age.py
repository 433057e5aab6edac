"""Under optimizers of the Adam family, entrants move like new parameters under Adam."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from libraries import Library, host
from torch import nn

import topkast
from topkast import reference
from topkast._age import SETTLED, corrections, grow, kappa, scale_young, young_limit
from topkast.adapter import Migration

BETAS = (0.9, 0.999)


def displacement_range(
    is_scaled: bool, steps: int = 2000, entered: int = 10_000
) -> tuple[float, float]:
    """Largest and smallest displacement of an entrant under a constant gradient, in lr."""
    mean = square = 0.0
    ratios = []
    for age in range(1, steps + 1):
        mean, square = 0.9 * mean + 0.1, 0.999 * square + 0.001
        count = entered + age
        step = mean / (1 - 0.9**count) / np.sqrt(square / (1 - 0.999**count))
        if is_scaled:
            ages = np.asarray([age - 1], np.int16)
            step = float(scale_young(np.asarray([step]), ages, np.asarray(count), BETAS)[0])
        ratios.append(step)
    return max(ratios), min(ratios)


def test_an_entrant_moves_by_the_learning_rate() -> None:
    assert displacement_range(is_scaled=False)[0] == pytest.approx(6.57, abs=0.01)
    assert displacement_range(is_scaled=True) == pytest.approx((1.0, 1.0), abs=1e-3)


def test_settled_entries_keep_their_bits(library: Library, rng: np.random.Generator) -> None:
    steps = rng.standard_normal(6).astype(np.float32)
    ages = np.asarray([0, 5, 9_999, 10_000, 20_000, SETTLED], np.int16)
    scaled = host(
        scale_young(
            library.asarray(steps),
            library.asarray(ages),
            library.asarray(np.asarray(12_000)),
            BETAS,
        )
    )
    assert scaled.dtype == np.float32
    assert scaled[3:].tobytes() == steps[3:].tobytes()
    factors = kappa(ages[:3].astype(np.float64) + 1, BETAS) / kappa(np.asarray(12_000.0), BETAS)
    np.testing.assert_allclose(scaled[:3], steps[:3] * factors, rtol=1e-6)


def test_ages_saturate(library: Library) -> None:
    ages = library.asarray(np.asarray([0, 7, SETTLED - 1, SETTLED], np.int16))
    assert host(grow(ages)).tolist() == [1, 8, SETTLED, SETTLED]
    assert host(grow(ages)).dtype == np.int16


def test_corrections_equal_adams() -> None:
    table = corrections(BETAS)
    assert len(table) == young_limit(BETAS) + 1 == 10_001
    for count in (1, 12, 500, 10_000):
        assert table[count] == pytest.approx(np.sqrt(1 - 0.999**count) / (1 - 0.9**count))
    assert corrections((0.0, 0.5))[1] == pytest.approx(np.sqrt(0.5))


# In each framework, one tensor whose set B changes at every refresh shows how entrants move.

REFRESH, UPDATES = 20, 81
SHAPE = (12, 20)


def gradient(update: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(update)
    return np.random.default_rng(0).choice([-1.0, 1.0], SHAPE) * rng.uniform(0.5, 1.5, SHAPE)


def start() -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).standard_normal(SHAPE)


OPTIONS: dict[str, Any] = {
    "fwd": 0.9,
    "bwd": 0.7,
    "refresh_every": REFRESH,
    "penalty": 0.0,
    "explore": "random",
}


class TorchRun:
    def __init__(self, build: Any, sparse: bool, **options: Any) -> None:
        self.layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False).double()
        with torch.no_grad():
            self.layer.weight.copy_(torch.from_numpy(start()))
        self.opt: Any = topkast.wrap_optimizer(build(self.layer.parameters()), **OPTIONS | options)
        self.sparse = sparse
        if sparse:
            topkast.sparsify(self.layer, self.opt)

    def step(self, update: int) -> None:
        grad = torch.from_numpy(gradient(update))
        if self.sparse:
            layer: Any = self.layer
            layer.values.grad = grad.reshape(-1)[layer.indices].view(layer.values.shape)
        else:
            self.layer.weight.grad = grad
        self.opt.step()

    def theta(self) -> Any:
        return topkast.dense_params(self.opt)["0.0"].numpy()

    def backward(self) -> Any:
        return topkast.masks(self.opt)["0.0"].backward.numpy()


class FunctionalRun:
    def __init__(self, rule: Any, asarray: Any, jit: Any = lambda f: f, **options: Any) -> None:
        self.tx = topkast.wrap_optimizer(rule, **OPTIONS | options)
        self.asarray, self.run = asarray, jit(self.tx.step)
        self.params = {"0.0": asarray(start())}
        self.state = self.tx.init(self.params)

    def step(self, update: int) -> None:
        grads = {"0.0": self.asarray(gradient(update))}
        self.params, self.state = self.run(grads, self.state, self.params)

    def theta(self) -> Any:
        return np.asarray(host(self.params)["0.0"])

    def backward(self) -> Any:
        return np.asarray(host(topkast.masks(self.state, self.params))["0.0"].backward)


def torch_adam(params: Any) -> Any:
    return torch.optim.Adam(params, 1e-3)


RUNS: dict[str, Any] = {
    "masked": lambda: TorchRun(torch_adam, False),
    "sparse": lambda: TorchRun(torch_adam, True),
    "masked fused": lambda: TorchRun(lambda p: torch.optim.Adam(p, 1e-3, fused=True), False),
    "masked adamw": lambda: TorchRun(lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.0), False),
    "masked nadam": lambda: TorchRun(lambda p: torch.optim.NAdam(p, 1e-3), False),
    "masked radam": lambda: TorchRun(lambda p: torch.optim.RAdam(p, 1e-3), False),
    "numpy": lambda: FunctionalRun(topkast.Adam(1e-3), np.array),
    "torch arrays": lambda: FunctionalRun(topkast.Adam(1e-3), torch.from_numpy),
    "optax": lambda: FunctionalRun(optax.adam(1e-3), jnp.asarray),
    "optax jit": lambda: FunctionalRun(optax.adam(1e-3), jnp.asarray, jax.jit),
    "optax hyperparams": lambda: FunctionalRun(
        optax.inject_hyperparams(optax.adam)(1e-3), jnp.asarray, jax.jit
    ),
    "optax chain": lambda: FunctionalRun(
        optax.chain(optax.clip_by_global_norm(1e9), optax.scale_by_adam(), optax.scale(-1e-3)),
        jnp.asarray,
        jax.jit,
    ),
}


def displacements(run: Any) -> tuple[float, float]:
    """Largest displacement of entries that entered B late, and of settled entries."""
    first = run.backward()
    entered = np.zeros(SHAPE, bool)
    late, settled = 0.0, 0.0
    for update in range(1, UPDATES):
        inside, before = run.backward(), run.theta()
        run.step(update)
        moved = np.abs(run.theta() - before)
        if update > REFRESH:
            entered |= inside & ~first
            late = max(late, float(moved[inside & entered].max(initial=0)))
            settled = max(settled, float(moved[inside & ~entered].max(initial=0)))
    return late, settled


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "optax chain" else name
        for name in RUNS
    ],
)
def test_entrants_move_no_further_than_new_weights(name: str, x64: None) -> None:
    late, settled = displacements(RUNS[name]())
    assert 0.5 * settled < late < 1.3 * settled


def test_without_scaling_entrants_move_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that the test above fails if nothing is scaled."""
    monkeypatch.setattr("topkast._age.young_limit", lambda betas: 0)
    late, _ = displacements(FunctionalRun(topkast.Adam(1e-3), np.array))
    monkeypatch.undo()
    _, settled = displacements(FunctionalRun(topkast.Adam(1e-3), np.array))
    assert late > 1.5 * settled  # `late` includes entrants that have settled since


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, 1e-3),
        lambda p: torch.optim.Adamax(p, 1e-3),
        lambda p: torch.optim.Adagrad(p, 1e-3),
    ],
    ids=["SGD", "RMSprop", "Adamax", "Adagrad"],
)
def test_optimizers_without_bias_correction_of_the_square_have_no_ages(build: Any) -> None:
    run = TorchRun(build, False)
    (execution,) = run.opt._wrapper_state.executions
    assert execution.young is None


@pytest.mark.parametrize(
    "betas", [(0.9, 0.95), (0.9, 0.98), (0.95, 0.999), (0.95, 0.9999), (0.8, 0.8), (0.0, 0.999)]
)
def test_every_pair_of_betas_has_ages(betas: tuple[float, float]) -> None:
    """Under (0.95, 0.999) entrants would move 4.6 learning rates, yet few in a short trial."""
    run = TorchRun(lambda params: torch.optim.Adam(params, 1e-3, betas=betas), False)
    (execution,) = run.opt._wrapper_state.executions
    assert execution.profile.traits.betas == betas
    for rule in (topkast.Adam(1e-3, betas=betas), optax.adam(1e-3, *betas)):
        params = {"w": start()} if isinstance(rule, topkast.Adam) else {"w": jnp.asarray(start())}
        state = topkast.wrap_optimizer(rule, fwd=0.9, bwd=0.8).init(params)
        assert list(state.ages) == ["w"]


@pytest.mark.parametrize(("lr", "decay"), [(1.0, 0.01), (0.1, 0.1), (1e-3, 10.0)])
def test_decay_does_not_hide_a_bias_correction(lr: float, decay: float) -> None:
    """A learning rate of 1 is usual under a `LambdaLR` that computes the real one."""
    run = TorchRun(lambda params: torch.optim.AdamW(params, lr, weight_decay=decay), False)
    (execution,) = run.opt._wrapper_state.executions
    assert execution.profile.traits.betas == BETAS
    for rule in (topkast.AdamW(lr, weight_decay=decay), optax.adamw(lr, weight_decay=decay)):
        params = {"w": start() if isinstance(rule, topkast.AdamW) else jnp.asarray(start())}
        state = topkast.wrap_optimizer(rule, fwd=0.9, bwd=0.8).init(params)
        assert list(state.ages) == ["w"]


def test_lion_has_betas_and_no_ages() -> None:
    """Its betas belong to no bias correction, so scaling would be wrong."""
    tx = topkast.wrap_optimizer(optax.lion(1e-3), fwd=0.9, bwd=0.8)
    assert tx.init({"w": jnp.asarray(start())}).ages == {}


def test_copies_of_the_weight_are_scaled_with_it(x64: None) -> None:
    """Schedule-free optimizers move z, and the weight follows it."""
    tx = topkast.wrap_optimizer(optax.contrib.schedule_free_adamw(1e-3), **OPTIONS)
    params = {"w": jnp.asarray(start())}
    state = tx.init(params)
    assert list(state.ages) == ["w"]
    step = jax.jit(tx.step)
    largest = 0.0
    for update in range(1, UPDATES):
        before = host(params["w"])
        params, state = step({"w": jnp.asarray(gradient(update))}, state, params)
        if update > REFRESH:
            largest = max(largest, float(np.abs(host(params["w"]) - before).max()))
    assert largest < 2e-3  # 31 times as much without


class TestState:
    def test_ages_are_two_bytes_an_entry(self) -> None:
        run = TorchRun(torch_adam, False)
        (execution,) = run.opt._wrapper_state.executions
        ages = execution.young.ages
        assert (ages.dtype, ages.shape) == (torch.int16, execution.support.indices.shape)

    def test_ages_after_many_updates(self) -> None:
        """They are counted from a time that moves on before an int16 would overflow."""
        run = TorchRun(torch_adam, False)
        (execution,) = run.opt._wrapper_state.executions
        young, group = execution.young, run.opt.param_groups[0]
        rng = np.random.default_rng(0)
        expected = host(young.current_ages()).astype(int)
        for updates in (1, 7, 16_000, 30_000, 400, 3, 16_383, 1, 20_000, 5):
            for _ in range(updates):
                young.count_step()
            expected = np.minimum(expected + updates, SETTLED)
            np.testing.assert_array_equal(host(young.current_ages()), expected)
            source = rng.integers(0, len(expected), len(expected)).astype(np.int32)
            survives = rng.random(len(expected)) < 0.8
            young.migrate(Migration(torch.from_numpy(source), torch.from_numpy(survives)), group)
            expected = np.where(survives, expected[source], 0)
            np.testing.assert_array_equal(host(young.current_ages()), expected)

    @pytest.mark.parametrize("sparse", [False, True])
    def test_ages_are_saved_loaded_and_copied(self, sparse: bool) -> None:
        run = TorchRun(torch_adam, sparse)
        for update in range(1, 2 * REFRESH + 5):
            run.step(update)
        saved = run.opt.state_dict()
        ages = saved["state"][0]["topkast"]["ages"]
        assert {int(age) for age in ages} == {4, SETTLED} | {REFRESH + 4} & set(ages.tolist())
        other = TorchRun(torch_adam, sparse)
        other.opt.load_state_dict(saved)
        duplicate = copy.deepcopy(run)
        for update in range(2 * REFRESH + 5, 3 * REFRESH + 9):
            for each in (run, other, duplicate):
                each.step(update)
        np.testing.assert_array_equal(run.theta(), other.theta())
        np.testing.assert_array_equal(run.theta(), duplicate.theta())

    def test_masked_and_sparse_agree_over_refreshes(self) -> None:
        masked, sparse = TorchRun(torch_adam, False), TorchRun(torch_adam, True)
        for update in range(1, UPDATES):
            masked.step(update)
            sparse.step(update)
        np.testing.assert_array_equal(masked.theta(), sparse.theta())

    def test_wrapping_after_dense_steps_counts_them(self) -> None:
        layer = nn.Linear(20, 12, bias=False)
        inner = torch.optim.Adam(layer.parameters())
        for update in range(1, 31):
            layer.weight.grad = torch.from_numpy(gradient(update)).float()
            inner.step()
        opt = topkast.wrap_optimizer(inner, **OPTIONS)
        (execution,) = opt._wrapper_state.executions
        assert execution.steps == 30

    def test_a_schedule_of_betas_is_followed(self) -> None:
        run = TorchRun(torch_adam, False)
        for update in range(1, UPDATES):
            run.opt.param_groups[0]["betas"] = (0.85 + 0.1 * (update % 2), 0.999)
            run.step(update)
        assert np.isfinite(run.theta()).all()


def test_reference_counts_ages() -> None:
    """Entries that never left B are as old as the run."""
    rule = reference.AdamW(1e-3, weight_decay=0.0)
    layer = reference.TopKAST(start(), rule, fwd=0.9, bwd=0.7, refresh_every=10)
    for update in range(1, 25):
        layer.step(gradient(update))
    assert layer.age[layer.backward].max() == 24
    assert set(np.unique(layer.age[layer.backward])) <= {4, 14, 24}
