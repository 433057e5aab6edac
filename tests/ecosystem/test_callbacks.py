"""The callbacks inside of trainers: one line for each, and no glue elsewhere."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import topkast_torch
import torch
import torch_ema
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker, on_main_process
from ecosystem.models import TOKENS, llama, wrap
from ecosystem.quiet import QUIET_LIGHTNING
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from optimizer_runs import OPTIONS, assert_same_bits, make_model
from topkast_torch import callbacks
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import Trainer, TrainingArguments

import topkast

pytestmark = QUIET_LIGHTNING

BATCHES = torch.randn(10, 4, 12, generator=torch.Generator().manual_seed(0))


def read_events(folder: Path) -> Any:
    """What TensorBoard reads of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


class TestPlainLoop:
    def test_tensorboard_reads_scalars_and_masks(self, tmp_path: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        model = make_model()
        inner = torch.optim.AdamW(model.named_parameters(), 0.02)
        optimizer = topkast.wrap_optimizer(inner, **OPTIONS)
        writer = SummaryWriter(tmp_path)
        monitor = callbacks.Monitor(optimizer, writer=writer, every=2, draw_every=4)
        for inputs in BATCHES:
            optimizer.zero_grad()
            (model(inputs) - inputs[:, :4]).square().mean().backward()
            optimizer.step()
            monitor.step()
        writer.close()
        events = read_events(tmp_path)
        updates = events.Scalars("topkast/updates")
        assert [(event.step, event.value) for event in updates] == [(n, n) for n in range(2, 11, 2)]
        assert "topkast/mask_change/2.weight" in events.Tags()["scalars"]
        images = events.Images("topkast/mask/0.weight")
        assert [event.step for event in images] == [1, 4, 8]
        assert images[0].encoded_image_string.startswith(b"\x89PNG")

    def test_an_average_of_torch_ema_ends_sparse(self) -> None:
        model = make_model()
        inner = torch.optim.AdamW(model.parameters(), 0.02)
        optimizer = topkast.wrap_optimizer(inner, **OPTIONS)
        average = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.5)
        monitor = callbacks.Monitor(optimizer, averages=[average])
        for inputs in BATCHES:
            optimizer.zero_grad()
            (model(inputs) - inputs[:, :4]).square().mean().backward()
            optimizer.step()
            average.update()
            monitor.step()
        assert torch.count_nonzero(average.shadow_params[0]) > 39
        monitor.finish()
        average.copy_to(model.parameters())
        assert 0 < torch.count_nonzero(model.get_parameter("0.weight")) <= 39
        for name, (forward, _) in zip(
            ("0.weight", "2.weight"), topkast.masks(optimizer).values(), strict=True
        ):
            assert not model.get_parameter(name)[~forward].any()


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.model, self.sparse = make_model(), sparse
        self.wrapped: Any = None

    def configure_model(self) -> None:
        if self.wrapped is None:
            inner = torch.optim.AdamW(self.named_parameters(), 0.02)
            self.wrapped = topkast.wrap_optimizer(inner, **OPTIONS)
            if self.sparse:
                topkast.sparsify(self, self.wrapped, auto=False)

    def configure_optimizers(self) -> Any:
        self.configure_model()
        return self.wrapped

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss: Tensor = (self.model(batch[0]) - batch[0][:, :4]).square().mean()
        return loss


class DenseModule(Module):
    def configure_model(self) -> None:
        self.wrapped = torch.optim.AdamW(self.parameters(), 0.02)


def fit(folder: Path, module: Module, *used: Any, epochs: int = 2, **options: Any) -> Any:
    silent = "enable_progress_bar", "enable_model_summary", "enable_checkpointing"
    path = options.pop("ckpt_path", None)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=list(used),
        **dict.fromkeys(silent, False) | {"logger": False, "log_every_n_steps": 1} | options,
    )
    loader = DataLoader(TensorDataset(BATCHES.view(-1, 12)), batch_size=4)
    trainer.fit(module, loader, ckpt_path=path, weights_only=False)
    return trainer


