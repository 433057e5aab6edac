"""All that the demo asks of a framework: a network that can be trained, evaluated and measured."""

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

Batch: TypeAlias = tuple[NDArray[Any], NDArray[np.int64]]  # inputs, and the numbers of classes


class Trainer(ABC):
    """A network in training by one of the three methods, in one framework.

    Whatever is sparse is evaluated at its forward view.
    """

    @classmethod
    @abstractmethod
    def versions(cls) -> dict[str, str]:
        """Versions of the packages that it computes with."""

    @classmethod
    @abstractmethod
    def limit_threads(cls, count: int | None) -> AbstractContextManager[int | None]:
        """Use so many threads, if that can be told; gives the number in use, if it is known."""

    @abstractmethod
    def __init__(
        self, network: Network, method: str, settings: Settings, *, dense: tuple[str, ...]
    ) -> None: ...

    @abstractmethod
    def step(self, batch: Batch) -> float:
        """Take a step of the optimizer, to its end; returns the loss before it.

        May raise :class:`topkast.NonFiniteError`.
        """

    @abstractmethod
    def loss(self, batch: Batch) -> float:
        """Mean cross-entropy, in nats."""

    @abstractmethod
    def predict(self, inputs: NDArray[Any]) -> NDArray[np.int64]:
        """Number of the likeliest class of each input."""

    @abstractmethod
    def params(self) -> Mapping[str, Any]:
        """Arrays of the framework by the names of the weights."""

    @abstractmethod
    def masks(self) -> dict[str, topkast.Masks]:
        """Masks of the tensors that are sparse, as NumPy arrays."""

    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state, without the sets of Top-KAST."""

    @abstractmethod
    def total_bytes(self) -> int:
        """Bytes of weights, gradients and all that the optimizer holds."""
