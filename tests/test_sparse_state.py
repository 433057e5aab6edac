"""State dicts, copies and files of sparse models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import topkast_torch
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sparse_training import CASES, assert_agree, prepare, train
from torch import Tensor

import topkast


class TestState:
    @pytest.mark.parametrize(("model", "options"), CASES)
    def test_densify_inverts_sparsify(self, model: str, options: dict[str, Any]) -> None:
        masked, masked_opt, inputs = prepare(model, **options)
        built, opt, _ = prepare(model, **options)
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

    @pytest.mark.parametrize(("model", "options"), [CASES[0], CASES[-2]])
    def test_a_dense_forward_view_loads_into_a_sparse_model(
        self, model: str, options: dict[str, Any]
    ) -> None:
        masked, masked_opt, inputs = prepare(model, **options)
        sparse, opt, _ = prepare(model, **options)
        topkast.sparsify(sparse, opt)
        train(masked, masked_opt, inputs, 3)  # the sets are still those of the first selection
        sparse.load_state_dict(masked.state_dict())
        torch.testing.assert_close(sparse(inputs), masked(inputs))
        train(sparse, opt, inputs, 2)
        with pytest.raises(topkast.MismatchError, match="outside the forward set"):
            sparse.load_state_dict(prepare(model, **options, dense=True)[0].state_dict())

    @pytest.mark.parametrize(("name", "options"), CASES[1:2] + CASES[3:])
    def test_a_sparse_state_resumes_bit_for_bit(self, name: str, options: dict[str, Any]) -> None:
        model, opt, inputs = prepare(name, **options)
        topkast.sparsify(model, opt)
        train(model, opt, inputs, 10)
        saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
        other, other_opt, _ = prepare(name, **options)
        topkast.sparsify(other, other_opt)
        other.load_state_dict(saved[0])
        with pytest.raises(topkast.MismatchError, match="load the optimizer's state dict too"):
            train(other, other_opt, inputs, 1)
        other_opt.load_state_dict(saved[1])
        for network, optimizer in ((model, opt), (other, other_opt)):
            train(network, optimizer, inputs, 10)
        assert_agree(opt, other_opt, 0.0)

    @pytest.mark.parametrize(("model", "options"), [CASES[0], CASES[-2]])
    def test_an_optimizer_state_moves_between_executions(
        self, model: str, options: dict[str, Any]
    ) -> None:
        masked, masked_opt, inputs = prepare(model, dtype=torch.float64, **options)
        sparse, sparse_opt, _ = prepare(model, dtype=torch.float64, **options)
        topkast.sparsify(sparse, sparse_opt)
        train(masked, masked_opt, inputs, 9)
        sparse_opt.load_state_dict(masked_opt.state_dict())
        with torch.no_grad():
            for name, param in masked.named_parameters():
                if not name.endswith("weight") or param.dim() == 1:
                    sparse.get_parameter(name).copy_(param)
            for buffer, other in zip(sparse.buffers(), masked.buffers(), strict=True):
                buffer.copy_(other)
        for network, optimizer in ((masked, masked_opt), (sparse, sparse_opt)):
            train(network, optimizer, inputs, 9)
        assert_agree(masked_opt, sparse_opt, 1e-11)

    @pytest.mark.parametrize(("name", "options"), [CASES[0], CASES[-2]])
    def test_copies_are_independent(self, name: str, options: dict[str, Any]) -> None:
        model, opt, inputs = prepare(name, **options)
        topkast.sparsify(model, opt)
        train(model, opt, inputs, 3)
        other, other_opt = copy.deepcopy((model, opt))
        loaded = pickle.loads(pickle.dumps(model))
        torch.testing.assert_close(loaded(inputs), model(inputs), rtol=0, atol=0)
        train(other, other_opt, inputs, 9)
        train(model, opt, inputs, 9)
        assert_agree(opt, other_opt, 0.0)

    @pytest.mark.parametrize("block", [None, (3, 2)])
    @pytest.mark.parametrize("name", ["indices", "active_count", "shape", "values"])
    def test_a_corrupt_structure_is_refused(self, name: str, block: Any) -> None:
        layer = topkast_torch.SparseLinear(6, 9, fwd=0.8, bwd=0.6, block=block)
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

    def test_the_block_is_saved_and_checked(self) -> None:
        layers = {
            block: topkast_torch.SparseLinear(6, 9, fwd=0.8, bwd=0.6, block=block)
            for block in (None, (3, 2), (3, 1), (1, 1))
        }
        state = layers[3, 2].state_dict()
        assert state["block"].tolist() == [3, 2]
        assert "block" not in layers[None].state_dict()
        assert layers[1, 1].block is None
        other = topkast_torch.SparseLinear(6, 9, fwd=0.8, bwd=0.6, block=(3, 2))
        other.load_state_dict(state)
        assert torch.equal(other.weight, layers[3, 2].weight)
        layers[1, 1].load_state_dict(layers[None].state_dict())
        for block, message in ((None, "the layer single weights"), ((3, 1), "blocks of 3 × 1")):
            before = layers[block].weight.clone()
            with pytest.raises(topkast.MismatchError, match=f"has blocks of 3 × 2, .*{message}"):
                layers[block].load_state_dict(state)
            assert torch.equal(layers[block].weight, before)
        without = {name: entry for name, entry in state.items() if name != "block"}
        with pytest.raises(topkast.MismatchError, match="has single weights, the layer blocks"):
            other.load_state_dict(without)
        malformed: list[tuple[Any, str]] = [
            (torch.tensor([3, 2, 1]), "two numbers"),
            (torch.tensor(3), "two numbers"),
            (torch.tensor([3.0, 2.0]), "integer dtype"),
            ([3, 2], "must be a tensor"),
            (torch.tensor([4, 2]), "do not divide a matrix of 9 × 6"),
            (torch.tensor([0, 2]), "do not divide"),
        ]
        for entry, message in malformed:
            with pytest.raises(topkast.MismatchError, match=message):
                other.load_state_dict(state | {"block": entry})

    @pytest.mark.parametrize("options", [{"block": (2, 2)}, {"block": (1, 4)}], ids=str)
    def test_files_of_blocks_are_those_of_single_weights(
        self, options: dict[str, Any], tmp_path: Path
    ) -> None:
        model, opt, inputs = prepare("divisible", **options)
        topkast.sparsify(model, opt)
        train(model, opt, inputs, 8)
        topkast_torch.save_forward(model, tmp_path / "file")
        loaded = topkast_torch.load_forward(tmp_path / "file")
        expected = topkast.densify(model).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in loaded)

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
