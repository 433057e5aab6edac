"""ResNet-50 on ImageNet: figure 2 and tables 1 and 6 of the paper."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import topkast
from topkast_paper.experiment import Experiment, conduct
from topkast_paper.imagenet import ImageFolder, Listing, Stream, collate, find_images
from topkast_paper.resnet50 import ResNet
from topkast_paper.settings import Settings
from topkast_paper.sparsity import decay_groups, measure_flops, measure_sets, wrap

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]


@dataclass(frozen=True, kw_only=True)
class ImageNetSettings(Settings):
    """A run of ResNet-50 on ImageNet; the defaults are the paper's.

    Its appendix B has the batch, the steps, the learning rate with its schedule, the weight decay
    and the dense layers. It refers to prior work for the rest: Nesterov momentum, label smoothing
    and the multiplied schedules are those of RigL's code. There, batch norm sees 128 images at a
    time, as here in each micro-batch.

    Attributes
    ----------
    lr
        Peak of the learning rate.
    warm_up
        Epochs over which it rises from 0.
    drops
        Epochs at which it falls to a tenth.
    momentum, weight_decay, label_smoothing
        As usual. The penalty takes the place of weight decay where there is one.
    size
        Height and width of the images.
    depths, width
        Of the network; see :class:`topkast_paper.resnet50.ResNet`.
    workers
        Processes that read images, besides the main one. None: one for each processor, up to 16.
    """

    dense: tuple[str, ...] = ("conv1.weight", "fc.weight")
    steps: int = 32_000
    batch: int = 4096
    micro_batch: int | None = 128
    lr: float = 1.6
    warm_up: float = 5
    drops: tuple[float, ...] = (30, 70, 90)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    size: int = 224
    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    workers: int | None = None

    def lr_after(self, epochs: float) -> float:
        """The learning rate after a number of epochs.

        >>> from topkast_paper.train_resnet50 import ImageNetSettings
        >>> [round(ImageNetSettings().lr_after(epoch), 6) for epoch in (0, 2.5, 5, 30, 70, 90)]
        [0.0, 0.8, 1.6, 0.16, 0.016, 0.0016]
        >>> round(ImageNetSettings(multiplier=2).lr_after(59), 6)
        1.6
        """
        epochs /= self.multiplier
        if epochs < self.warm_up:
            return self.lr * epochs / self.warm_up
        return self.lr * 0.1 ** sum(epochs >= drop for drop in self.drops)

    def build(self, classes: int) -> ResNet:
        """The network, initialised by PyTorch's global random generator."""
        return ResNet(classes, depths=self.depths, width=self.width)


def train(settings: ImageNetSettings, folder: Path, output: Path, seed: int) -> dict[str, Any]:
    """Train on the images of `folder`; go on from the checkpoint of `output`, if it has one.

    Parameters
    ----------
    settings
        The run.
    folder
        A folder with the folders train and val, and in each of them one folder for each class.
    output
        Folder for the checkpoint and the learning curve, ``curve.json``.
    seed
        Seed of weights, order and crops of the images, and the method's random choices.

    Returns
    -------
    dict
        ``"metric"``, its name; ``"final"``, the accuracy of the trained network on the validation
        images in percent; ``"curve"``, by update; ``"steps"``; the sizes of
        :func:`topkast_paper.sparsity.measure_sets`, and the FLOPs of
        :func:`topkast_paper.sparsity.measure_flops`.

    Raises
    ------
    PaperError
        If images are missing or cannot be read, `output` holds another run, or training diverges.
    topkast.OptionError
        If the method does not accept the sparsities, or its FLOPs have no formula.
    """
    images = find_images(folder)
    classes = len(images[0].classes)
    identity = settings.describe() | {
        "seed": repr(seed),
        "data": f"{len(images[0]):,} + {len(images[1]):,} images of {classes:,} classes",
    }
    experiment = _ImageNet(settings, images, seed)
    sgd = torch.optim.SGD(
        decay_groups(experiment.model, settings, settings.weight_decay),
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=True,
    )
    optimizer = wrap(sgd, settings, seed=seed)
    with torch.device("meta"):
        shape = settings.build(classes)
        example = torch.empty(1, 3, settings.size, settings.size)
    flops = measure_flops(settings, partial(topkast.cost, shape, example, optimizer="momentum"))
    final, curve = conduct(
        experiment, optimizer, settings, output=output, identity=identity, seed=seed
    )
    return {
        "metric": "top-1 accuracy (%)",
        "final": final,
        "curve": curve,
        "steps": settings.total_steps,
        **measure_sets(experiment.model, optimizer, settings),
        **flops,
    }


class _ImageNet(Experiment):
    def __init__(
        self, settings: ImageNetSettings, images: tuple[Listing, Listing], seed: int
    ) -> None:
        self._settings = settings
        self._images, self._val = images
        self._seed = seed
        self._device = settings.torch_device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = settings.build(len(self._images.classes)).to(self._device)
        self._mean, self._std = (
            255 * torch.tensor(values, device=self._device).view(3, 1, 1)
            for values in (_MEAN, _STD)
        )

    def steps(self, start: int) -> Iterator[Iterable[Any]]:
        settings = self._settings
        stream = Stream(
            len(self._images),
            batch=settings.batch,
            micro_batch=settings.micro_batch_size,
            steps=(start, settings.total_steps),
            seed=self._seed,
        )
        dataset = ImageFolder(self._images, size=settings.size, seed=self._seed)
        micro_batches = self._load(dataset, stream)
        for _ in range(start, settings.total_steps):
            yield itertools.islice(micro_batches, stream.parts_per_step)

    def loss(self, micro_batch: Any) -> Tensor:
        images, labels = self._to_device(micro_batch)
        smoothing = self._settings.label_smoothing
        loss = cross_entropy(self.model(images), labels, label_smoothing=smoothing)
        return loss * (len(labels) / self._settings.batch)

    def lr(self, step: int) -> float:
        return self._settings.lr_after(step * self._settings.batch / len(self._images))

    def evaluate(self, *, test: bool) -> float:
        count, size = len(self._val), self._settings.micro_batch_size
        keys = [
            [(0, number) for number in range(start, min(start + size, count))]
            for start in range(0, count, size)
        ]
        correct = 0
        for batch in self._load(ImageFolder(self._val, size=self._settings.size, seed=None), keys):
            images, labels = self._to_device(batch)
            correct += int((self.model(images).argmax(dim=1) == labels).sum())
        return 100 * correct / count

    def _load(self, dataset: ImageFolder, batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
        workers = self._settings.workers
        if workers is None:
            workers = min(16, os.cpu_count() or 1)
        # A process with threads, as PyTorch's, must not be forked.
        methods = multiprocessing.get_all_start_methods()
        start_method = "forkserver" if "forkserver" in methods else "spawn"
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=self._device.type == "cuda",
            multiprocessing_context=start_method if workers else None,
        )
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch

    def _to_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = (part.to(self._device, non_blocking=True) for part in batch)
        return (images - self._mean) / self._std, labels
