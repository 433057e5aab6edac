"""Costs of PyTorch models: positions by hand, bytes as ``topkast.summary`` measures them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import topkast_torch
import torch
from topkast_torch import SparseLinear, measure_layers
from torch import Tensor, nn

import topkast


def positions(model: nn.Module, *example: Tensor) -> dict[str, float]:
    layers = measure_layers(model, example)
    return {name: float(layer.positions) for name, layer in layers.items() if layer.positions}


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (lambda: nn.Linear(6, 5), (2, 6), 1),
        (lambda: nn.Linear(6, 5), (2, 7, 3, 6), 7 * 3),
        (lambda: nn.Conv1d(6, 4, 3), (2, 6, 10), 8),
        (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), (3, 6, 9, 12), 5 * 6),
        (lambda: nn.Conv2d(6, 4, 3, dilation=2), (3, 6, 9, 12), 5 * 8),
        (lambda: nn.Conv3d(6, 4, 2), (2, 6, 3, 4, 5), 2 * 3 * 4),
        (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2), (2, 6, 5, 7), 5 * 7),
    ],
)
def test_positions_of_layers(
    layer: Callable[[], nn.Module], shape: tuple[int, ...], expected: int
) -> None:
    assert positions(layer(), torch.ones(shape)) == {"weight": expected}


def test_flops_of_a_convolution_are_those_of_the_unfolded_product() -> None:
    conv = nn.Conv2d(6, 4, 3, groups=2)
    result = topkast.cost(conv, torch.ones(2, 6, 9, 9), method="dense")
    assert result.forward_flops == 2 * (7 * 7) * 4 * (6 // 2 * 9)  # 4 outputs of 27 inputs each


class Attention(nn.Module):
    """Three tokens that attend to five, of other widths."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, queries: Tensor, keys: Tensor) -> Any:
        return self.attention(queries, value=keys, key=keys)[0]


def test_positions_of_attention() -> None:
    queries, keys = torch.ones(2, 3, 8), torch.ones(2, 5, 8)
    # 8 × 8 · 3 + 2 · 8 × 8 · 5 multiplications with a weight of 24 × 8
    assert positions(Attention(), queries, keys) == {
        "attention.in_proj_weight": pytest.approx(13 / 3),
        "attention.out_proj.weight": 3,
    }
    assert positions(Attention(kdim=6, vdim=6), queries, torch.ones(2, 5, 6)) == {
        "attention.q_proj_weight": 3,
        "attention.k_proj_weight": 5,
        "attention.v_proj_weight": 5,
        "attention.out_proj.weight": 3,
    }


def test_a_frozen_encoder_does_not_take_the_path_without_layers() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).requires_grad_(False).eval()
    expected = {"self_attn.in_proj_weight", "self_attn.out_proj.weight"}
    counted = positions(layer, torch.ones(2, 5, 8))
    assert counted == dict.fromkeys(expected | {"linear1.weight", "linear2.weight"}, 5)


def test_layers_that_are_used_twice_and_never() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.twice, self.never = nn.Linear(6, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embedding.weight  # tied

        def forward(self, tokens: Tensor) -> Tensor:
            vectors = self.embedding(tokens)
            output: Tensor = self.head(self.twice(self.twice(vectors)))
            return output

    model, tokens = Network(), torch.zeros(2, 4, dtype=torch.int64)
    assert positions(model, tokens) == {"embedding.weight": 4, "twice.weight": 8}
    result = topkast.cost(model, tokens, method="rigl", fwd=0.9)
    assert result.uncounted == ("never.weight",)


def test_measuring_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_layers(model, torch.randn(2, 3, 5, 5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, True, False]
    assert not any(module._forward_hooks for module in model.modules())
    assert all(param.grad is None for param in model.parameters())


def test_models_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1 << 17, 1 << 17), nn.ReLU(), nn.Linear(1 << 17, 4))
        example = torch.ones(1, 1 << 17)
    result = topkast.cost(model, example, method="rigl", fwd=0.99, dense="2.*")
    assert result.layers[0].forward == 171_798_692  # 2^34 - floor(0.99 · 2^34)
    assert result.dense_forward_flops == 2 * (2**34 + 2**19)


