"""Transformer-XL on enwik8 and WikiText-103: tables 2, 3 and 5 of the paper."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import topkast
from topkast.analysis import Layer
from topkast_paper import PaperError
from topkast_paper.experiment import Experiment, conduct
from topkast_paper.language import (
    ENWIK8_SIZES,
    Corpus,
    Numbers,
    Segments,
    load_enwik8,
    load_wikitext103,
)
from topkast_paper.settings import Settings
from topkast_paper.sparsity import measure_flops, measure_sets, wrap
from topkast_paper.transformer_xl import TransformerXL


@dataclass(frozen=True, kw_only=True)
class LanguageSettings(Settings):
    """A run of Transformer-XL: :data:`ENWIK8`, :data:`ENWIK8_SMALL`, :data:`WIKITEXT103` or others.

    Sizes, learning rate, clipping, window and memories are those of the paper's appendix A. It has
    no number of steps and no batch, and a range of dropout, 0.05 to 0.2, without a rule: these
    three are those of the large models of Dai et al. (2019), whose setup it follows. All weights
    are sparse, embeddings too: the paper's numbers of parameters are shares of all of them.

    Attributes
    ----------
    corpus
        Name of the text.
    parts
        Bytes of enwik8 for training, validation and test.
    layers, width, heads, inner, embed, cutoffs, dropout
        Of the model; see :class:`topkast_paper.transformer_xl.TransformerXL`.
    window, memory
        Tokens of a segment, and of the memory in training.
    eval_memory
        Tokens of the memory in evaluation.
    lr
        Peak of the learning rate.
    start_lr, warm_up
        It rises from `start_lr` over `warm_up` updates, and falls along half a cosine to 0.
    max_norm
        Norm to which the gradient of all weights is clipped.
    """

    corpus: Literal["enwik8", "wikitext-103"]
    parts: tuple[int, int, int] = ENWIK8_SIZES
    layers: int
    width: int
    heads: int
    inner: int
    embed: int
    cutoffs: tuple[int, ...] = ()
    dropout: float
    window: int
    memory: int
    eval_memory: int
    lr: float = 2e-4
    start_lr: float = 1e-7
    warm_up: int = 4000
    max_norm: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % (2 * self.heads):
            raise PaperError(
                f"width must be a multiple of twice the heads, got {self.width} and {self.heads}"
            )

    def lr_after(self, steps: int) -> float:
        """The learning rate after a number of updates.

        >>> from topkast_paper.train_transformer_xl import ENWIK8
        >>> [f"{ENWIK8.lr_after(step):.1e}" for step in (0, 2000, 4000, 202_000, 400_000)]
        ['1.0e-07', '1.0e-04', '2.0e-04', '1.0e-04', '0.0e+00']
        """
        warm_up = self.warm_up * self.multiplier
        if steps < warm_up:
            return self.start_lr + (self.lr - self.start_lr) * steps / warm_up
        passed = (steps - warm_up) / max(1, self.total_steps - warm_up)
        return self.lr * (1 + math.cos(math.pi * passed)) / 2

    def build(self, size: int) -> TransformerXL:
        """The model for a number of different tokens, by PyTorch's global random generator."""
        if self.cutoffs and self.cutoffs[-1] >= size:
            raise PaperError(
                f"the bands of the softmax begin at the words {self.cutoffs}, but the text has "
                f"only {size:,} different ones: choose smaller cutoffs"
            )
        return TransformerXL(
            size,
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            inner=self.inner,
            embed=self.embed,
            cutoffs=self.cutoffs,
            dropout=self.dropout,
        )

    def load(self, folder: Path) -> Corpus:
        """Read the text."""
        if self.corpus == "enwik8":
            return load_enwik8(folder, self.parts)
        return load_wikitext103(folder)


ENWIK8 = LanguageSettings(
    corpus="enwik8",
    steps=400_000,
    batch=64,
    micro_batch=4,
    layers=24,
    width=1024,
    heads=8,
    inner=3072,
    embed=512,
    dropout=0.15,
    window=768,
    memory=2304,
    eval_memory=5000,
)
"""The model of table 2, whose parameters the paper gives as 277 M."""

ENWIK8_SMALL = replace(ENWIK8, width=512, inner=1536)
"""The model of table 5: 69 M."""

WIKITEXT103 = LanguageSettings(
    corpus="wikitext-103",
    dense=("vocabulary.bands.weight",),  # which has one row for each band
    steps=4_000_000,
    batch=128,
    micro_batch=8,
    layers=18,
    width=1024,
    heads=16,
    inner=4096,
    embed=1024,
    cutoffs=(20_000, 40_000, 200_000),
    dropout=0.2,
    window=512,
    memory=768,
    eval_memory=2000,
)
"""The model of table 3: 285 M."""


