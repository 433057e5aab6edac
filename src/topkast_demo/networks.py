"""The two networks of the demo, as sizes: each framework builds its own from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class MLP:
    """Linear layers of these widths with ReLU in between; the last one is named ``head``."""

    widths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """Predicts each character from those before it, at most `context` of them.

    It is initialised as GPT-2 is: normal, and smaller where a layer adds to the residual stream.
    """

    characters: int  # that differ
    context: int
    width: int
    layers: int
    heads: int

    def spread(self, inputs: int, *, residual: bool) -> float:
        """Standard deviation of the initial weights of a layer with so many inputs."""
        scale = (2 * self.layers) ** -0.5 if residual else 1.0
        return float(scale * inputs**-0.5)


EMBEDDING_SPREAD = 0.1

Network: TypeAlias = MLP | Transformer