def test_options_get_the_parameters_and_their_names() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    seen = {}

    def is_last(name: str, tensor: Any) -> bool:
        seen[name] = tensor
        return bool(name.startswith("2."))

    example = torch.ones(1, 20)
    result = topkast.cost(model, example, fwd=0.9, bwd=0.8, dense=is_last)
    assert seen == {"0.weight": model[0].weight, "2.weight": model[2].weight}
    assert [row.forward for row in result.layers] == [60, 30, 300, 10]
    assert result.layers == topkast.cost(model, example, fwd=0.9, bwd=0.8, dense="2.*").layers


METHODS = [
    topkast.methods.TopKAST(),
    topkast.methods.Random(),
    topkast.methods.Static(),
    topkast.methods.SET(),
    topkast.methods.SMET(),
    topkast.methods.RigL(),
    topkast.methods.GSE(),
    topkast.methods.SNFS(),
    topkast.methods.DSR(),
    topkast.methods.DeepRewiring(),
    topkast.methods.DNW(),
    topkast.methods.IHT(end=8, initial=0.5),
    topkast.methods.GradualPruning(start=0, end=8, initial=0.5),
    topkast.methods.GraNet(start=0, end=8),
    topkast.methods.ACDC(warm_up=2, sparse=2, dense=2, end=8),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_bytes_of_every_method_are_those_that_summary_measures(method: Any) -> None:
    bwd = {"any": 0.8, "equal": 0.9, "none": 0.0}[method.backward]
    bwd = 0.9 if isinstance(method, topkast.methods.Static) else bwd
    options: Any = {"fwd": 0.9, "bwd": bwd, "method": method, "refresh_every": 2}
    param = nn.Parameter(torch.randn(40, 30, generator=torch.Generator().manual_seed(0)))
    adam = torch.optim.Adam([("w", param)], 1e-4)
    optimizer = topkast.wrap_optimizer(adam, **options)
    largest: dict[str, int] = {}
    for _ in range(8):
        optimizer.zero_grad()
        param.square().sum().backward()
        optimizer.step()
        parts = topkast.summary(optimizer).held_parts
        largest = {part: max(largest.get(part, 0), count) for part, count in parts.items()}
    expected = topkast.cost({"w": (40, 30)}, steps=8, execution="masked", **options).bytes
    largest["state"] -= 4  # a step count
    for part in ("values", "gradient", "state", "indices", "ages", "momentum", "reservoir"):
        assert largest[part] == expected[part], part


WIDTHS = (256, 512, 384, 10)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda params: torch.optim.Adam(params, 1e-5),
    "adamw": lambda params: torch.optim.AdamW(params, 1e-5),
    "momentum": lambda params: torch.optim.SGD(params, 1e-4, momentum=0.9),
    "sgd": lambda params: torch.optim.SGD(params, 1e-4),
}


def make_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(model: nn.Module, optimizer: Any, example: Tensor) -> topkast.Summary:
    optimizer.zero_grad()
    model(example).square().mean().backward()
    optimizer.step()
    return topkast.summary(optimizer)


