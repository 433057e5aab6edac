"""Safetensors files of the forward view: the values on A and their indices."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from topkast import MismatchError
from topkast_torch.sparse._sparse_layer import SparseLayer
from topkast_torch.sparse._structure import BLOCK, STRUCTURE

_FORMAT = "topkast-forward-1"
_INDICES = (torch.int32, torch.int64)
_MAX_ENTRIES_PER_VALUE = 1 << 20  # a small file must not make us allocate a huge tensor


def save_forward(model: nn.Module, path: str | PathLike[str]) -> None:
    r"""Save the forward view of a sparse model: of each sparse weight, the values on A alone.

    A sparse weight ``name.weight`` becomes ``name.weight.values``, shape (\|A\|,), and
    ``name.weight.indices``, their flat C-order indices, ascending, int32 where they fit and int64
    otherwise. The weight's shape is in the metadata. All other entries of the state dict are saved
    unchanged.

    Parameters
    ----------
    model
        A model after :func:`topkast.sparsify`.
    path
        File to write. Needs the extra ``topkast[safetensors]``.

    Raises
    ------
    MismatchError
        If the model has no sparse layer.

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
    save_file: Any = _import_safetensors("torch").save_file
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SparseLayer)
    }
    if not layers:
        raise MismatchError("the model has no sparse layer: call topkast.sparsify first")
    structure = "values", *STRUCTURE, BLOCK
    layer_entries = {_join(name, entry) for name in layers for entry in structure}
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}  # the name under which a shared tensor is saved, by its other names
    saved_names: dict[Any, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in layer_entries:
            key = tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
            if tensor.numel() and key in saved_names:
                same[name] = saved_names[key]
            else:
                saved_names[key] = name
                tensors[name] = tensor.detach().contiguous()
    shapes = {}
    for name, layer in layers.items():
        weight = _join(name, "weight")
        if id(layer) in saved_names:
            same[weight] = saved_names[id(layer)]
            continue
        saved_names[id(layer)] = weight
        tensors[weight + ".values"], tensors[weight + ".indices"] = _active_entries(layer)
        shapes[weight] = list(layer.weight_shape)
    metadata = {"format": _FORMAT, "shapes": json.dumps(shapes), "same": json.dumps(same)}
    save_file(tensors, path, metadata=metadata)


def _active_entries(layer: SparseLayer) -> tuple[Tensor, Tensor]:
    """The values on A and their flat indices, ascending."""
    support = layer.support
    values = layer.values.detach().view(-1)[: support.forward_size].clone()
    indices = support.active_entries.clone()
    if support.blocks is None:
        return values, indices
    indices, order = indices.sort()
    return values[order], indices


def load_forward(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Load a file of :func:`save_forward` as the state dict of a dense model.

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
        If :func:`save_forward` did not write the file, or its indices do not fit its shapes.

    Examples
    --------
    See :func:`save_forward`.
    """
    safe_open: Any = _import_safetensors("").safe_open
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, Any] = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise MismatchError(
                f"{path} was not written by topkast_torch.save_forward: its format is "
                f"{metadata.get('format')!r}, expected {_FORMAT!r}"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        shapes, same = (_read_object(metadata, name) for name in ("shapes", "same"))
        for name, shape in shapes.items():
            tensors[name] = _to_dense(name, shape, tensors)
        for name, saved_name in same.items():
            tensors[name] = tensors[saved_name]
    except (ValueError, KeyError) as error:
        raise MismatchError(
            f"{path} is not a valid file of topkast_torch.save_forward: {error}"
        ) from error
    return tensors


def _read_object(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    content = json.loads(metadata.get(name, "{}" if name == "same" else "null"))
    if not isinstance(content, dict):
        raise ValueError(f"its metadata entry {name!r} must be a JSON object, got {content!r}")
    return content


def _to_dense(name: str, shape: Any, tensors: dict[str, Tensor]) -> Tensor:
    """The dense tensor of a file's values and indices, after checking that they fit."""
    values, indices = tensors.pop(name + ".values"), tensors.pop(name + ".indices")
    if not isinstance(shape, list) or not all(
        isinstance(length, int) and length >= 0 for length in shape
    ):
        raise ValueError(f"the shape of {name} must be a list of lengths, got {shape!r}")
    size = math.prod(shape)
    if values.dim() != 1 or indices.shape != values.shape or indices.dtype not in _INDICES:
        raise ValueError(
            f"{name} has values of shape {tuple(values.shape)} and indices of {indices.dtype} and "
            f"shape {tuple(indices.shape)}, expected one integer index per value"
        )
    indices = indices.long()
    is_ascending = bool((indices[1:] > indices[:-1]).all())
    if len(indices) and not (is_ascending and int(indices[0]) >= 0 and int(indices[-1]) < size):
        raise ValueError(f"the indices of {name} must ascend in [0, {size})")
    if size > _MAX_ENTRIES_PER_VALUE * max(len(indices), 1):
        raise ValueError(
            f"{name} has {len(indices)} values for a weight of shape {tuple(shape)}, more than "
            f"{_MAX_ENTRIES_PER_VALUE} entries for each value"
        )
    return values.new_zeros(size).index_copy(0, indices, values).view(shape)


def _import_safetensors(submodule: str) -> Any:
    try:
        return importlib.import_module(f"safetensors.{submodule}" if submodule else "safetensors")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "save_forward and load_forward need safetensors: pip install 'topkast[safetensors]'"
        ) from error


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
