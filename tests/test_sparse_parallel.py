"""Sparse layers that read the same activations: the bits of single layers, and when they run so."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_training import OPTIMIZERS, OPTIONS, assert_agree, train
from topkast_torch import SparseLinear, SparseParallel, SparseSequential
from topkast_torch.sparse.chains import _parallel, _parallel_function
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

import topkast

pytest.importorskip("numba")

WIDTH = 30
UNITS = pytest.mark.parametrize("block", [None, (2, 1)], ids=str)


def make_layers(
    rows: Sequence[int] = (40, 8, 140),
    biases: Sequence[bool] = (True, False, True),
    *,
    dtype: torch.dtype = torch.float32,
    block: tuple[int, int] | None = None,
    bwd: float = 0.6,
) -> list[Any]:
    options: Any = {"fwd": 0.8, "bwd": bwd, "dtype": dtype, "block": block}
    return [SparseLinear(WIDTH, *layer, **options) for layer in zip(rows, biases, strict=True)]


def one_by_one(layers: Sequence[nn.Module], x: Tensor) -> tuple[Any, ...]:
    return tuple(layer(x) for layer in layers)


def gradients(
    outputs: Sequence[Tensor], used: Sequence[int], sources: Sequence[Tensor]
) -> list[Tensor | None]:
    """The outputs, and the gradients of a loss that reads some of them."""
    weights = [
        torch.linspace(-1, 1 + number, output.numel(), dtype=output.dtype).view(output.shape)
        for number, output in enumerate(outputs)
    ]
    loss: Any = sum((outputs[number] * weights[number]).sum() for number in used)
    return [
        *(output.detach() for output in outputs),
        *torch.autograd.grad(loss, sources, allow_unused=True),
    ]


def run(model: Any, x: Tensor, used: Sequence[int] | None = None) -> list[Tensor | None]:
    """Outputs and gradients of a container, or of a list of layers one by one."""
    outputs = model(x) if isinstance(model, nn.Module) else one_by_one(model, x)
    params = [param for layer in model for param in layer.parameters()]
    sources = [tensor for tensor in (x, *params) if tensor.requires_grad]
    return gradients(outputs, range(len(outputs)) if used is None else used, sources)


def assert_equal(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def count_layers(model: nn.Module, *inputs: Tensor) -> int:
    """How many layers run together in a forward pass."""
    with patch.object(
        _parallel, "run_parallel", side_effect=_parallel_function.run_parallel
    ) as together:
        model(*inputs)
    return sum(len(call.args[1].products) for call in together.call_args_list)


@pytest.mark.parametrize("shape", [(30,), (0, 30), (1, 30), (37, 30), (2, 0, 30), (2, 150, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@UNITS
def test_layers_have_the_bits_that_they_have_one_by_one(
    shape: tuple[int, ...], dtype: torch.dtype, block: Any
) -> None:
    layers = make_layers(dtype=dtype, block=block)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    for members in (layers, layers[:2]):
        parallel = SparseParallel(*members)
        assert count_layers(parallel, x) == len(members)
        assert_equal(run(parallel, x), run(members, x))
        with torch.no_grad():
            assert_equal(parallel(x), one_by_one(members, x))


@given(data=st.data())
def test_any_layers_outputs_and_gradients(data: st.DataObject) -> None:
    """Unused outputs, frozen Parameters, inputs without gradient."""
    block = data.draw(st.sampled_from([None, (2, 1), (4, 1)]))
    rows = [4 * units for units in data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))]
    flags = st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))
    layers = make_layers(rows, data.draw(flags), block=block)
    for layer, trains, trains_bias in zip(layers, data.draw(flags), data.draw(flags), strict=True):
        layer.values.requires_grad_(trains)
        if layer.bias is not None:
            layer.bias.requires_grad_(trains_bias)
    x = torch.randn(data.draw(st.integers(0, 70)), WIDTH, requires_grad=data.draw(st.booleans()))
    parallel, used = SparseParallel(*layers), data.draw(st.permutations(range(len(rows))))
    used = [n for n in used if any(p.requires_grad for p in (x, *layers[n].parameters()))]
    used = used[: data.draw(st.integers(0, len(used)))]
    if used:
        together, alone = run(parallel, x, used), run(layers, x, used)
        # The order of a sum of gradients of x follows the order in which the loss reads outputs.
        if x.requires_grad:
            torch.testing.assert_close(together.pop(len(rows)), alone.pop(len(rows)))
        assert_equal(together, alone)


@UNITS
@pytest.mark.parametrize("freezes", [False, True])
def test_bits_do_not_depend_on_the_number_of_threads(block: Any, freezes: bool) -> None:
    """Also where there is nothing but the sum of the input gradients, each of which waits.

    Each input is new, since memory that is used again has the results of the call before.
    """
    parallel = SparseParallel(*make_layers(block=block)).requires_grad_(not freezes)
    inputs = [torch.randn(700, WIDTH, requires_grad=True) for _ in range(30)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            results.append([run(parallel, x) for x in inputs])
    finally:
        torch.set_num_threads(threads)
    for one, five in zip(*results, strict=True):
        assert_equal(one, five)


def test_two_threads_run_one_container_at_the_same_time() -> None:
    parallel = SparseParallel(*make_layers())
    inputs = [torch.randn(100 + number, WIDTH, requires_grad=True) for number in range(4)]
    expected = [run(parallel, x) for x in inputs]
    with ThreadPoolExecutor(4) as executor:
        for number in range(4):
            repeated = executor.map(lambda x: run(parallel, x), [inputs[number]] * 20)
            for result in repeated:
                assert_equal(result, expected[number])


@UNITS
@pytest.mark.parametrize("freezes", [False, True])
def test_derivatives_agree_with_finite_differences(block: Any, freezes: bool) -> None:
    """With A = B: in B∖A the gradient is not that of the output."""
    layers = make_layers((4, 2), (True, False), dtype=torch.float64, block=block, bwd=0.8)
    parallel = SparseParallel(*layers)
    if freezes:
        for layer in layers:
            layer.values.requires_grad_(False)
    params = [param for param in parallel.parameters() if param.requires_grad]

    def compute(x: Tensor, *_: Tensor) -> Any:
        """The outputs; Parameters are varied in place."""
        return parallel(x)

    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(compute, (x, *params))
    assert torch.autograd.gradgradcheck(compute, (x, *params))


def test_second_derivatives_are_those_of_the_layers() -> None:
    layers = make_layers(dtype=torch.float64)
    shared = [layers[0], layers[1], layers[0]]  # a layer that is a member twice
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)

    def penalty(outputs: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the norm of a gradient."""
        loss: Any = sum(output.square().sum() for output in outputs[:2])  # the last is not used
        grads = torch.autograd.grad(loss, [x, params[0]], create_graph=True)
        norm: Any = sum(grad.square().sum() for grad in grads)
        return [
            *(grad.detach() for grad in grads),
            *torch.autograd.grad(norm, [x, *params], materialize_grads=True, allow_unused=True),
        ]

    for members in (layers, shared):
        parallel = SparseParallel(*members)
        params = list(parallel.parameters())
        first, second = penalty(parallel(x), params), penalty(one_by_one(members, x), params)
        for one, other in zip(first, second, strict=True):
            torch.testing.assert_close(one, other)


