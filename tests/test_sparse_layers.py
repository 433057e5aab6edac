"""Sparse layers: gradients, inputs, state and conversion."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import topkast_torch
import torch
from sparse_training import OPTIONS, assert_agree, check_gradients, prepare, train
from torch import nn

import topkast


@pytest.mark.parametrize("shape", [(6,), (1, 6), (0, 6), (7, 6), (2, 3, 6), (129, 6)], ids=str)
@pytest.mark.parametrize(
    ("bias", "block"),
    [(True, None), (False, None), (True, (3, 1)), (True, (3, 2)), (True, (1, 3)), (True, (9, 6))],
)
def test_linear_gradients(
    backend: str, shape: tuple[int, ...], bias: bool, block: tuple[int, int] | None
) -> None:
    layer = topkast_torch.SparseLinear(
        6, 9, bias, fwd=0.7, bwd=0.4, block=block, dtype=torch.float64
    )
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    check_gradients(layer, inputs, nn.functional.linear)


@pytest.mark.parametrize("block", [None, (3, 1), (2, 2)])
def test_layers_used_directly(block: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    torch.manual_seed(0)
    sparse = nn.Sequential(
        topkast_torch.SparseLinear(20, 30, fwd=0.8, bwd=0.6, block=block),
        nn.ReLU(),
        nn.Linear(30, 5),
    )
    optimizers = []
    for model in (dense, sparse):
        opt = torch.optim.AdamW(model.named_parameters(), 1e-2)
        optimizers.append(topkast.wrap_optimizer(opt, **OPTIONS, block=block, dense="2.*"))
        train(model, optimizers[-1], torch.randn(16, 20, generator=torch.manual_seed(1)), 20)
    dense_masks, sparse_masks = (list(topkast.masks(opt).values()) for opt in optimizers)
    assert torch.equal(dense_masks[0].forward, sparse_masks[0].forward)
    assert topkast.summary(optimizers[1]).tensors[0].shape == (30, 20)
    theta, other = (next(iter(topkast.dense_params(opt).values())) for opt in optimizers)
    torch.testing.assert_close(theta, other, rtol=1e-5, atol=1e-6)


def test_a_layer_under_a_plain_optimizer_keeps_its_mask() -> None:
    layer = topkast_torch.SparseLinear(20, 30, fwd=0.8, bwd=0.8)
    before = layer.weight != 0
    train(layer, torch.optim.SGD(layer.parameters(), 0.1), torch.randn(8, 20), 5)
    assert torch.equal(layer.weight != 0, before)


def test_memory_of_a_linear_layers_products() -> None:
    """The kernels need at most 4 bytes for each entry of B besides its index."""
    pytest.importorskip("numba")
    for fwd, bwd in ((0.9, 0.8), (0.95, 0.9)):
        layer = topkast_torch.SparseLinear(1024, 512, fwd=fwd, bwd=bwd)
        layer(torch.randn(4, 1024, requires_grad=True)).sum().backward()
        assert layer.active_count < layer.products.nbytes <= 4 * layer.values.numel()


def make_sparse(layer: Any) -> Any:
    model = nn.Sequential(layer)
    inner = torch.optim.SGD(model.named_parameters(), 0.1)
    topkast.sparsify(model, topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8))
    return model[0]


@pytest.mark.parametrize(
    ("layer", "shape", "bytes_per_entry"),
    [(nn.Linear(400, 300), (4, 400), 6), (nn.Conv2d(48, 64, 3), (2, 48, 8, 8), 8)],
)
def test_only_an_input_gradient_makes_the_layout_of_the_transpose(
    layer: Any, shape: tuple[int, ...], bytes_per_entry: int
) -> None:
    """A first layer and inference have none: 6 bytes an entry of A, with offsets 10.

    What it is made from is dropped then.
    """
    pytest.importorskip("numba")
    sparse = make_sparse(layer)
    inputs = torch.randn(shape)
    sparse(inputs).sum().backward()
    held = sparse.products.nbytes
    sparse(inputs.requires_grad_()).sum().backward()
    assert sparse.products.nbytes - held > bytes_per_entry * sparse.active_count


@pytest.mark.parametrize("layer_type", ["linear", "convolution"])
def test_indices_written_to_between_the_passes_are_refused(layer_type: str) -> None:
    """The kernels read the indices in place, and would read invalid ones."""
    pytest.importorskip("numba")
    layer: Any = topkast_torch.SparseLinear(20, 30, fwd=0.8, bwd=0.6)
    inputs = torch.randn(4, 20)
    if layer_type == "convolution":
        model = nn.Sequential(nn.Conv2d(4, 6, 3))
        opt = torch.optim.SGD(model.named_parameters(), 0.1)
        topkast.sparsify(model, topkast.wrap_optimizer(opt, fwd=0.8, bwd=0.6))
        layer, inputs = model[0], torch.randn(2, 4, 6, 6)
    loss = layer(inputs).sum()
    layer.indices[: layer.active_count] = torch.arange(layer.active_count, dtype=torch.int32)
    with pytest.raises(topkast.MismatchError, match="written to between"):
        loss.backward()
    layer.indices = layer.support.indices.clone()


class TestInputs:
    def test_other_precisions_are_refused_except_under_autocast(self) -> None:
        layer = topkast_torch.SparseLinear(6, 9, fwd=0.8, bwd=0.6)
        inputs = torch.randn(4, 6)
        with pytest.raises(topkast.MismatchError, match=r"input .* has dtype torch\.bfloat16"):
            layer(inputs.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(inputs.bfloat16())
        assert output.dtype == torch.float32

    def test_inputs_on_another_device_are_refused(self) -> None:
        layer = topkast_torch.SparseLinear(6, 9, fwd=0.8, bwd=0.6)
        with pytest.raises(topkast.MismatchError, match="is on meta, its values on cpu: move"):
            layer(torch.empty(4, 6, device="meta"))

    def test_inputs_of_any_strides(self, backend: str) -> None:
        layer = topkast_torch.SparseLinear(6, 9, fwd=0.8, bwd=0.6)
        inputs = torch.randn(12, 10)[::2, 2:8]
        for strided in (inputs, inputs.t().contiguous().t(), inputs[:1].expand(5, 6)):
            torch.testing.assert_close(
                layer(strided), nn.functional.linear(strided, layer.weight, layer.bias)
            )

    @pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
    def test_outputs_and_gradients_may_be_viewed(
        self, backend: str, shape: tuple[int, ...]
    ) -> None:
        layer = topkast_torch.SparseLinear(6, 9, fwd=0.8, bwd=0.6)
        inputs = torch.randn(shape, requires_grad=True)
        output = layer(inputs)
        (grad_output,) = torch.autograd.grad(output.view(-1).sum(), inputs)
        assert output.is_contiguous()
        assert grad_output.is_contiguous()

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile reads it
    def test_compiled_models(self) -> None:
        model, opt, inputs = prepare("mlp")
        topkast.sparsify(model, opt)
        expected = model(inputs)
        output = torch.compile(model, backend="eager")(inputs)
        torch.testing.assert_close(output, expected)

    def test_frozen_layers_do_not_move(self) -> None:
        model, opt, inputs = prepare("mlp")
        model.get_parameter("2.weight").requires_grad_(False)
        topkast.sparsify(model, opt)
        before = topkast.dense_params(opt)["2.weight"]
        train(model, opt, inputs, 9)
        assert torch.equal(topkast.dense_params(opt)["2.weight"], before)

    def test_converting_a_model_in_training_raises(self) -> None:
        model, opt, inputs = prepare("mlp")
        topkast.sparsify(model, opt)
        model.double()
        with pytest.raises(topkast.MismatchError, match="was converted"):
            train(model, opt, inputs.double(), 1)


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

    def test_outputs_may_be_changed_in_place(self, backend: str) -> None:
        layer = self.make()
        output = torch.relu_(layer(torch.ones(4, 20)))
        output.sum().backward()
        assert layer.values.grad is not None

    def test_autocast_returns_float32(self, backend: str) -> None:
        layer = self.make()
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(torch.ones(4, 20))
        assert output.dtype == torch.float32

    def test_products_follow_written_buffers_and_values(self) -> None:
        """As averages of models and DistributedDataParallel write to them."""
        layer, other = self.make(), self.make()
        inputs = torch.ones(4, 20)
        layer(inputs)
        with torch.no_grad():
            for buffer, other_buffer in zip(layer.buffers(), other.buffers(), strict=True):
                buffer.copy_(other_buffer)
            layer.values.copy_(other.values)
        torch.testing.assert_close(
            layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias)
        )

    def test_replicas_with_one_state_stay_equal(self) -> None:
        replicas = [self.make(), self.make()]
        state = replicas[0].state_dict()
        for layer in replicas:
            assert not list(
                layer.buffers()
            )  # DistributedDataParallel would broadcast them at each step
            layer.load_state_dict(state)
        optimizers = [self.wrap(layer) for layer in replicas]
        for layer, opt in zip(replicas, optimizers, strict=True):
            train(layer, opt, torch.ones(4, 20), 5)
        assert_agree(optimizers[0], optimizers[1], 0.0)

    def test_a_loaded_layer_has_no_weights_outside_b(self) -> None:
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
        output = nn.functional.linear(inputs, layer.weight, layer.bias).square().sum()
        torch.testing.assert_close(torch.autograd.grad(output, layer.values)[0], direct)

    def test_low_precision_is_refused(self) -> None:
        with pytest.raises(topkast.UnsupportedTensorError, match="bfloat16"):
            self.make(dtype=torch.bfloat16)

    def test_a_layer_converted_to_low_precision_raises(self) -> None:
        with pytest.raises(topkast.MismatchError, match=r"converted to torch\.float16"):
            self.make().half()(torch.ones(4, 20).half())

    def test_saving_a_model_without_sparse_layers_raises(self, tmp_path: Path) -> None:
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

    def test_sparsify_removes_the_hooks_of_masked_execution(self) -> None:
        model, opt, _ = prepare("mlp")
        weights = [param for name, param in model.named_parameters() if "weight" in name]
        topkast.sparsify(model, opt)
        for weight in weights:  # masked execution's hook would expect a dense gradient
            (hook,) = weight._post_accumulate_grad_hooks.values()
            assert "_sparse_execution" in type(hook).__module__

    def test_a_layer_with_a_replaced_forward_stays_masked(self) -> None:
        model, opt, inputs = prepare("mlp")
        layer: Any = model.get_submodule("0")
        layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
        report = topkast.sparsify(model, opt)
        assert "forward function was replaced" in report.layers[0].reason
        train(model, opt, inputs, 2)
