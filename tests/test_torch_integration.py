"""Wrapped optimizers with schedulers, scalers, clipping, accumulation, hooks and compilation."""

from __future__ import annotations

import gc
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

import topkast


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


def wrap(inner: torch.optim.Optimizer, **options: Any) -> Any:
    defaults: dict[str, Any] = {"fwd": 0.9, "bwd": 0.7, "refresh_every": 3}
    return topkast.wrap_optimizer(inner, **defaults | options)


def make(**options: Any) -> tuple[nn.Sequential, Any]:
    model = make_model()
    return model, wrap(torch.optim.AdamW(model.named_parameters(), 0.02), **options)


def batch(step: int, size: int = 8) -> Tensor:
    return torch.randn(size, 12, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    loss: Tensor = (model(inputs) - inputs[:, :4]).square().mean()
    return loss


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()


def theta(optimizer: Any) -> dict[str, Tensor]:
    return topkast.dense_params(optimizer)


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# Gradients


def test_gradient_is_zero_outside_the_backward_set_once_accumulated() -> None:
    model, optimizer = make(refresh_every=2)
    for step in range(5):
        optimizer.zero_grad()
        for micro in range(2):
            loss_of(model, batch(10 * step + micro)).backward()
            for name, mask in topkast.masks(optimizer).items():
                grad = model.get_parameter(name).grad
                assert grad is not None
                assert not grad[~mask.backward].any()
                assert grad[mask.backward].any()
        optimizer.step()


def test_micro_batches_equal_one_batch() -> None:
    inputs = [batch(step, size=32) for step in range(9)]
    results = []
    for count in (1, 4):
        model = make_model().double()
        optimizer = wrap(torch.optim.SGD(model.named_parameters(), 0.1, momentum=0.9))
        for large_batch in inputs:
            optimizer.zero_grad()
            for micro_batch in large_batch.double().chunk(count):
                (loss_of(model, micro_batch) / count).backward()
            optimizer.step()
        results.append((theta(optimizer), topkast.masks(optimizer), topkast.summary(optimizer)))
    for name in results[0][1]:
        assert torch.equal(results[0][1][name].backward, results[1][1][name].backward)
        torch.testing.assert_close(results[0][0][name], results[1][0][name], rtol=1e-9, atol=1e-12)
    assert results[0][2].updates == results[1][2].updates == 9


def test_clipping_sees_the_inner_optimizers_gradient() -> None:
    model, optimizer = make()
    loss_of(model, batch(0)).backward()
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert float(clipped.norm()) == pytest.approx(1e-3, rel=1e-3)
    assert float(total) > 1e-3
    optimizer.step()


def test_missing_and_late_gradients() -> None:
    model, optimizer = make()
    before = theta(optimizer)
    optimizer.step()  # no gradient anywhere: not an update
    assert_equal(before, theta(optimizer))
    assert topkast.summary(optimizer).updates == 0
    model[0](batch(0)).square().mean().backward()  # none for the last layer
    optimizer.step()
    after = theta(optimizer)
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert torch.equal(after["2.weight"], before["2.weight"])
    assert not optimizer.state[model[2].weight]
    train(model, optimizer, range(4))
    assert not torch.equal(theta(optimizer)["2.weight"], before["2.weight"])


def test_frozen_tensor_trains_once_unfrozen() -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    optimizer = wrap(torch.optim.AdamW(model.named_parameters(), 0.02))
    before = theta(optimizer)["0.weight"]
    train(model, optimizer, range(4))
    assert torch.equal(theta(optimizer)["0.weight"], before)
    model[0].weight.requires_grad_(True)
    train(model, optimizer, range(4, 6))
    assert not torch.equal(theta(optimizer)["0.weight"], before)
    grad = model.get_parameter("0.weight").grad
    assert grad is not None
    assert torch.count_nonzero(grad) <= 58


def test_forward_passes_change_nothing() -> None:
    model, optimizer = make()
    train(model, optimizer, range(2))
    before, alpha = theta(optimizer), {k: v.clone() for k, v in model.state_dict().items()}
    model.eval()
    with torch.no_grad():
        for step in range(5):
            model(batch(step))
    assert_equal(before, theta(optimizer))
    assert_equal(alpha, model.state_dict())


def test_non_finite_gradient_moves_nothing_outside_the_backward_set() -> None:
    model, optimizer = make(refresh_every=100)
    before, masks = theta(optimizer), topkast.masks(optimizer)
    loss_of(model, batch(0) * float("nan")).backward()
    optimizer.step()
    for name, mask in masks.items():
        after = theta(optimizer)[name]
        assert torch.equal(after[~mask.backward], before[name][~mask.backward])
        assert after[mask.backward].isnan().any()
        assert not model.get_parameter(name)[~mask.forward].any()


def test_refresh_on_a_non_finite_weight_names_the_tensor() -> None:
    model, optimizer = make(refresh_every=1)
    loss_of(model, batch(0) * float("nan")).backward()
    with pytest.raises(topkast.NonFiniteError, match=r"0\.weight: 58 of 192 entries"):
        optimizer.step()


# Options that change during training


def test_exploration_stops_at_a_step() -> None:
    model, optimizer = make(explore_until=4, refresh_every=3, penalty=0.1)
    for step in range(10):
        before, masks = theta(optimizer), topkast.masks(optimizer)
        train(model, optimizer, range(step, step + 1))
        after = theta(optimizer)
        for name, mask in masks.items():
            exploring = mask.backward & ~mask.forward
            moved = (after[name] != before[name])[exploring]
            grad = model.get_parameter(name).grad
            assert grad is not None
            if step < 4:
                assert moved.any()
            else:
                assert not moved.any()
                assert not grad[~mask.forward].any()
            assert (after[name] != before[name])[mask.forward].any()


def test_group_added_after_exploration_has_stopped_does_not_explore() -> None:
    model, optimizer = make(explore_until=2, refresh_every=100)
    train(model, optimizer, range(3))
    head = nn.Linear(4, 10)
    named = [(f"head.{name}", param) for name, param in head.named_parameters()]
    optimizer.add_param_group({"params": named})
    before, mask = theta(optimizer)["head.weight"], topkast.masks(optimizer)["head.weight"]
    head(model(batch(0))).square().mean().backward()
    optimizer.step()
    moved = theta(optimizer)["head.weight"] != before
    assert moved[mask.forward].all()
    assert not moved[~mask.forward].any()


def test_random_exploration_redraws_at_every_refresh() -> None:
    model, optimizer = make(explore="random", refresh_every=1, penalty=0.0)
    drawn = []
    for step in range(4):
        mask = topkast.masks(optimizer)["0.weight"]
        drawn.append(mask.backward & ~mask.forward)
        train(model, optimizer, range(step, step + 1))
    overlaps = [int((a & b).sum()) for a, b in itertools.pairwise(drawn)]
    assert all(overlap < 30 for overlap in overlaps)  # of 38, drawn from 172: 8 expected
    other = make(explore="random", refresh_every=1, penalty=0.0, seed=1)[1]
    assert not torch.equal(drawn[0], topkast.masks(other)["0.weight"].backward)


def test_global_seed_of_torch_does_not_matter() -> None:
    masks = []
    for seed in (1, 2):
        model = make_model()
        torch.manual_seed(seed)
        masks.append(
            topkast.masks(wrap(torch.optim.SGD(model.parameters(), 0.1), explore="random"))
        )
    for name in masks[0]:
        assert torch.equal(masks[0][name].backward, masks[1][name].backward)


def test_penalty_may_be_scheduled_but_sparsity_may_not() -> None:
    model, optimizer = make(penalty=0.0)
    other_model, other = make(penalty=0.5)
    optimizer.param_groups[0]["penalty"] = 0.5
    train(model, optimizer, range(4))
    train(other_model, other, range(4))
    assert_equal(theta(optimizer), theta(other))
    optimizer.param_groups[0]["fwd"] = 0.95
    with pytest.raises(topkast.OptionError, match="fwd"):
        train(model, optimizer, range(4, 5))


def test_group_options() -> None:
    model = make_model()
    groups: Any = [
        {"params": list(model[0].named_parameters()), "fwd": 0.98, "bwd": 0.5, "penalty": 0.0},
        {"params": list(model[2].named_parameters()), "lr": 0.1, "dense": True},
    ]
    optimizer = wrap(torch.optim.SGD(groups, 0.02))
    rows = {row.name: row for row in topkast.summary(optimizer).tensors}
    assert (rows["weight"].forward, rows["weight"].backward) == (4, 96)
    assert rows["1.weight"].forward_sparsity == 0.0
    assert [group["fwd"] for group in optimizer.param_groups] == [0.98, 0.9]
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.1]
    before = theta(optimizer)
    train(model, optimizer, range(1))
    assert not torch.equal(theta(optimizer)["1.weight"], before["1.weight"])