def test_second_derivatives_of_a_layer_that_is_in_a_chain_twice() -> None:
    layer = SparseLinear(WIDTH, WIDTH, fwd=0.8, bwd=0.6, dtype=torch.float64)
    x, results = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True), []
    for model in (SparseSequential(layer, layer), nn.Sequential(layer, layer)):
        loss, sources = model(x).square().sum(), [x, *layer.parameters()]
        results.append(torch.autograd.grad(loss, sources, create_graph=True))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_transforms_compilation_and_checkpoints() -> None:
    from torch.utils.checkpoint import checkpoint

    layers = make_layers()
    parallel = SparseParallel(*layers)
    x = torch.randn(5, WIDTH, requires_grad=True)
    expected = run(layers, x)
    checkpointed: Any = checkpoint(parallel, x, use_reentrant=False)
    assert_equal(gradients(checkpointed, range(3), [x, *parallel.parameters()]), expected)
    with torch.no_grad():
        assert_equal(torch.compile(parallel, backend="eager")(x), expected[:3])
    params = {name: param.detach() for name, param in parallel.named_parameters()}

    def loss(params: Any, row: Tensor) -> Any:
        outputs = torch.func.functional_call(parallel, params, (row,))
        return sum(output.square().sum() for output in outputs)

    together = torch.func.grad(loss)(params, x)
    total: Any = sum(output.square().sum() for output in one_by_one(layers, x))
    alone = torch.autograd.grad(total, tuple(parallel.parameters()))
    torch.testing.assert_close(tuple(together.values()), alone)
    # A backward pass under vmap.
    directions, results = torch.randn(4, 5, 40), []
    for output in (parallel(x)[0], layers[0](x)):

        def pull_back(direction: Tensor, output: Tensor = output) -> Any:
            return torch.autograd.grad(output, x, direction, retain_graph=True)

        results.append(torch.func.vmap(pull_back)(directions))
    torch.testing.assert_close(*results)


