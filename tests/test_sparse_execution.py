"""Sparse layers compute what masked ones do, and never form anything as large as a dense weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import topkast_torch
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from topkast_torch import _functions, _layers, _products, _sparsify
from torch import Tensor, nn

import topkast

OPTIONS: dict[str, Any] = {"fwd": 0.8, "bwd": 0.6, "refresh_every": 7, "penalty": 1e-2}


# No layer here has a bias whose gradient is zero (that of keys, or before a BatchNorm): Adam would
# make steps of its rounding errors.


class Attention(nn.Module):
    """A small transformer block of ``nn.Linear``."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.project_in = nn.Linear(width, 3 * width, bias=False)
        self.project_out = nn.Linear(width, width, bias=False)
        self.feed = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))

    def forward(self, hidden: Tensor) -> Tensor:
        batch, time, width = hidden.shape
        split = self.project_in(self.norm(hidden)).view(batch, time, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.project_out(mixed.transpose(1, 2).reshape(batch, time, width))
        fed: Tensor = self.feed(hidden)
        return hidden + fed


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 5)
    ), torch.randn(33, 30)


def convolutional() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Conv2d(4, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, stride=2, dilation=2, padding=2, groups=3, bias=False),
        nn.ReLU(),
        nn.Conv2d(12, 8, (1, 3), padding="same"),
        nn.Flatten(),
        nn.Linear(8 * 25, 5),
    ), torch.randn(6, 4, 10, 10)


def transformer() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(Attention(), Attention(), nn.Linear(24, 5)), torch.randn(3, 11, 24)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": mlp,
    "convolutional": convolutional,
    "transformer": transformer,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, 0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, 1e-2),
}


