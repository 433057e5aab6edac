"""The two networks as pure functions of pytrees; names and initialisation are those of PyTorch."""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from topkast_demo.networks import EMBEDDING_SPREAD, MLP, Network, Transformer

Params: TypeAlias = dict[str, Any]


def initialise(network: Network, key: jax.Array) -> Params:
    """Random weights: nested dictionaries of arrays, which are (inputs, outputs) in a layer."""
    if isinstance(network, MLP):
        return _initialise_mlp(network, key)
    return _initialise_transformer(network, key)


def apply(network: Network, params: Params, inputs: jax.Array) -> jax.Array:
    """Logits (…, classes)."""
    if isinstance(network, MLP):
        return _apply_mlp(network, params, inputs)
    return _apply_transformer(network, params, inputs)


def _initialise_mlp(network: MLP, key: jax.Array) -> Params:
    layers = list(itertools.pairwise(network.widths))
    names = [*_hidden(network), "head"]
    keys = jax.random.split(key, len(layers))
    return {
        name: _uniform_linear(key, *widths)
        for name, key, widths in zip(names, keys, layers, strict=True)
    }


def _apply_mlp(network: MLP, params: Params, pixels: jax.Array) -> jax.Array:
    hidden = pixels
    for name in _hidden(network):
        hidden = jax.nn.relu(_linear(params[name], hidden))
    return _linear(params["head"], hidden)


def _hidden(network: MLP) -> list[str]:
    return [f"hidden{place}" for place in range(len(network.widths) - 2)]


def _initialise_transformer(network: Transformer, key: jax.Array) -> Params:
    width = network.width
    embedding, positions, head, *blocks = jax.random.split(key, 3 + network.layers)
    shapes = {"embedding": (network.characters, width), "positions": (network.context, width)}
    tables = {
        name: {"weight": EMBEDDING_SPREAD * jax.random.normal(key, shapes[name])}
        for name, key in (("embedding", embedding), ("positions", positions))
    }
    return {
        **tables,
        "blocks": [_initialise_block(network, key) for key in blocks],
        "norm": _initialise_norm(width),
        "head": _uniform_linear(head, width, network.characters),
    }


def _initialise_block(network: Transformer, key: jax.Array) -> Params:
    width = network.width
    keys = jax.random.split(key, 4)

    def linear(key: jax.Array, inputs: int, outputs: int, *, residual: bool = False) -> Params:
        spread = network.spread(inputs, residual=residual)
        weight = spread * jax.random.normal(key, (inputs, outputs))
        return {"weight": weight, "bias": jnp.zeros(outputs)}

    return {
        "attention_norm": _initialise_norm(width),
        "attention_in": linear(keys[0], width, 3 * width),
        "attention_out": linear(keys[1], width, width, residual=True),
        "feed_norm": _initialise_norm(width),
        "feed_in": linear(keys[2], width, 4 * width),
        "feed_out": linear(keys[3], 4 * width, width, residual=True),
    }


def _apply_transformer(network: Transformer, params: Params, text: jax.Array) -> jax.Array:
    places = params["positions"]["weight"][: text.shape[1]]
    hidden = params["embedding"]["weight"][text] + places
    for block in params["blocks"]:
        hidden += _attend(network, block, _norm(block["attention_norm"], hidden))
        fed = _linear(block["feed_in"], _norm(block["feed_norm"], hidden))
        hidden += _linear(block["feed_out"], jax.nn.gelu(fed, approximate=False))
    return _linear(params["head"], _norm(params["norm"], hidden))


def _attend(network: Transformer, block: Params, hidden: jax.Array) -> jax.Array:
    batch, time, width = hidden.shape
    split = (batch, time, 3, network.heads, width // network.heads)
    parts = _linear(block["attention_in"], hidden).reshape(split)
    query, key, value = (parts[:, :, place] for place in range(3))
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return _linear(block["attention_out"], mixed.reshape(hidden.shape))


def _uniform_linear(key: jax.Array, inputs: int, outputs: int) -> Params:
    """As ``torch.nn.Linear`` is at first."""
    bound = inputs**-0.5
    weight, bias = jax.random.split(key)
    return {
        "weight": jax.random.uniform(weight, (inputs, outputs), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias, (outputs,), minval=-bound, maxval=bound),
    }


def _linear(params: Params, inputs: jax.Array) -> jax.Array:
    outputs: jax.Array = inputs @ params["weight"] + params["bias"]
    return outputs


def _initialise_norm(width: int) -> Params:
    return {"weight": jnp.ones(width), "bias": jnp.zeros(width)}


def _norm(params: Params, inputs: jax.Array) -> jax.Array:
    normal = jax.nn.standardize(inputs, axis=-1, epsilon=1e-5)
    outputs: jax.Array = normal * params["weight"] + params["bias"]
    return outputs
