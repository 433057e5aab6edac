"""The interface of trainers: a network that is trained, evaluated and measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import topkast
from topkast_demo.networks import Network
from topkast_demo.settings import Settings

Batch: TypeAlias = tuple[NDArray[Any], NDArray[np.int64]]  # inputs and class numbers


class Trainer(ABC):
    """A network trained by one of the three methods in one framework.

    Sparse tensors are evaluated at their forward view.
    """

    @classmethod
    @abstractmethod
    def versions(cls) -> dict[str, str]:
        """Versions of the framework's packages."""

    @classmethod
    @abstractmethod
    def limit_threads(cls, count: int | None) -> AbstractContextManager[int | None]:
        """Use `count` threads in a context, if possible; gives the number in use, if known."""

    @abstractmethod
    def __init__(
        self, network: Network, method: str, settings: Settings, *, dense: tuple[str, ...]
    ) -> None: ...

    @abstractmethod
    def step(self, batch: Batch) -> float:
        """Take a step of the optimizer and wait for its end; returns the loss before the step.

        May raise :class:`topkast.NonFiniteError`.
        """

    @abstractmethod
    def loss(self, batch: Batch) -> float:
        """Mean cross-entropy, in nats."""

    @abstractmethod
    def predict(self, inputs: NDArray[Any]) -> NDArray[np.int64]:
        """The number of the most likely class of each input."""

    @abstractmethod
    def params(self) -> Mapping[str, Any]:
        """The weights, as arrays of the framework, by name."""

    @abstractmethod
    def masks(self) -> dict[str, topkast.Masks]:
        """Masks of the sparse tensors, as NumPy arrays."""

    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of the inner optimizer's state, without the sets of Top-KAST."""

    @abstractmethod
    def total_bytes(self) -> int:
        """Bytes of weights, gradients and everything that the optimizer holds."""
