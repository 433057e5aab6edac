"""Tensors of all layouts and dtypes: supported with their strides, or refused and unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import topkast_torch
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import topkast
from topkast.testing import assert_forward_view, assert_masks, to_numpy


def sgd(*params: Tensor, **options: Any) -> Any:
    defaults: dict[str, Any] = {"fwd": 0.9, "bwd": 0.7, "refresh_every": 2}
    return topkast.wrap_optimizer(torch.optim.SGD(params, 0.1, momentum=0.9), **defaults | options)


def train(param: Parameter, optimizer: Any, steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        target = torch.randn(param.shape, generator=generator).to(param.dtype)
        ((param - target).abs() ** 2).sum().backward()
        optimizer.step()


def strided(*shape: int) -> Tensor:
    """A tensor with gaps: every second entry of a tensor along the last axis."""
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


LAYOUTS = {
    "contiguous": lambda: torch.randn(6, 5, 4, 3),
    "channels last": lambda: torch.randn(6, 5, 4, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(10, 36).T,
    "with gaps": lambda: strided(6, 5, 4, 3),
}


@pytest.mark.parametrize("distribution", ["uniform", "global"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_their_strides_and_have_the_same_weights(
    layout: str, distribution: str
) -> None:
    torch.manual_seed(0)
    odd = Parameter(LAYOUTS[layout]())
    plain = Parameter(odd.detach().clone(memory_format=torch.contiguous_format))
    strides = odd.stride()
    runs = []
    for param in (odd, plain):
        optimizer = sgd(param, distribution=distribution)
        train(param, optimizer)
        runs.append((topkast.dense_params(optimizer)["0.0"], topkast.masks(optimizer)["0.0"]))
    assert odd.stride() == strides
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1].backward, runs[1][1].backward)
    assert torch.equal(odd, plain)
    assert_forward_view(runs[0][0], odd.detach(), runs[0][1].forward)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
def test_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    param = Parameter(torch.randn(20, 20, dtype=dtype))
    optimizer = sgd(param, refresh_every=1)
    train(param, optimizer, steps=4)
    theta, masks = topkast.dense_params(optimizer)["0.0"], topkast.masks(optimizer)["0.0"]
    assert theta.dtype == param.dtype == dtype
    wide = theta.double() if dtype.is_floating_point else theta
    assert_masks(wide, masks, fwd=0.9, bwd=0.7)
    assert torch.equal(param.detach(), torch.where(masks.forward, theta, 0))
    assert optimizer.state[param]["momentum_buffer"].dtype == dtype


def test_empty_and_tiny_tensors_do_not_stop_the_others() -> None:
    empty, one = Parameter(torch.randn(0, 5)), Parameter(torch.randn(1, 1))
    scalar, matrix = Parameter(torch.randn(())), Parameter(torch.randn(10, 10))
    optimizer = sgd(empty, one, scalar, matrix, refresh_every=100)
    before = topkast.dense_params(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        sum((p.square().sum() for p in (empty, one, scalar, matrix)), torch.tensor(0.0)).backward()
        optimizer.step()
    after = topkast.dense_params(optimizer)
    assert [int((before[name] != after[name]).sum()) for name in before] == [0, 1, 1, 30]
    assert [row.backward for row in topkast.summary(optimizer).tensors] == [0, 1, 1, 30]


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.head(self.embed(tokens))
            return logits

    model = Tied()
    optimizer = topkast.wrap_optimizer(
        torch.optim.AdamW(model.named_parameters(), 0.01), fwd=0.9, bwd=0.8
    )
    assert list(topkast.masks(optimizer)) == ["embed.weight"]
    model(torch.arange(30)).square().sum().backward()
    grad = model.embed.weight.grad
    assert grad is not None
    assert torch.count_nonzero(grad) <= 48
    optimizer.step()
    assert model.head.weight is model.embed.weight


def test_repeated_names_get_the_group_number() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    groups = [{"params": list(layer.named_parameters())} for layer in (first, second)]
    optimizer = topkast.wrap_optimizer(torch.optim.SGD(groups, 0.1), fwd=0.5, bwd=0.5)
    assert list(topkast.dense_params(optimizer)) == ["weight", "bias", "1.weight", "1.bias"]


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    from torch._C._distributed_c10d import HashStore

    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_sharded_parameter_is_refused(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    param = Parameter(distribute_tensor(torch.randn(8, 8), mesh, [Shard(0)]))
    with pytest.raises(topkast.UnsupportedTensorError, match=r"0\.0 .* a DTensor, placed"):
        sgd(param)


REFUSED: dict[str, tuple[Any, str]] = {
    "meta": (lambda: Parameter(torch.empty(4, 4, device="meta")), "meta"),
    "integer": (
        lambda: Parameter(torch.ones(4, 4, dtype=torch.int32), requires_grad=False),
        "weights must be floats",
    ),
    "expanded": (lambda: Parameter(torch.randn(4, 1).expand(4, 4)), "entries share memory"),
    "sparse": (lambda: Parameter(torch.eye(4).to_sparse()), "layout"),
    "lazy": (lambda: nn.LazyLinear(4).weight, "not initialised"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_tensors_are_refused_by_name(name: str) -> None:
    make, reason = REFUSED[name]
    good, bad = Parameter(torch.randn(4, 4)), make()
    before = good.detach().clone()
    with pytest.raises(topkast.UnsupportedTensorError, match=rf"0\.1 .*{reason}"):
        sgd(good, bad)
    assert torch.equal(good, before)


class OnMps(nn.Parameter):
    """Stands for a Parameter on an Apple GPU."""

    device = property(lambda self: torch.device("mps:0"))


@pytest.mark.parametrize("sparse", [False, True])
def test_apple_gpus_are_refused_by_name(sparse: bool) -> None:
    layer: Any = topkast_torch.SparseLinear(20, 30, fwd=0.9, bwd=0.8) if sparse else None
    layer = layer or nn.Linear(20, 30)
    name = "values" if sparse else "weight"
    setattr(layer, name, OnMps(getattr(layer, name).detach()))
    inner = torch.optim.SGD(layer.named_parameters(), 0.1)
    with pytest.raises(topkast.UnsupportedTensorError, match=f"{name} .* is on mps:0, .* CUDA"):
        topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8)


def test_parameters_that_share_memory_are_refused() -> None:
    first = Parameter(torch.randn(6, 6))
    second = Parameter(first.data.T)
    with pytest.raises(topkast.UnsupportedTensorError, match=r"0\.[01] and 0\.[01] share memory"):
        sgd(first, second)


def test_disjoint_views_of_one_storage_are_accepted() -> None:
    storage = torch.randn(2, 6, 6)
    first, second = Parameter(storage[0]), Parameter(storage[1])
    sgd(first, second)
    assert int(torch.count_nonzero(storage)) == 8


def test_sparse_gradient_is_an_error() -> None:
    embedding = nn.Embedding(20, 4, sparse=True)
    optimizer = sgd(embedding.weight)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(topkast.UnsupportedTensorError, match=r"0\.0 has a gradient of layout"):
        optimizer.step()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weight_is_named_and_nothing_changes(value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model.get_parameter("1.weight")[1, :2] = value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inner = torch.optim.AdamW(model.named_parameters(), 0.1)
    model(torch.ones(1, 4))
    with pytest.raises(topkast.NonFiniteError, match=r"1\.weight: 2 of 16 entries are NaN or inf"):
        topkast.wrap_optimizer(inner, fwd=0.5, bwd=0.5)
    for name, tensor in model.state_dict().items():
        assert to_numpy(tensor).tobytes() == to_numpy(before[name]).tobytes()
    assert inner.param_groups[0]["params"][0] is model[0].weight
    assert not inner.state


def test_global_ranking_needs_one_dtype() -> None:
    with pytest.raises(topkast.OptionError, match="one dtype and one device"):
        sgd(
            Parameter(torch.randn(4, 4)),
            Parameter(torch.randn(4, 4, dtype=torch.float64)),
            distribution="global",
        )


def test_global_ranking_fixes_the_total_but_not_the_shares() -> None:
    torch.manual_seed(0)
    small, large = Parameter(torch.randn(10, 10) * 0.1), Parameter(torch.randn(10, 10))
    optimizer = sgd(small, large, distribution="global")
    rows = topkast.summary(optimizer).tensors
    assert sum(row.forward for row in rows) == 20
    assert sum(row.backward for row in rows) == 60
    assert rows[0].forward < rows[1].forward
    assert int(torch.count_nonzero(small)) == rows[0].forward


@pytest.mark.parametrize("shape", [(5, 5), (5, 5, 1, 1)])
def test_global_ranking_carries_dense_state_over_if_all_have_it(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    first, second = Parameter(torch.randn(shape)), Parameter(torch.randn(5, 5))
    inner = torch.optim.Adam([first, second], 0.1)
    (first.sum() + second.square().sum()).backward()
    inner.step()
    moments = torch.cat([inner.state[p]["exp_avg"].flatten() for p in (first, second)])
    optimizer = topkast.wrap_optimizer(inner, fwd=0.8, bwd=0.5, distribution="global")
    indices = optimizer.__topkast_inspect__().supports["0.0 + 0.1"].indices
    assert torch.equal(optimizer.state[first]["exp_avg"].flatten(), moments[indices])


def test_global_ranking_refuses_states_that_differ() -> None:
    first, second = Parameter(torch.randn(5, 5)), Parameter(torch.randn(5, 5))
    inner = torch.optim.Adam([first, second], 0.1)
    first.sum().backward()
    inner.step()
    before = first.detach().clone()
    with pytest.raises(topkast.MismatchError, match="before its first step"):
        topkast.wrap_optimizer(inner, fwd=0.8, bwd=0.5, distribution="global")
    assert torch.equal(first, before)
    assert inner.state[first]["exp_avg"].shape == (5, 5)


def test_flat_parameter_of_fsdp_is_refused() -> None:
    flat_class = type("FlatParameter", (Parameter,), {})
    flat: Tensor = torch.Tensor._make_subclass(flat_class, torch.randn(9), True)
    with pytest.raises(topkast.UnsupportedTensorError, match=r"0\.0 is a FlatParameter of FSDP"):
        sgd(flat)


@pytest.mark.parametrize("options", [{}, {"explore_until": 3}, {"distribution": "global"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_equal_pytorch(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels and PyTorch give the same bits for large tensors."""
    runs = []
    for min_entries in (0, 1 << 60):
        monkeypatch.setattr("topkast_torch.execution._flat._KERNEL_MIN_ENTRIES", min_entries)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 50)).to(dtype)
        inner = torch.optim.AdamW(model.named_parameters(), 0.01)
        opt = topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.7, refresh_every=4, **options)
        for turn in range(9):
            opt.zero_grad()
            for _ in range(1 + turn % 2):  # accumulated, or not
                model(torch.ones(3, 40, dtype=dtype)).square().mean().backward()
            if turn % 3 == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            opt.step()
            if turn % 4 == 1:
                opt.step()  # with the same gradient
        grads = [param.grad for param in model.parameters()]
        runs.append([*topkast.dense_params(opt).values(), *model.parameters(), *grads])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_a_gradient_written_without_a_version_change() -> None:
    """Through ``grad.data``, as in old loops and gradient scalers."""
    runs = []
    ways: list[Callable[[Any], Any]] = [
        lambda grad: grad.data.mul_(0.5),
        lambda grad: np.multiply(grad.numpy(), 0.5, out=grad.numpy()),
        lambda grad: grad.mul_(0.5),
    ]
    for scale in ways:
        torch.manual_seed(0)
        layer = nn.Linear(30, 20)
        inner = torch.optim.SGD(layer.named_parameters(), 0.1)
        opt = topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.7, refresh_every=10)
        for _ in range(3):
            opt.zero_grad()
            layer(torch.ones(3, 30)).square().sum().backward()
            scale(layer.weight.grad)
            opt.step()
            opt.step()  # with the same gradient, from which the first step's penalty is gone
        runs.append(topkast.dense_params(opt)["weight"])
    assert torch.equal(runs[0], runs[2])
    assert torch.equal(runs[1], runs[2])
