"""Transformers: the Trainer trains as a plain loop does, and what is saved loads."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem.models import MODELS, TOKENS, llama, logits, train, wrap
from optimizer_runs import assert_same_bits
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments

import topkast

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # A Trainer's checkpoints are for itself: it resumes from them.
    pytest.mark.filterwarnings("ignore::topkast.SparseExportWarning"),
]


class Sentences(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": TOKENS[index], "labels": TOKENS[index]}


class InOrder(Trainer):  # type: ignore[misc]
    """The batches of a plain loop."""

    def _get_train_sampler(self, *arguments: Any) -> SequentialSampler:
        return SequentialSampler(Sentences())


def factor(step: int) -> float:
    return 1 / (1 + step)


def trainer(folder: Path, model: nn.Module, optimizer: Any, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=12,
        report_to=[],
        use_cpu=True,
        save_strategy="steps",
        save_steps=6,
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_grad_norm=0.5,
        **{"per_device_train_batch_size": 4} | options,
    )
    return InOrder(
        model,
        arguments,
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        optimizers=(optimizer, LambdaLR(optimizer, factor)),
    )


def plain_loop(name: str, sparse: bool, parts: int = 1) -> tuple[nn.Module, Any]:
    model = MODELS[name]()
    optimizer = wrap(model, sparse)
    scheduler = LambdaLR(optimizer, factor)
    for step in range(12):
        tokens = TOKENS[4 * (step % 8) :][:4]
        optimizer.zero_grad()
        for part in tokens.chunk(parts):
            (model(input_ids=part, labels=part).loss / parts).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
    return model, optimizer


def assert_close(one: Any, other: Any) -> None:
    """The same weights but for rounding: a Trainer divides the sum of losses by their number.

    Not biases, among which are those of keys: their gradients are zero but for rounding.
    """
    theta = topkast.dense_params(other)
    for name, masks in topkast.masks(one).items():
        assert torch.equal(masks.backward, topkast.masks(other)[name].backward), name
        torch.testing.assert_close(
            theta[name], topkast.dense_params(one)[name], rtol=1e-5, atol=1e-6
        )


CASES = [("gpt2", False), ("llama", False), ("llama", True), ("bert", False), ("bert", True)]


@pytest.mark.parametrize(("name", "sparse"), CASES)
class TestTrainer:
    def test_it_trains_as_in_a_plain_loop(self, tmp_path: Path, name: str, sparse: bool) -> None:
        _, expected = plain_loop(name, sparse)
        model = MODELS[name]()
        optimizer = wrap(model, sparse)
        trainer(tmp_path, model, optimizer).train()
        assert topkast.summary(optimizer).updates == 12
        assert_close(expected, optimizer)

    def test_a_run_is_resumed_bit_for_bit(self, tmp_path: Path, name: str, sparse: bool) -> None:
        model = MODELS[name]()
        optimizer = wrap(model, sparse)
        trainer(tmp_path, model, optimizer).train()
        other_model = MODELS[name]()
        other = wrap(other_model, sparse)
        resumed = trainer(tmp_path, other_model, other)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert_same_bits(model.state_dict(), other_model.state_dict())
        assert_same_bits(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize("sparse", [False, True])
def test_accumulated_gradients_are_one_update(tmp_path: Path, sparse: bool) -> None:
    _, expected = plain_loop("llama", sparse, parts=2)
    model = llama()
    optimizer = wrap(model, sparse)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer(tmp_path, model, optimizer, **options).train()
    assert topkast.summary(optimizer).updates == 12
    assert_close(expected, optimizer)


@pytest.mark.parametrize("sparse", [False, True])
def test_gradient_checkpoints_give_the_same_weights(tmp_path: Path, sparse: bool) -> None:
    runs: list[Any] = []
    for checkpointing in (False, True):
        model = llama()
        optimizer = wrap(model, sparse)
        folder = tmp_path / str(checkpointing)
        trainer(folder, model, optimizer, gradient_checkpointing=checkpointing).train()
        runs.append(topkast.dense_params(optimizer))
    assert_same_bits(runs[0], runs[1])


@pytest.mark.parametrize("sparse", [False, True])
def test_the_best_model_comes_back_and_trains_on(tmp_path: Path, sparse: bool) -> None:
    model = llama()
    optimizer = wrap(model, sparse)
    best = trainer(
        tmp_path,
        model,
        optimizer,
        eval_strategy="steps",
        eval_steps=6,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worse one, so that it is not what is there already
    )
    best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-6")
    folder = tmp_path / "checkpoint-6"
    other_model = llama()
    other = wrap(other_model, sparse)
    other.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    state = topkast.densify(model.state_dict())
    for key, tensor in topkast.densify(other_model.state_dict()).items():
        if key.endswith("proj.weight"):
            assert torch.equal(state[key], tensor), key
    train(model, [optimizer], range(3))


class TestSavePretrained:
    def test_without_sparse_layers_it_is_as_ever(self, tmp_path: Path) -> None:
        model = llama()
        optimizer = wrap(model)
        train(model, [optimizer], range(7))
        with warnings.catch_warnings():
            warnings.simplefilter("error", topkast.SparseExportWarning)
            model.save_pretrained(tmp_path)
        assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))

    def test_sparse_layers_are_warned_of_and_one_line_saves_what_loads(
        self, tmp_path: Path
    ) -> None:
        model = llama()
        optimizer = wrap(model, sparse=True)
        train(model, [optimizer], range(7))
        with pytest.warns(topkast.SparseExportWarning, match=r"topkast\.densify"):
            model.save_pretrained(tmp_path / "sparse")
        with warnings.catch_warnings():
            warnings.simplefilter("error", topkast.SparseExportWarning)
            model.save_pretrained(
                tmp_path / "dense", state_dict=topkast.densify(model.state_dict())
            )
        loaded = type(model).from_pretrained(tmp_path / "dense")
        torch.testing.assert_close(logits(loaded), logits(model))
