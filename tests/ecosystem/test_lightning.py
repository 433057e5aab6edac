"""Lightning: hooks, checkpoints, callbacks; as in a plain loop."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import topkast_torch
import torch
from ecosystem.quiet import QUIET_LIGHTNING
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from optimizer_runs import OPTIONS, assert_same_bits, make_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import topkast

pytestmark = QUIET_LIGHTNING

BATCHES = torch.randn(10, 4, 12, generator=torch.Generator().manual_seed(0))


class Module(lightning.LightningModule):  # type: ignore[misc]
    """The optimizer is wrapped in ``configure_optimizers``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()
        self.wrapped: Any = None
        self.trained: dict[str, Tensor] = {}
        self.seen: list[Tensor] = []

    def wrap(self) -> Any:
        inner = torch.optim.AdamW(self.named_parameters(), 0.02)
        return topkast.wrap_optimizer(inner, **OPTIONS)

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.seen.append(batch[0])
        return loss_of(self.model, batch[0])

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.trained = topkast.dense_params(self.wrapped)

    def configure_optimizers(self) -> Any:
        self.wrapped = self.wrapped or self.wrap()
        return [self.wrapped], [torch.optim.lr_scheduler.ExponentialLR(self.wrapped, 0.9)]


class SparseModule(Module):
    """Made sparse in ``configure_model``, which comes before a checkpoint is loaded."""

    def configure_model(self) -> None:
        if self.wrapped is None:
            self.wrapped = self.wrap()
            topkast.sparsify(self, self.wrapped, auto=False)


class LateSparseModule(Module):
    """Made sparse after checkpoints are loaded; its checkpoints are dense."""

    def configure_optimizers(self) -> Any:
        self.wrapped = self.wrap()
        topkast.sparsify(self, self.wrapped, auto=False)
        return super().configure_optimizers()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = topkast.densify(checkpoint["state_dict"])


