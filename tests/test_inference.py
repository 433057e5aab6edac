"""Inference on A without PyTorch: the same outputs, by layers and in a row."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import topkast_torch
import torch
from torch import Tensor, nn

import topkast
import topkast.inference
from topkast.inference._weights import make_weight

pytest.importorskip("numba")

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def sparsified(
    model: nn.Module, dense: Any = None, block: tuple[int, int] | None = None
) -> nn.Module:
    """The model in evaluation, with sparse layers."""
    adam = torch.optim.Adam(model.named_parameters())
    options: Any = {"fwd": 0.8, "bwd": 0.6, "dense": dense, "block": block}
    topkast.sparsify(model, topkast.wrap_optimizer(adam, **options), auto=False)
    return model.eval()


def round_trip(model: nn.Module, path: Path) -> topkast.inference.Model:
    topkast_torch.save_forward(model, path / "file")
    return topkast.inference.load(path / "file")


def assert_same(model: topkast.inference.Model, expected: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        output = expected(x).numpy()
    actual = model(x.numpy())
    assert actual.shape == output.shape
    assert actual.dtype == output.dtype
    tolerance = TOLERANCE[x.dtype]
    np.testing.assert_allclose(actual, output, rtol=tolerance, atol=tolerance)


def make_mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two sparse layers in a chain, one without a bias, and a dense one."""
    return nn.Sequential(
        nn.Linear(24, 40),
        nn.ReLU(),
        nn.Linear(40, 32, bias=False),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 6),
        nn.Sigmoid(),
    ).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("block", [None, (2, 1), (4, 1), (2, 2)], ids=str)
def test_linear_layers(tmp_path: Path, dtype: torch.dtype, block: Any) -> None:
    model = sparsified(make_mlp(dtype), dense="7.*", block=block)
    loaded = round_trip(model, tmp_path)
    for shape in ((24,), (0, 24), (1, 24), (37, 24), (2, 3, 24)):
        assert_same(loaded, model, torch.randn(shape, dtype=dtype))
    rows = {None: 1, (2, 1): 2, (4, 1): 4, (2, 2): 2}[block]
    for name in ("0", "2"):
        layer: Any = loaded[name]
        assert layer.is_sparse
        assert layer.rows == rows
        assert layer.active == layer.shape[0] * layer.shape[1] // 5
    last: Any = loaded["7"]
    assert not last.is_sparse
    assert last.active == 6 * 16


def test_neighbours_of_other_units_do_not_join(tmp_path: Path) -> None:
    widths, blocks = (24, 40, 32, 32, 8), (None, (2, 1), (2, 1), (4, 1))
    layers = [
        topkast_torch.SparseLinear(width, rows, fwd=0.8, bwd=0.8, block=block)
        for (width, rows), block in zip(itertools.pairwise(widths), blocks, strict=True)
    ]
    model = nn.Sequential(*layers[:2], nn.ReLU(), nn.ReLU(), *layers[2:], nn.Tanh(), nn.ReLU())
    loaded = round_trip(model, tmp_path)
    assert_same(loaded, model, torch.randn(7, 24))
    assert [loaded[name].rows for name in ("0", "1", "4", "5")] == [1, 2, 2, 4]  # type: ignore[attr-defined]


