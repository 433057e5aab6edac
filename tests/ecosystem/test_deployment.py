"""What is saved and exported, in the hands of other libraries: Transformers, ONNX."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import topkast_torch
import torch
from ecosystem.models import MODELS, TOKENS, logits, train, wrap
from torch import Tensor, nn

import topkast

CASES = [("gpt2", False), ("llama", False), ("llama", True), ("bert", False), ("bert", True)]


@pytest.mark.parametrize(("name", "sparse"), CASES)
def test_save_pretrained_saves_what_plain_transformers_loads(
    tmp_path: Path, name: str, sparse: bool
) -> None:
    model = MODELS[name]()
    optimizer = wrap(model, sparse)
    train(model, [optimizer], range(7))
    if sparse:
        model.save_pretrained(tmp_path, state_dict=topkast.densify(model.state_dict()))
    else:
        model.save_pretrained(tmp_path)
    masks = topkast.masks(optimizer)
    counts = {key: int(mask.forward.sum()) for key, mask in masks.items()}
    torch.save({"logits": logits(model), "counts": counts}, tmp_path / "expected.pt")
    code = f"""
import sys, torch
from transformers import {type(model).__name__}
model = {type(model).__name__}.from_pretrained(".").eval()
expected = torch.load("expected.pt")
with torch.no_grad():
    output = model(input_ids=torch.tensor({TOKENS[:4].tolist()})).logits
torch.testing.assert_close(output, expected["logits"])
for name, count in expected["counts"].items():
    assert int(torch.count_nonzero(model.get_parameter(name))) == count, name
assert not {{"topkast", "topkast_torch"}} & {{*sys.modules}}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200, cwd=tmp_path)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_file_of_a_becomes_sparse_layers_of_transformers(tmp_path: Path, name: str) -> None:
    model = MODELS[name]()
    optimizer = wrap(model, sparse=name != "gpt2")
    train(model, [optimizer], range(7))
    topkast_torch.save_forward(model, tmp_path / "file")
    loaded = MODELS[name]()
    topkast_torch.load_sparse(loaded, tmp_path / "file")
    torch.testing.assert_close(logits(loaded), logits(model))
    layers = [layer for layer in loaded.modules() if hasattr(layer, "values")]
    assert len(layers) == {"llama": 8, "bert": 7, "gpt2": 0}[name]  # without tied embeddings
    dense = MODELS[name]()
    dense.load_state_dict(topkast_torch.load_forward(tmp_path / "file"))
    torch.testing.assert_close(logits(dense), logits(model))


def make() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 12), nn.ReLU(), nn.Linear(12, 4)
    )
    adam = torch.optim.Adam(model.named_parameters())
    topkast.sparsify(model, topkast.wrap_optimizer(adam, fwd=0.8, bwd=0.6), auto=False)
    return model.eval(), torch.randn(2, 4, 5, 5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("dynamo", [True, False])
class TestONNX:
    def test_a_densified_copy_is_exported(self, tmp_path: Path, dynamo: bool) -> None:
        model, x = make()
        dense = topkast.densify(copy.deepcopy(model))
        path = tmp_path / "model.onnx"
        torch.onnx.export(dense, (x,), path, dynamo=dynamo, input_names=["x"])
        onnx.checker.check_model(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (output,) = session.run(None, {"x": x.numpy()})
        expected: Any = model(x).detach().numpy()
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)

    def test_sparse_layers_are_refused_with_the_remedy(self, tmp_path: Path, dynamo: bool) -> None:
        model, x = make()
        with pytest.raises(Exception, match=r"cannot be exported|Failed to export") as refusal:
            torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=dynamo)
        errors: list[BaseException] = [refusal.value]
        while (cause := errors[-1].__cause__) is not None:
            errors.append(cause)
        assert isinstance(errors[-1], topkast.MismatchError)
        assert "export topkast.densify(copy.deepcopy(model))" in str(errors[0])
