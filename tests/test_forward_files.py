"""Files of A in PyTorch: sparse layers for inference, masked models, what does not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import topkast_torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

import topkast


class Network(nn.Module):
    """A sparse convolution, a sparse layer that is used twice, a dense one and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16, bias=False))
        self.shared = self.body[2]
        self.head = nn.Linear(16, 4)
        self.embedding = nn.Embedding(30, 8)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.conv(images)).relu().mean((-2, -1)) + self.embedding.weight[3]
        output: Tensor = self.head(self.shared(self.body(hidden).relu()))
        return output


def prepare(**options: Any) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model, x = Network(), torch.randn(5, 4, 6, 6)
    adam = torch.optim.Adam(model.named_parameters())
    defaults: dict[str, Any] = {"fwd": 0.75, "bwd": 0.5, "dense": "head*"}
    wrapped: Any = topkast.wrap_optimizer(adam, **defaults | options)
    for _ in range(3):
        wrapped.zero_grad()
        model(x).square().mean().backward()
        wrapped.step()
    return model.eval(), wrapped, x


@pytest.mark.parametrize("block", [None, (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@torch.no_grad()
def test_a_file_becomes_sparse_layers(
    tmp_path: Path, sparse: bool, device: str, block: Any
) -> None:
    with torch.enable_grad():
        model, optimizer, x = prepare(block=block)
    expected = model(x)
    if sparse:
        topkast.sparsify(model, optimizer, auto=False)
    topkast_torch.save_forward(model, tmp_path / "file")
    with torch.device(device):
        loaded = Network().eval()
    topkast_torch.load_sparse(loaded, tmp_path / "file")
    torch.testing.assert_close(loaded(x), expected)
    assert type(loaded.get_submodule("conv")) is topkast_torch.SparseConv2d
    assert type(loaded.get_submodule("body")) is topkast_torch.SparseSequential
    assert type(loaded.get_submodule("head")) is nn.Linear
    assert loaded.shared is loaded.body[2]
    values = loaded.get_parameter("conv.values")
    assert values.shape == (1, 72)
    assert not values.requires_grad
    embedding = loaded.get_parameter("embedding.weight")
    assert int(torch.count_nonzero(embedding)) == 60
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    dense = topkast.densify(copy.deepcopy(loaded)).state_dict()
    for name, tensor in topkast_torch.load_forward(tmp_path / "file").items():
        assert torch.equal(dense[name], tensor), name


def test_the_dtype_is_that_of_the_model(tmp_path: Path) -> None:
    model, _, x = prepare()
    topkast_torch.save_forward(model, tmp_path / "file")
    double, low = Network().double().eval(), Network().bfloat16().eval()
    topkast_torch.load_sparse(double, tmp_path / "file")
    torch.testing.assert_close(double(x.double()).float(), model(x))
    assert double.get_parameter("conv.values").dtype == torch.float64
    topkast_torch.load_sparse(low, tmp_path / "file")  # bfloat16 has no sparse products
    assert type(low.get_submodule("conv")) is nn.Conv2d
    assert int(torch.count_nonzero(low.get_parameter("conv.weight"))) == 72


def test_a_file_holds_little_more_than_values_and_indices(tmp_path: Path) -> None:
    layer = nn.Linear(500, 400, bias=False)
    adam = torch.optim.Adam(layer.named_parameters())
    topkast.wrap_optimizer(adam, fwd=0.98, bwd=0.9)
    topkast_torch.save_forward(layer, tmp_path / "file")
    assert 8 * 4000 < (tmp_path / "file").stat().st_size < 8 * 4000 + 600
    with safe_open(tmp_path / "file", framework="pt") as file:
        indices = file.get_tensor("weight.indices")
    assert torch.equal(indices.long(), layer.weight.view(-1).nonzero().view(-1))


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_dense_tensors_are_stored_in_the_smaller_form(tmp_path: Path, share: float) -> None:
    tensor = (torch.rand(50, 40, generator=torch.Generator().manual_seed(0)) < share).float()
    model = nn.Module()
    model.register_buffer("mask", tensor)
    model.register_buffer("flags", tensor.bool() & False)
    model.register_buffer("vector", torch.zeros(30))
    model.register_buffer("few", torch.zeros(1100, 1000))  # a file with fewer would be refused
    model.register_parameter("sparse", nn.Parameter(torch.eye(20)))
    topkast_torch.save_forward(model, tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        names = set(file.keys())
    entries = {"mask.values", "mask.indices"} if share < 0.5 else {"mask"}
    assert names == entries | {"flags", "vector", "few", "sparse.values", "sparse.indices"}
    for name, loaded in topkast_torch.load_forward(tmp_path / "file").items():
        assert torch.equal(loaded, model.state_dict()[name]), name


@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_embeddings_stay_dense(tmp_path: Path, device: str, head_first: bool) -> None:
    def make() -> nn.Module:
        pairs = [("head", nn.Linear(8, 30, bias=False)), ("embedding", nn.Embedding(30, 8))]
        model = nn.Module()
        for name, module in pairs if head_first else reversed(pairs):
            model.add_module(name, module)
        tied: Any = model
        tied.embedding.weight = tied.head.weight
        return model

    model = make()
    adam = torch.optim.Adam(model.named_parameters())
    topkast.wrap_optimizer(adam, fwd=0.8, bwd=0.6)
    topkast_torch.save_forward(model, tmp_path / "file")
    with torch.device(device):
        loaded = make()
    topkast_torch.load_sparse(loaded, tmp_path / "file")
    for name in ("head.weight", "embedding.weight"):
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda model: setattr(model, "head", nn.Linear(16, 5)), r"head\.\w+ of shape .*4"),
            (lambda model: setattr(model, "conv", nn.Conv2d(4, 8, 1)), r"conv\.weight of shape"),
            (lambda model: setattr(model, "tail", nn.Linear(2, 2)), r"lacks \['tail\.bias"),
            (lambda model: delattr(model, "head"), r"has \['head\.bias', 'head\.weight'\] in add"),
        ],
    )
    def test_another_model(self, tmp_path: Path, change: Any, message: str) -> None:
        model, _, _ = prepare()
        topkast_torch.save_forward(model, tmp_path / "file")
        other = Network().eval()
        change(other)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(topkast.MismatchError, match=message):
            topkast_torch.load_sparse(other, tmp_path / "file")
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, before[name]), name

    def test_models_in_training(self, tmp_path: Path) -> None:
        model, optimizer, _ = prepare()
        topkast_torch.save_forward(model, tmp_path / "file")
        with pytest.raises(topkast.MismatchError, match=r"conv\.weight is trained by a wrapped"):
            topkast_torch.load_sparse(model, tmp_path / "file")
        topkast.sparsify(model, optimizer, auto=False)
        with pytest.raises(topkast.MismatchError, match="conv is a sparse layer already"):
            topkast_torch.load_sparse(model, tmp_path / "file")

    def test_a_dense_model_has_nothing_to_save(self, tmp_path: Path) -> None:
        with pytest.raises(topkast.MismatchError, match="no tensor of which half is zero"):
            topkast_torch.save_forward(nn.Linear(3, 3), tmp_path / "file")