def test_dense_false_in_a_group_sparsifies_biases_too() -> None:
    model = nn.Linear(20, 20)
    groups: Any = [{"params": [model.weight]}, {"params": [model.bias], "dense": False}]
    optimizer = wrap(torch.optim.SGD(groups, 0.1))
    rows = {row.name: row.forward for row in topkast.summary(optimizer).tensors}
    assert rows == {"0.0": 40, "1.0": 2}
    assert int(torch.count_nonzero(model.bias)) == 2


def test_group_added_later() -> None:
    model, head = make_model(), nn.Linear(4, 10)
    inner = torch.optim.AdamW(model.named_parameters(), 0.02)
    optimizer = wrap(inner)
    train(model, optimizer, range(2))
    named = [(f"head.{name}", param) for name, param in head.named_parameters()]
    optimizer.add_param_group({"params": named, "fwd": 0.5, "bwd": 0.25, "lr": 0.5})
    assert int(torch.count_nonzero(head.weight)) == 20
    extended = nn.Sequential(model, head)
    before = theta(optimizer)
    for step in range(2):
        optimizer.zero_grad()
        extended(batch(step)).square().mean().backward()
        optimizer.step()
    assert optimizer.state[head.weight]["exp_avg"].shape == (1, 30)
    assert not torch.equal(theta(optimizer)["head.weight"], before["head.weight"])
    assert optimizer.param_groups[1]["refresh_every"] == 3


