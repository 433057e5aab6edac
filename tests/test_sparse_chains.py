"""Sparse layers in a row: the same bits as one by one, and one by one where something looks on."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import pytest
import topkast_torch
import torch
from topkast_torch.sparse.chains import _chain, _sequential
from torch import Tensor, nn

import topkast

pytest.importorskip("numba")

WIDTHS = (30, 40, 140, 20)


def make_layers(
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    last_relu: bool = False,
    block: tuple[int, int] | None = None,
) -> list[nn.Module]:
    """Sparse layers with ReLUs after the first and the third, and after the last if asked for."""
    modules: list[nn.Module] = []
    for number, (width, rows) in enumerate(zip(WIDTHS, (*WIDTHS[1:], 10), strict=True)):
        options: Any = {"fwd": 0.8, "bwd": 0.6, "dtype": dtype, "block": block}
        modules.append(topkast_torch.SparseLinear(width, rows, bias, **options))
        if number % 2 == 0 or (last_relu and rows == 10):
            modules.append(nn.ReLU())
    return modules


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of all Parameters and of x if it needs one."""
    output = model(x)
    sources = [tensor for tensor in (x, *model.parameters()) if tensor.requires_grad]
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, sources, weights)]


def assert_equal(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def count_chains(model: nn.Module, x: Tensor) -> int:
    """How many chains a forward pass runs."""
    with patch.object(_sequential, "run_chain", side_effect=_chain.run_chain) as chain:
        model(x)
    return chain.call_count


@pytest.mark.parametrize("shape", [(30,), (0, 30), (1, 30), (37, 30), (2, 150, 30)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("last_relu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("block", [None, (2, 1)], ids=str)
def test_a_chain_has_the_bits_of_its_layers(
    shape: tuple[int, ...], bias: bool, last_relu: bool, dtype: torch.dtype, block: Any
) -> None:
    modules = make_layers(bias=bias, dtype=dtype, last_relu=last_relu, block=block)
    chain = topkast_torch.SparseSequential(*modules)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    assert count_chains(chain, x) == (0 if shape == (30,) else 1) or len(shape) == 1
    assert_equal(run(chain, x), run(nn.Sequential(*modules), x))
    with torch.no_grad():
        assert torch.equal(chain(x), nn.Sequential(*modules)(x))


@pytest.mark.parametrize("block", [None, (2, 1)], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(block: Any) -> None:
    """Nor on which thread is first: a product waits for what it reads.

    Each input is new, since memory that is used again has the results of the call before.
    """
    chain = topkast_torch.SparseSequential(*make_layers(last_relu=True, block=block))
    inputs = [torch.randn(1500, 30, requires_grad=True) for _ in range(50)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            results.append([run(chain, x) for x in inputs])
    finally:
        torch.set_num_threads(threads)
    for one, five in zip(*results, strict=True):
        assert_equal(one, five)


@pytest.mark.parametrize("block", [None, (2, 1)], ids=str)
def test_only_the_gradients_that_are_needed(block: Any) -> None:
    """Frozen values and biases, with an input that has no gradient or has one."""
    modules = make_layers(last_relu=True, block=block)
    chain, plain = topkast_torch.SparseSequential(*modules), nn.Sequential(*modules)
    params: Any = list(chain.parameters())
    for wanted in ([0], [1], [6], [7], [3, 4], [], range(8)):
        for number, param in enumerate(params):
            param.requires_grad_(number in wanted)
        for needs_x in (True, False):
            if wanted or needs_x:
                x = torch.randn(40, 30, requires_grad=needs_x)
                assert_equal(run(chain, x), run(plain, x))


def test_layers_of_other_units_do_not_join() -> None:
    layers = [
        topkast_torch.SparseLinear(8, 8, fwd=0.5, bwd=0.5, block=block)
        for block in (None, None, (2, 1), (4, 1), (4, 1), (2, 2), (2, 2))
    ]
    chain, x = topkast_torch.SparseSequential(*layers), torch.randn(3, 8, requires_grad=True)
    assert count_chains(chain, x) == 2
    assert_equal(run(chain, x), run(nn.Sequential(*layers), x))


@pytest.mark.parametrize("block", [None, (2, 1)], ids=str)
def test_nan_passes_a_relu_as_in_pytorch(block: Any) -> None:
    modules = make_layers(last_relu=True, block=block)
    x = torch.randn(9, 30)
    x[3, 5] = float("nan")
    results = run(topkast_torch.SparseSequential(*modules), x), run(nn.Sequential(*modules), x)
    assert_equal(*results)
    assert results[0][0].isnan().any()


def test_second_derivatives() -> None:
    modules = make_layers(dtype=torch.float64, last_relu=True)
    chain = topkast_torch.SparseSequential(*modules)
    x = torch.randn(3, 30, dtype=torch.float64, requires_grad=True)

    def penalty(model: nn.Module) -> list[Tensor]:
        """The gradients of the norm of a gradient."""
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        sources = [x, *model.parameters()]
        grads = torch.autograd.grad(
            grad.square().sum(), sources, materialize_grads=True, allow_unused=True
        )
        return [grad.detach(), *grads]

    assert count_chains(chain, x) == 1
    first, second = penalty(chain), penalty(nn.Sequential(*modules))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)


def test_backward_passes_under_vmap() -> None:
    modules = make_layers(last_relu=True)
    x, directions = torch.randn(3, 30, requires_grad=True), torch.randn(4, 3, 10)
    results = []
    for model in (topkast_torch.SparseSequential(*modules), nn.Sequential(*modules)):
        output, sources = model(x), [x, *model.parameters()]

        def pull_back(direction: Tensor, output: Any = output, sources: Any = sources) -> Any:
            return torch.autograd.grad(output, sources, direction, retain_graph=True)

        results.append(torch.func.vmap(pull_back)(directions))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_function_transforms() -> None:
    modules = make_layers()
    x = torch.randn(3, 30)
    results = []
    for model in (topkast_torch.SparseSequential(*modules), nn.Sequential(*modules)):
        params = {name: param.detach() for name, param in model.named_parameters()}

        def loss(params: Any, row: Tensor, model: nn.Module = model) -> Tensor:
            total: Tensor = torch.func.functional_call(model, params, (row[None],)).square().sum()
            return total

        per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
        results.append(list(per_example.values()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_checkpointing_and_compilation() -> None:
    from torch.utils.checkpoint import checkpoint

    chain = topkast_torch.SparseSequential(*make_layers(last_relu=True))
    x = torch.randn(16, 30, requires_grad=True)
    expected = run(chain, x)
    checkpointed: Any = lambda x: checkpoint(chain, x, use_reentrant=False)  # noqa: E731
    checkpointed.parameters = chain.parameters
    assert_equal(run(checkpointed, x), expected)
    compiled = torch.compile(chain, backend="eager")
    with torch.no_grad():
        assert_equal([compiled(x)], expected[:1])


def test_autocast() -> None:
    modules = make_layers()
    x = torch.randn(16, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [
            model(x.bfloat16())
            for model in (topkast_torch.SparseSequential(*modules), nn.Sequential(*modules))
        ]
    assert results[0].dtype == torch.float32
    assert torch.equal(*results)


def test_layers_run_one_by_one_under_hooks() -> None:
    modules = make_layers()
    chain = topkast_torch.SparseSequential(*modules)
    x = torch.randn(16, 30, requires_grad=True)
    expected, seen = run(chain, x), []
    for register in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
    ):
        handle = getattr(modules[1], register)(lambda *_: seen.append(register))  # noqa: B023
        assert count_chains(chain, x) == 0
        assert_equal(run(chain, x), expected)
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert count_chains(chain, x) == 0
    handle.remove()
    with patch.object(modules[1], "forward", side_effect=modules[1].forward):
        assert count_chains(chain, x) == 0
    assert set(seen) == {
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
    }
    assert count_chains(chain, x) == 1


def test_modules_may_be_replaced() -> None:
    modules = make_layers()
    chain = topkast_torch.SparseSequential(*modules)
    x = torch.randn(16, 30)
    assert count_chains(chain, x) == 1
    chain[1] = nn.Tanh()
    assert count_chains(chain, x) == 1  # of the layers after it
    assert torch.equal(chain(x), nn.Sequential(*chain)(x))
    with pytest.raises(topkast.MismatchError, match="takes 30 features"):
        chain(torch.randn(16, 31))


def test_two_threads_run_one_chain_at_the_same_time() -> None:
    chain = topkast_torch.SparseSequential(*make_layers(last_relu=True))
    inputs = [torch.randn(100 + number, 30, requires_grad=True) for number in range(4)]
    expected = [run(chain, x) for x in inputs]

    def repeat(number: int) -> list[list[Tensor]]:
        return [run(chain, inputs[number]) for _ in range(50)]

    with ThreadPoolExecutor(4) as executor:
        for number, results in enumerate(executor.map(repeat, range(4))):
            for result in results:
                assert_equal(result, expected[number])


def test_indices_written_to_between_the_passes_are_refused() -> None:
    modules = make_layers()
    output = topkast_torch.SparseSequential(*modules)(torch.randn(4, 30))
    assert isinstance(modules[0], topkast_torch.SparseLinear)
    modules[0].indices[:1] = modules[0].indices[:1].clone()
    with pytest.raises(topkast.MismatchError, match="written to between"):
        output.sum().backward()


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    return nn.Sequential(nn.Linear(30, 40), nn.ReLU(), hidden, nn.Tanh(), nn.Linear(20, 5))


def test_sparsify_links_layers_and_densify_unlinks_them() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.named_parameters(), 1e-2)
    wrapped = topkast.wrap_optimizer(optimizer, fwd=0.8, bwd=0.6, refresh_every=3)
    names = list(model.state_dict())
    topkast.sparsify(model, wrapped)
    assert type(model) is type(model[2]) is topkast_torch.SparseSequential
    x = torch.randn(16, 30)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for each in copies:
        assert torch.equal(each(x), model(x))
        assert type(each) is topkast_torch.SparseSequential
    topkast.densify(model)
    assert type(model) is type(model[2]) is nn.Sequential
    assert list(model.state_dict()) == names


def test_training_has_the_bits_of_layers_one_by_one() -> None:
    """With refreshes, which give layers new products."""
    x, results = torch.randn(16, 30, generator=torch.Generator().manual_seed(1)), []
    for links in (True, False):
        model = make_model()
        optimizer = torch.optim.AdamW(model.named_parameters(), 1e-2)
        wrapped = topkast.wrap_optimizer(optimizer, fwd=0.8, bwd=0.6, refresh_every=3)
        topkast.sparsify(model, wrapped)
        if not links:
            model.__class__ = model[2].__class__ = nn.Sequential
        for _ in range(10):
            wrapped.zero_grad()
            model(x).square().mean().backward()
            wrapped.step()
        results.append(list(topkast.dense_params(wrapped).values()))
    assert_equal(*results)


def test_a_method_that_needs_gradients_outside_b_sees_each_layer() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    method = topkast.methods.RigL(fraction=0.3, until=100)
    wrapped = topkast.wrap_optimizer(optimizer, fwd=0.8, bwd=0.8, refresh_every=2, method=method)
    topkast.sparsify(model, wrapped)
    x, counts = torch.randn(16, 30), []
    for _ in range(4):
        wrapped.zero_grad()
        counts.append(count_chains(model, x))
        model(x).square().mean().backward()
        wrapped.step()
    assert counts == [2, 0, 2, 0]
