"""Tensors that a sparse layer may be given: every kind is read as PyTorch reads it, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import topkast_torch
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

import topkast


def linear(block: Any = None) -> Any:
    torch.manual_seed(0)
    layer = topkast_torch.SparseLinear(20, 24, fwd=0.8, bwd=0.5, block=block)
    return layer, torch.randn(5, 20)


def chain() -> Any:
    first, x = linear()
    second = topkast_torch.SparseLinear(24, 8, fwd=0.8, bwd=0.5)
    return topkast_torch.SparseSequential(first, nn.ReLU(), second, nn.ReLU()), x


def parallel() -> Any:
    first, x = linear()
    container = topkast_torch.SparseParallel(first, copy.deepcopy(first))
    return First(container), x


class First(nn.Module):
    """The first output of a module, plus twice the second."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Any) -> Tensor:
        first, second = self.module(x)
        combined: Tensor = first + 2 * second
        return combined


def convolution() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1))
    inner = torch.optim.SGD(model.named_parameters(), 0.1)
    topkast.sparsify(model, topkast.wrap_optimizer(inner, fwd=0.8, bwd=0.5))
    return model[0], torch.randn(3, 4, 6, 5)


MODULES: dict[str, Callable[[], Any]] = {
    "linear": linear,
    "units": lambda: linear((4, 1)),
    "blocks": lambda: linear((2, 2)),
    "chain": chain,
    "parallel": parallel,
    "convolution": convolution,
}
every_module = pytest.mark.parametrize("name", MODULES)

# Tensors whose memory does not hold their entries in order, and what they are made of.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": lambda x: torch._neg_view(-x),
    "conjugate": lambda x: torch.complex(x, -x).conj().imag,
    "zero": lambda x: torch._efficientzerotensor(x.shape),
    "expanded": lambda x: x[:1].expand_as(x),
    "strided": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "flipped": lambda x: x.flip(0),
}