def test_the_input_is_kept_once() -> None:
    """And not at all if only the input and biases need gradients."""
    parallel, x = SparseParallel(*make_layers()), torch.randn(128, WIDTH, requires_grad=True)
    for expected in (2, 0):  # the input as it is, for second derivatives, and packed
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor.numel()) or tensor,  # type: ignore[misc]
            lambda tensor: tensor,
        ):
            outputs = parallel(x)
        assert sum(numel == x.numel() for numel in kept) == expected
        assert max(kept) == (x.numel() if expected else parallel[2].values.numel())
        assert outputs[0].requires_grad
        for layer in parallel:
            layer.values.requires_grad_(False)


def test_autocast() -> None:
    layers = make_layers()
    x = torch.randn(16, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = SparseParallel(*layers)(x.bfloat16())
        assert_equal(outputs, one_by_one(layers, x.bfloat16()))
    assert outputs[0].dtype == torch.float32


def test_layers_run_one_by_one_under_hooks() -> None:
    layers = make_layers()
    parallel = SparseParallel(*layers)
    x = torch.randn(16, WIDTH, requires_grad=True)
    expected, seen = run(layers, x), []
    for register in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
    ):
        handle = getattr(layers[1], register)(lambda *_: seen.append(register))  # noqa: B023
        assert count_layers(parallel, x) == 0
        assert_equal(run(parallel, x), expected)
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert count_layers(parallel, x) == 0
    handle.remove()
    with patch.object(layers[1], "forward", side_effect=layers[1].forward):
        assert count_layers(parallel, x) == 0
    assert len(set(seen)) == 3
    assert count_layers(parallel, x) == 3


def test_layers_that_differ_run_by_themselves() -> None:
    """Dense ones, and those whose units differ; layers may be replaced."""
    plain, columns = make_layers((8, 12), (True, True)), make_layers((8,), (True,), block=(2, 1))
    members = [nn.Linear(WIDTH, 3), plain[0], *columns, nn.Tanh(), plain[1]]
    parallel, x = SparseParallel(*members), torch.randn(7, WIDTH, requires_grad=True)
    assert count_layers(parallel, x) == 2
    together, alone = run(parallel, x), run(members, x)
    grad_x = len(members)  # a sum in another order
    torch.testing.assert_close(together.pop(grad_x), alone.pop(grad_x))
    assert_equal(together, alone)
    parallel.add_module("1", nn.Linear(WIDTH, 5))
    assert count_layers(parallel, x) == 0
    assert parallel(x)[1].shape == (7, 5)
    assert len(parallel) == len(members)
    assert parallel[2] is columns[0]
    doubled = SparseParallel(*make_layers()).double()
    assert count_layers(doubled, x.double()) == 3


def test_bad_inputs_are_refused() -> None:
    parallel = SparseParallel(*make_layers())
    with pytest.raises(topkast.MismatchError, match="takes 30 features"):
        parallel(torch.randn(16, 31))
    with pytest.raises(topkast.MismatchError, match="has dtype torch"):
        parallel(torch.randn(16, 30).double())
    with pytest.raises(topkast.OptionError, match="at least one layer"):
        SparseParallel()
    with pytest.raises(topkast.OptionError, match="'query': 3, 'key': 4"):
        SparseParallel(query=nn.Linear(3, 4), key=nn.Linear(4, 4))


def test_indices_that_were_written_to_are_refused() -> None:
    layers = make_layers()
    parallel, x = SparseParallel(*layers), torch.randn(4, WIDTH)
    outputs = parallel(x)
    layers[1].indices[:1] = layers[1].indices[:1].clone()
    with pytest.raises(topkast.MismatchError, match="written to between"):
        outputs[0].sum().backward()
    layers[1].indices[0] = 10**6
    with pytest.raises(topkast.MismatchError, match=r"indices|index"):
        parallel(x)
    hostile = make_layers()
    parallel = SparseParallel(*hostile)
    parallel(x)
    hostile[2].indices.numpy()[:] = 10**6  # past PyTorch's version counter
    with pytest.raises(ValueError, match=r"overwritten|out of range|outside"):
        parallel(x)


