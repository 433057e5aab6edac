"""The sizes of the demo's two networks, from which each framework builds its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class MLP:
    """Linear layers of these widths with ReLU between them; the last layer is named ``head``."""

    widths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A transformer that predicts each character from up to `context` previous ones.

    It is initialised like GPT-2: normally, and smaller for layers that add to the residual stream.
    """

    characters: int  # number of distinct characters
    context: int
    width: int
    layers: int
    heads: int

    def initial_std(self, inputs: int, *, residual: bool) -> float:
        """Standard deviation of the initial weights of a layer, from its number of inputs."""
        scale = (2 * self.layers) ** -0.5 if residual else 1.0
        return float(scale * inputs**-0.5)


EMBEDDING_STD = 0.1

Network: TypeAlias = MLP | Transformer
