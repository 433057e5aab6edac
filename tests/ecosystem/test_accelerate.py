"""Accelerate: wrapped optimizers are prepared, and train as in a plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from optimizer_runs import OPTIONS, assert_same_bits, make_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import topkast

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Accelerate keeps one state a process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def build(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.named_parameters(), 0.02)


def wrap(model: nn.Module, sparse: bool) -> Any:
    optimizer = topkast.wrap_optimizer(build(model), **OPTIONS)
    if sparse:
        topkast.sparsify(model, optimizer, auto=False)
    return optimizer


def batches(count: int = 10) -> Tensor:
    return torch.randn(count, 4, 12, generator=torch.Generator().manual_seed(0))


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    loss: Tensor = (model(inputs).float() - inputs[:, :4]).square().mean()
    return loss


def plain_loop(
    sparse: bool = False, accumulate: int = 1, lowered: bool = False
) -> tuple[nn.Module, Any]:
    model = make_model()
    optimizer = wrap(model, sparse)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for number, inputs in enumerate(batches(), 1):
        with torch.autocast("cpu", torch.bfloat16) if lowered else nullcontext():
            loss = loss_of(model, inputs) / accumulate
        loss.backward()
        if number % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model, optimizer


def accelerated_loop(
    accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, inputs: Tensor
) -> None:
    for batch in inputs:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.2)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


ORDERS = ["before", "between", "sparsified before", "sparsified after"]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("order", ORDERS)
def test_it_trains_as_in_a_plain_loop(order: str, accumulate: int, precision: str) -> None:
    sparse = "sparsified" in order
    expected_model, expected = plain_loop(sparse, accumulate, precision == "bf16")
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
    )
    original = make_model()
    if order == "between":
        model = accelerator.prepare(original)
        optimizer = wrap(model, sparse)
        prepared = accelerator.prepare(optimizer)
    else:
        optimizer = wrap(original, order == "sparsified before")
        model, prepared = accelerator.prepare(original, optimizer)
        if order == "sparsified after":
            topkast.sparsify(original, optimizer, auto=False)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.ExponentialLR(prepared, 0.9))
    accelerated_loop(accelerator, model, prepared, scheduler, batches())
    assert topkast.summary(optimizer).updates == 10 // accumulate
    assert_same_bits(topkast.dense_params(expected), topkast.dense_params(optimizer))
    assert_same_bits(expected_model.state_dict(), accelerator.unwrap_model(model).state_dict())


def test_wrapping_what_was_prepared_is_refused_with_the_order_that_works() -> None:
    accelerator = Accelerator(cpu=True)
    original = make_model()
    _, prepared = accelerator.prepare(original, build(original))
    with pytest.raises(
        topkast.UnsupportedOptimizerError,
        match=r"AcceleratedOptimizer holds another optimizer, AdamW.*before the library prepares",
    ):
        topkast.wrap_optimizer(prepared, **OPTIONS)
    assert int(torch.count_nonzero(original.get_parameter("0.weight"))) == 192


def test_making_sparse_takes_the_wrapper_and_says_so() -> None:
    accelerator = Accelerator(cpu=True)
    original = make_model()
    model, prepared = accelerator.prepare(original, wrap(original, False))
    with pytest.raises(topkast.OptionError, match="got AcceleratedOptimizer"):
        topkast.sparsify(model, prepared)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_saved_state_resumes_bit_for_bit(tmp_path: Path, sparse: bool) -> None:
    def start() -> tuple[Accelerator, Any, Any, Any]:
        anew_accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        original = make_model()
        optimizer = wrap(original, sparse)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return anew_accelerator, *anew_accelerator.prepare(original, optimizer, scheduler)

    inputs = batches(16)
    accelerator, model, optimizer, scheduler = start()
    accelerated_loop(accelerator, model, optimizer, scheduler, inputs[:6])
    accelerator.save_state(str(tmp_path))
    accelerated_loop(accelerator, model, optimizer, scheduler, inputs[6:])
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    other_accelerator, other_model, other, other_scheduler = start()
    accelerated_loop(other_accelerator, other_model, other, other_scheduler, inputs[-4:])
    other_accelerator.load_state(str(tmp_path))
    accelerated_loop(other_accelerator, other_model, other, other_scheduler, inputs[6:])
    assert_same_bits(model.state_dict(), other_model.state_dict())
    assert_same_bits(optimizer.state_dict(), other.state_dict())


def test_batches_of_a_prepared_loader() -> None:
    runs = []
    for accelerated in (False, True):
        original = make_model()
        optimizer: Any = wrap(original, False)
        loader: Any = DataLoader(TensorDataset(batches().view(-1, 12)), batch_size=4)
        model: Any = original
        if accelerated:
            accelerator = Accelerator(cpu=True)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for (inputs,) in loader:
            optimizer.zero_grad()
            loss_of(model, inputs).backward()
            optimizer.step()
        runs.append(optimizer.state_dict())
    assert_same_bits(*runs)
