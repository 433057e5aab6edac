"""The two networks as PyTorch modules."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from topkast_demo.networks import EMBEDDING_STD, MLP, Network, Transformer


def build(network: Network) -> nn.Module:
    """Build the network, initialised by torch's global random generator."""
    return _mlp(network) if isinstance(network, MLP) else _CharacterTransformer(network)


def _mlp(network: MLP) -> nn.Sequential:
    *hidden, last = itertools.pairwise(network.widths)
    model = nn.Sequential()
    for layer, (inputs, outputs) in enumerate(hidden):
        model.add_module(f"hidden{layer}", nn.Linear(inputs, outputs))
        model.add_module(f"relu{layer}", nn.ReLU())
    model.add_module("head", nn.Linear(*last))
    return model


class _CharacterTransformer(nn.Module):
    def __init__(self, network: Transformer):
        super().__init__()
        width = network.width
        self.embedding = nn.Embedding(network.characters, width)
        self.positions = nn.Embedding(network.context, width)
        layers = (_TransformerLayer(width, network.heads) for _ in range(network.layers))
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, network.characters)
        self._initialise(network)

    def forward(self, text: Tensor) -> Tensor:
        """Logits (batch, time, characters) of the character that follows each one of `text`."""
        positions = torch.arange(text.shape[1], device=text.device)
        hidden = self.embedding(text) + self.positions(positions)
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits

    def _initialise(self, network: Transformer) -> None:
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                std = network.initial_std(module.in_features, residual=name.endswith("_out"))
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=EMBEDDING_STD)


class _TransformerLayer(nn.Module):
    """Attention, then a feed-forward network, each with a residual connection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, 4 * width)
        self.feed_out = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self._attend(self.attention_norm(hidden))
        fed_forward: Tensor = self.feed_out(gelu(self.feed_in(self.feed_norm(hidden))))
        return hidden + fed_forward

    def _attend(self, hidden: Tensor) -> Tensor:
        batch, time, width = hidden.shape
        projected = self.attention_in(hidden).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.attention_out(attended.transpose(1, 2).reshape(batch, time, width))
        return out
