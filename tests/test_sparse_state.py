"""State dicts, copies and files of sparse models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import topkast_torch
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sparse_training import MODELS, assert_agree, mlp, prepare, train
from torch import Tensor

import topkast


class TestState:
    @pytest.mark.parametrize("model", MODELS)
    def test_densify_inverts_sparsify(self, model: str) -> None:
        masked, masked_opt, inputs = prepare(model)
        built, opt, _ = prepare(model)
        topkast.sparsify(built, opt)
        for network, optimizer in ((masked, masked_opt), (built, opt)):
            train(network, optimizer, inputs, 9)
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
        train(masked, masked_opt, inputs, 3)  # the sets are still those of the first selection
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
        for network, optimizer in ((model, opt), (other, other_opt)):
            train(network, optimizer, inputs, 10)
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
        for network, optimizer in ((masked, masked_opt), (sparse, sparse_opt)):
            train(network, optimizer, inputs, 9)
        assert_agree(masked_opt, sparse_opt, 1e-11)

    def test_copies_are_independent(self) -> None:
        model, opt, inputs = prepare("mlp")
        topkast.sparsify(model, opt)
        train(model, opt, inputs, 3)
        other, other_opt = copy.deepcopy((model, opt))
        train(other, other_opt, inputs, 9)
        train(model, opt, inputs, 9)
        assert_agree(opt, other_opt, 0.0)

    @pytest.mark.parametrize("name", ["indices", "active_count", "shape", "values"])
    def test_a_corrupt_structure_is_refused(self, name: str) -> None:
        layer = topkast_torch.SparseLinear(6, 9, fwd=0.8, bwd=0.6)
        before = copy.deepcopy(layer.state_dict())
        state = copy.deepcopy(before)
        incomplete = {key: entry for key, entry in before.items() if key != name}
        for strict in (True, False):
            with pytest.raises(topkast.MismatchError, match="must be loaded together"):
                layer.load_state_dict(incomplete, strict=strict)
        changes: dict[str, Callable[[Tensor], Tensor]] = {
            "indices": lambda entry: entry.flip(0),
            "active_count": lambda entry: entry + 1,
            "shape": lambda entry: entry.flip(0),
            "values": lambda entry: entry[:, 1:],
        }
        state[name] = changes[name](state[name])
        with pytest.raises(topkast.MismatchError, match="the state dict has"):
            layer.load_state_dict(state)
        for key, entry in layer.state_dict().items():
            assert torch.equal(entry, before[key]), key

    def test_safetensors_hold_only_the_forward_view(self, tmp_path: Path) -> None:
        model, opt, inputs = prepare("convolutional")
        topkast.sparsify(model, opt)
        train(model, opt, inputs, 8)
        path = tmp_path / "model.safetensors"
        topkast_torch.save_forward(model, path)
        with safe_open(path, framework="pt") as file:
            values = file.get_tensor("0.weight.values")
        assert values.shape == (87,)  # 20 % of 432
        dense = topkast_torch.load_forward(path)
        expected = topkast.densify(model).state_dict()
        assert dense.keys() == expected.keys()
        assert all(torch.equal(dense[name], expected[name]) for name in dense)
        save_file({"0.weight": torch.ones(2)}, path)
        with pytest.raises(topkast.MismatchError, match="not written by"):
            topkast_torch.load_forward(path)