@pytest.mark.parametrize(
    ("group", "error"),
    [
        ({"fwd": 0.5}, topkast.OptionError),  # below bwd
        ({"params": [torch.nn.Parameter(torch.full((3, 3), torch.nan))]}, topkast.NonFiniteError),
        ({"dense": "no.*"}, topkast.OptionError),
    ],
)
def test_refused_group_is_not_added(group: dict[str, Any], error: type[Exception]) -> None:
    model, head = make_model(), nn.Linear(4, 10)
    optimizer = wrap(torch.optim.AdamW(model.parameters(), 0.02))
    weights = head.weight.detach().clone()
    with pytest.raises(error):
        optimizer.add_param_group({"params": list(head.parameters())} | group)
    assert len(optimizer.param_groups) == 1
    assert torch.equal(head.weight, weights)
    train(model, optimizer, range(4))
    optimizer.load_state_dict(optimizer.state_dict())


# Other libraries' code around the optimizer


SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.5**epoch),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.5),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 1, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 2], 0.5),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 2),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.5, 1.0, 3),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.5),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.5, 2), lr_scheduler.ExponentialLR(opt, 0.5)], [2]
    ),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 4),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.5, 2)], optimizer=opt
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.05, 2, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.05, total_steps=10),
    "WarmupStableDecay": None,
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in lr_scheduler.__all__
        if name not in ("LRScheduler", "_LRScheduler") and name[0].isupper()
    ],
)
def test_every_scheduler_reaches_the_inner_optimizer(name: str) -> None:
    model = make_model()
    inner = torch.optim.AdamW(model.named_parameters(), 0.02)
    optimizer = wrap(inner)
    scheduler = SCHEDULERS[name](optimizer)
    rates = []
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        assert inner.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        rates.append(float(inner.param_groups[0]["lr"]))
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len(set(rates)) > 1


def test_scheduler_built_before_wrapping_is_an_error() -> None:
    model = make_model()
    inner = torch.optim.AdamW(model.parameters(), 0.02)
    lr_scheduler.ExponentialLR(inner, 0.5)
    with pytest.raises(topkast.UnsupportedOptimizerError, match="wrap the optimizer first"):
        wrap(inner)
    assert int(torch.count_nonzero(model.get_parameter("0.weight"))) == 192


