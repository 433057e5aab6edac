"""The two networks as pure functions of pytrees, with the names and initialisation of PyTorch."""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from topkast_demo.networks import EMBEDDING_STD, MLP, Network, Transformer

Params: TypeAlias = dict[str, Any]


def initialise(network: Network, key: jax.Array) -> Params:
    """Draw random weights: nested dictionaries of arrays, of shape (inputs, outputs) in a layer."""
    if isinstance(network, MLP):
        return _initialise_mlp(network, key)
    return _initialise_transformer(network, key)


def apply(network: Network, params: Params, inputs: jax.Array) -> jax.Array:
    """Compute logits (…, classes)."""
    if isinstance(network, MLP):
        return _apply_mlp(network, params, inputs)
    return _apply_transformer(network, params, inputs)


def _initialise_mlp(network: MLP, key: jax.Array) -> Params:
    layers = list(itertools.pairwise(network.widths))
    names = [*_hidden_names(network), "head"]
    keys = jax.random.split(key, len(layers))
    return {
        name: _uniform_linear(key, *widths)
        for name, key, widths in zip(names, keys, layers, strict=True)
    }


def _apply_mlp(network: MLP, params: Params, pixels: jax.Array) -> jax.Array:
    hidden = pixels
    for name in _hidden_names(network):
        hidden = jax.nn.relu(_linear(params[name], hidden))
    return _linear(params["head"], hidden)


def _hidden_names(network: MLP) -> list[str]:
    return [f"hidden{layer}" for layer in range(len(network.widths) - 2)]


def _initialise_transformer(network: Transformer, key: jax.Array) -> Params:
    width = network.width
    embedding, positions, head, *layers = jax.random.split(key, 3 + network.layers)
    shapes = {"embedding": (network.characters, width), "positions": (network.context, width)}
    tables = {
        name: {"weight": EMBEDDING_STD * jax.random.normal(key, shapes[name])}
        for name, key in (("embedding", embedding), ("positions", positions))
    }
    return {
        **tables,
        "blocks": [_initialise_layer(network, key) for key in layers],
        "norm": _initialise_norm(width),
        "head": _uniform_linear(head, width, network.characters),
    }


def _initialise_layer(network: Transformer, key: jax.Array) -> Params:
    width = network.width
    keys = jax.random.split(key, 4)

    def linear(key: jax.Array, inputs: int, outputs: int, *, residual: bool = False) -> Params:
        std = network.initial_std(inputs, residual=residual)
        weight = std * jax.random.normal(key, (inputs, outputs))
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
    positions = params["positions"]["weight"][: text.shape[1]]
    hidden = params["embedding"]["weight"][text] + positions
    for layer in params["blocks"]:
        hidden += _attend(network, layer, _norm(layer["attention_norm"], hidden))
        expanded = _linear(layer["feed_in"], _norm(layer["feed_norm"], hidden))
        hidden += _linear(layer["feed_out"], jax.nn.gelu(expanded, approximate=False))
    return _linear(params["head"], _norm(params["norm"], hidden))


def _attend(network: Transformer, layer: Params, hidden: jax.Array) -> jax.Array:
    batch, time, width = hidden.shape
    by_head = (batch, time, 3, network.heads, width // network.heads)
    projected = _linear(layer["attention_in"], hidden).reshape(by_head)
    query, key, value = (projected[:, :, index] for index in range(3))
    attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return _linear(layer["attention_out"], attended.reshape(hidden.shape))


def _uniform_linear(key: jax.Array, inputs: int, outputs: int) -> Params:
    """Initialise a linear layer like ``torch.nn.Linear``."""
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