@pytest.mark.parametrize("execution", ["masked", "sparse"])
@pytest.mark.parametrize(
    ("inner", "fwd", "bwd", "block"),
    [
        ("adam", 0.9, 0.8, None),
        ("adam", 0.9, 0.0, None),
        ("adamw", 0.8, 0.5, None),
        ("momentum", 0.95, 0.9, None),
        ("sgd", 0.9, 0.9, None),
        ("adam", 0.9, 0.8, (2, 2)),
        ("adam", 0.9, 0.8, (4, 1)),
    ],
)
def test_bytes_are_those_that_summary_measures(
    inner: str, fwd: float, bwd: float, block: Any, execution: Any
) -> None:
    """Exact for all parts but those that depend on the positions of the entries."""
    model, example = make_mlp(), torch.randn(8, WIDTHS[0], requires_grad=True)
    optimizer = topkast.wrap_optimizer(
        OPTIMIZERS[inner](model.named_parameters()),
        fwd=fwd,
        bwd=bwd,
        refresh_every=2,
        dense="4.*",
        block=block,
    )
    options: Any = {"fwd": fwd, "bwd": bwd, "dense": "4.*", "optimizer": inner, "block": block}
    expected = topkast.cost(model, example, execution=execution, **options)
    if execution == "sparse":
        topkast.sparsify(model, optimizer)
    measured = train(model, optimizer, example)  # no refresh yet, so no reserve
    parts, counts = measured.held_parts, expected.bytes

    for part in ("values", "indices", "ages", "reservoir"):
        assert parts[part] == counts[part], part
    steps = 4 * 6 if inner.startswith("adam") else 0  # a step count for each Parameter
    assert parts["state"] == counts["state"] + steps
    # summary counts gradients of dense tensors, and what is dense in masked execution, as the
    # model's.
    held = parts["gradient"] + measured.model_bytes
    assert held == counts["gradient"] + counts["model"]
    assert parts["layouts"] == pytest.approx(counts["layouts"], rel=0.15)
    total = expected.total_bytes - counts["reserve"] - counts["layouts"] + parts["layouts"]
    assert measured.total_bytes == total + steps
    if execution == "sparse":  # and of the model as it is now
        again = topkast.cost(model, example, execution=execution, **options)
        assert (again.bytes, again.fraction) == (expected.bytes, expected.fraction)

    reserve = train(model, optimizer, example).held_parts["reserve"]
    assert reserve == pytest.approx(counts["reserve"], rel=0.2)


def test_bytes_of_sparse_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 96, 3))
    example = torch.randn(2, 64, 8, 8, requires_grad=True)
    optimizer = topkast.wrap_optimizer(
        torch.optim.Adam(model.named_parameters()), fwd=0.9, bwd=0.8, refresh_every=9
    )
    expected = topkast.cost(model, example, fwd=0.9, bwd=0.8).bytes
    topkast.sparsify(model, optimizer)
    parts = train(model, optimizer, example).held_parts
    assert parts["layouts"] == pytest.approx(expected["layouts"], rel=0.15)
    for part in ("values", "indices", "ages", "reservoir"):
        assert parts[part] == expected[part], part


def test_methods_that_forget_have_no_reservoir() -> None:
    """`Static` stores what the formula's methods with one set store."""
    model, example = make_mlp(), torch.randn(8, WIDTHS[0])
    optimizer = topkast.wrap_optimizer(
        OPTIMIZERS["adam"](model.named_parameters()),
        fwd=0.9,
        bwd=0.9,
        method=topkast.methods.Static(),
    )
    expected = topkast.cost(model, example, method="static", fwd=0.9, execution="masked")
    measured = train(model, optimizer, example)
    assert measured.total_bytes == expected.total_bytes + 4 * 6


def test_sparse_layers_have_sets_of_their_own() -> None:
    model = nn.Sequential(SparseLinear(100, 50, fwd=0.95, bwd=0.9), nn.ReLU(), nn.Linear(50, 20))
    result = topkast.cost(model, torch.ones(3, 4, 100), fwd=0.9, bwd=0.8)
    rows = {row.name: row for row in result.layers}
    assert (rows["0.values"].forward, rows["0.values"].backward) == (250, 500)
    assert rows["0.values"].shape == (50, 100)
    assert rows["0.values"].training_flops == 2 * 4 * (2 * 250 + 500)
    assert (rows["2.weight"].forward, rows["2.weight"].backward) == (100, 200)


def test_examples_that_cannot_be() -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(topkast.OptionError, match=r"pass an input as the second .*got NoneType"):
        topkast.cost(model, fwd=0.9, bwd=0.8)
    with pytest.raises(topkast.OptionError, match=r"has no samples: its shape is \(0, 4\)"):
        topkast.cost(model, torch.ones(0, 4), fwd=0.9, bwd=0.8)
    with pytest.raises(topkast.OptionError, match="the model cannot compute with the example"):
        topkast.cost(model, torch.ones(2, 5), fwd=0.9, bwd=0.8)
    with pytest.raises(topkast.OptionError, match=r"expected a torch\.nn\.Module, got Tensor"):
        topkast_torch.measure_layers(torch.ones(3), torch.ones(2, 5))  # type: ignore[arg-type]