class TestLightning:
    @pytest.mark.parametrize("sparse", [False, True])
    def test_loggers_get_the_summary_and_tensorboard_the_masks(
        self, tmp_path: Path, sparse: bool
    ) -> None:
        loggers = [TensorBoardLogger(tmp_path, "board", 0), CSVLogger(tmp_path, "table", 0)]
        callback = callbacks.LightningCallback(every="refresh", draw_every=9, draw="*.0.weight")
        options: Any = {"logger": loggers, "accumulate_grad_batches": 2}
        fit(tmp_path, Module(sparse), callback, **options)
        events = read_events(tmp_path / "board" / "version_0")
        assert [event.step for event in events.Scalars("topkast/updates")] == [3, 6, 9]
        assert [event.step for event in events.Images("topkast/mask/model.0.weight")] == [1, 9]
        table = (tmp_path / "table" / "version_0" / "metrics.csv").read_text()
        assert "topkast/mask_change/model.2.weight" in table.splitlines()[0]

    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize(
        "make",
        [
            lambda: EMAWeightAveraging(decay=0.9),
            lambda: StochasticWeightAveraging(0.01, 1, annealing_epochs=1),
        ],
        ids=["EMA", "SWA"],
    )
    @pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model")
    def test_the_model_ends_sparse_under_callbacks_that_average(
        self, tmp_path: Path, make: Any, first: bool
    ) -> None:
        without, module = Module(), Module()
        with pytest.warns(topkast.DenseAverageWarning):
            fit(tmp_path, without, make(), epochs=3)
        assert torch.count_nonzero(without.model.get_parameter("0.weight")) > 39
        averaging, callback = make(), callbacks.LightningCallback()
        used = [callback, averaging] if first else [averaging, callback]
        trainer = fit(tmp_path, module, *used, epochs=3)
        masks = topkast.masks(module.wrapped)
        for name, (forward, _) in masks.items():
            expected = without.get_parameter(name) * forward
            assert torch.equal(module.get_parameter(name), expected), name
            assert torch.count_nonzero(expected) > forward.sum() // 2
        path = tmp_path / "end.ckpt"
        trainer.save_checkpoint(path)
        saved = torch.load(path, weights_only=False)["state_dict"]
        assert not saved["model.0.weight"][~masks["model.0.weight"].forward].any()

    @pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model")
    def test_averages_of_sparse_layers_are_refused_before_training(self, tmp_path: Path) -> None:
        module = Module(sparse=True)
        with pytest.raises(topkast.MismatchError, match=r"Use topkast_torch\.WeightAverage"):
            fit(tmp_path, module, EMAWeightAveraging(), callbacks.LightningCallback())
        assert topkast.summary(module.wrapped).updates == 0

    @pytest.mark.parametrize("sparse", [False, True])
    def test_its_own_average_is_resumed_bit_for_bit(self, tmp_path: Path, sparse: bool) -> None:
        averages: list[Any] = []
        for epochs in ([2], [1, 2]):
            path = None
            for count in epochs:
                callback = callbacks.LightningCallback(decay=0.5)
                trainer = fit(tmp_path, Module(sparse), callback, epochs=count, ckpt_path=path)
                path = tmp_path / "run.ckpt"
                trainer.save_checkpoint(path)
            assert callback.average is not None
            averages.append(callback.average.forward_params())
        assert_same_bits(averages[0], averages[1])
        assert int(torch.count_nonzero(averages[0]["model.0.weight"])) == 39

    def test_a_run_without_a_wrapped_optimizer_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(topkast.OptionError, match="configure_optimizers: AdamW"):
            fit(tmp_path, DenseModule(), callbacks.LightningCallback())


