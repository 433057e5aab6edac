"""Tiny language models of Transformers, made from scratch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import topkast_torch
import torch
from optimizer_runs import OPTIONS
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import topkast

TOKENS = torch.randint(0, 50, (32, 12), generator=torch.Generator().manual_seed(0))


def gpt2() -> Any:
    """With tied embeddings, and layers that are ``Conv1D``."""
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


def bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


MODELS: dict[str, Callable[[], Any]] = {"gpt2": gpt2, "llama": llama, "bert": bert}


def wrap(model: nn.Module, sparse: bool = False) -> topkast_torch.TopKASTOptimizer:
    """A wrapped optimizer of what is trained of a model."""
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    optimizer: Any = topkast.wrap_optimizer(torch.optim.AdamW(named, 0.01), **OPTIONS)
    if sparse:
        topkast.sparsify(model, optimizer, auto=False)
    assert isinstance(optimizer, topkast_torch.TopKASTOptimizer)
    return optimizer


def train(model: Any, optimizers: list[Any], steps: range) -> None:
    """A plain loop."""
    for step in steps:
        tokens = TOKENS[4 * (step % 8) :][:4]
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        for optimizer in optimizers:
            optimizer.step()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=TOKENS[:4]).logits
    model.train()
    return found