def make_convolutional(dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Sequential(
            nn.Conv2d(16, 32, (3, 2), stride=(1, 2), dilation=(2, 1), groups=4, bias=False),
            nn.ReLU(),
        ),
        nn.Conv2d(32, 8, 2, padding="same"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.BatchNorm1d(5, affine=False),
    ).to(dtype)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("block", [None, (2, 1)], ids=str)
def test_convolutions(tmp_path: Path, dtype: torch.dtype, block: Any) -> None:
    torch.manual_seed(0)
    model: Any = make_convolutional(dtype)
    model(torch.randn(16, 4, 14, 11, dtype=dtype))  # running statistics
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
            nn.init.uniform_(module.bias)
    model = sparsified(model, dense=["0.*", "8.*"], block=block)  # a dense convolution too
    loaded = round_trip(model, tmp_path)
    for shape in ((3, 4, 14, 11), (1, 4, 14, 11), (17, 4, 9, 12)):
        assert_same(loaded, model, torch.randn(shape, dtype=dtype))
    image = torch.randn(4, 14, 11, dtype=dtype)
    first: Any = loaded["0"]
    np.testing.assert_allclose(
        first(image.numpy()), model[0](image).detach().numpy(), rtol=1e-4, atol=1e-5
    )
    assert first.active == first.shape[0] * 4 * 9
    inner: Any = loaded["4.0"]
    sparse: Any = model[4]
    assert inner.active == sparse[0].support.forward_size < 160
    assert loaded.sequence == ("0", "1", "2", "3", "4.0", "4.1", "5", "6", "7", "8", "9")


class Composed(nn.Module):
    """No sequence: an embedding, two heads, a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 24)
        self.body, self.head = nn.Linear(24, 24), nn.Linear(24, 5)
        self.again = self.body
        self.norm = nn.LayerNorm(24)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.body(self.embedding(tokens)).relu()
        output: Tensor = self.head(self.norm(self.again(hidden)))
        return output


def test_other_models_are_composed_of_their_layers(tmp_path: Path) -> None:
    model = sparsified(Composed(), dense="head*")
    loaded = round_trip(model, tmp_path)
    assert list(loaded) == ["body", "head", "again"]
    assert loaded["again"] is loaded["body"]
    assert loaded.arrays.keys() == {"embedding.weight", "norm.weight", "norm.bias"}
    tokens = torch.tensor([3, 1, 4])
    hidden = np.maximum(loaded["body"](loaded.arrays["embedding.weight"][tokens.numpy()]), 0)
    hidden = loaded["again"](hidden)
    hidden -= hidden.mean(-1, keepdims=True)
    hidden /= np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(loaded["head"](hidden), model(tokens), rtol=1e-4, atol=1e-5)
    with pytest.raises(topkast.MismatchError, match=r"model\['body'\]\(x\)"):
        loaded(hidden)
    with pytest.raises(KeyError, match="no layer 'tail', only 'body', 'head', 'again'"):
        _ = loaded["tail"]


def test_layers_that_are_not_known_are_left_out(tmp_path: Path) -> None:
    layers = {
        "gelu": nn.GELU(),
        "mirror": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        "pool": nn.MaxPool2d(2, ceil_mode=True),
        "batch": nn.BatchNorm2d(4, track_running_stats=False),
        "mean": nn.AdaptiveAvgPool2d(2),
        "known": nn.Linear(20, 20),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    loaded = round_trip(sparsified(model), tmp_path)
    assert list(loaded) == ["known"]
    assert loaded.sequence is None


def test_a_masked_model_and_one_that_was_made_dense_again(tmp_path: Path) -> None:
    model = make_mlp()
    adam = torch.optim.Adam(model.named_parameters())
    optimizer = topkast.wrap_optimizer(adam, fwd=0.8, bwd=0.6, dense="7.*")
    x = torch.randn(5, 24)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    files = []
    for make in (lambda: None, lambda: topkast.sparsify(model, optimizer, auto=False)):
        make()
        loaded = round_trip(model.eval(), tmp_path)
        assert_same(loaded, model, x)
        files.append((tmp_path / "file").stat().st_size)
    topkast.densify(model)
    assert_same(round_trip(model, tmp_path), model, x)
    assert abs(files[0] - files[1]) < 100  # the order of entries in the header may differ


def test_several_threads_call_one_model(tmp_path: Path) -> None:
    model = sparsified(make_mlp(), dense="7.*")
    loaded = round_trip(model, tmp_path)
    inputs = [torch.randn(1 + number % 7, 24) for number in range(200)]
    with torch.no_grad():
        expected = [model(x).numpy() for x in inputs]
    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(lambda x: loaded(x.numpy()), inputs))
    for actual, output in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(actual, output, rtol=1e-5, atol=1e-6)


def test_pytorch_is_not_imported(tmp_path: Path) -> None:
    model = sparsified(
        nn.Sequential(
            nn.Conv2d(4, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 12),
            nn.ReLU(),
            nn.Linear(12, 12),
        )
    )
    x = torch.randn(3, 4, 5, 5)
    topkast_torch.save_forward(model, tmp_path / "file")
    np.save(tmp_path / "x.npy", x.numpy())
    with torch.no_grad():
        np.save(tmp_path / "y.npy", model(x).numpy())
    code = """
import sys
import numpy as np
import topkast.inference
model = topkast.inference.load("file")
np.testing.assert_allclose(model(np.load("x.npy")), np.load("y.npy"), rtol=1e-5, atol=1e-6)
assert not {"torch", "jax", "topkast_torch", "safetensors.torch"} & {*sys.modules}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)


