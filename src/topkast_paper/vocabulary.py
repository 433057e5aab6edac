"""Embedding and softmax with common weights, for few characters or very many words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear, log_softmax

_RATIO = 4  # of the widths of two bands


class Vocabulary(nn.Module):
    r"""The first and the last layer of a language model.

    With `cutoffs`, words are in bands by their frequency. The embeddings of each band are a quarter
    as wide as those of the band before (Baevski and Auli, 2019), and the softmax is over the first
    band and the other bands as wholes, and then inside a band (Grave et al., 2017). As in
    Transformer-XL, tables are used for both layers, and so are the projections between them and the
    model, except the first band's.

    Parameters
    ----------
    size
        Number of words or characters.
    width
        Width of the model.
    embed
        Width of the embeddings of the first band.
    cutoffs
        First word of each band after the first.

    Examples
    --------
    >>> import torch
    >>> from topkast_paper.vocabulary import Vocabulary
    >>> vocabulary = Vocabulary(10, width=8, embed=16, cutoffs=(4, 7))
    >>> [tuple(table.shape) for table in vocabulary.tables]
    [(4, 16), (3, 4), (3, 1)]
    >>> hidden = vocabulary(torch.tensor([[0, 5, 9]]))
    >>> hidden.shape, vocabulary.loss(hidden[0], torch.tensor([5, 9, 0])).shape
    (torch.Size([1, 3, 8]), torch.Size([3]))
    """

    def __init__(self, size: int, *, width: int, embed: int, cutoffs: Sequence[int] = ()) -> None:
        super().__init__()
        self._width = width
        self._edges = list(itertools.pairwise((0, *cutoffs, size)))
        widths = [embed // _RATIO**band for band in range(len(self._edges))]
        counts = [end - start for start, end in self._edges]
        tables = zip(counts, widths, strict=True)
        self.tables = nn.ParameterList(torch.empty(count, own) for count, own in tables)
        self.biases = nn.ParameterList(torch.zeros(count) for count in counts)
        self.projections = nn.ModuleList()
        self.head: nn.Linear | None = None
        self.bands: nn.Linear | None = None
        if cutoffs or embed != width:
            self.projections.extend(nn.Linear(own, width, bias=False) for own in widths)
        if cutoffs:
            self.head = nn.Linear(width, embed, bias=False)
            self.bands = nn.Linear(embed, len(cutoffs))
        for table in self.tables:
            nn.init.normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
        if self.bands is not None:
            nn.init.zeros_(self.bands.weight)
            nn.init.zeros_(self.bands.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors (..., width) of tokens (...)."""
        hidden = self.tables[0].new_zeros(*tokens.shape, self._width)
        for band, (start, end) in enumerate(self._edges):
            inside = (tokens >= start) & (tokens < end)
            rows = embedding(tokens[inside] - start, self.tables[band])
            if self.projections:
                rows = self.projections[band](rows)
            hidden[inside] = rows.to(hidden.dtype)
        scaled: Tensor = hidden * math.sqrt(self._width)
        return scaled

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative logarithms of the probabilities of targets (n,), given vectors (n, width)."""
        if self.head is None or self.bands is None:
            return cross_entropy(self._logits(hidden, 0), targets, reduction="none")
        first = self.head(hidden)
        logits = linear(first, self.tables[0], self.biases[0])
        scores = log_softmax(_widen(torch.cat((logits, self.bands(first)), dim=1)), dim=1)
        losses = scores.new_empty(len(targets))
        for band, (start, end) in enumerate(self._edges):
            inside = ((targets >= start) & (targets < end)).nonzero()[:, 0]
            wanted = targets[inside] - start
            if band:
                inner = cross_entropy(self._logits(hidden[inside], band), wanted, reduction="none")
                losses[inside] = inner - scores[inside, len(self.tables[0]) + band - 1]
            else:
                losses[inside] = -scores[inside, wanted]
        return losses

    def uses(self, shares: Sequence[float]) -> Iterator[tuple[str, float]]:
        """How often a token uses each weight: names, and means over tokens.

        `shares` are the bands' shares of the tokens. A weight that is looked up is not used.
        """
        for band, share in enumerate(shares):
            is_adaptive = self.head is not None
            output = share if band else 1.0
            yield f"tables.{band}", output
            if self.projections:  # into the model, and out of it
                both = share + (0.0 if is_adaptive and not band else output)
                yield f"projections.{band}.weight", both
        if self.head is not None:
            yield "head.weight", 1.0
            yield "bands.weight", 1.0

    def shares(self, counts: Tensor) -> list[float]:
        """The bands' shares of tokens, given how often each word occurs (size,)."""
        total = int(counts.sum())
        return [int(counts[start:end].sum()) / total for start, end in self._edges]

    def _logits(self, hidden: Tensor, band: int) -> Tensor:
        if self.projections:
            projection: Tensor = self.projections[band].get_parameter("weight")
            hidden = hidden @ projection
        return _widen(linear(hidden, self.tables[band], self.biases[band]))


def _widen(logits: Tensor) -> Tensor:
    """Logits in single precision, if they are in half precision."""
    return logits.float() if logits.itemsize < 4 else logits
