"""The two tasks of the demo: data, a network, and a metric."""

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
    """A classification task: inputs and their class numbers."""

    title: str
    metric: str  # name of the quantity that evaluate() returns
    unit: str
    short_unit: str
    higher_is_better: bool
    log_loss: bool  # whether the training loss falls by orders of magnitude
    dense: tuple[str, ...]  # tensors that the sparse runs keep dense
    threads: int | None  # number of threads to use; None: the framework's default
    network: Network
    description: str

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield training batches without end; equal seeds give equal batches.

        torch draws the batches for all frameworks.
        """

    @abstractmethod
    def evaluate(self, trainer: Trainer) -> float:
        """Evaluate the metric on data that was not used for training."""


class DigitsTask(Task):
    title = "Digits"
    metric = "test accuracy"
    unit = short_unit = "%"
    higher_is_better = True
    log_loss = True
    dense = ("head.*",)
    threads = 1  # more threads slow down a network this small

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
            for batch in torch.randperm(len(labels), generator=generator).split(self._batch):
                if len(batch) == self._batch:
                    yield pixels[batch.numpy()], labels[batch.numpy()]

    def evaluate(self, trainer: Trainer) -> float:
        labels = self._images.test_labels
        correct = int((trainer.predict(self._images.test_pixels) == labels).sum())
        return 100 * correct / len(labels)


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
            batch = self._train[starts.numpy() + window]
            yield batch[:, :-1], batch[:, 1:]

    def evaluate(self, trainer: Trainer) -> float:
        text, targets = self._valid
        total = 0.0
        for start in range(0, len(text), 64):
            batch = slice(start, start + 64)
            total += trainer.loss((text[batch], targets[batch])) * targets[batch].size
        return total / targets.size / math.log(2)


def load_task(settings: Settings) -> Task:
    """Load the task of the settings, on its bundled data or on the user's file."""
    if settings.task == "digits":
        # The bundled digits are so easy that only a thin network shows the cost of sparsity.
        hidden = (300, 300) if settings.data else (48, 48)
        return DigitsTask(load_images(settings.data), hidden=hidden)
    return TextTask(load_text(settings.data, min_valid_size=TextTask.context + 1))
