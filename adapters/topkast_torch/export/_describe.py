"""Descriptions of a model's layers, for inference without PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from topkast_torch.sparse._layers import SparseConv2d, SparseLinear
from topkast_torch.sparse.chains._sequential import SparseSequential

Description = dict[str, Any]

_PLAIN: dict[type[nn.Module], str] = {
    nn.Linear: "Linear",
    SparseLinear: "Linear",
    nn.ReLU: "ReLU",
    nn.Tanh: "Tanh",
    nn.Sigmoid: "Sigmoid",
    nn.Identity: "Identity",
    nn.Dropout: "Identity",
    nn.Dropout2d: "Identity",
}
_SEQUENCES = nn.Sequential, SparseSequential


def describe_layers(model: nn.Module) -> tuple[dict[str, Description], list[str] | None]:
    """The layers that :mod:`topkast.inference` knows by name, and the order of their calls.

    The order is None unless the model is a sequence of such layers alone.
    """
    described: dict[str, Description] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        description = _describe(module)
        if description is not None:
            described[name] = description
    leaves = [name for name, _ in _leaves("", model)]
    return described, leaves if all(name in described for name in leaves) else None


def _leaves(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of nested sequences, in the order of their calls."""
    if type(module) not in _SEQUENCES or "forward" in module.__dict__:
        yield name, module
        return
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _leaves(f"{name}.{child_name}" if name else child_name, child)


def _describe(module: Any) -> Description | None:
    """The type and the options of a layer; None if inference does not know it."""
    layer_type = type(module)
    if "forward" in module.__dict__:  # was replaced
        return None
    if layer_type in _PLAIN:
        return {"type": _PLAIN[layer_type]}
    if layer_type in (nn.Conv2d, SparseConv2d):
        if module.padding_mode != "zeros":
            return None
        left, right, top, bottom = module._reversed_padding_repeated_twice
        return {
            "type": "Conv2d",
            "stride": list(module.stride),
            "padding": [[top, bottom], [left, right]],
            "dilation": list(module.dilation),
            "groups": module.groups,
        }
    if layer_type in (nn.BatchNorm1d, nn.BatchNorm2d) and module.running_mean is not None:
        return {"type": "BatchNorm", "epsilon": module.eps}
    if layer_type is nn.Flatten:
        return {"type": "Flatten", "start": module.start_dim, "end": module.end_dim}
    if layer_type is nn.MaxPool2d:
        is_plain = _pair(module.dilation) == [1, 1] and not module.ceil_mode
        if not is_plain or module.return_indices:
            return None
        options = {"size": module.kernel_size, "stride": module.stride, "padding": module.padding}
        return {"type": "MaxPool2d"} | {name: _pair(value) for name, value in options.items()}
    if layer_type is nn.AdaptiveAvgPool2d and _pair(module.output_size) == [1, 1]:
        return {"type": "MeanPool2d"}
    return None


def _pair(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value, value]
