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
_BATCH_AXES = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,)}  # numbers of axes of their inputs
_SEQUENCES = nn.Sequential, SparseSequential


def describe_layers(model: nn.Module) -> tuple[dict[str, Description], list[str] | None]:
    """The layers that :mod:`topkast.inference` knows by name, and the order of their calls.

    The order is None unless the model is a sequence of such layers alone. Modules with forward
    hooks, which may change what goes in and out, are not known, and neither are layers whose weight
    is computed at each call, as by ``torch.nn.utils.prune`` and ``weight_norm``.
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
    if type(module) not in _SEQUENCES or _is_changed(module):
        yield name, module
        return
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _leaves(f"{name}.{child_name}" if name else child_name, child)


def _describe(module: Any) -> Description | None:
    """The type and the options of a layer; None if inference does not know it."""
    layer_type = type(module)
    if _is_changed(module):
        return None
    if layer_type in (nn.Linear, nn.Conv2d) and "weight" not in module._parameters:
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
    if layer_type in _BATCH_AXES and module.running_mean is not None:
        axes = list(_BATCH_AXES[layer_type])
        return {"type": "BatchNorm", "epsilon": module.eps, "axes": axes}
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


def _is_changed(module: Any) -> bool:
    """Whether a call of the module may do something else than its class says."""
    return bool(
        "forward" in module.__dict__  # was replaced
        or module._forward_hooks
        or module._forward_pre_hooks
    )


def _pair(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value, value]