def test_bytes_are_counted(tmp_path: Path) -> None:
    model = sparsified(nn.Sequential(nn.Linear(100, 100), nn.ReLU()))
    loaded = round_trip(model, tmp_path)
    layer: Any = loaded["0"]
    assert layer.nbytes == 8 * 2000 + 400 + layer.products.nbytes
    assert loaded.nbytes == layer.nbytes


class TestInputs:
    @pytest.mark.parametrize(
        ("name", "x", "message"),
        [
            ("0", np.ones((2, 4, 5, 5)), "layer 0 has dtype float32, its input float64"),
            ("0", np.ones((2, 3, 5, 5), "float32"), "layer 0 takes images of 4 channels"),
            ("0", np.ones((5, 5), "float32"), "layer 0 takes images of 4 channels"),
            ("0", np.ones((2, 4, 2, 5), "float32"), r"layer 0: a window of \(3, 3\) does not fit"),
            ("1", np.ones((2, 3, 4, 4), "float32"), "layer 1 takes 8 channels"),
            ("3", np.ones((2, 71), "float32"), "layer 3 takes 72 features"),
            ("3", np.float32(1.0), "takes a NumPy array, got numpy.float32"),
            ("3", torch.ones(2, 72), "takes a NumPy array, got torch.Tensor"),
            ("4", np.ones((2, 11), "float32"), "layer 4 takes 12 features"),
        ],
    )
    def test_they_are_refused_by_name(
        self, tmp_path: Path, name: str, x: Any, message: str
    ) -> None:
        model = nn.Sequential(
            nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 12), nn.Linear(12, 4)
        )
        loaded = round_trip(sparsified(model, dense="4.*"), tmp_path)
        with pytest.raises(topkast.MismatchError, match=message):
            loaded[name](x)

    def test_inputs_that_are_not_contiguous_or_read_only(self, tmp_path: Path) -> None:
        model = sparsified(make_mlp(), dense="7.*")
        loaded = round_trip(model, tmp_path)
        x = np.random.default_rng(0).standard_normal((24, 6)).astype("float32")
        read_only = np.ascontiguousarray(x.T)
        read_only.flags.writeable = False
        np.testing.assert_array_equal(loaded(x.T), loaded(read_only))


CONVOLUTION: dict[str, Any] = {
    "type": "Conv2d",
    "stride": [1, 1],
    "padding": [[0, 0], [0, 0]],
    "dilation": [1, 1],
    "groups": 1,
}