def gradients(module: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The output and all gradients, for a changed gradient of the output."""
    inputs = x.detach().requires_grad_()
    sources = [inputs, *module.parameters()]
    output = module(inputs)
    grad_output = change(torch.linspace(-1, 1, output.numel()).view_as(output))
    grads = torch.autograd.grad(output, sources, grad_output, retain_graph=True)
    # And as a function that can be differentiated again.
    again = torch.autograd.grad(output, sources, grad_output, create_graph=True)
    (second,) = torch.autograd.grad(again[0].square().sum(), sources[1])
    return [output.detach(), *grads, *(grad.detach() for grad in again), second]


@every_module
@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_read_as_its_entries(name: str, view: str) -> None:
    """Of inputs, gradients of outputs, values and biases."""
    module, x = MODULES[name]()
    change = VIEWS[view]

    def plain(tensor: Tensor) -> Tensor:
        return change(tensor).clone().contiguous().resolve_neg()

    expected = gradients(module, plain(x), plain)
    actual = gradients(module, change(x), change)
    torch.testing.assert_close(actual, expected)  # PyTorch sums gradients of biases by strides
    params = {key: param.detach() for key, param in module.named_parameters()}
    with torch.no_grad():
        expected_output = torch.func.functional_call(
            module, {key: plain(param) for key, param in params.items()}, x
        )
        output = torch.func.functional_call(
            module, {key: change(param) for key, param in params.items()}, x
        )
    assert torch.equal(output, expected_output)


@every_module
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_no_dense_tensor_of_floats_is_refused(name: str) -> None:
    module, x = MODULES[name]()
    nested, jagged = (
        torch.nested.nested_tensor([x[0], x[1]], layout=layout)
        for layout in (torch.strided, torch.jagged)
    )
    for wrong, message in [
        (None, "takes a torch.Tensor, got builtins.NoneType"),
        (x.numpy(), "takes a torch.Tensor, got numpy.ndarray"),
        (x.to_sparse(), "takes a dense tensor, got torch.sparse_coo"),
        (nested, "takes a dense tensor, got a nested one"),
        (jagged, "takes a dense tensor, got a nested one"),
        (x.long(), "has dtype torch.int64"),
        (torch.tensor(1.0), r"got an input of shape \(\)"),
    ]:
        with pytest.raises(topkast.MismatchError, match=message):
            module(wrong)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.complex64, torch.int64):  # a conversion would drop a part, or digits
            with pytest.raises(topkast.MismatchError, match=rf"has dtype {dtype}.*input$"):
                module(x.to(dtype))


@every_module
@pytest.mark.parametrize("takes_gradients", [True, False])
@pytest.mark.filterwarnings("ignore:.*jit.script. is deprecated")  # PyTorch calls it
def test_forward_mode_is_refused(name: str, takes_gradients: bool) -> None:
    """Also without gradients, where a tangent would get lost."""
    module, x = MODULES[name]()
    with torch.set_grad_enabled(takes_gradients):
        with (
            forward_ad.dual_level(),
            pytest.raises(topkast.MismatchError, match="no forward-mode derivatives"),
        ):
            module(forward_ad.make_dual(x, x))
        with pytest.raises(topkast.MismatchError, match="no forward-mode derivatives"):
            torch.func.jvp(module, (x,), (x,))
        with forward_ad.dual_level():
            assert torch.equal(module(x), MODULES[name]()[0](x))


@pytest.mark.parametrize("name", ["linear", "units", "blocks", "convolution"])
def test_infinity_and_nan_reach_what_a_weight_of_a_connects_with_them(name: str) -> None:
    module, x = MODULES[name]()
    connects = (module.weight.detach().as_subclass(Tensor) != 0).to(x.dtype)
    x.view(-1)[3], x.view(-1)[-1] = torch.nan, torch.inf
    reached = (~x.isfinite()).to(x.dtype)
    if isinstance(module, topkast_torch.SparseLinear):
        expected = reached @ connects.T > 0
    else:
        window = module.stride, module.padding, module.dilation, module.groups
        expected = nn.functional.conv2d(reached, connects, None, *window) > 0
    assert torch.equal(~module(x).isfinite(), expected)


@pytest.mark.filterwarnings("ignore:.*jit.script. is deprecated")  # PyTorch calls it
def test_forward_mode_through_the_dense_weight_is_refused() -> None:
    layer = topkast_torch.SparseLinear(8, 6, fwd=0.5, bwd=0.25)
    kept = layer.values.detach()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(kept, kept)
        with pytest.raises(topkast.MismatchError, match="no forward-mode derivatives"):
            torch.func.functional_call(DenseWeight(layer), {"layer.values": dual}, (kept,))


class DenseWeight(nn.Module):
    def __init__(self, layer: topkast_torch.SparseLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, _: Tensor) -> Tensor:
        return self.layer.weight


@every_module
def test_what_hooks_of_saved_tensors_return_is_checked(name: str) -> None:
    module, x = MODULES[name]()
    expected = gradients(module, x, Tensor.contiguous)

    def to_memory(tensor: Tensor) -> Any:
        return tensor.detach().numpy().copy(order="F"), tensor.shape

    with saved_tensors_hooks(to_memory, lambda pair: torch.from_numpy(pair[0]).view(pair[1])):
        actual = gradients(module, x, Tensor.contiguous)
    for first, second in zip(actual, expected, strict=True):
        assert torch.equal(first, second)
    for lossy in (Tensor.half, lambda tensor: tensor.flatten()[:1]):
        with saved_tensors_hooks(lossy, lambda tensor: tensor):
            output = module(x.requires_grad_())
        with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)):
            output.sum().backward()


@every_module
def test_layers_that_inference_mode_copied(name: str) -> None:
    module, x = MODULES[name]()
    expected = module(x)
    with torch.inference_mode():
        copied = copy.deepcopy(module)
        assert torch.equal(copied(x), expected)
    with torch.no_grad():
        assert torch.equal(copied(x), expected)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "convolution"])
def test_layers_that_inference_mode_made(name: str) -> None:
    expected = MODULES[name]()[0](MODULES[name]()[1])
    with torch.inference_mode():
        module, x = MODULES[name]()
        assert torch.equal(module(x), expected)
    with torch.no_grad():
        assert torch.equal(module(x), expected)


@every_module
def test_layers_that_are_trained_after_a_call_in_inference_mode(name: str) -> None:
    (module, x), (other, _) = MODULES[name](), MODULES[name]()
    with torch.inference_mode():
        module(x)
    for first, second in zip(
        gradients(module, x, Tensor.contiguous),
        gradients(other, x, Tensor.contiguous),
        strict=True,
    ):
        assert torch.equal(first, second)


def loss(output: Tensor) -> Tensor:
    return output.sin().sum()


@every_module
def test_second_derivatives_by_function_transforms(name: str) -> None:
    """Transforms of transforms see what autograd computes."""
    module, x = MODULES[name]()
    module, x = module.double(), x[:2].double()
    params = dict(module.named_parameters())
    key, first = next((key, param) for key, param in params.items() if key.endswith("values"))

    def compute(x: Tensor, values: Tensor) -> Tensor:
        return loss(torch.func.functional_call(module, {key: values}, x))

    def penalty(x: Tensor, values: Tensor) -> Tensor:
        grads = torch.func.grad(compute, argnums=(0, 1))(x, values)
        return torch.stack([grad.square().sum() for grad in grads]).sum()

    inputs = x.clone().requires_grad_()
    grads = torch.autograd.grad(compute(inputs, first), (inputs, first), create_graph=True)
    norm = torch.stack([grad.square().sum() for grad in grads]).sum()
    expected = torch.autograd.grad(norm, (inputs, first))
    values = first.detach()
    actual = torch.func.grad(penalty, argnums=(0, 1))(x, values)
    torch.testing.assert_close(actual, expected)
    hessian = torch.func.jacrev(torch.func.grad(compute))(x, values)
    torch.testing.assert_close(
        hessian, torch.autograd.functional.hessian(lambda x: compute(x, values), x)
    )
    batched = torch.vmap(torch.func.grad(penalty), in_dims=(0, None))
    examples = torch.stack([x, 2 * x])
    one_by_one = [torch.func.grad(penalty)(example, values) for example in examples]
    torch.testing.assert_close(batched(examples, values), torch.stack(one_by_one))


@every_module
def test_third_derivatives_are_refused(name: str) -> None:
    module, x = MODULES[name]()
    x.requires_grad_()
    (first,) = torch.autograd.grad(loss(module(x)), x, create_graph=True)
    (second,) = torch.autograd.grad(loss(first), x, create_graph=True)
    with pytest.raises(topkast.MismatchError, match="first and second derivatives alone"):
        loss(second).backward()
