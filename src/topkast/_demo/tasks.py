"""The two tasks of the demo: data, a network for it, and how good the network is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from topkast._demo.data import Images, Text, load_images, load_text
from topkast._demo.models import CharacterTransformer, mlp
from topkast._demo.settings import Settings

Batch = tuple[Tensor, Tensor]


class Task(ABC):
    """Something to learn: inputs and the numbers of the classes that they belong to."""

    title: str
    metric: str  # what evaluate() returns
    unit: str
    short_unit: str
    higher_is_better: bool
    log_loss: bool  # whether the training loss falls by orders of magnitude
    dense: tuple[str, ...]  # tensors that the sparse runs keep dense
    threads: int | None  # that torch should use; None: as many as it likes
    description: str

    @abstractmethod
    def model(self) -> nn.Module:
        """The network, initialised by torch's random numbers."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Batches to train on, without an end; the same ones for the same seed."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> float:
        """How good the network is on the data that it was not trained on."""


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy, in nats."""
    inputs, classes = batch
    return cross_entropy(model(inputs).flatten(0, -2), classes.flatten())


class DigitsTask(Task):
    title = "Digits"
    metric = "test accuracy"
    unit = short_unit = "%"
    higher_is_better = True
    log_loss = True
    dense = ("head.*",)
    threads = 1  # so small a network loses more to several than it gains

    def __init__(self, images: Images, *, hidden: tuple[int, ...], batch: int = 50):
        self._train = torch.tensor(images.train_pixels), torch.tensor(images.train_labels)
        self._test = torch.tensor(images.test_pixels), torch.tensor(images.test_labels)
        self._widths = (images.train_pixels.shape[1], *hidden, images.classes)
        self._batch = min(batch, len(images.train_labels))
        self.description = (
            f"{images.source}, {len(images.train_labels):,} to train and "
            f"{len(images.test_labels):,} to test on; MLP {'-'.join(map(str, self._widths))}"
        )

    def model(self) -> nn.Module:
        return mlp(*self._widths)

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        pixels, labels = self._train
        while True:
            for chosen in torch.randperm(len(labels), generator=generator).split(self._batch):
                if len(chosen) == self._batch:
                    yield pixels[chosen], labels[chosen]

    def evaluate(self, model: nn.Module) -> float:
        pixels, labels = self._test
        with torch.no_grad():
            right = (model(pixels).argmax(1) == labels).sum()
        return 100 * int(right) / len(labels)


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
        self._train = torch.tensor(text.train)
        self._characters = text.characters
        self._width, self._layers, self._batch = width, layers, batch
        windows = (len(text.valid) - 1) // self.context
        valid = torch.tensor(text.valid[: windows * self.context + 1])
        self._valid = (
            valid[:-1].view(windows, self.context),
            valid[1:].view(windows, self.context),
        )
        self.description = (
            f"{text.source}, {len(text.train):,} characters to train and {len(text.valid):,} to "
            f"validate on, {text.characters} different; transformer of {layers} layers, "
            f"{width} wide, with a context of {self.context}"
        )

    def model(self) -> nn.Module:
        return CharacterTransformer(
            self._characters, context=self.context, width=self._width, layers=self._layers, heads=4
        )

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        window = torch.arange(self.context + 1)
        while True:
            last = len(self._train) - self.context
            starts = torch.randint(last, (self._batch, 1), generator=generator)
            chosen = self._train[starts + window]
            yield chosen[:, :-1], chosen[:, 1:]

    def evaluate(self, model: nn.Module) -> float:
        total = 0.0
        with torch.no_grad():
            for batch in zip(*(part.split(64) for part in self._valid), strict=True):
                total += loss(model, batch).item() * batch[1].numel()
        return total / self._valid[1].numel() / math.log(2)


def load_task(settings: Settings) -> Task:
    """The task that the settings name, on its own data or on theirs."""
    if settings.task == "digits":
        # The bundled digits are so easy that only a thin network shows what sparsity costs.
        hidden = (300, 300) if settings.data else (48, 48)
        return DigitsTask(load_images(settings.data), hidden=hidden)
    return TextTask(load_text(settings.data, least=TextTask.context + 1))
