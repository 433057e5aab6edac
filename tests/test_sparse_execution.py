"""Sparse layers agree with masked ones, and allocate nothing as large as a dense weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import topkast_torch
import torch
from sparse_training import CASES, assert_agree, prepare, train
from topkast_torch.sparse import _sparse_layer, _sparsify
from torch import Tensor, nn

import topkast
from topkast.methods import Mixed, Static


def slow_but_for_adamw(case: Any) -> list[Any]:
    """One case with each rule: by default all with AdamW in float64, the first with SGD too."""
    (model, options), marks = (case.values, case.marks) if hasattr(case, "marks") else (case, ())
    is_first = (model, options) == CASES[0]
    rules = [("adamw", torch.float64), ("sgd", torch.float32)]
    rules += [("adamw", torch.float32), ("sgd", torch.float64)]
    return [
        pytest.param(
            model,
            options,
            *rule,
            marks=[*marks, *([] if number <= is_first else [pytest.mark.slow])],
        )
        for number, rule in enumerate(rules)
    ]


@pytest.mark.parametrize(
    ("model", "options", "optimizer", "dtype"),
    [param for case in CASES for param in slow_but_for_adamw(case)],
)
def test_sparse_and_masked_execution_agree(
    backend: str, model: str, options: dict[str, Any], optimizer: str, dtype: torch.dtype
) -> None:
    masked, masked_opt, inputs = prepare(model, optimizer, dtype, **options)
    sparse, sparse_opt, _ = prepare(model, optimizer, dtype, **options)
    report = topkast.sparsify(sparse, sparse_opt)
    assert {layer.execution for layer in report.layers} == {"sparse"}
    before = topkast.masks(sparse_opt)
    for _ in range(6):
        train(masked, masked_opt, inputs, 5)
        train(sparse, sparse_opt, inputs, 5)
        assert_agree(masked_opt, sparse_opt, 1e-5 if dtype == torch.float32 else 1e-11)
    assert any(
        not torch.equal(mask.forward, before[name].forward)
        for name, mask in topkast.masks(sparse_opt).items()
    )
    torch.testing.assert_close(sparse(inputs), masked(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "options"), CASES)
def test_sparsify_continues_training(backend: str, model: str, options: dict[str, Any]) -> None:
    """Sparsify after masked steps, between two accumulated gradients."""
    masked, masked_opt, inputs = prepare(model, **options)
    sparse, sparse_opt, _ = prepare(model, **options)
    for network, optimizer in ((masked, masked_opt), (sparse, sparse_opt)):
        train(network, optimizer, inputs, 9)
        optimizer.zero_grad()
        network(inputs).square().mean().backward()
    moments = {
        name: entry["exp_avg"].clone()
        for name, entry in zip(
            sparse_opt.param_groups[0]["param_names"], sparse_opt.state.values(), strict=True
        )
    }
    topkast.sparsify(sparse, sparse_opt)
    for name, entry in zip(moments, sparse_opt.state.values(), strict=True):
        assert torch.equal(entry["exp_avg"], moments[name])
    for network, optimizer in ((masked, masked_opt), (sparse, sparse_opt)):
        network(inputs).mean().backward()
        optimizer.step()
        train(network, optimizer, inputs, 9)
    assert_agree(masked_opt, sparse_opt)


@pytest.mark.parametrize(
    "options",
    [
        {"explore_until": 5},
        {"penalty_kind": "l1", "penalty": 1e-3},
        {"penalty": 0.0},
        {"explore": "random"},
        {"distribution": "erk"},
        {"fwd": 0.0, "bwd": 0.0},
        {"fwd": 0.99, "bwd": 0.99},
        {"dense": ["0.*"]},
        {"block": (2, 2), "explore_until": 5},
        {"block": (4, 1), "penalty_kind": "l1", "penalty": 1e-3},
        {"block": (4, 1), "explore": "random"},
        {"block": (2, 3), "overrides": {"[57].*": {"block": (4, 4)}}},
        {"block": (4, 1), "block_score": "max"},
        {"block": (2, 4), "method": Static()},
        {"block": (2, 4), "method": Mixed(0.5)},
        {"block": (8, 1), "fwd": 0.0, "bwd": 0.0},
        {"block": (2, 1), "fwd": 0.99, "bwd": 0.99},
        {"block": (4, 1), "overrides": {"2.*": {"block": None}, "5.*": {"block": (16, 1)}}},
        {"block": (4, 1), "distribution": "erk", "power": 1.5},
    ],
    ids=str,
)
def test_options_agree_with_masked_execution(options: dict[str, Any]) -> None:
    model = "divisible" if "block" in options else "mlp"
    masked, masked_opt, inputs = prepare(model, dtype=torch.float64, **options)
    sparse, sparse_opt, _ = prepare(model, dtype=torch.float64, **options)
    report = topkast.sparsify(sparse, sparse_opt)
    assert {layer.execution for layer in report.layers} == {"sparse"}
    for network, optimizer in ((masked, masked_opt), (sparse, sparse_opt)):
        train(network, optimizer, inputs, 15)
    assert_agree(masked_opt, sparse_opt, 1e-11)


@pytest.mark.parametrize("block", [None, (4, 1), (2, 2)])
def test_nothing_as_large_as_a_dense_weight_is_allocated(backend: str, block: Any) -> None:
    """Measured by PyTorch's memory profiler over forward, backward and step, without a refresh."""
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 300))
    inner = torch.optim.AdamW(model.named_parameters())
    opt = topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8, refresh_every=100, block=block)
    batch = torch.randn(8, 300)

    def largest_allocation() -> int:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            train(model, opt, batch, 1)
        sizes = [
            event.nbytes() if callable(event.nbytes) else event.nbytes
            for event in profiler.profiler.kineto_results.events()
            if event.name() == "[memory]"
        ]
        assert sizes
        return int(max(sizes))

    train(model, opt, batch, 2)
    weight = 300 * 400 * 4
    assert largest_allocation() >= weight  # the gradient of a masked layer
    topkast.sparsify(model, opt)
    train(model, opt, batch, 2)
    assert largest_allocation() <= (0.3 if backend == "compiled" else 0.5) * weight