class Gated(nn.Module):
    """A transformer block with separate projections and a gated feed-forward network."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.norm, self.feed_norm = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SparseParallel(
            query=nn.Linear(width, width, bias=False),
            key=nn.Linear(width, width, bias=False),
            value=nn.Linear(width, width),
        )
        self.out = nn.Linear(width, width, bias=False)
        self.feed = SparseParallel(nn.Linear(width, 40), nn.Linear(width, 40))
        self.down = nn.Linear(40, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, time, width = hidden.shape
        query, key, value = (
            projected.view(batch, time, self.heads, -1).transpose(1, 2)
            for projected in self.attention(self.norm(hidden))
        )
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        gate, up = self.feed(self.feed_norm(hidden))
        fed: Tensor = self.down(silu(gate) * up)
        return hidden + fed


def prepare(
    optimizer: str = "adamw", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(Gated()).to(dtype), torch.randn(3, 11, 24, dtype=dtype)
    inner = OPTIMIZERS[optimizer](list(model.named_parameters()))
    return model, topkast.wrap_optimizer(inner, **{**OPTIONS, **options}), inputs


@pytest.mark.parametrize(("optimizer", "block"), [("adamw", None), ("sgd", (4, 1))], ids=str)
def test_sparse_and_masked_execution_agree(optimizer: str, block: Any) -> None:
    masked, masked_opt, inputs = prepare(optimizer, torch.float64, block=block)
    sparse, sparse_opt, _ = prepare(optimizer, torch.float64, block=block)
    assert count_layers(masked, inputs) == 0
    report = topkast.sparsify(sparse, sparse_opt)
    assert {layer.execution for layer in report.layers} == {"sparse"}
    assert count_layers(sparse, inputs) == 5
    for _ in range(5):
        train(masked, masked_opt, inputs, 10)
        train(sparse, sparse_opt, inputs, 10)
        assert_agree(masked_opt, sparse_opt, 1e-11)


def test_training_has_the_bits_of_layers_one_by_one() -> None:
    """With refreshes, which give layers new products."""
    results = []
    for runs_together in (True, False):
        model, optimizer, inputs = prepare()
        topkast.sparsify(model, optimizer)
        if not runs_together:
            for module in model.modules():
                if isinstance(module, SparseLinear):
                    module.register_forward_hook(lambda *_: None)
        assert count_layers(model, inputs) == (5 if runs_together else 0)
        train(model, optimizer, inputs, 16)
        results.append(list(topkast.dense_params(optimizer).values()))
    assert_equal(*results)


def test_checkpoints_copies_and_the_way_back() -> None:
    model, optimizer, inputs = prepare()
    names = list(model.state_dict())
    assert "0.attention.query.weight" in names
    topkast.sparsify(model, optimizer)
    other, other_optimizer, _ = prepare()
    topkast.sparsify(other, other_optimizer)
    train(model, optimizer, inputs, 8)
    expected = model(inputs)
    other_optimizer.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    for each in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert count_layers(each, inputs) == 5
        assert torch.equal(each(inputs), expected)
    dense, _, _ = prepare()
    dense.load_state_dict(topkast.densify(model.state_dict()))
    topkast.densify(model)
    assert list(model.state_dict()) == names
    assert type(model[0].attention.query) is nn.Linear  # type: ignore[index]
    assert count_layers(model, inputs) == 0
    for each in (dense, model):
        torch.testing.assert_close(each(inputs), expected)


def test_a_method_that_needs_gradients_outside_b_sees_each_layer() -> None:
    method = topkast.methods.RigL(fraction=0.3, until=100)
    options: Any = {"bwd": 0.8, "refresh_every": 2, "method": method, "penalty": None}
    model, optimizer, inputs = prepare("sgd", **options)
    topkast.sparsify(model, optimizer)
    counts = []
    for _ in range(4):
        optimizer.zero_grad()
        counts.append(count_layers(model, inputs))
        model(inputs).square().mean().backward()
        optimizer.step()
    assert counts == [5, 0, 5, 0]
