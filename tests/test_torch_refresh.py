"""A refresh among few candidates trains as a refresh that reads all weights does."""

from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import reservoir_training
import torch
from products import star
from reservoir_training import train
from topkast_torch.execution import _flat
from topkast_torch.inner import _young
from torch import Tensor

import topkast
from topkast.backends import _compiled
from topkast.kernels import scale_displacement
from topkast.methods import TopKAST, View


class ReadsAll(TopKAST):
    """The same choice, from all weights at each refresh."""

    takes_largest: ClassVar[bool] = False


class Smallest(TopKAST):
    """Another choice, which inherits nothing of what its base class says of itself."""

    def choose(self, view: View, /) -> topkast.Support:
        order = view.weights.abs().argsort()[: view.backward].int()
        active, exploring = order[: view.forward], order[view.forward :]
        return topkast.Support.of(active.sort().values, exploring.sort().values)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=3e-3),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
}


def build(optimizer: str, **options: Any) -> tuple[Any, Any]:
    return reservoir_training.build(optimizer=OPTIMIZERS[optimizer], **options)


def reserves(opt: Any) -> list[Any]:
    return [execution.selection.reserve for execution in opt._wrapper_state.executions]


def assert_same(first: Any, second: Any) -> None:
    one, two = first.state_dict(), second.state_dict()
    flat, other = (dict(walk(state)) for state in (one, two))
    assert flat.keys() == other.keys()
    for path, value in flat.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[path]), path
        elif not any("method" in str(part) for part in path):
            assert value == other[path], path


def walk(state: Any, path: tuple[Any, ...] = ()) -> Any:
    if isinstance(state, dict):
        for key, value in state.items():
            yield from walk(value, (*path, key))
    elif isinstance(state, (list, tuple)):
        for key, value in enumerate(state):
            yield from walk(value, (*path, key))
    else:
        yield path, state


@pytest.mark.parametrize("sparse", [False, True], ids=["masked", "sparse"])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        *star(
            ["adamw", "adagrad", "momentum"],
            [{}, {"block": (2, 1)}, {"block": (2, 2), "block_score": "max"}],
        ),
        *(
            pytest.param(optimizer, options, marks=pytest.mark.slow)
            for optimizer in OPTIMIZERS
            for options in (
                {"refresh_every": 3, "penalty_kind": "l1"},
                {"block": (1, 4), "dtype": torch.float64},
            )
        ),
    ],
)
def test_trajectories_are_equal(optimizer: str, options: dict[str, Any], sparse: bool) -> None:
    model, opt = build(optimizer, sparse=sparse, **options)
    other, other_opt = build(optimizer, sparse=sparse, method=ReadsAll(), **options)
    for _ in range(4):
        train(model, opt, 4)
        train(other, other_opt, 4)
        assert_same(opt, other_opt)
    assert all(reserve is not None for reserve in reserves(opt))
    assert any(reserve.bound > 0 for reserve in reserves(opt))
    assert reserves(other_opt) == [None, None]


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.float64}, {"distribution": "global"}, {"overrides": {"0.*": {"bwd": 0.0}}}],
    ids=["float64", "global", "all of B"],
)
def test_other_settings_too(options: dict[str, Any]) -> None:
    model, opt = build("adamw", **options)
    other, other_opt = build("adamw", method=ReadsAll(), **options)
    train(model, opt, 12)
    train(other, other_opt, 12)
    assert_same(opt, other_opt)
    assert any(reserve is not None for reserve in reserves(opt))


@pytest.mark.parametrize(
    "options", [{"explore": "random", "block": (2, 1)}, {"dtype": torch.bfloat16}]
)
def test_what_needs_all_weights_reads_them(options: dict[str, Any]) -> None:
    model, opt = build("momentum", **options)
    train(model, opt, 3)
    assert reserves(opt) == [None, None]


