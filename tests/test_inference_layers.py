"""Single layers of files of A without PyTorch: what is shared, what is refused, what is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import topkast_torch
import torch
from torch import nn

import topkast
import topkast.inference

pytest.importorskip("numba")


def thinned(layer: Any) -> Any:
    """A dense layer of which a fifth of the weights is not zero."""
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) > 0.8)
    return layer


def round_trip(model: nn.Module, path: Path) -> topkast.inference.Model:
    topkast_torch.save_forward(model, path / "file")
    return topkast.inference.load(path / "file")


def make_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(8)
    for tensor in (norm.running_mean, norm.bias):
        assert tensor is not None
        nn.init.normal_(tensor)
    return norm


class TestSharedTensors:
    """Layers may share some of their tensors and differ in the others."""

    @pytest.mark.parametrize(
        ("make", "shape"),
        [
            (lambda: thinned(nn.Linear(8, 8)), (3, 8)),
            (lambda: thinned(nn.Conv2d(8, 8, 3, padding=1)), (2, 8, 5, 5)),
            (make_norm, (2, 8, 5, 5)),
        ],
        ids=["linear", "convolution", "norm"],
    )
    def test_a_weight_with_biases_of_their_own(
        self, tmp_path: Path, make: Callable[[], Any], shape: tuple[int, ...]
    ) -> None:
        first, second, third = make(), make(), make()
        second.weight = first.weight
        third.weight, third.bias = first.weight, first.bias
        sparse = [thinned(nn.Linear(shape[-1], shape[-1]))]  # a file needs one
        model = nn.Sequential(first, nn.Tanh(), second, third, first, *sparse).eval()
        loaded = round_trip(model, tmp_path)
        x = torch.randn(shape)
        with torch.no_grad():
            np.testing.assert_allclose(loaded(x.numpy()), model(x), rtol=1e-4, atol=1e-5)
        assert loaded["4"] is loaded["0"]
        assert loaded["2"] is not loaded["0"]
        assert (loaded["3"] is loaded["0"]) == (make is not make_norm)  # it has statistics too

    def test_parts_of_one_storage(self, tmp_path: Path) -> None:
        model = thinned(nn.Linear(8, 8))
        model.register_buffer("whole", torch.arange(12.0).view(3, 4))
        model.register_buffer("rows", model.whole[1:])
        model.register_buffer("columns", model.whole.T)
        model.register_buffer("bits", model.whole.view(torch.int32))
        topkast_torch.save_forward(model, tmp_path / "file")
        for name, tensor in topkast_torch.load_forward(tmp_path / "file").items():
            assert torch.equal(tensor, model.state_dict()[name]), name


class TestLayersThatDoMore:
    """A layer is described only if its class says what a call does."""

    @pytest.mark.parametrize("where", ["0", "1", ""])
    @pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
    def test_hooks(self, tmp_path: Path, register: str, where: str) -> None:
        model = nn.Sequential(thinned(nn.Linear(8, 8)), nn.ReLU(), thinned(nn.Linear(8, 8)))
        module = model.get_submodule(where)
        handle = getattr(module, register)(lambda module, *arguments: None)
        loaded = round_trip(model, tmp_path)
        assert loaded.sequence is None
        assert list(loaded) == [name for name in ("0", "1", "2") if name != where]
        with pytest.raises(topkast.MismatchError, match="layers without hooks that"):
            loaded(np.ones((1, 8), np.float32))
        handle.remove()
        assert round_trip(model, tmp_path).sequence == ("0", "1", "2")

    def test_weights_that_are_computed_at_each_call(self, tmp_path: Path) -> None:
        from torch.nn.utils import prune

        pruned = prune.random_unstructured(nn.Linear(8, 8), "weight", amount=0.8)
        convolution = prune.random_unstructured(nn.Conv2d(2, 2, 3), "weight", amount=0.8)
        parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        model = nn.Sequential(pruned, parametrized, thinned(nn.Linear(8, 8)), convolution)
        loaded = round_trip(model, tmp_path)
        assert list(loaded) == ["2"]
        assert {"0.weight_orig", "0.weight_mask", "3.weight_orig"} <= loaded.arrays.keys()
        prune.remove(pruned, "weight")
        assert list(round_trip(model, tmp_path)) == ["0", "2"]

    def test_state_that_is_no_tensor(self, tmp_path: Path) -> None:
        class Counted(nn.Linear):
            def get_extra_state(self) -> Any:
                return {"calls": 3}

        with pytest.raises(topkast.MismatchError, match="_extra_state is a dict, but the file can"):
            topkast_torch.save_forward(thinned(Counted(8, 8)), tmp_path / "file")


MODULES: list[tuple[nn.Module, list[tuple[int, ...]]]] = [
    (make_norm(), [(2, 8, 3, 3), (8, 8, 8), (3, 8), (8,)]),
    (nn.BatchNorm1d(8), [(3, 8), (3, 8, 2), (3, 8, 2, 2), (8,)]),
    (nn.Flatten(), [(3, 4), (3, 4, 5), (0, 4, 5), (3,), ()]),
    (nn.Flatten(1, 2), [(3, 4, 5), (3, 4, 5, 6), (3, 4), (3,)]),
    (nn.Flatten(-2, -1), [(3, 4), (3, 4, 5), (3,)]),
    (nn.Flatten(2, 1), [(3, 4, 5), (3, 4)]),
    (nn.MaxPool2d(2), [(3, 4, 5), (2, 3, 4, 5), (0, 3, 4, 5), (4, 5), (1, 2, 3, 4, 5), (5,)]),
    (nn.MaxPool2d(3, 1, 1), [(3, 4, 5), (2, 3, 1, 1), (4, 5), (5,)]),
    (nn.AdaptiveAvgPool2d(1), [(4, 5), (3, 4, 5), (2, 3, 4, 5), (0, 3, 4, 5), (5,)]),
    (nn.Sigmoid(), [(3, 4), (), (0,)]),
    (nn.Tanh(), [(3, 4), (), (0,)]),
    (nn.ReLU(), [(3, 4), (), (0,)]),
]


@pytest.mark.parametrize(("module", "shapes"), MODULES, ids=lambda value: str(value)[:24])
def test_shapes_are_taken_and_refused_as_in_pytorch(
    tmp_path: Path, module: nn.Module, shapes: list[tuple[int, ...]]
) -> None:
    model = nn.ModuleDict({"one": module, "other": thinned(nn.Linear(8, 8))}).eval()
    loaded: Any = round_trip(model, tmp_path)["one"]
    for shape in shapes:
        x = torch.randn(shape)
        try:
            expected = module(x)
        except (ValueError, RuntimeError, IndexError):
            with pytest.raises(topkast.MismatchError):
                loaded(x.numpy())
        else:
            np.testing.assert_allclose(loaded(x.numpy()), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ReLU", "Sigmoid", "Tanh", "MaxPool2d"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((1, 4, 4), int), "takes floats, got int64"),
        (np.ma.masked_array(np.ones((1, 4, 4)), True), "got numpy.ma.*MaskedArray"),
        ([[[1.0]]], "takes a NumPy array, got builtins.list"),
    ],
)
def test_functions_refuse_what_is_no_array_of_floats(
    tmp_path: Path, name: str, x: Any, message: str
) -> None:
    module = nn.MaxPool2d(2) if name == "MaxPool2d" else getattr(nn, name)()
    loaded = round_trip(nn.Sequential(module, thinned(nn.Linear(8, 8))), tmp_path)
    with pytest.raises(topkast.MismatchError, match=message):
        loaded(x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_small_probabilities_keep_their_digits(tmp_path: Path, dtype: Any) -> None:
    loaded = round_trip(nn.Sequential(nn.Sigmoid(), thinned(nn.Linear(8, 8))), tmp_path)
    x = np.linspace(-80, 80, 161, dtype=dtype)
    expected = torch.from_numpy(x).sigmoid().numpy()
    actual = loaded["0"](x)
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    extremes = loaded["0"](np.asarray([-np.inf, -1e5, 1e5, np.inf, np.nan], dtype))
    np.testing.assert_array_equal(extremes, np.asarray([0, 0, 1, 1, np.nan], dtype))


def test_paths_that_are_no_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "file"):
        with pytest.raises(OSError, match=f"{path} cannot be written: "):
            topkast_torch.save_forward(thinned(nn.Linear(8, 8)), path)
        loads: Any = topkast.inference.load, topkast_torch.load_forward
        for load in loads:
            with pytest.raises(OSError, match=str(path)):
                load(path)


def test_what_was_loaded_outlives_its_file(tmp_path: Path) -> None:
    """A file that is written over is no memory of the tensors that were read from it."""
    model = nn.Sequential(thinned(nn.Linear(64, 64)), nn.Linear(64, 64))
    topkast_torch.save_forward(model, tmp_path / "file")
    state = topkast_torch.load_forward(tmp_path / "file")
    with torch.device("meta"):
        sparse = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    topkast_torch.load_sparse(sparse, tmp_path / "file")
    size = (tmp_path / "file").stat().st_size
    with (tmp_path / "file").open("r+b") as file:
        file.write(bytes(size))
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    x = torch.randn(3, 64)
    torch.testing.assert_close(sparse(x), model(x))
