"""Transformer-XL: attention by relative positions, with a memory of earlier segments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, pad, relu

from topkast_paper.vocabulary import Vocabulary


class TransformerXL(nn.Module):
    """The language model of Dai et al. (2019), with layer norm after each residual connection.

    Parameters
    ----------
    size
        Number of different tokens.
    layers, width, heads, inner
        Number of layers, width of the model, attention heads, width of the feed-forward layers.
    embed, cutoffs
        Of the embedding; see :class:`topkast_paper.vocabulary.Vocabulary`.
    dropout
        Rate of dropout, of attention too.

    Examples
    --------
    >>> import torch
    >>> from topkast_paper.transformer_xl import TransformerXL
    >>> model = TransformerXL(11, layers=2, width=8, heads=2, inner=16, embed=8)
    >>> tokens = torch.arange(10).reshape(1, 10)
    >>> hidden, memory = model(tokens, None, keep=6)
    >>> hidden.shape, memory.shape
    (torch.Size([1, 10, 8]), torch.Size([2, 1, 6, 8]))
    """

    def __init__(
        self,
        size: int,
        *,
        layers: int,
        width: int,
        heads: int,
        inner: int,
        embed: int,
        cutoffs: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self._rate = dropout
        self.vocabulary = Vocabulary(size, width=width, embed=embed, cutoffs=cutoffs)
        self.layers = nn.ModuleList(_Layer(width, heads, inner, dropout) for _ in range(layers))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, memory: Tensor | None, *, keep: int) -> tuple[Tensor, Tensor]:
        """Vectors (batch, time, width) from which the next tokens are predicted, and a new memory.

        Parameters
        ----------
        tokens
            Numbers of the tokens (batch, time).
        memory
            The inputs of each layer for earlier tokens, (layers, batch, earlier, width); None at
            the beginning of a text.
        keep
            Largest number of tokens in the new memory, which has no gradient.
        """
        hidden = dropout(self.vocabulary(tokens), self._rate, self.training)
        earlier = 0 if memory is None else memory.shape[2]
        length = earlier + tokens.shape[1]
        positions = encode_distances(length, hidden.shape[2], hidden.device).to(hidden.dtype)
        positions = dropout(positions, self._rate, self.training)
        contexts = []
        for number, layer in enumerate(self.layers):
            context = hidden if memory is None else torch.cat((memory[number], hidden), dim=1)
            contexts.append(context[:, max(0, context.shape[1] - keep) :].detach())
            hidden = layer(hidden, context, positions)
        return dropout(hidden, self._rate, self.training), torch.stack(contexts)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Loss of each target (batch, time) in nats, as one vector."""
        return self.vocabulary.loss(hidden.flatten(0, 1), targets.flatten())

    def uses(
        self, *, window: int, memory: int, sequences: int, shares: Sequence[float]
    ) -> Iterator[tuple[str, float]]:
        """How often a segment uses each weight: names and numbers of positions.

        Parameters
        ----------
        window, memory
            Tokens of the segment, and before it.
        sequences
            Number of segments that are computed at once: they have their distances in common.
        shares
            The bands' shares of the tokens.
        """
        context = window + memory
        for number in range(len(self.layers)):
            for name in ("attention.query", "attention.output", "feed_in", "feed_out"):
                yield f"layers.{number}.{name}.weight", window
            for name in ("key", "value"):
                yield f"layers.{number}.attention.{name}.weight", context
            yield f"layers.{number}.attention.distance.weight", context / sequences
        for name, count in self.vocabulary.uses(shares):
            yield f"vocabulary.{name}", count * window


def encode_distances(count: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines (count, width) of the distances count - 1, ..., 0."""
    distances = torch.arange(count - 1, -1, -1, device=device, dtype=torch.float32)
    frequencies = 10_000 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles = distances[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, rate: float) -> None:
        super().__init__()
        self._rate = rate
        self.attention = RelativeAttention(width, heads, rate)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, inner)
        self.feed_out = nn.Linear(inner, width)
        self.feed_norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor, context: Tensor, positions: Tensor) -> Tensor:
        attended = self._drop(self.attention(hidden, context, positions))
        hidden = self.attention_norm(hidden + attended)
        fed = self._drop(self.feed_out(self._drop(relu(self.feed_in(hidden)))))
        normed: Tensor = self.feed_norm(hidden + fed)
        return normed

    def _drop(self, hidden: Tensor) -> Tensor:
        return dropout(hidden, self._rate, self.training)


class RelativeAttention(nn.Module):
    r"""Attention whose scores depend on contents and distances (Dai et al., 2019, section 3.3).

    The score of query i and key j is :math:`(q_i + u)^T k_j + (q_i + v)^T W r_{i-j}`, divided by
    the root of a head's width. Both biases are vectors (width,), so that they stay dense.
    """

    def __init__(self, width: int, heads: int, rate: float) -> None:
        super().__init__()
        self._heads = heads
        self._rate = rate
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.distance = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(width))
        self.distance_bias = nn.Parameter(torch.zeros(width))

    def forward(self, inputs: Tensor, context: Tensor, positions: Tensor) -> Tensor:
        """Attend from inputs (batch, time, width) to a context (batch, earlier + time, width).

        `positions` are those of :func:`encode_distances`, (earlier + time, width).
        """
        query = self.query(inputs)
        key, value = (self._split(layer(context)) for layer in (self.key, self.value))
        distance = self._split(self.distance(positions))
        content_query, distance_query = (
            self._split(query + bias) for bias in (self.content_bias, self.distance_bias)
        )
        scores = content_query @ key.mT + shift(distance_query @ distance.mT)
        scores = scores / math.sqrt(key.shape[-1])
        time, length = scores.shape[-2:]
        future = torch.ones(time, length, dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(future.triu(length - time + 1), -torch.inf)
        weights = dropout(scores.softmax(dim=-1), self._rate, self.training).to(value.dtype)
        output: Tensor = self.output((weights @ value).transpose(1, 2).flatten(2))
        return output

    def _split(self, vectors: Tensor) -> Tensor:
        """(..., time, width) as heads: (..., heads, time, width / heads)."""
        heads: Tensor = vectors.unflatten(-1, (self._heads, -1))
        return heads.transpose(-3, -2)


def shift(scores: Tensor) -> Tensor:
    """Move scores by distance, (..., time, length) from length - 1 down to 0, to their keys.

    Entries of keys after the query are arbitrary.

    Examples
    --------
    >>> import torch
    >>> from topkast_paper.transformer_xl import shift
    >>> shift(torch.tensor([[2, 1, 0], [2, 1, 0]])).tril(1)  # queries of the keys 1 and 2
    tensor([[1, 0, 0],
            [2, 1, 0]])
    """
    time, length = scores.shape[-2:]
    padded = pad(scores, (1, 0)).flatten(-2)  # each row is one longer, so that it begins later
    moved: Tensor = padded[..., time:].unflatten(-1, (time, length))
    return moved