class TestFiles:
    def write(self, path: Path, tensors: dict[str, Any], **metadata: Any) -> Path:
        from safetensors.numpy import save_file

        entries = {
            name: entry if isinstance(entry, str) else json.dumps(entry)
            for name, entry in metadata.items()
        }
        save_file(tensors, path / "file", metadata={"format": "topkast-forward-1"} | entries)
        return path / "file"

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            ({"layers": {"fc": {"type": "Attention"}}}, "'Attention', which this version does not"),
            ({"layers": {"fc": {}}}, "file is not a valid file .*'type'"),
            ({"layers": {"fc": 3}}, "file is not a valid file"),
            ({"layers": {"fc": {"type": "Conv2d"}}}, "needs a weight with 4 axes"),
            ({"layers": {"fc": {"type": "BatchNorm", "epsilon": 1}}}, "needs running_mean"),
            ({"layers": {"conv": CONVOLUTION | {"groups": 0}}}, "must divide 4 channels, got 0"),
            ({"layers": {"conv": CONVOLUTION | {"stride": [0, 1]}}}, r"at least 1, got \[0, 1\]"),
            ({"layers": {"conv": CONVOLUTION | {"padding": []}}}, "file is not a valid file"),
            (
                {"layers": {"conv": CONVOLUTION | {"padding": [[0, 0], [-1, 0]]}}},
                r"at least 0, got \[-1, 0\]",
            ),
            ({"layers": {"conv": CONVOLUTION | {"groups": 3}}}, "must divide 4 channels, got 3"),
            ({"layers": {"other": {"type": "Linear"}}}, "needs a weight with 2 axes, got None"),
            ({"sequence": ["fc"]}, "names layers that it lacks"),
            ({"layers": "[" * 5000}, "file is not a valid file"),
            ({"shapes": {"fc.weight": [True, 6]}}, r"a list of lengths, got \[True, 6\]"),
            ({"format": "topkast-forward-9"}, "its format is 'topkast-forward-9', expected"),
            ({"shapes": {"fc.weight": [1, 2]}}, r"indices of fc\.weight must ascend in \[0, 2\)"),
        ],
    )
    def test_other_descriptions_are_refused(
        self, tmp_path: Path, metadata: dict[str, Any], message: str
    ) -> None:
        tensors = {
            "fc.weight.values": np.ones(2, "float32"),
            "fc.weight.indices": np.asarray([0, 3], "int32"),
            "conv.weight": np.ones((4, 2, 3, 3), "float32"),
        }
        path = self.write(tmp_path, tensors, **{"shapes": {"fc.weight": [2, 3]}} | metadata)
        with pytest.raises(topkast.MismatchError, match=message):
            topkast.inference.load(path)

    def test_what_is_no_file_of_ours_is_refused(self, tmp_path: Path) -> None:
        model = sparsified(nn.Sequential(nn.Linear(24, 24)))
        topkast_torch.save_forward(model, tmp_path / "file")
        whole = (tmp_path / "file").read_bytes()
        for content in (b"", b"\x00" * 7, whole[:-1], whole[: len(whole) // 2], b"no" * 200):
            (tmp_path / "other").write_bytes(content)
            loads: Any = topkast.inference.load, topkast_torch.load_forward
            for load in loads:
                with pytest.raises(topkast.MismatchError, match="other is damaged"):
                    load(tmp_path / "other")
        with pytest.raises(FileNotFoundError):
            topkast.inference.load(tmp_path / "missing")

    def test_low_precision_is_refused(self, tmp_path: Path) -> None:
        for dtype, message in (
            (torch.bfloat16, "BF16, which NumPy does not have: save model.float"),
            (torch.float16, "float16, but the kernels need float32 or float64"),
        ):
            layer = nn.Linear(24, 24).to(dtype)
            with torch.no_grad():
                layer.weight[1:] = 0
            topkast_torch.save_forward(layer, tmp_path / "file")
            with pytest.raises(topkast.MismatchError, match=message):
                topkast.inference.load(tmp_path / "file")


@pytest.mark.parametrize("seed", range(20))
def test_units_are_found_only_where_all_are_complete(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = int(rng.choice([2, 4, 8]))
    mask = np.repeat(rng.random((3, 7)) < 0.5, rows, axis=0)
    mask[:rows, 0] = True
    mask[rows : 2 * rows, 0] = False  # no two units below each other in this column
    dense = np.where(mask, rng.standard_normal(mask.shape), 0)
    indices = np.flatnonzero(mask).astype(np.int32)
    weight = make_weight("w", mask.shape, indices, dense.reshape(-1)[indices])
    assert weight.rows in (rows, rows // 2) or weight.rows % rows == 0
    restored = np.zeros(mask.shape)
    unit_rows, columns = np.divmod(weight.indices, 7)
    for number in range(weight.rows):
        restored[unit_rows * weight.rows + number, columns] = weight.values[number :: weight.rows]
    np.testing.assert_array_equal(restored, dense)
    broken = np.delete(indices, int(rng.integers(len(indices))))
    assert make_weight("w", mask.shape, broken, dense.reshape(-1)[broken]).rows < rows