@pytest.fixture(params=["compiled", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels, and PyTorch's own sparse products in the place of a missing numba."""
    chosen: str = request.param
    monkeypatch.setattr(_products, "has_numba", lambda: chosen == "compiled")
    return chosen


def prepare(
    model: str, optimizer: str = "adamw", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    built, inputs = MODELS[model]()
    built, inputs = built.to(dtype), inputs.to(dtype)
    opt = OPTIMIZERS[optimizer](list(built.named_parameters()))
    return built, topkast.wrap_optimizer(opt, **{**OPTIONS, **options}), inputs


def train(model: nn.Module, optimizer: Any, inputs: Tensor, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)
        batch = inputs + 0.1 * torch.randn_like(inputs)
        (model(batch) - 1).square().mean().backward()
        optimizer.step()


def assert_agree(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    """Supports identical, θ within `tolerance` of its norm."""
    masks, others = topkast.masks(one), topkast.masks(other)
    assert masks.keys() == others.keys()
    for name, mask in masks.items():
        assert torch.equal(mask.forward, others[name].forward), name
        assert torch.equal(mask.backward, others[name].backward), name
    for (name, theta), found in zip(
        topkast.dense_params(one).items(), topkast.dense_params(other).values(), strict=True
    ):
        assert (theta - found).norm() <= tolerance * theta.norm(), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_sparse_and_masked_execution_agree(
    backend: str, model: str, optimizer: str, dtype: torch.dtype
) -> None:
    masked, masked_opt, inputs = prepare(model, optimizer, dtype)
    sparse, sparse_opt, _ = prepare(model, optimizer, dtype)
    report = topkast.sparsify(sparse, sparse_opt)
    assert {layer.execution for layer in report.layers} == {"sparse"}
    before = topkast.masks(sparse_opt)
    for _ in range(10):
        train(masked, masked_opt, inputs, 5)
        train(sparse, sparse_opt, inputs, 5)
        assert_agree(masked_opt, sparse_opt, 1e-5 if dtype == torch.float32 else 1e-11)
    assert any(
        not torch.equal(mask.forward, before[name].forward)
        for name, mask in topkast.masks(sparse_opt).items()
    )
    torch.testing.assert_close(sparse(inputs), masked(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_training_goes_on_where_it_was(backend: str, model: str) -> None:
    """Sparsified after masked steps, in the midst of an accumulation."""
    masked, masked_opt, inputs = prepare(model)
    sparse, sparse_opt, _ = prepare(model)
    for one, optimizer in ((masked, masked_opt), (sparse, sparse_opt)):
        train(one, optimizer, inputs, 9)
        optimizer.zero_grad()
        one(inputs).square().mean().backward()
    moments = {
        name: entry["exp_avg"].clone()
        for name, entry in zip(
            sparse_opt.param_groups[0]["param_names"], sparse_opt.state.values(), strict=True
        )
    }
    topkast.sparsify(sparse, sparse_opt)
    for name, entry in zip(moments, sparse_opt.state.values(), strict=True):
        assert torch.equal(entry["exp_avg"], moments[name])
    for one, optimizer in ((masked, masked_opt), (sparse, sparse_opt)):
        one(inputs).mean().backward()
        optimizer.step()
        train(one, optimizer, inputs, 9)
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
    ],
    ids=str,
)
def test_options_mean_the_same(options: dict[str, Any]) -> None:
    masked, masked_opt, inputs = prepare("mlp", dtype=torch.float64, **options)
    sparse, sparse_opt, _ = prepare("mlp", dtype=torch.float64, **options)
    topkast.sparsify(sparse, sparse_opt)
    for one, optimizer in ((masked, masked_opt), (sparse, sparse_opt)):
        train(one, optimizer, inputs, 15)
    assert_agree(masked_opt, sparse_opt, 1e-11)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (0, 6), (7, 6), (2, 3, 6), (129, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_gradients(backend: str, shape: tuple[int, ...], bias: bool) -> None:
    layer = topkast_torch.SparseLinear(6, 9, bias, fwd=0.7, bwd=0.4, dtype=torch.float64)
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    check_gradients(layer, inputs, nn.functional.linear)


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 2), "dilation": (2, 1)},
    {"kernel_size": 3, "groups": 2, "bias": False},
    {"kernel_size": 3, "groups": 4, "padding": "same"},
    {"kernel_size": (2, 1), "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 1},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("images", [3, None])
def test_convolution_gradients(
    backend: str, options: dict[str, Any], images: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_functions, "_UNFOLDED", 700)  # a few images at a time, and one
    torch.manual_seed(0)
    dense = nn.Conv2d(4, 8, **options, dtype=torch.float64)
    shape = (4, 7, 6) if images is None else (images, 4, 7, 6)
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    model = copy.deepcopy(dense)
    opt = torch.optim.SGD(model.named_parameters(), 0.1)
    opt = topkast.wrap_optimizer(opt, fwd=0.7, bwd=0.4)
    topkast.sparsify(model, opt)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        found: Tensor = torch.func.functional_call(dense, given, x)
        return found

    check_gradients(model, inputs, convolve)


def check_gradients(layer: Any, inputs: Tensor, dense: Callable[..., Tensor]) -> None:
    """By differences, and against the dense layer: the output, and gradients on B."""
    found = layer(inputs)
    weight = layer.weight.requires_grad_()
    expected = dense(inputs, weight, layer.bias)
    torch.testing.assert_close(found, expected)
    slope = torch.randn_like(found)
    given = [tensor for tensor in (inputs, layer.bias) if tensor is not None]
    grads = torch.autograd.grad(found, [layer.values, *given], slope)
    dense_grads = torch.autograd.grad(expected, [weight, *given], slope)
    on_b = dense_grads[0].reshape(-1)[layer.indices].view(layer.values.shape)
    torch.testing.assert_close(grads, (on_b, *dense_grads[1:]))

    def on_a(inputs: Tensor, values: Tensor, *bias: Tensor) -> Tensor:
        # What the layer does is no function of B∖A, whose gradient is that of a dense weight.
        flags = layer.active.view(values.shape)
        held = torch.where(flags, values, layer.values.detach())
        given = {"values": held} | ({"bias": bias[0]} if bias else {})
        found: Tensor = torch.func.functional_call(layer, given, inputs)
        return found

    if inputs.numel():
        assert torch.autograd.gradcheck(on_a, (inputs, layer.values, *given[1:]))


def test_nothing_as_large_as_a_dense_weight_is_allocated(backend: str) -> None:
    """Forward, backward and step, between refreshes, by PyTorch's profiler of memory."""
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 300))
    opt = torch.optim.AdamW(model.named_parameters())
    opt = topkast.wrap_optimizer(opt, fwd=0.9, bwd=0.8, refresh_every=100)
    batch = torch.randn(8, 300)

    def largest() -> int:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=kinds, profile_memory=True) as profiler:
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
    assert largest() >= weight  # the gradient of a masked layer
    topkast.sparsify(model, opt)
    train(model, opt, batch, 2)
    assert largest() <= (0.3 if backend == "compiled" else 0.5) * weight


@pytest.mark.parametrize("threads", [2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    def after(count: int) -> dict[str, Tensor]:
        torch.set_num_threads(count)
        try:
            model, opt, inputs = prepare("mlp")
            topkast.sparsify(model, opt)
            train(model, opt, inputs, 10)
        finally:
            torch.set_num_threads(1)
        return topkast.dense_params(opt)

    expected, found = after(1), after(threads)
    for name, theta in expected.items():
        torch.testing.assert_close(found[name], theta, rtol=1e-5, atol=1e-6)


def test_layers_used_directly() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    torch.manual_seed(0)
    sparse = nn.Sequential(
        topkast_torch.SparseLinear(20, 30, fwd=0.8, bwd=0.6), nn.ReLU(), nn.Linear(30, 5)
    )
    optimizers = []
    for model in (dense, sparse):
        opt = torch.optim.AdamW(model.named_parameters(), 1e-2)
        optimizers.append(topkast.wrap_optimizer(opt, **OPTIONS, dense="2.*"))
        train(model, optimizers[-1], torch.randn(16, 20, generator=torch.manual_seed(1)), 20)
    masked, found = (list(topkast.masks(opt).values()) for opt in optimizers)
    assert torch.equal(masked[0].forward, found[0].forward)
    assert topkast.summary(optimizers[1]).tensors[0].shape == (30, 20)
    theta, other = (next(iter(topkast.dense_params(opt).values())) for opt in optimizers)
    torch.testing.assert_close(theta, other, rtol=1e-5, atol=1e-6)


def test_a_layer_under_a_plain_optimizer_keeps_its_mask() -> None:
    layer = topkast_torch.SparseLinear(20, 30, fwd=0.8, bwd=0.8)
    before = layer.weight != 0
    train(layer, torch.optim.SGD(layer.parameters(), 0.1), torch.randn(8, 20), 5)
    assert torch.equal(layer.weight != 0, before)


class TestChoice:
    def test_the_report_names_what_stays_masked(self) -> None:
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
                found: Tensor = self.free(self.attention(x, x, x)[0])
                return found

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

    def test_global_ranking_stays_masked(self) -> None:
        model, opt, inputs = prepare("mlp", distribution="global")
        report = topkast.sparsify(model, opt)
        assert {row.execution for row in report.layers} == {"masked"}
        assert all("distribution='global'" in row.reason for row in report.layers)
        train(model, opt, inputs, 2)

    def test_only_some(self) -> None:
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

    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("faster", ["masked", "sparse"])
    def test_an_example_decides(
        self, model: str, faster: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        built, opt, inputs = prepare(model)
        before = copy.deepcopy(built.state_dict())
        clock = iter(range(10**6))

        def passes(module: nn.Module, given: Tensor) -> Callable[[], Any]:
            run = real(module, given)
            slow = isinstance(module, _layers.SparseLayer) == (faster == "masked")

            def timed() -> Any:
                for _ in range(50 * slow):
                    next(clock)
                return run()

            return timed

        real = _sparsify._passes
        monkeypatch.setattr(_sparsify, "_passes", passes)
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

    def test_what_is_no_wrapped_optimizer_is_refused(self) -> None:
        model = nn.Linear(3, 3)
        with pytest.raises(topkast.OptionError, match="needs the optimizer that"):
            topkast.sparsify(model, torch.optim.SGD(model.parameters(), 0.1))
        others: list[Any] = [{}, torch.optim.SGD(model.parameters(), 0.1)]
        for swapped in others:
            with pytest.raises(topkast.AdapterNotFoundError, match=r"expected a torch\.nn\.Module"):
                topkast.sparsify(swapped, model)
        with pytest.raises(topkast.OptionError, match="not built for the parameters of this"):
            topkast.sparsify(nn.Linear(3, 3), prepare("mlp")[1])
        for example in (torch.ones(2, 3), (torch.ones(2, 30), 1), "x"):
            with pytest.raises(topkast.OptionError, match="does not take the example"):
                topkast.sparsify(*prepare("mlp")[:2], example=example)


class TestState:
    @pytest.mark.parametrize("model", MODELS)
    def test_densify_is_the_inverse(self, model: str) -> None:
        masked, masked_opt, inputs = prepare(model)
        built, opt, _ = prepare(model)
        topkast.sparsify(built, opt)
        for one, optimizer in ((masked, masked_opt), (built, opt)):
            train(one, optimizer, inputs, 9)
        expected = built.eval()(inputs)
        dense_state = topkast.densify(built.state_dict())
        assert topkast.densify(built) is built
        assert [*map(type, built.modules())] == [*map(type, masked.modules())]
        assert list(built.state_dict()) == list(masked.state_dict())
        torch.testing.assert_close(built(inputs), expected)
        for name, entry in built.state_dict().items():
            assert torch.equal(entry, dense_state[name]), name
        masked.load_state_dict(dense_state)

    def test_a_dense_forward_view_loads_into_a_sparse_model(self) -> None:
        masked, masked_opt, inputs = prepare("mlp")
        sparse, opt, _ = prepare("mlp")
        topkast.sparsify(sparse, opt)
        train(masked, masked_opt, inputs, 3)  # the sets are those of the first selection
        sparse.load_state_dict(masked.state_dict())
        torch.testing.assert_close(sparse(inputs), masked(inputs))
        train(sparse, opt, inputs, 2)
        with pytest.raises(topkast.MismatchError, match="outside the forward set"):
            sparse.load_state_dict(mlp()[0].state_dict())

    def test_a_sparse_state_resumes_bit_for_bit(self) -> None:
        model, opt, inputs = prepare("convolutional")
        topkast.sparsify(model, opt)
        train(model, opt, inputs, 10)
        saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
        other, other_opt, _ = prepare("convolutional")
        topkast.sparsify(other, other_opt)
        other.load_state_dict(saved[0])
        with pytest.raises(topkast.MismatchError, match="load the optimizer's state dict too"):
            train(other, other_opt, inputs, 1)
        other_opt.load_state_dict(saved[1])
        for one, optimizer in ((model, opt), (other, other_opt)):
            train(one, optimizer, inputs, 10)
        assert_agree(opt, other_opt, 0.0)

    def test_an_optimizer_state_moves_between_executions(self) -> None:
        masked, masked_opt, inputs = prepare("mlp", dtype=torch.float64)
        sparse, sparse_opt, _ = prepare("mlp", dtype=torch.float64)
        topkast.sparsify(sparse, sparse_opt)
        train(masked, masked_opt, inputs, 9)
        sparse_opt.load_state_dict(masked_opt.state_dict())
        with torch.no_grad():
            for name in ("0.bias", "2.bias", "4.bias"):
                sparse.get_parameter(name).copy_(masked.get_parameter(name))
        for one, optimizer in ((masked, masked_opt), (sparse, sparse_opt)):
            train(one, optimizer, inputs, 9)
        assert_agree(masked_opt, sparse_opt, 1e-11)

    def test_copies_are_independent(self) -> None:
        model, opt, inputs = prepare("mlp")
        topkast.sparsify(model, opt)
        train(model, opt, inputs, 3)
        other, other_opt = copy.deepcopy((model, opt))
        train(other, other_opt, inputs, 9)
        train(model, opt, inputs, 9)
        assert_agree(opt, other_opt, 0.0)

    @pytest.mark.parametrize("name", ["indices", "active", "shape", "values"])
    def test_a_corrupt_structure_is_refused(self, name: str) -> None:
        layer = topkast_torch.SparseLinear(6, 9, fwd=0.8, bwd=0.6)
        before = copy.deepcopy(layer.state_dict())
        state = copy.deepcopy(before)
        lacking = {key: entry for key, entry in before.items() if key != name}
        for strict in (True, False):
            with pytest.raises(topkast.MismatchError, match="belong together"):
                layer.load_state_dict(lacking, strict=strict)
        changes: dict[str, Callable[[Tensor], Tensor]] = {
            "indices": lambda entry: entry.flip(0),
            "active": torch.ones_like,
            "shape": lambda entry: entry.flip(0),
            "values": lambda entry: entry[:, 1:],
        }
        state[name] = changes[name](state[name])
        with pytest.raises(topkast.MismatchError, match="the state dict has"):
            layer.load_state_dict(state)
        for key, entry in layer.state_dict().items():
            assert torch.equal(entry, before[key]), key

    def test_safetensors_hold_the_forward_view_alone(self, tmp_path: Path) -> None:
        model, opt, inputs = prepare("convolutional")
        topkast.sparsify(model, opt)
        train(model, opt, inputs, 8)
        path = tmp_path / "model.safetensors"
        topkast_torch.save_forward(model, path)
        with safe_open(path, framework="pt") as file:
            held = file.get_tensor("0.weight.values")
        assert held.shape == (87,)  # 20 % of 432
        dense = topkast_torch.load_forward(path)
        expected = topkast.densify(model).state_dict()
        assert dense.keys() == expected.keys()
        assert all(torch.equal(dense[name], expected[name]) for name in dense)
        save_file({"0.weight": torch.ones(2)}, path)
        with pytest.raises(topkast.MismatchError, match="not written by"):
            topkast_torch.load_forward(path)


class TestInputs:
    def test_other_precision_is_refused_but_under_autocast(self) -> None:
        layer = topkast_torch.SparseLinear(6, 9, fwd=0.8, bwd=0.6)
        inputs = torch.randn(4, 6)
        with pytest.raises(topkast.MismatchError, match=r"input .* is torch\.bfloat16"):
            layer(inputs.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(inputs.bfloat16())
        assert found.dtype == torch.float32

    def test_inputs_of_any_strides(self, backend: str) -> None:
        layer = topkast_torch.SparseLinear(6, 9, fwd=0.8, bwd=0.6)
        inputs = torch.randn(12, 10)[::2, 2:8]
        for given in (inputs, inputs.t().contiguous().t(), inputs[:1].expand(5, 6)):
            torch.testing.assert_close(
                layer(given), nn.functional.linear(given, layer.weight, layer.bias)
            )

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks
    def test_compiled_models(self) -> None:
        model, opt, inputs = prepare("mlp")
        topkast.sparsify(model, opt)
        expected = model(inputs)
        found = torch.compile(model, backend="eager")(inputs)
        torch.testing.assert_close(found, expected)

    def test_frozen_layers_stay(self) -> None:
        model, opt, inputs = prepare("mlp")
        model.get_parameter("2.weight").requires_grad_(False)
        topkast.sparsify(model, opt)
        before = topkast.dense_params(opt)["2.weight"]
        train(model, opt, inputs, 9)
        assert torch.equal(topkast.dense_params(opt)["2.weight"], before)

    def test_converting_a_model_in_training_is_told(self) -> None:
        model, opt, inputs = prepare("mlp")
        topkast.sparsify(model, opt)
        model.double()
        with pytest.raises(topkast.MismatchError, match="was converted"):
            train(model, opt, inputs.double(), 1)


def test_the_step_leaves_the_gradient_of_the_loss() -> None:
    """As in masked execution: the penalty's gradient is the optimizer's alone."""
    model, opt, inputs = prepare("mlp", penalty=1.0)
    topkast.sparsify(model, opt)
    model(inputs).square().mean().backward()
    before = [torch.clone(param.grad) for param in model.parameters() if param.grad is not None]
    opt.step()
    after = [param.grad for param in model.parameters() if param.grad is not None]
    assert len(before) == 6
    assert all(map(torch.equal, before, after))


class TestAgreementInOddLoops:
    """What the tests of training loops do in masked execution, and what a reviewer thought of."""

    def both(self, loop: Callable[[Any, Any, Tensor], None], **options: Any) -> None:
        given = prepare("mlp", dtype=torch.float64, **options)
        masked, masked_opt, inputs = given
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

        self.both(loop, refresh_every=2)

    def test_clipping_after_exploration_has_stopped(self) -> None:
        def loop(model: Any, opt: Any, inputs: Tensor) -> None:
            for _ in range(9):
                opt.zero_grad()
                model(inputs).square().mean().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                opt.step()

        self.both(loop, explore_until=2, refresh_every=3)

    def test_scaler_with_an_overflow(self) -> None:
        def loop(model: Any, opt: Any, inputs: Tensor) -> None:
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            for step in range(9):
                opt.zero_grad()
                loss = model(inputs).square().mean() * (torch.inf if step == 4 else 1.0)
                scaler.scale(loss).backward()
                scaler.step(opt)
                scaler.update()

        self.both(loop, refresh_every=3)

    def test_closures(self) -> None:
        def loop(model: Any, opt: Any, inputs: Tensor) -> None:
            def closure() -> Tensor:
                opt.zero_grad()
                loss: Tensor = model(inputs).square().mean()
                loss.backward()
                return loss

            for _ in range(9):
                opt.step(closure)

        self.both(loop, refresh_every=2)

    def test_a_group_added_later(self) -> None:
        def loop(model: Any, opt: Any, inputs: Tensor) -> None:
            torch.manual_seed(5)
            head = topkast_torch.SparseLinear(5, 4, fwd=0.5, bwd=0.2, dtype=torch.float64)
            named = [(f"head.{name}", param) for name, param in head.named_parameters()]
            opt.add_param_group({"params": named, "fwd": 0.5, "bwd": 0.2})
            train(nn.Sequential(model, head), opt, inputs, 9)

        self.both(loop)

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


class TestLayer:
    def make(self, **options: Any) -> topkast_torch.SparseLinear:
        return topkast_torch.SparseLinear(20, 30, **{"fwd": 0.9, "bwd": 0.8, **options})

    def wrap(self, layer: nn.Module) -> Any:
        opt = torch.optim.SGD(layer.named_parameters(), 0.1)
        return topkast.wrap_optimizer(opt, fwd=0.9, bwd=0.8, refresh_every=1)

    def test_inputs_of_another_width_are_refused(self) -> None:
        with pytest.raises(topkast.MismatchError, match="takes 20 features"):
            self.make()(torch.ones(4, 40))
        model = nn.Sequential(nn.Conv2d(4, 8, 3))
        opt = self.wrap(model)
        topkast.sparsify(model, opt)
        with pytest.raises(topkast.MismatchError, match="images of 4 channels"):
            model(torch.ones(1, 8, 5, 5))

    def test_what_follows_may_work_in_place(self, backend: str) -> None:
        layer = self.make()
        found = torch.relu_(layer(torch.ones(4, 20)))
        found.sum().backward()
        assert layer.values.grad is not None

    def test_without_numba_under_autocast(self, backend: str) -> None:
        layer = self.make()
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(torch.ones(4, 20))
        assert found.dtype == torch.float32

    def test_writing_into_its_buffers_is_noticed(self) -> None:
        """As an average of models does, or DistributedDataParallel."""
        layer, other = self.make(), self.make()
        inputs = torch.ones(4, 20)
        layer(inputs)
        with torch.no_grad():
            for own, given in zip(layer.buffers(), other.buffers(), strict=True):
                own.copy_(given)
            layer.values.copy_(other.values)
        torch.testing.assert_close(
            layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias)
        )

    def test_replicas_that_were_given_one_state_stay_equal(self) -> None:
        """What DistributedDataParallel broadcasts: Parameters and all buffers, in place."""
        replicas = [self.make(), self.make()]
        parts = [[*layer.parameters(), *layer.buffers()] for layer in replicas]
        with torch.no_grad():
            for one, other in zip(*parts, strict=True):
                other.copy_(one)
        optimizers = [self.wrap(layer) for layer in replicas]
        for layer, opt in zip(replicas, optimizers, strict=True):
            train(layer, opt, torch.ones(4, 20), 5)
        assert_agree(optimizers[0], optimizers[1], 0.0)

    def test_a_loaded_layer_knows_nothing_outside_b(self) -> None:
        layer, other = self.make(), self.make()
        other.load_state_dict(layer.state_dict())
        assert int((topkast.dense_params(self.wrap(other))["values"] != 0).sum()) == 120

    @pytest.mark.parametrize("way", ["deepcopy", "assign", "copy"])
    def test_an_optimizer_finds_the_layer_of_its_values(self, way: str) -> None:
        layer = self.make()
        if way == "deepcopy":
            layer = copy.deepcopy(layer)
        elif way == "copy":
            copy.copy(layer)
        else:
            layer.load_state_dict(self.make().state_dict(), assign=True)
        assert topkast.summary(self.wrap(layer)).tensors[0].shape == (30, 20)

    def test_a_failed_wrap_changes_nothing(self) -> None:
        layer = self.make()
        with pytest.raises(topkast.OptionError):
            topkast.wrap_optimizer(
                torch.optim.SGD(layer.named_parameters(), 0.1), fwd=0.9, bwd=0.8, dense="typo"
            )
        assert int((topkast.dense_params(self.wrap(layer))["values"] != 0).sum()) == 600

    def test_tied_values_are_refused(self) -> None:
        layer, other = self.make(), self.make()
        with pytest.raises(topkast.MismatchError, match="another sparse layer"):
            other.values = layer.values

    def test_the_weight_can_be_differentiated(self) -> None:
        layer, inputs = self.make(), torch.randn(4, 20)
        (direct,) = torch.autograd.grad(layer(inputs).square().sum(), layer.values)
        found = nn.functional.linear(inputs, layer.weight, layer.bias).square().sum()
        torch.testing.assert_close(torch.autograd.grad(found, layer.values)[0], direct)

    def test_low_precision_is_refused(self) -> None:
        with pytest.raises(topkast.UnsupportedTensorError, match="bfloat16"):
            self.make(dtype=torch.bfloat16)

    def test_a_layer_converted_to_low_precision_is_told(self) -> None:
        with pytest.raises(topkast.MismatchError, match=r"converted to torch\.float16"):
            self.make().half()(torch.ones(4, 20).half())

    def test_there_must_be_something_sparse_to_save(self, tmp_path: Path) -> None:
        with pytest.raises(topkast.MismatchError, match="no sparse layer"):
            topkast_torch.save_forward(nn.Linear(3, 3), tmp_path / "file")

    def test_inputs_by_name(self) -> None:
        layer = self.make()
        assert layer(input=torch.ones(4, 20)).shape == (4, 30)

    def test_a_model_made_dense_leaves_its_optimizer_readable(self) -> None:
        model, opt, inputs = prepare("mlp")
        topkast.sparsify(model, opt)
        train(model, opt, inputs, 2)
        state = opt.state_dict()
        topkast.densify(model)
        assert topkast.summary(opt).updates == 2
        opt.load_state_dict(state)
        for use in (lambda: train(model, opt, inputs, 1), lambda: topkast.sparsify(model, opt)):
            with pytest.raises(topkast.MismatchError, match=r"made dense by topkast\.densify"):
                use()

    def test_sparsified_layers_leave_no_hook_behind(self) -> None:
        model, opt, _ = prepare("mlp")
        weights = [param for name, param in model.named_parameters() if "weight" in name]
        topkast.sparsify(model, opt)
        assert not any(weight._post_accumulate_grad_hooks for weight in weights)

    def test_a_layer_with_a_forward_of_its_own_stays(self) -> None:
        model, opt, inputs = prepare("mlp")
        layer: Any = model.get_submodule("0")
        layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
        report = topkast.sparsify(model, opt)
        assert "forward function was replaced" in report.layers[0].reason
        train(model, opt, inputs, 2)
