"""The forward view alone, as a safetensors file: values on A and where they are."""

from __future__ import annotations

import json
import math
from os import PathLike
from typing import Any

from torch import Tensor, nn

from topkast import MismatchError
from topkast_torch._sparse_layer import SparseLayer

_FORMAT = "topkast-forward-1"


def save_forward(model: nn.Module, path: str | PathLike[str]) -> None:
    r"""Save what the forward pass of a sparse model sees: of each sparse layer, A alone.

    A sparse weight ``name.weight`` becomes ``name.weight.values``, shape (\|A\|,), and
    ``name.weight.indices``, its flat C-order indices, ascending, int32 where they fit and int64
    otherwise. Its shape is in the metadata. Everything else of the state dict is saved as it is.

    Parameters
    ----------
    model
        A model after :func:`topkast.sparsify`.
    path
        File to write. Needs the extra ``topkast[safetensors]``.

    Raises
    ------
    MismatchError
        If there is no sparse layer.

    Examples
    --------
    >>> import tempfile, torch, topkast_torch
    >>> layer = topkast_torch.SparseLinear(20, 30, fwd=0.9, bwd=0.8)
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     topkast_torch.save_forward(layer, file.name)
    ...     state = topkast_torch.load_forward(file.name)
    >>> dense = torch.nn.Linear(20, 30)
    >>> dense.load_state_dict(state)
    <All keys matched successfully>
    """
    from safetensors.torch import save_file

    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)
    }
    if not layers:
        raise MismatchError("the model has no sparse layer: call topkast.sparsify first")
    own = {
        _join(name, part) for name in layers for part in ("values", "indices", "active", "shape")
    }
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if name not in own
    }
    shapes = {}
    for name, layer in layers.items():
        weight, size = _join(name, "weight"), math.prod(layer.weight_shape)
        indices = layer.indices[layer.active]
        tensors[weight + ".values"] = layer.values.detach().view(-1)[layer.active]
        tensors[weight + ".indices"] = indices.int() if size < 1 << 31 else indices
        shapes[weight] = list(layer.weight_shape)
    save_file(tensors, path, metadata={"format": _FORMAT, "shapes": json.dumps(shapes)})


def load_forward(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The state dict of a dense model from a file of :func:`save_forward`.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    dict of str to Tensor
        Sparse weights as dense tensors that are zero outside A.

    Raises
    ------
    MismatchError
        If the file is none of :func:`save_forward`, or its indices do not fit its shapes.

    Examples
    --------
    See :func:`save_forward`.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata: dict[str, Any] = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise MismatchError(
                f"{path} was not written by topkast_torch.save_forward: its format is "
                f"{metadata.get('format')!r}, expected {_FORMAT!r}"
            )
        shapes = json.loads(metadata["shapes"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        values, indices = tensors.pop(name + ".values"), tensors.pop(name + ".indices").long()
        size = math.prod(shape)
        fit = ((indices[1:] > indices[:-1]).all(), (indices >= 0).all(), (indices < size).all())
        if len(values) != len(indices) or not all(fit):
            raise MismatchError(
                f"{path}: the indices of {name} must ascend in [0, {size}), one for each value"
            )
        tensors[name] = values.new_zeros(size).index_copy(0, indices, values).view(shape)
    return tensors


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
