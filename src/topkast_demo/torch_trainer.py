"""The demo's networks, trained with PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

import topkast
from topkast_demo.methods import draw_static_masks, wrapper_options
from topkast_demo.networks import Network
from topkast_demo.settings import Settings
from topkast_demo.torch_models import build
from topkast_demo.trainer import Batch, Trainer

OPTIMIZERS: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


class TorchTrainer(Trainer):
    @classmethod
    def versions(cls) -> dict[str, str]:
        return {"torch": torch.__version__}

    @classmethod
    @contextmanager
    def limit_threads(cls, count: int | None) -> Iterator[int | None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count or before)
        try:
            yield torch.get_num_threads()
        finally:
            torch.set_num_threads(before)

    def __init__(
        self, network: Network, method: str, settings: Settings, *, dense: tuple[str, ...]
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self._model = build(network)
        self._is_wrapped = False
        if method == "static":
            for name, mask in draw_static_masks(self.params(), settings, dense).items():
                with torch.no_grad():
                    self._model.get_parameter(name).mul_(torch.from_numpy(mask))
        make_optimizer = OPTIMIZERS[settings.optimizer]
        self._optimizer = make_optimizer(self._model.named_parameters(), lr=settings.lr)
        options = wrapper_options(method, settings, dense)
        if options is not None:
            self._optimizer = topkast.wrap_optimizer(self._optimizer, **options)
            if settings.execution == "sparse":
                topkast.sparsify(self._model, self._optimizer)
        self._is_wrapped = options is not None
        self._scheduler = LambdaLR(self._optimizer, settings.schedule)

    def step(self, batch: Batch) -> float:
        self._optimizer.zero_grad()
        loss = self._loss(batch)
        loss.backward()
        self._optimizer.step()
        self._scheduler.step()
        return loss.item()

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        return self._loss(batch).item()

    @torch.no_grad()
    def predict(self, inputs: NDArray[Any]) -> NDArray[np.int64]:
        classes: NDArray[np.int64] = self._model(torch.from_numpy(inputs)).argmax(-1).numpy()
        return classes

    def params(self) -> Mapping[str, Tensor]:
        if self._is_wrapped:  # the model holds only the forward view, or only sparse layers
            return topkast.dense_params(self._optimizer)
        return dict(self._model.named_parameters())

    def masks(self) -> dict[str, topkast.Masks]:
        masks = topkast.masks(self._optimizer) if self._is_wrapped else {}
        return {
            name: topkast.Masks(forward.numpy(), backward.numpy())
            for name, (forward, backward) in masks.items()
        }

    def state_bytes(self) -> int:
        entries = (
            entry
            for param in self._model.parameters()
            for entry in self._optimizer.state[param].values()
        )
        return sum(entry.nbytes for entry in entries if isinstance(entry, Tensor))

    def total_bytes(self) -> int:
        if self._is_wrapped:
            return topkast.summary(self._optimizer).total_bytes
        return 2 * sum(param.nbytes for param in self._model.parameters()) + self.state_bytes()

    def _loss(self, batch: Batch) -> Tensor:
        inputs, classes = map(torch.from_numpy, batch)
        return cross_entropy(self._model(inputs).flatten(0, -2), classes.flatten())