def train(settings: LanguageSettings, folder: Path, output: Path, seed: int) -> dict[str, Any]:
    """Train on the text in `folder`; go on from the checkpoint of `output`, if it has one.

    Parameters
    ----------
    settings
        The run.
    folder
        The folder with enwik8, or with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens.
    output
        Folder for the checkpoint and the learning curve, ``curve.json``.
    seed
        Seed of weights, dropout, and the method's random choices.

    Returns
    -------
    dict
        ``"metric"``, its name; ``"final"``, bits per character or perplexity on the test part;
        ``"curve"``, by update, with the metric on the validation part; ``"steps"``; the sizes of
        :func:`topkast_paper.sparsity.measure_sets`, and the FLOPs of
        :func:`topkast_paper.sparsity.measure_flops`.

    Raises
    ------
    PaperError
        If the text is missing or cannot be read, `output` holds another run, or training diverges.
    topkast.OptionError
        If the method does not accept the sparsities, or its FLOPs have no formula.
    """
    corpus = settings.load(folder)
    identity = settings.describe() | {"seed": repr(seed), "data": corpus.about}
    experiment = _Language(settings, corpus, seed)
    adam = torch.optim.Adam(experiment.model.named_parameters(), lr=settings.lr)
    optimizer = wrap(adam, settings, seed=seed)
    layers = describe_layers(experiment.model, settings, corpus.train)
    flops = measure_flops(settings, partial(topkast.cost, layers, optimizer="adam"))
    final, curve = conduct(
        experiment, optimizer, settings, output=output, identity=identity, seed=seed
    )
    return {
        "metric": "bits per character" if settings.corpus == "enwik8" else "perplexity",
        "final": final,
        "curve": curve,
        "steps": settings.total_steps,
        **measure_sets(experiment.model, optimizer, settings),
        **flops,
    }


def describe_layers(
    model: TransformerXL, settings: LanguageSettings, tokens: Numbers
) -> dict[str, Layer]:
    """The tensors of the model for :func:`topkast.cost`; a sample is a segment with full memory.

    `tokens` are those by which the bands' shares are counted.
    """
    vocabulary = model.vocabulary
    size = sum(len(table) for table in vocabulary.tables)
    counts = torch.from_numpy(np.bincount(tokens, minlength=size))
    uses = dict(
        model.uses(
            window=settings.window,
            memory=settings.memory,
            sequences=settings.micro_batch_size,
            shares=vocabulary.shares(counts),
        )
    )
    return {
        name: Layer(tuple(param.shape), uses.get(name, 0))
        for name, param in model.named_parameters()
    }


class _Language(Experiment):
    has_test = True

    def __init__(self, settings: LanguageSettings, corpus: Corpus, seed: int) -> None:
        self._settings = settings
        self._corpus = corpus
        self._device = settings.torch_device
        self.max_norm = settings.max_norm
        self._segments = Segments(corpus.train, settings.batch, settings.window)
        self._memories: list[Tensor | None] = []
        self._evaluated = {
            test: Segments(part, 1, max(1, min(settings.window, len(part) - 1)))
            for test, part in ((False, corpus.valid), (True, corpus.test))
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: TransformerXL = settings.build(corpus.size).to(self._device)

    def steps(self, start: int) -> Iterator[Iterable[Any]]:
        size = self._settings.micro_batch_size
        for step in range(start, self._settings.total_steps):
            number = step % len(self._segments)
            inputs, targets = self._segments[number]
            parts = list(zip(inputs.split(size), targets.split(size), strict=True))
            if number == 0:  # the beginning of the text
                self._memories = [None] * len(parts)
            yield enumerate(parts)

    def loss(self, micro_batch: Any) -> Tensor:
        group, part = micro_batch
        inputs, targets = (tensor.to(self._device) for tensor in part)
        hidden, memory = self.model(inputs, self._memories[group], keep=self._settings.memory)
        self._memories[group] = memory
        return self.model.loss(hidden, targets).sum() / (
            self._settings.batch * self._settings.window
        )

    def lr(self, step: int) -> float:
        return self._settings.lr_after(step)

    def evaluate(self, *, test: bool) -> float:
        total, count = 0.0, 0
        memory: Tensor | None = None
        for inputs, targets in self._evaluated[test].all():
            hidden, memory = self.model(
                inputs.to(self._device), memory, keep=self._settings.eval_memory
            )
            total += float(self.model.loss(hidden, targets.to(self._device)).double().sum())
            count += targets.numel()
        nats = total / count
        return nats / math.log(2) if self._settings.corpus == "enwik8" else math.exp(nats)

    def state(self) -> dict[str, Any]:
        return {"memories": self._memories}

    def load_state(self, state: dict[str, Any]) -> None:
        self._memories = [
            memory if memory is None else memory.to(self._device) for memory in state["memories"]
        ]