def test_step_hooks_fire_once_and_in_order() -> None:
    model = make_model()
    inner = torch.optim.AdamW(model.parameters(), 0.02)
    calls: list[str] = []
    inner.register_step_post_hook(lambda opt, args, kwargs: calls.append("registered on inner"))
    optimizer = wrap(inner)
    calls.clear()
    handle = optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append("before"))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append("after"))
    both = register_optimizer_step_post_hook(lambda opt, args, kwargs: calls.append("everywhere"))
    try:
        train(model, optimizer, range(1))
    finally:
        both.remove()
    assert calls == ["before", "registered on inner", "after", "everywhere"]
    handle.remove()
    calls.clear()
    train(model, optimizer, range(1))
    assert calls == ["registered on inner", "after"]


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_with_overflow_equals_the_unwrapped_run(fused: bool) -> None:
    runs = []
    for wrapped in (False, True):
        model = make_model()
        optimizer: Any = torch.optim.AdamW(model.parameters(), 0.02, fused=fused)
        if wrapped:
            optimizer = wrap(optimizer, fwd=0.0, bwd=0.0, penalty=0.0, refresh_every=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(6):
            optimizer.zero_grad()
            loss = loss_of(model, batch(step))
            scaler.scale(loss * (float("inf") if step in (0, 3) else 1.0)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        runs.append({k: v.clone() for k, v in model.state_dict().items()})
        if wrapped:
            assert topkast.summary(optimizer).updates == 4
    assert_equal(*runs)


def test_skipped_step_moves_no_weight_no_mask_and_no_counter() -> None:
    model, optimizer = make(refresh_every=1)
    train(model, optimizer, range(2))
    before, masks = theta(optimizer), topkast.masks(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    optimizer.zero_grad()
    scaler.scale(loss_of(model, batch(2)) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_equal(before, theta(optimizer))
    for name, mask in topkast.masks(optimizer).items():
        assert torch.equal(mask.backward, masks[name].backward)
    assert topkast.summary(optimizer).updates == 2


def test_closures() -> None:
    model, optimizer = make()
    other_model, other = make()

    def closure() -> Tensor:
        other.zero_grad()
        loss = loss_of(other_model, batch(step))
        loss.backward()
        return loss

    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        loss = other.step(closure)
        assert float(loss.detach()) > 0
    assert_equal(theta(optimizer), theta(other))


def test_prepared_optimizer_equals_a_plain_one() -> None:
    """As in Accelerate, which reloads the fresh state, and Lightning, which copies ``__dict__``."""
    model, optimizer = make()
    other_model, other = make()
    other.load_state_dict(other.state_dict())
    prepared_class = type("Prepared", (type(other),), {})
    prepared: Any = object.__new__(prepared_class)
    prepared.__dict__.update({k: v for k, v in other.__dict__.items() if k != "step"})
    for step in range(7):
        train(model, optimizer, range(step, step + 1))
        other.zero_grad()
        loss_of(other_model, batch(step)).backward()
        (prepared if step % 2 else other).step()
    assert_equal(theta(optimizer), theta(other))
    assert topkast.summary(prepared).updates == 7


def test_compiled_model_is_not_compiled_again() -> None:
    torch._dynamo.reset()
    model, optimizer = make(refresh_every=2)
    counter = CompileCounter()
    compiled: Any = torch.compile(model, backend=counter)
    for step in range(7):
        optimizer.zero_grad()
        loss_of(compiled, batch(step)).backward()
        optimizer.step()
        if step == 0:
            frames = counter.frame_count
    assert counter.frame_count == frames > 0
    expected_model, expected = make(refresh_every=2)
    train(expected_model, expected, range(7))
    assert_equal(theta(expected), theta(optimizer))


def test_deleted_wrapper_has_no_effect_on_the_model() -> None:
    model, optimizer = make()
    del optimizer
    gc.collect()
    loss_of(model, batch(0)).backward()
    for param in model.parameters():
        assert param.grad is not None
        if param.dim() > 1:
            assert torch.count_nonzero(param.grad) > 0.31 * param.numel()  # |B| is 0.3 of it


# External writes to the Parameters


def test_external_writes_on_the_forward_set_are_accepted() -> None:
    model, optimizer = make(refresh_every=100)
    train(model, optimizer, range(2))
    with torch.no_grad():
        model.get_parameter("0.weight").clamp_(-0.1, 0.1)
    train(model, optimizer, range(2, 3))
    mask = topkast.masks(optimizer)["0.weight"].forward
    assert theta(optimizer)["0.weight"][mask].abs().max() < 0.15


def test_loading_dense_weights_under_the_optimizer_is_an_error() -> None:
    model, optimizer = make()
    model.load_state_dict(make_model().state_dict())
    loss_of(model, batch(0)).backward()
    with pytest.raises(topkast.MismatchError, match=r"0\.weight.*before wrapping the optimizer"):
        optimizer.step()


def test_exported_model_is_sparse_at_any_moment() -> None:
    model, optimizer = make(refresh_every=2)
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        counts = {
            name: int(torch.count_nonzero(tensor)) for name, tensor in model.state_dict().items()
        }
        assert (counts["0.weight"], counts["2.weight"]) == (20, 7)


def test_signature_equals_any_optimizers() -> None:
    _, optimizer = make()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert list(inspect.signature(type(optimizer).step).parameters) == ["self", "closure"]
    assert repr(optimizer).startswith("TopKASTOptimizer around AdamW (")


def test_replaced_memory_is_accepted() -> None:
    model, optimizer = make(refresh_every=100)
    weight = model.get_parameter("0.weight")
    weight.data = weight.data * 2
    train(model, optimizer, range(1))
    mask = topkast.masks(optimizer)["0.weight"].forward
    assert torch.equal(theta(optimizer)["0.weight"][mask], weight[mask])
    assert theta(optimizer)["0.weight"][mask].abs().max() > 0.4


def test_converting_the_model_under_the_optimizer_is_an_error() -> None:
    model, optimizer = make()
    model.double()
    model(batch(0).double()).square().mean().backward()
    with pytest.raises(topkast.MismatchError, match=r"float64 on cpu now, but was torch.float32"):
        optimizer.step()
