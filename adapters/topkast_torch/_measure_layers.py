"""Shapes and positions of a model's layers, from a forward pass on an example."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from topkast import OptionError
from topkast.adapter import Layer, TensorInfo
from topkast_torch._example import hooked, run_example
from topkast_torch.sparse._layers import SparseConv2d, SparseLinear
from topkast_torch.sparse._sparse_layer import SparseLayer, layer_of

Uses = Iterator[tuple[Tensor | None, Fraction]]  # a weight, and the positions that it is used at
Inputs = Mapping[str, Any]  # of a module, by name


def measure_layers(model: nn.Module, example: Any) -> dict[str, Layer]:
    """Return the layers of a model: shape, positions and bytes of a number of each Parameter.

    The model runs forward once on `example`, in evaluation mode. Positions are those of one sample.
    Products of ``nn.Linear``, of convolutions and transposed convolutions, of
    ``nn.MultiheadAttention`` and of sparse layers are counted. A Parameter with several uses has
    the sum of their positions. Other Parameters have no positions: embeddings, recurrent layers,
    weights that a model multiplies itself.

    Parameters
    ----------
    model
        A ``torch.nn.Module``. On the meta device, with an example there, nothing is computed.
    example
        An input of the model, or a tuple of inputs. The first axis of the first tensor numbers
        samples.

    Returns
    -------
    dict of str to topkast.analysis.Layer
        By name of the Parameter. Sparse layers have the sizes of their sets.

    Raises
    ------
    OptionError
        If `example` has no tensor, or no samples, or the model does not accept it.

    Examples
    --------
    >>> import torch, topkast_torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten())
    >>> layers = topkast_torch.measure_layers(model, torch.ones(2, 3, 10, 10))
    >>> layers["0.weight"].shape, layers["0.weight"].positions
    ((8, 3, 3, 3), Fraction(64, 1))
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"expected a torch.nn.Module, got {type(model).__name__}")
    samples = _count_samples(example)
    positions: dict[Tensor, Fraction] = {}

    def record(module: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
        names = _INPUTS if isinstance(module, nn.MultiheadAttention) else ("input",)
        inputs = dict(zip(names, arguments, strict=False)) | named
        for weight, count in _find_uses(module)(module, inputs, output):
            if weight is not None:
                positions[weight] = positions.get(weight, Fraction()) + count / samples

    with hooked(
        module.register_forward_hook(record, with_kwargs=True)
        for module in model.modules()
        if _find_uses(module) is not _of_others
    ):
        run_example(model, example)
    return {
        name: _describe(param, positions.get(param, Fraction()))
        for name, param in model.named_parameters()
    }


def _describe(param: Tensor, positions: Fraction) -> Layer:
    layer = layer_of(param)
    if layer is None:
        return Layer(tuple(param.shape), positions, param.element_size(), tensor=param)
    shape = layer.weight_shape
    sets = layer.support.forward_size, param.numel()
    info = TensorInfo(shape, param.dtype)
    return Layer(shape, positions, param.element_size(), sets, layer.block, tensor=info)


def _count_samples(example: Any) -> int:
    inputs = example if isinstance(example, (tuple, list)) else (example,)
    for tensor in inputs:
        if isinstance(tensor, Tensor) and tensor.dim():
            if not len(tensor):
                raise OptionError(f"the example has no samples: its shape is {tuple(tensor.shape)}")
            return len(tensor)
    raise OptionError(
        "the positions of a model's layers are counted on an example: pass an input as the second "
        "argument, a tensor whose first axis numbers samples, or a tuple of inputs, got "
        f"{type(example).__name__}"
    )


def _of_linear(module: Any, inputs: Inputs, output: Tensor) -> Uses:
    yield _weight(module), _positions(output, -1)


def _of_convolution(module: Any, inputs: Inputs, output: Tensor) -> Uses:
    yield _weight(module), _positions(output, _channel_axis(module))


def _of_transposed_convolution(module: Any, inputs: Inputs, output: Tensor) -> Uses:
    # Each input position is multiplied by the whole window.
    yield module.weight, _positions(inputs["input"], _channel_axis(module))


def _of_attention(module: Any, inputs: Inputs, output: Any) -> Uses:
    """The projections; queries and keys have lengths of their own."""
    query, key, value = (_positions(inputs[name], -1) for name in _INPUTS)
    yield module.in_proj_weight, (query + key + value) / 3
    yield module.q_proj_weight, query
    yield module.k_proj_weight, key
    yield module.v_proj_weight, value
    yield module.out_proj.weight, query


def _of_others(module: Any, inputs: Inputs, output: Any) -> Uses:
    yield from ()


def _weight(module: Any) -> Tensor:
    weight: Tensor = module.values if isinstance(module, SparseLayer) else module.weight
    return weight


def _channel_axis(module: Any) -> int:
    return -1 - len(module.kernel_size)


def _positions(tensor: Tensor, features_axis: int) -> Fraction:
    """The number of vectors of features in a tensor, over all samples."""
    lengths = list(tensor.shape)
    del lengths[features_axis]
    return Fraction(math.prod(lengths))


_INPUTS = ("query", "key", "value")  # of nn.MultiheadAttention

_USES: dict[tuple[type[nn.Module], ...], Callable[[Any, Inputs, Any], Uses]] = {
    (nn.Linear, SparseLinear): _of_linear,
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d): _of_transposed_convolution,
    (nn.Conv1d, nn.Conv2d, nn.Conv3d, SparseConv2d): _of_convolution,
    (nn.MultiheadAttention,): _of_attention,
}


def _find_uses(module: nn.Module) -> Callable[[Any, Inputs, Any], Uses]:
    """The function that tells how a module of this type uses its weights."""
    for types, uses in _USES.items():
        if isinstance(module, types):
            return uses
    return _of_others