@pytest.mark.parametrize("threads", [2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    def train_with(count: int) -> dict[str, Tensor]:
        torch.set_num_threads(count)
        try:
            model, opt, inputs = prepare("mlp")
            topkast.sparsify(model, opt)
            train(model, opt, inputs, 10)
        finally:
            torch.set_num_threads(1)
        return topkast.dense_params(opt)

    expected, actual = train_with(1), train_with(threads)
    for name, theta in expected.items():
        torch.testing.assert_close(actual[name], theta, rtol=1e-5, atol=1e-6)


class TestChoice:
    def test_the_report_names_layers_that_stay_masked(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
                self.other.weight = self.one.weight
                self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
                self.free = nn.Linear(8, 8)
                self.table = nn.Embedding(9, 8)

            def forward(self, x: Tensor) -> Tensor:
                x = self.other(self.one(x))
                output: Tensor = self.free(self.attention(x, x, x)[0])
                return output

        model = Tied()
        opt = topkast.wrap_optimizer(torch.optim.AdamW(model.named_parameters()), fwd=0.9, bwd=0.8)
        report = topkast.sparsify(model, opt)
        reasons = {layer.name: layer.reason for layer in report.layers}
        assert {row.name for row in report.layers if row.execution == "sparse"} == {"free.weight"}
        assert "shared by 2 layers" in reasons["one.weight"]
        assert "MultiheadAttention" in reasons["attention.in_proj_weight"]
        assert "NonDynamicallyQuantizableLinear" in reasons["attention.out_proj.weight"]
        assert "Embedding" in reasons["table.weight"]
        assert "MultiheadAttention" in str(report)
        assert report.to_dict()["layers"][0]["name"] == "one.weight"
        train(model, opt, torch.randn(2, 5, 8), 3)

    def test_blocks_of_stacked_layers_stay_masked(self) -> None:
        layer = nn.Conv2d(4, 4, (3, 1), bias=False)
        inner = torch.optim.SGD(layer.named_parameters(), 0.1)
        opt = topkast.wrap_optimizer(inner, fwd=0.5, bwd=0.25, stacked="weight", block=(2, 1))
        (row,) = topkast.sparsify(layer, opt).layers
        assert (row.execution, row.reason) == (
            "masked",
            "its blocks are cut from the layers of a stacked tensor",
        )

    def test_a_sparse_layer_cannot_be_stacked(self) -> None:
        layer = topkast_torch.SparseLinear(8, 6, fwd=0.5, bwd=0.25)
        inner = torch.optim.SGD(layer.named_parameters(), 0.1)
        options: Any = {"fwd": 0.5, "bwd": 0.25, "dense": False}
        with pytest.raises(topkast.OptionError, match=r"values is the weight .* leave it out of"):
            topkast.wrap_optimizer(inner, stacked="values", **options)
        topkast.wrap_optimizer(inner, **options)

    def test_global_ranking_stays_masked(self) -> None:
        model, opt, inputs = prepare("mlp", distribution="global")
        report = topkast.sparsify(model, opt)
        assert {row.execution for row in report.layers} == {"masked"}
        assert all("distribution='global'" in row.reason for row in report.layers)
        train(model, opt, inputs, 2)

    def test_only_selects_layers(self) -> None:
        model, opt, inputs = prepare("mlp")
        report = topkast.sparsify(model, opt, only=["0.*", "2.*"])
        assert [row.execution for row in report.layers] == ["sparse", "sparse", "masked"]
        train(model, opt, inputs, 8)
        again = topkast.sparsify(model, opt, only="0.*")
        assert [row.reason for row in again.layers[:2]] == ["it was already"] * 2
        assert {row.execution for row in topkast.sparsify(model, opt).layers} == {"sparse"}
        train(model, opt, inputs, 8)
        with pytest.raises(topkast.OptionError, match="matches none"):
            topkast.sparsify(*prepare("mlp")[:2], only="nothing")

    @pytest.mark.parametrize(("model", "options"), CASES[:4])
    @pytest.mark.parametrize("faster", ["masked", "sparse"])
    def test_an_example_decides_by_time(
        self, model: str, options: Any, faster: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        built, opt, inputs = prepare(model, **options)
        before = copy.deepcopy(built.state_dict())
        clock = iter(range(10**6))

        def make_slow_passes(module: nn.Module, layer_input: Tensor) -> Callable[[], Any]:
            run = make_passes(module, layer_input)
            slow = isinstance(module, _sparse_layer.SparseLayer) == (faster == "masked")

            def timed() -> Any:
                for _ in range(50 * slow):
                    next(clock)
                return run()

            return timed

        make_passes = _sparsify._make_passes
        monkeypatch.setattr(_sparsify, "_make_passes", make_slow_passes)
        monkeypatch.setattr("time.perf_counter", lambda: next(clock))
        report = topkast.sparsify(built, opt, example=inputs)
        assert {row.execution for row in report.layers} == {faster}
        assert all(row.masked_ms and row.sparse_ms for row in report.layers)
        assert "ms" in str(report)
        if faster == "masked":
            for name, entry in built.state_dict().items():
                assert torch.equal(entry, before[name]), name
        assert all(param.grad is None for param in built.parameters())
        assert built.training
        train(built, opt, inputs, 8)

    def test_invalid_arguments_are_refused(self) -> None:
        model = nn.Linear(3, 3)
        with pytest.raises(topkast.OptionError, match="needs the optimizer that"):
            topkast.sparsify(model, torch.optim.SGD(model.parameters(), 0.1))
        others: list[Any] = [{}, torch.optim.SGD(model.parameters(), 0.1)]
        for swapped in others:
            with pytest.raises(topkast.AdapterNotFoundError, match=r"expected a torch\.nn\.Module"):
                topkast.sparsify(swapped, model)
        with pytest.raises(
            topkast.AdapterNotFoundError, match=r"in JAX, call topkast_jax\.sparsify"
        ):
            topkast.sparsify({"w": 1.0}, model)
        with pytest.raises(topkast.OptionError, match="not built for the parameters of this"):
            topkast.sparsify(nn.Linear(3, 3), prepare("mlp")[1])
        for example in (torch.ones(2, 3), (torch.ones(2, 30), 1), "x"):
            with pytest.raises(topkast.OptionError, match="cannot compute with the example"):
                topkast.sparsify(*prepare("mlp")[:2], example=example)


def test_a_step_leaves_the_gradient_of_the_loss() -> None:
    """As in masked execution, only the inner optimizer sees the penalty's gradient."""
    model, opt, inputs = prepare("mlp", penalty=1.0)
    topkast.sparsify(model, opt)
    model(inputs).square().mean().backward()
    before = [torch.clone(param.grad) for param in model.parameters() if param.grad is not None]
    opt.step()
    after = [param.grad for param in model.parameters() if param.grad is not None]
    assert len(before) == 6
    assert all(map(torch.equal, before, after))


class TestAgreementInOddLoops:
    """Unusual training loops give the same result in masked and in sparse execution."""

    def run_both(self, loop: Callable[[Any, Any, Tensor], None], **options: Any) -> None:
        masked, masked_opt, inputs = prepare("mlp", dtype=torch.float64, **options)
        sparse, sparse_opt, _ = prepare("mlp", dtype=torch.float64, **options)
        topkast.sparsify(sparse, sparse_opt)
        loop(masked, masked_opt, inputs)
        loop(sparse, sparse_opt, inputs)
        assert_agree(masked_opt, sparse_opt, 1e-11)

    def test_gradients_that_are_never_zeroed(self) -> None:
        def loop(model: Any, opt: Any, inputs: Tensor) -> None:
            for _ in range(9):
                model(inputs).square().mean().backward()
                opt.step()

        self.run_both(loop, refresh_every=2)

    def test_clipping_after_exploration_has_stopped(self) -> None:
        def loop(model: Any, opt: Any, inputs: Tensor) -> None:
            for _ in range(9):
                opt.zero_grad()
                model(inputs).square().mean().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                opt.step()

        self.run_both(loop, explore_until=2, refresh_every=3)

    def test_scaler_with_an_overflow(self) -> None:
        def loop(model: Any, opt: Any, inputs: Tensor) -> None:
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            for step in range(9):
                opt.zero_grad()
                loss = model(inputs).square().mean() * (torch.inf if step == 4 else 1.0)
                scaler.scale(loss).backward()
                scaler.step(opt)
                scaler.update()

        self.run_both(loop, refresh_every=3)

    def test_closures(self) -> None:
        def loop(model: Any, opt: Any, inputs: Tensor) -> None:
            def closure() -> Tensor:
                opt.zero_grad()
                loss: Tensor = model(inputs).square().mean()
                loss.backward()
                return loss

            for _ in range(9):
                opt.step(closure)

        self.run_both(loop, refresh_every=2)

    def test_a_group_added_later(self) -> None:
        def loop(model: Any, opt: Any, inputs: Tensor) -> None:
            torch.manual_seed(5)
            head = topkast_torch.SparseLinear(5, 4, fwd=0.5, bwd=0.2, dtype=torch.float64)
            named = [(f"head.{name}", param) for name, param in head.named_parameters()]
            opt.add_param_group({"params": named, "fwd": 0.5, "bwd": 0.2})
            train(nn.Sequential(model, head), opt, inputs, 9)

        self.run_both(loop)

    def test_an_inner_step_that_fails_leaves_the_gradient(self) -> None:
        model, opt, inputs = prepare("mlp", penalty=1.0)
        topkast.sparsify(model, opt)
        model(inputs).square().mean().backward()
        values: Any = model.get_parameter("0.values")
        before = values.grad.clone()
        opt.param_groups[0]["lr"] = "high"
        with pytest.raises((TypeError, RuntimeError, ValueError)):
            opt.step()
        assert torch.equal(values.grad, before)