def test_a_method_that_chooses_otherwise_is_asked() -> None:
    assert not Smallest.takes_largest
    model, opt = build("momentum", method=Smallest())
    train(model, opt, 2)
    for execution in opt._wrapper_state.executions:
        theta = execution.theta().abs()
        inside = theta[execution.support.entries.long()]
        assert inside.max() <= theta.sort().values[len(inside) - 1]


def test_weights_changed_between_steps_count() -> None:
    """Values may be written to; what lies outside B may not be reached."""
    model, opt = build("momentum", sparse=True)
    other, other_opt = build("momentum", sparse=True, method=ReadsAll())
    for network, optimizer in ((model, opt), (other, other_opt)):
        train(network, optimizer, 3)
        with torch.no_grad():
            network[0].values.mul_(0.01)
        train(network, optimizer, 3)
    assert_same(opt, other_opt)


def test_resumption_and_copies_need_no_reserve() -> None:
    model, opt = build("adamw")
    train(model, opt, 5)
    resumed, resumed_opt = build("adamw")
    resumed.load_state_dict(model.state_dict())
    resumed_opt.load_state_dict(opt.state_dict())
    assert reserves(resumed_opt) == [None, None]
    copied, copied_opt = copy.deepcopy((model, opt))
    for network, optimizer in ((model, opt), (resumed, resumed_opt), (copied, copied_opt)):
        train(network, optimizer, 5)
    assert_same(opt, resumed_opt)
    assert_same(opt, copied_opt)


def test_summary_counts_the_reserve() -> None:
    model, opt = build("momentum")
    train(model, opt, 1)
    before = [row.held_bytes for row in topkast.summary(opt).tensors if row.forward_sparsity]
    sizes = [reserve.nbytes for reserve in reserves(opt)]
    for execution in opt._wrapper_state.executions:
        values = execution.values.detach().view(-1).clone()
        execution.restore(execution.support, values, execution.reservoir)
    after = [row.held_bytes for row in topkast.summary(opt).tensors if row.forward_sparsity]
    assert [one - two for one, two in zip(before, after, strict=True)] == sizes


def test_one_tensor_after_the_other_takes_memory_for_its_new_sets() -> None:
    def memory_of_a_refresh(layers: int) -> int:
        """Bytes of temporary arrays at the peak of a step with a refresh."""
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(layers)))
        inner = torch.optim.Adam(model.named_parameters(), lr=0.01)
        opt = topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8)
        topkast.sparsify(model, opt)
        peaks = []
        for _ in range(4):
            opt.zero_grad()
            model(torch.randn(8, 256)).square().mean().backward()
            tracemalloc.start()
            opt.step()
            held, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            peaks.append(peak - held)
        return min(peaks[1:])  # the first fills the reserve

    assert memory_of_a_refresh(8) < 1.5 * memory_of_a_refresh(2)


def test_another_score_of_blocks() -> None:
    """The reserve holds scores of one kind: with another one, all weights are read again."""
    model, opt = build("momentum", sparse=True, block=(2, 2))
    other, other_opt = build("momentum", sparse=True, block=(2, 2), method=ReadsAll())
    for score in ("sum", "max", "sum"):
        for network, optimizer in ((model, opt), (other, other_opt)):
            optimizer.param_groups[0]["block_score"] = score
            train(network, optimizer, 3)
        assert_same(opt, other_opt)
    assert {execution.selection.block_score for execution in opt._wrapper_state.executions} == {
        "sum"
    }


def test_sums_that_overflow() -> None:
    """Then all weights are scaled down to be ranked, which a choice among candidates cannot do."""
    model, opt = build("momentum", sparse=True, block=(2, 2))
    other, other_opt = build("momentum", sparse=True, block=(2, 2), method=ReadsAll())
    for network, optimizer in ((model, opt), (other, other_opt)):
        with torch.no_grad():
            network[0].values[0, :4] = 3e38
        train(network, optimizer, 1)
    assert_same(opt, other_opt)
    assert [reserve is None for reserve in reserves(opt)] == [True, False]