def test_a_shared_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(torch.eye(20))
    model[1].weight = model[0].weight
    topkast_torch.save_forward(model, tmp_path / "file")
    other = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 30, bias=False))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(
        topkast.MismatchError, match=r"has 1\.weight of shape \(20, 20\), the model"
    ):
        topkast_torch.load_sparse(other, tmp_path / "file")
    assert [type(layer) for layer in other] == [nn.Linear, nn.Linear]
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name])


class TestExport:
    def make(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(
            nn.Conv2d(4, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 12),
            nn.ReLU(),
            nn.Linear(12, 4),
        )
        adam = torch.optim.Adam(model.named_parameters())
        topkast.sparsify(model, topkast.wrap_optimizer(adam, fwd=0.8, bwd=0.6), auto=False)
        return model.eval(), torch.randn(2, 4, 5, 5)

    def test_a_densified_copy_is_exported(self) -> None:
        model, x = self.make()
        dense = topkast.densify(copy.deepcopy(model))
        exported = torch.export.export(dense, (x,)).module()
        torch.testing.assert_close(exported(x), model(x))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_sparse_layers_are_refused_by_name(self) -> None:
        model, x = self.make()
        layer: Any = topkast_torch.SparseLinear(4, 4, fwd=0.5, bwd=0.5)
        chain = topkast_torch.SparseSequential(layer, nn.ReLU(), copy.deepcopy(layer))
        for module, inputs in ((model, x), (layer, torch.ones(1, 4)), (chain, torch.ones(1, 4))):
            for export in (torch.export.export, torch.jit.trace):
                with pytest.raises(topkast.MismatchError, match=r"export topkast\.densify\(copy"):
                    export(module, (inputs,))
