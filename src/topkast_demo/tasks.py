"""The two tasks of the demo: data, a network for it, and how good the network is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch

from topkast_demo.data import Images, Text, load_images, load_text
from topkast_demo.networks import MLP, Network, Transformer
from topkast_demo.settings import Settings
from topkast_demo.trainer import Batch, Trainer


class Task(ABC):
    """Something to learn: inputs and the numbers of the classes that they belong to."""

    title: str
    metric: str  # what evaluate() returns
    unit: str
    short_unit: str
    higher_is_better: bool
    log_loss: bool  # whether the training loss falls by orders of magnitude
    dense: tuple[str, ...]  # tensors that the sparse runs keep dense
    threads: int | None  # that the framework should use; None: as many as it likes
    network: Network
    description: str

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Batches to train on, without an end; the same ones for the same seed.

        torch draws them for all frameworks.
        """

    @abstractmethod
    def evaluate(self, trainer: Trainer) -> float:
        """How good the network is on the data that it was not trained on."""


class DigitsTask(Task):
    title = "Digits"
    metric = "test accuracy"
    unit = short_unit = "%"
    higher_is_better = True
    log_loss = True
    dense = ("head.*",)
    threads = 1  # so small a network loses more to several than it gains

    def __init__(self, images: Images, *, hidden: tuple[int, ...], batch: int = 50):
        self._images = images
        self.network = MLP((images.train_pixels.shape[1], *hidden, images.classes))
        self._batch = min(batch, len(images.train_labels))
        self.description = (
            f"{images.source}, {len(images.train_labels):,} to train and "
            f"{len(images.test_labels):,} to test on; MLP {'-'.join(map(str, self.network.widths))}"
        )

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        pixels, labels = self._images.train_pixels, self._images.train_labels
        while True:
            for chosen in torch.randperm(len(labels), generator=generator).split(self._batch):
                if len(chosen) == self._batch:
                    yield pixels[chosen.numpy()], labels[chosen.numpy()]

    def evaluate(self, trainer: Trainer) -> float:
        labels = self._images.test_labels
        right = int((trainer.predict(self._images.test_pixels) == labels).sum())
        return 100 * right / len(labels)


class TextTask(Task):
    title = "Text"
    metric = "validation loss"
    unit = "bits per character"
    short_unit = "bpc"
    higher_is_better = False
    log_loss = False
    dense = ("embedding.*", "positions.*", "head.*")
    threads = None
    context = 64

    def __init__(self, text: Text, *, width: int = 128, layers: int = 2, batch: int = 8):
        self.network = Transformer(
            characters=text.characters, context=self.context, width=width, layers=layers, heads=4
        )
        self._train = text.train
        self._batch = batch
        windows = (len(text.valid) - 1) // self.context
        valid = text.valid[: windows * self.context + 1]
        self._valid = (
            valid[:-1].reshape(windows, self.context),
            valid[1:].reshape(windows, self.context),
        )
        self.description = (
            f"{text.source}, {len(text.train):,} characters to train and {len(text.valid):,} to "
            f"validate on, {text.characters} different; transformer of {layers} layers, "
            f"{width} wide, with a context of {self.context}"
        )

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        window = np.arange(self.context + 1)
        while True:
            last = len(self._train) - self.context
            starts = torch.randint(last, (self._batch, 1), generator=generator)
            chosen = self._train[starts.numpy() + window]
            yield chosen[:, :-1], chosen[:, 1:]

    def evaluate(self, trainer: Trainer) -> float:
        text, following = self._valid
        total = 0.0
        for start in range(0, len(text), 64):
            part = slice(start, start + 64)
            total += trainer.loss((text[part], following[part])) * following[part].size
        return total / following.size / math.log(2)


def load_task(settings: Settings) -> Task:
    """The task that the settings name, on its own data or on theirs."""
    if settings.task == "digits":
        # The bundled digits are so easy that only a thin network shows what sparsity costs.
        hidden = (300, 300) if settings.data else (48, 48)
        return DigitsTask(load_images(settings.data), hidden=hidden)
    return TextTask(load_text(settings.data, least=TextTask.context + 1))