@pytest.mark.parametrize("block", [None, (2, 1)])
@pytest.mark.parametrize("sparse", [False, True], ids=["masked", "sparse"])
def test_a_weight_without_a_rank_changes_no_set(sparse: bool, block: Any) -> None:
    model, opt = build("momentum", sparse=sparse, block=block)
    train(model, opt, 2)
    before = [execution.support for execution in opt._wrapper_state.executions]
    executions = list(opt._wrapper_state.executions)
    with torch.no_grad():
        executions[1].values.view(-1)[3] = float("nan")
        if not sparse:
            executions[1].write_forward_view()
    with pytest.raises(topkast.NonFiniteError, match="768 of 3840 entries are NaN"):
        train(model, opt, 1)
    assert [execution.support for execution in executions] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 40_000])
def test_young_entries_move_alike_with_and_without_kernels(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    old, new = torch.randn(2, size, dtype=dtype)
    factors = torch.cat([torch.linspace(0, 2, 200, dtype=dtype), torch.ones(1, dtype=dtype)])
    ages = torch.randint(0, 300, (size,), dtype=torch.int16)
    weight = factors[ages.long().add(3).clamp(max=200)]
    expected = _young._interpolate(old, new, weight)
    scale_displacement(new.numpy(), old.numpy(), ages.numpy(), factors.numpy(), since=3)
    assert torch.equal(new, expected)


@pytest.mark.parametrize("sparse", [False, True], ids=["masked", "sparse"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_kernels_change_no_bit_of_an_update(
    optimizer: str, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products of sparse layers round differently: gradients are written by hand."""
    gradients = torch.randn(8, 3_840, generator=torch.Generator().manual_seed(3))
    states = []
    for min_entries in (0, 1 << 60):
        least = dict.fromkeys(_compiled._MIN_ENTRIES, min_entries)
        monkeypatch.setattr(_compiled, "_MIN_ENTRIES", least)
        monkeypatch.setattr(_flat, "_KERNEL_MIN_ENTRIES", min_entries)
        monkeypatch.setattr(_young, "_KERNEL_MIN_ENTRIES", min_entries)
        _, opt = build(optimizer, sparse=sparse, penalty=0.1)
        execution = next(iter(opt._wrapper_state.executions))
        for gradient in gradients:
            if sparse:
                on_b = gradient[execution.support.entries.long()]
                execution.values.grad = on_b.view(execution.values.shape)
            else:
                param = execution.members["0.weight"].param
                param.grad = gradient.view(param.shape).clone()
            opt.step()
        states.append(opt)
    assert_same(*states)


@pytest.mark.parametrize("sparse", [False, True])
def test_other_tensors_with_the_memory_of_a_state_follow_it(sparse: bool) -> None:
    """A refresh writes into the memory of a state, which views, arrays and processes share."""
    model, opt = build("adamw", sparse=sparse)
    plain, plain_opt = build("adamw", sparse=sparse)
    for network, optimizer in ((model, opt), (plain, plain_opt)):
        train(network, optimizer, 1)
    wrapped = opt._wrapper_state
    first, second = (wrapped.inner.state[one.values] for one in wrapped.executions)
    view, array = first["exp_avg"].view(-1), np.from_dlpack(first["exp_avg_sq"])
    second["exp_avg_sq"].share_memory_()
    before, kept = view.clone(), [*first.values(), *second.values()]
    for network, optimizer in ((model, opt), (plain, plain_opt)):
        train(network, optimizer, 3)
    assert not torch.equal(view, before)
    assert torch.equal(view, first["exp_avg"].view(-1))
    np.testing.assert_array_equal(array, first["exp_avg_sq"].numpy())
    assert second["exp_avg_sq"].is_shared()
    assert all(
        one is other for one, other in zip([*first.values(), *second.values()], kept, strict=True)
    )
    assert_same(opt, plain_opt)
