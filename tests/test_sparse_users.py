"""Sparse layers in use: derivatives, export, lists of Parameters, invalid structures, files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import topkast_torch
import torch
from topkast_torch import SparseLinear
from torch import Tensor, nn

import topkast

OPTIONS: dict[str, Any] = {"fwd": 0.8, "bwd": 0.5, "refresh_every": 3, "penalty": 0.1}


def make_layer(layer_type: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    if layer_type == "linear":
        return SparseLinear(6, 5, fwd=0.6, bwd=0.4).double(), torch.randn(3, 6).double()
    if layer_type == "linear, blocks":
        layer = SparseLinear(6, 4, fwd=0.6, bwd=0.4, block=(4, 1))
        return layer.double(), torch.randn(3, 6).double()
    dense = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1)).double()
    block = (2, 3) if layer_type == "convolution, blocks" else None
    inner = torch.optim.SGD(dense.named_parameters(), 0.1)
    opt = topkast.wrap_optimizer(inner, fwd=0.6, bwd=0.4, block=block)
    topkast.sparsify(dense, opt)
    return dense[0], torch.randn(2, 3, 5, 6).double()


@pytest.fixture(params=["linear", "linear, blocks", "convolution", "convolution, blocks"])
def layer_type(request: pytest.FixtureRequest) -> str:
    layer_type: str = request.param
    return layer_type


def masked_twin(layer: Any) -> Any:
    """A dense layer with the same forward view."""
    return topkast.densify(copy.deepcopy(layer))


class TestDerivatives:
    def test_second_derivatives(self, layer_type: str, backend: str) -> None:
        """A gradient penalty has the gradient of the dense layer, on B."""
        layer, x = make_layer(layer_type)
        twin = masked_twin(layer)
        results = []
        for model, weight in ((layer, layer.values), (twin, twin.weight)):
            inputs = x.clone().requires_grad_()
            output = model(inputs).tanh()
            by_input, by_weight = torch.autograd.grad(
                output.square().sum(), [inputs, weight], create_graph=True
            )
            if model is twin:
                outside = torch.ones(by_weight.numel(), dtype=torch.bool)
                outside[layer.support.entries] = False
                by_weight = torch.where(outside.view(by_weight.shape), 0, by_weight)
            loss = by_input.square().sum() + by_weight.square().sum()
            results.append(torch.autograd.grad(loss, [inputs, weight, model.bias]))
        (x_one, w_one, b_one), (x_two, w_two, b_two) = results
        torch.testing.assert_close(x_one, x_two)
        torch.testing.assert_close(b_one, b_two)
        on_b = w_two.reshape(-1)[layer.support.entries].view(w_one.shape)
        # The dense layer's output and gradient do not depend on B∖A.
        count = layer.support.forward_size
        torch.testing.assert_close(w_one.view(-1)[:count], on_b.view(-1)[:count])

    def test_functional_gradients(self, layer_type: str, backend: str) -> None:
        layer, x = make_layer(layer_type)
        params = dict(layer.named_parameters())

        def loss(params: Any, x: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(layer, params, x)
            return output.square().sum()

        grads = torch.func.grad(loss)(params, x)
        expected = torch.autograd.grad(loss(params, x), list(params.values()))
        for grad, expected_grad in zip(grads.values(), expected, strict=True):
            torch.testing.assert_close(grad, expected_grad)

    def test_gradients_per_sample(self, layer_type: str, backend: str) -> None:
        layer, x = make_layer(layer_type)
        params = dict(layer.named_parameters())

        def loss(params: Any, x: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(layer, params, x[None])
            return output.square().sum()

        grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
        for number in range(len(x)):
            expected = torch.func.grad(loss)(params, x[number])
            for name, grad in expected.items():
                torch.testing.assert_close(grads[name][number], grad)

    def test_vmap_over_inputs(self, layer_type: str, backend: str) -> None:
        layer, x = make_layer(layer_type)
        many = torch.stack([x, 2 * x, -x])
        torch.testing.assert_close(torch.func.vmap(layer)(many), torch.stack([*map(layer, many)]))


class TestCompileAndExport:
    @pytest.fixture(autouse=True)
    def reset_compiler(self) -> Iterator[None]:
        """Forget which functions other tests have compiled or failed to compile."""
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    def test_fullgraph_is_refused_by_name(self) -> None:
        layer, x = make_layer("linear")
        function: Any = torch.compile(layer, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="topkast's sparse products are not traced"):
            function(x)

    def test_export_is_refused_and_works_after_densify(self) -> None:
        layer, x = make_layer("linear")
        model = nn.Sequential(layer, nn.ReLU())
        with pytest.raises(Exception, match=r"topkast\.densify"):
            torch.export.export(model, (x,))
        dense = topkast.densify(copy.deepcopy(model))
        exported = torch.export.export(dense, (x,)).module()
        torch.testing.assert_close(exported(x), model(x))

    def test_compiling_around_a_step_with_a_refresh(self) -> None:
        layer = nn.Linear(20, 30)
        opt = topkast.wrap_optimizer(
            torch.optim.AdamW(layer.named_parameters()), fwd=0.9, bwd=0.8, refresh_every=2
        )
        step = torch.compile(lambda: opt.step(), backend="eager")
        for _ in range(4):
            opt.zero_grad()
            layer(torch.randn(8, 20)).square().mean().backward()
            step()
        assert topkast.summary(opt).updates == 4
        torch.compiler.reset()


def make_model() -> tuple[nn.Sequential, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    opt = topkast.wrap_optimizer(torch.optim.AdamW(model.named_parameters(), 0.02), **OPTIONS)
    return model, opt


def backward(model: nn.Module, step: int) -> Tensor:
    inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
    loss: Tensor = (model(inputs) - inputs[:, :4]).square().mean()
    loss.backward()
    return loss


class TestParameters:
    def test_parameters_keep_their_identity_and_are_trained(self) -> None:
        model, opt = make_model()
        params = list(model.parameters())
        loss = backward(model, 0)  # its graph stays alive and has the dense shapes
        opt.step()
        topkast.sparsify(model, opt)
        assert [id(param) for param in params] == [id(param) for param in model.parameters()]
        model.zero_grad()
        backward(model, 1)
        norm = torch.nn.utils.clip_grad_norm_(params, 1e-3)
        assert norm > 1e-3
        assert all(param.grad is not None and param.grad.norm() < 2e-3 for param in params)
        before = topkast.dense_params(opt)
        opt.step()
        assert not torch.equal(before["0.weight"], topkast.dense_params(opt)["0.weight"])
        del loss

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_an_accumulated_gradient_is_carried_over(self, dtype: torch.dtype) -> None:
        runs = []
        for sparse in (False, True):
            model, opt = make_model()
            backward(model, 0)
            if sparse:
                topkast.sparsify(model, opt)
            backward(model, 1)
            opt.step()
            runs.append(topkast.dense_params(opt))
        for name, theta in runs[0].items():
            torch.testing.assert_close(theta, runs[1][name])

    def test_optimizers_in_the_backward_pass(self) -> None:
        """One optimizer for each Parameter, stepped by a hook once its gradient is accumulated."""
        runs = []
        for sparse in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
            optimizers: dict[Any, Any] = {}
            for name, param in model.named_parameters():
                options = OPTIONS if param.dim() > 1 else OPTIONS | {"dense": True}
                optimizers[param] = topkast.wrap_optimizer(
                    torch.optim.SGD([(name, param)], 0.1), **options
                )
            if sparse:
                for param, opt in optimizers.items():
                    if param.dim() > 1:
                        topkast.sparsify(model, opt)

            def step(param: Tensor, optimizers: dict[Any, Any] = optimizers) -> None:
                optimizers[param].step()
                optimizers[param].zero_grad()

            for param in optimizers:
                param.register_post_accumulate_grad_hook(step)
            for number in range(7):
                backward(model, number)
            runs.append(
                {n: t for opt in optimizers.values() for n, t in topkast.dense_params(opt).items()}
            )
        for name, theta in runs[0].items():
            torch.testing.assert_close(theta, runs[1][name])

    def test_a_layer_sparsified_while_frozen_trains_once_unfrozen(self) -> None:
        runs = []
        for sparse in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
            model[0].weight.requires_grad_(False)
            opt = topkast.wrap_optimizer(
                torch.optim.SGD(model.named_parameters(), 0.1, momentum=0.9),
                **OPTIONS,
                explore_until=4,
            )
            if sparse:
                topkast.sparsify(model, opt)
            for number in range(9):
                if number == 5:
                    next(iter(model.parameters())).requires_grad_(True)
                opt.zero_grad()
                backward(model, number)
                opt.step()
            runs.append(topkast.dense_params(opt))
        for name, theta in runs[0].items():
            torch.testing.assert_close(theta, runs[1][name], rtol=1e-6, atol=1e-7)


class TestWeight:
    """``layer.weight`` is a read-only copy."""

    @pytest.mark.parametrize(
        "write",
        [
            lambda weight: weight.data.add_(1.0),
            lambda weight: weight.detach().mul_(2.0),
            lambda weight: weight.data.copy_(torch.zeros(5, 6)),
            lambda weight: setattr(weight, "data", torch.zeros(5, 6)),
            lambda weight: weight.data.view(-1).__setitem__(0, 1.0),
            lambda weight: nn.init.zeros_(weight),
            lambda weight: torch.add(weight.detach(), 1.0, out=weight.detach()),
            lambda weight: torch._foreach_add_([weight.detach()], 1.0),
            lambda weight: weight.data[0].zero_(),
        ],
    )
    def test_writes_are_refused(self, write: Any) -> None:
        """A write would be lost, such as that of merging an adapter."""
        layer, x = make_layer("linear")
        expected = layer(x)
        with pytest.raises(topkast.MismatchError, match=r"a read-only copy.*densify"):
            write(layer.weight)
        assert torch.equal(layer(x), expected)

    def test_reads_and_gradients_work(self) -> None:
        layer, x = make_layer("linear")
        torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
        assert type(layer.weight + 1) is type(layer.weight.clone()) is Tensor
        layer.weight.square().sum().backward()
        assert layer.values.grad.shape == layer.values.shape


class TestStructures:
    """Sets are checked whenever they change."""

    def test_permuted_entries_are_refused(self) -> None:
        layer, x = make_layer("linear")
        order = torch.randperm(len(layer.indices))
        layer.indices = layer.indices[order]
        with torch.no_grad():
            layer.values.copy_(layer.values[:, order])
        with pytest.raises(topkast.MismatchError, match="do not ascend"):
            layer(x)

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.indices.add_(1000),
            lambda layer: layer.indices.zero_(),
            lambda layer: setattr(layer, "indices", layer.indices.float()),
            lambda layer: setattr(layer, "indices", layer.indices[:-1]),
            lambda layer: setattr(layer, "indices", layer.indices[:, None]),
            lambda layer: setattr(layer, "active_count", len(layer.indices) + 1),
            lambda layer: setattr(layer, "active_count", float(layer.active_count)),
        ],
    )
    def test_invalid_sets_are_refused_before_a_product(self, change: Any) -> None:
        layer, x = make_layer("linear")
        layer(x)
        change(layer)
        with pytest.raises(
            topkast.MismatchError, match=r"the layer has (\d* ?indices|an index|\|A\|)"
        ):
            layer(x)

    @pytest.mark.parametrize("name", ["indices", "active_count", "shape", "values"])
    @pytest.mark.parametrize(
        "change",
        [
            lambda tensor: tensor[0] if tensor.dim() == 2 else tensor.view(-1, 1),
            lambda tensor: tensor[None],
            lambda tensor: None,
            lambda tensor: tensor.tolist(),
            lambda tensor: tensor.sum() if tensor.dim() else tensor + 1,
            lambda tensor: tensor.double() if tensor.dtype != torch.float64 else tensor[..., :-1],
        ],
        ids=["column", "row", "none", "list", "scalar", "dtype"],
    )
    def test_a_malformed_file_is_refused_by_name(self, name: str, change: Any) -> None:
        layer, x = make_layer("linear")
        expected = layer(x)
        state = layer.state_dict()
        state[name] = change(state[name])
        if name == "values" and torch.is_tensor(state[name]) and state[name].dtype != torch.float64:
            return
        with pytest.raises(topkast.MismatchError):
            layer.load_state_dict(state)
        assert torch.equal(layer(x), expected)

    def test_structure_is_not_in_buffers(self) -> None:
        model, opt = make_model()
        topkast.sparsify(model, opt)
        assert not list(model.buffers())
        assert {"0.indices", "0.active_count", "0.shape"} <= model.state_dict().keys()

    def test_densify_leaves_other_buffers_of_these_names_unchanged(self) -> None:
        state = {"indices": torch.arange(3), "shape": torch.tensor([2]), "values": torch.ones(3)}
        assert topkast.densify(state) == state

    def test_moving_keeps_the_structure(self) -> None:
        layer, x = make_layer("linear")
        expected = layer(x)
        assert torch.equal(layer.to("meta").indices, layer.indices)
        layer, x = make_layer("linear")
        torch.testing.assert_close(
            layer.float()(x.float()).double(), expected, rtol=1e-5, atol=1e-5
        )


class TestFiles:
    def test_tied_layers(self, tmp_path: Any) -> None:
        layer = nn.Linear(20, 20)
        model = nn.Sequential(layer, nn.ReLU(), layer)
        opt = topkast.wrap_optimizer(torch.optim.AdamW(model.named_parameters()), fwd=0.9, bwd=0.8)
        topkast.sparsify(model, opt)
        topkast_torch.save_forward(model, tmp_path / "tied.safetensors")
        state = topkast_torch.load_forward(tmp_path / "tied.safetensors")
        other = nn.Linear(20, 20)
        twin = nn.Sequential(other, nn.ReLU(), other)
        twin.load_state_dict(state)
        x = torch.randn(3, 20)
        torch.testing.assert_close(twin(x), model(x))

    @pytest.mark.parametrize(
        ("change", "metadata"),
        [
            ({}, {"format": "topkast-forward-1"}),
            ({}, {"format": "topkast-forward-1", "shapes": "no json"}),
            ({}, {"format": "topkast-forward-1", "shapes": "[1, 2]"}),
            ({}, {"format": "topkast-forward-1", "shapes": '{"weight": [-3, 5]}'}),
            ({}, {"format": "topkast-forward-1", "shapes": '{"weight": 7}'}),
            ({}, {"format": "topkast-forward-1", "shapes": '{"weight": [1000000, 1000000, 8]}'}),
            ({}, {"format": "topkast-forward-1", "shapes": '{"other": [5, 6]}'}),
            ({"weight.indices": torch.tensor([0.0, 1.0])}, {}),
            ({"weight.indices": torch.tensor([1, 0])}, {}),
            ({"weight.indices": torch.tensor([[0, 1]])}, {}),
            ({"weight.values": torch.tensor(1.0)}, {}),
            ({"weight.values": None}, {}),
        ],
    )
    def test_invalid_files_are_refused(
        self, tmp_path: Any, change: dict[str, Any], metadata: dict[str, str]
    ) -> None:
        from safetensors.torch import save_file

        tensors = {"weight.values": torch.ones(2), "weight.indices": torch.tensor([0, 1])} | change
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        metadata = metadata or {"format": "topkast-forward-1", "shapes": '{"weight": [5, 6]}'}
        save_file(tensors, tmp_path / "file", metadata=metadata)
        with pytest.raises(topkast.MismatchError, match="file"):
            topkast_torch.load_forward(tmp_path / "file")