class ManualModule(Module):
    """Manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.model, batch[0]))
        optimizer.step()

    def on_train_epoch_end(self) -> None:
        scheduler: Any = self.lr_schedulers()
        scheduler.step()


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    loss: Tensor = (model(inputs) - inputs[:, :4]).square().mean()
    return loss


def loader() -> Any:
    return DataLoader(TensorDataset(BATCHES.view(-1, 12)), batch_size=4)


def trainer(folder: Path, epochs: int = 2, **options: Any) -> lightning.Trainer:
    silent = "logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        default_root_dir=folder,
        **dict.fromkeys(silent, False) | options,
    )


def plain_loop(
    sparse: bool = False,
    epochs: int = 2,
    clip: float | None = None,
    accumulate: int = 1,
    batches: Tensor = BATCHES,
) -> dict[str, Tensor]:
    module = Module()
    optimizer = module.wrap()
    if sparse:
        topkast.sparsify(module, optimizer, auto=False)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(epochs):
        for number, inputs in enumerate(batches, 1):
            (loss_of(module.model, inputs) / accumulate).backward()
            if number % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
    theta: dict[str, Tensor] = topkast.dense_params(optimizer)
    return theta


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_trains_as_in_a_plain_loop(
    tmp_path: Path, sparse: bool, clip: float | None, accumulate: int
) -> None:
    module = SparseModule() if sparse else Module()
    options: dict[str, Any] = {"gradient_clip_val": clip, "accumulate_grad_batches": accumulate}
    trainer(tmp_path, **options).fit(module, loader())
    assert_same_bits(plain_loop(sparse, 2, clip, accumulate), module.trained)
    assert topkast.summary(module.wrapped).updates == 20 // accumulate


def test_manual_optimization(tmp_path: Path) -> None:
    module = ManualModule()
    trainer(tmp_path).fit(module, loader())
    assert_same_bits(plain_loop(), module.trained)


def test_mixed_precision_trains_as_masked_execution_does_in_autocast(tmp_path: Path) -> None:
    module = Module()
    trainer(tmp_path, precision="bf16-mixed").fit(module, loader())
    expected = Module()
    optimizer = expected.wrap()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(2):
        for inputs in BATCHES:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(expected.model, inputs)
            loss.backward()
            optimizer.step()
        scheduler.step()
    assert_same_bits(topkast.dense_params(optimizer), module.trained)


@pytest.mark.parametrize("kind", [Module, SparseModule, LateSparseModule])
@pytest.mark.filterwarnings("ignore::topkast.SparseExportWarning")
class TestCheckpoints:
    def test_a_run_is_resumed_bit_for_bit(self, tmp_path: Path, kind: type[Module]) -> None:
        path = tmp_path / "run.ckpt"
        first = kind()
        fit = trainer(tmp_path, epochs=1)
        fit.fit(first, loader())
        fit.save_checkpoint(path)
        module = kind()
        trainer(tmp_path).fit(module, loader(), ckpt_path=path, weights_only=False)
        assert_same_bits(plain_loop(kind is not Module), module.trained)
        assert topkast.summary(module.wrapped).updates == 20

    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
    def test_one_from_the_middle_of_an_epoch(self, tmp_path: Path, kind: type[Module]) -> None:
        """Of the same batches: a loader that cannot resume begins anew."""
        path = tmp_path / "run.ckpt"
        first, second = kind(), kind()
        saving = ModelCheckpoint(tmp_path, "run", every_n_train_steps=7)
        trainer(tmp_path, epochs=1, callbacks=[saving], enable_checkpointing=True).fit(
            first, loader()
        )
        trainer(tmp_path, epochs=1).fit(second, loader(), ckpt_path=path, weights_only=False)
        seen = torch.stack([*first.seen[:7], *second.seen])
        assert len(seen) == 10
        assert_same_bits(plain_loop(kind is not Module, epochs=1, batches=seen), second.trained)

    def test_a_model_is_loaded_from_it(self, tmp_path: Path, kind: type[Module]) -> None:
        path = tmp_path / "run.ckpt"
        module = kind()
        fit = trainer(tmp_path, epochs=1)
        fit.fit(module, loader())
        fit.save_checkpoint(path)
        loaded = kind.load_from_checkpoint(path, weights_only=False)
        torch.testing.assert_close(loaded.model(BATCHES[0]), module.model(BATCHES[0]))
        weight = topkast.densify(loaded.state_dict())["model.0.weight"]
        assert int(torch.count_nonzero(weight)) == 39


def test_making_sparse_in_configure_optimizers_is_warned_of(tmp_path: Path) -> None:
    module = LateSparseModule()
    with pytest.warns(topkast.SparseExportWarning, match="sparsify in configure_model"):
        trainer(tmp_path, epochs=1).fit(module, loader())
    with warnings.catch_warnings():
        warnings.simplefilter("error", topkast.SparseExportWarning)
        trainer(tmp_path, epochs=1).fit(SparseModule(), loader())


def test_a_backbone_is_unfrozen_later(tmp_path: Path) -> None:
    """The callback adds a group of Parameters without names."""

    class Tuned(Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(12, 12)

        def wrap(self) -> Any:
            named = [pair for pair in self.named_parameters() if pair[1].requires_grad]
            return topkast.wrap_optimizer(torch.optim.AdamW(named, 0.02), **OPTIONS)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return loss_of(self.model, self.backbone(batch[0]))

        def configure_optimizers(self) -> Any:
            self.wrapped = self.wrap()
            return self.wrapped

        def on_train_epoch_end(self) -> None:
            self.history.append(copy.deepcopy(self.backbone.state_dict()))

        history: list[dict[str, Tensor]] = []  # noqa: RUF012 - of one run

    module = Tuned()
    module.history = [copy.deepcopy(module.backbone.state_dict())]
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01)
    trainer(tmp_path, epochs=3, callbacks=[callback]).fit(module, loader())
    start, frozen, *_, last = module.history
    assert_same_bits(start, frozen)
    assert not torch.equal(frozen["weight"], last["weight"])
    assert list(topkast.masks(module.wrapped)) == ["model.0.weight", "model.2.weight", "1.0"]
    assert int(torch.count_nonzero(module.backbone.weight)) == 29
    assert topkast.summary(module.wrapped).updates == 30


class TestAverages:
    @pytest.mark.parametrize(
        ("callback", "name"),
        [
            (lambda: EMAWeightAveraging(decay=0.5), "AveragedModel"),
            (lambda: StochasticWeightAveraging(0.01, 1), "StochasticWeightAveraging"),
        ],
        ids=["EMA", "SWA"],
    )
    def test_those_of_forward_views_are_warned_of(
        self, tmp_path: Path, callback: Any, name: str
    ) -> None:
        module = Module()
        with pytest.warns(topkast.DenseAverageWarning, match=name):
            trainer(tmp_path, epochs=3, callbacks=[callback()]).fit(module, loader())

    @pytest.mark.filterwarnings("ignore::topkast.DenseAverageWarning")
    def test_an_average_beside_it_changes_no_training(self, tmp_path: Path) -> None:
        module = Module()
        fit = trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.5)])
        fit.fit(module, loader())
        assert_same_bits(plain_loop(), module.trained)

    def test_that_of_the_weights_stays_sparse(self, tmp_path: Path) -> None:
        class Averaged(Module):
            resumed: Any = None

            def on_train_batch_end(self, *arguments: Any) -> None:
                super().on_train_batch_end(*arguments)
                self.average.update()

            def configure_optimizers(self) -> Any:
                configured = super().configure_optimizers()
                self.average = topkast_torch.WeightAverage(self.wrapped, decay=0.5)
                return configured

            def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["average"] = self.average.state_dict()

            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                self.resumed = checkpoint["average"]

            def on_train_start(self) -> None:
                if self.resumed is not None:
                    self.average.load_state_dict(self.resumed)

        path = tmp_path / "run.ckpt"
        whole, half, rest = Averaged(), Averaged(), Averaged()
        trainer(tmp_path).fit(whole, loader())
        fit = trainer(tmp_path, epochs=1)
        fit.fit(half, loader())
        fit.save_checkpoint(path)
        trainer(tmp_path).fit(rest, loader(), ckpt_path=path, weights_only=False)
        averages = whole.average.forward_params()
        assert int(torch.count_nonzero(averages["model.0.weight"])) == 39
        assert_same_bits(averages, rest.average.forward_params())


def test_fabric(tmp_path: Path) -> None:
    module = Module()
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    optimizer = module.wrap()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    model, prepared = fabric.setup(module.model, optimizer)
    for epoch in range(2):
        for inputs in BATCHES:
            prepared.zero_grad()
            fabric.backward(loss_of(model, inputs))
            prepared.step()
        scheduler.step()
        if epoch == 0:
            fabric.save(tmp_path / "run.ckpt", {"model": model, "optimizer": prepared})
    assert_same_bits(plain_loop(), topkast.dense_params(optimizer))
    resumed = Module()
    other = resumed.wrap()
    model, prepared = fabric.setup(resumed.model, other)
    state = {"model": model, "optimizer": prepared}
    fabric.load(tmp_path / "run.ckpt", state)
    expected = torch.load(tmp_path / "run.ckpt", weights_only=True)["optimizer"]
    assert_same_bits(expected, other.state_dict())