class Sentences(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": TOKENS[index], "labels": TOKENS[index]}


def make_trainer(folder: Path, optimizer: Any, model: Any, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=8,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        per_device_train_batch_size=4,
        **{"report_to": []} | options,
    )
    optimizers = optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return Trainer(model, arguments, train_dataset=Sentences(), optimizers=optimizers)


class TestTransformers:
    @pytest.mark.parametrize("sparse", [False, True])
    def test_the_summary_is_in_the_history(self, tmp_path: Path, sparse: bool) -> None:
        model = llama()
        trainer = make_trainer(tmp_path, wrap(model, sparse), model)
        trainer.add_callback(callbacks.TransformersCallback(trainer, every=3))
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "topkast/updates" in entry]
        assert [(entry["step"], entry["topkast/updates"]) for entry in logged] == [(3, 3), (6, 6)]
        name = "model.layers.0.mlp.up_proj.weight"
        assert 0 <= logged[1][f"topkast/mask_change/{name}"] <= 1

    def test_tensorboard_gets_both(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
        model = llama()
        trainer = make_trainer(tmp_path, wrap(model), model, report_to=["tensorboard"])
        trainer.add_callback(
            callbacks.TransformersCallback(trainer, every=4, draw_every=5, draw="*.up_proj.weight")
        )
        trainer.train()
        events = read_events(tmp_path / "board")
        updates = events.Scalars("train/topkast/updates")
        assert [event.step for event in updates] == [4, 8]
        (image,) = events.Tags()["images"]
        assert [event.step for event in events.Images(image)] == [1, 5]

    def test_an_average_ends_sparse(self, tmp_path: Path) -> None:
        model = llama()
        optimizer = wrap(model)
        average = AveragedModel(model)
        trainer = make_trainer(tmp_path, optimizer, model)
        trainer.add_callback(callbacks.TransformersCallback(trainer, averages=[average]))
        with torch.no_grad():
            for param in average.parameters():
                param.fill_(1.0)
        trainer.train()
        averaged = dict(average.module.named_parameters())
        for name, (forward, _) in topkast.masks(optimizer).items():
            assert torch.equal(averaged[name] != 0, forward), name


class Recorder(GeneralTracker):  # type: ignore[misc]
    """A tracker of Accelerate's."""

    name = "recorder"
    requires_logging_directory = False
    tracker = None

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[dict[str, float], int]] = []

    @on_main_process  # type: ignore[untyped-decorator]
    def store_init_configuration(self, values: Any) -> None:
        pass

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: dict[str, float], step: int, **options: Any) -> None:
        self.entries.append((values, step))


def test_accelerate_logs_to_its_trackers() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    recorder = Recorder()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, log_with=recorder)
    accelerator.init_trackers("run")
    original = make_model()
    inner = torch.optim.AdamW(original.named_parameters(), 0.02)
    model, prepared = accelerator.prepare(original, topkast.wrap_optimizer(inner, **OPTIONS))
    average = AveragedModel(copy.deepcopy(original))
    monitor = callbacks.Monitor(prepared, accelerator.log, every=2, averages=[average])
    for inputs in BATCHES:
        with accelerator.accumulate(model):
            accelerator.backward((model(inputs) - inputs[:, :4]).square().mean())
            prepared.step()
            prepared.zero_grad()
        if accelerator.sync_gradients:
            average.update_parameters(model)
        monitor.step()
    monitor.finish()
    logged = [(entry["topkast/updates"], step) for entry, step in recorder.entries]
    assert logged == [(2, 2), (4, 4)]
    assert 0 < torch.count_nonzero(average.module.get_parameter("0.weight")) <= 39
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_a_trainer_is_imported_only_where_its_class_is_used() -> None:
    code = "import topkast_torch.callbacks, sys\n"
    code += "assert not {'lightning', 'pytorch_lightning', 'transformers'} & set(sys.modules)\n"
    code += "topkast_torch.callbacks.LightningCallback\n"
    code += "assert 'lightning' in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_averages_of_weights_are_for_every_trainer(tmp_path: Path) -> None:
    model = llama()
    optimizer = wrap(model, sparse=True)
    average = topkast_torch.WeightAverage(optimizer, decay=0.5)
    trainer = make_trainer(tmp_path, optimizer, model)
    trainer.add_callback(callbacks.TransformersCallback(trainer, averages=[average]))
    trainer.train()
    assert average.state_dict()["count"] == 8
