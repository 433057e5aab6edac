"""Safetensors files of the forward view: the values on A and their indices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from topkast import MismatchError
from topkast.adapter import FILE_FORMAT, MAX_ENTRIES_PER_VALUE, import_safetensors
from topkast_torch.export._describe import describe_layers
from topkast_torch.sparse._sparse_layer import SparseLayer
from topkast_torch.sparse._structure import BLOCK, STRUCTURE

_INT32_LIMIT = 1 << 31


def save_forward(model: nn.Module, path: str | PathLike[str]) -> None:
    r"""Save the forward view of a sparse model: of each sparse weight, the values on A alone.

    A sparse weight ``name.weight`` becomes ``name.weight.values``, shape (\|A\|,), and
    ``name.weight.indices``, their flat C-order indices, ascending, int32 where they fit and int64
    otherwise. The weight's shape is in the metadata. Weights of sparse layers are stored so, and
    dense tensors where this takes fewer bytes: those of masked execution, and of models that were
    made dense again. All other entries of the state dict are saved unchanged.

    The metadata also describes the layers that :mod:`topkast.inference` knows, and the order of
    their calls if the model is a ``torch.nn.Sequential`` of such layers alone.

    Parameters
    ----------
    model
        A model with sparse layers, or with dense tensors that are zero outside A.
    path
        File to write. Needs the extra ``topkast[safetensors]``.

    Raises
    ------
    MismatchError
        If no weight of the model is sparse, or an entry of its state dict is no tensor.
    OSError
        If the file cannot be written.

    See Also
    --------
    load_forward : Load the file as the state dict of a dense model.
    load_sparse : Load the file into sparse layers.
    topkast.inference.load : Load the file without PyTorch.

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
    save_file: Any = import_safetensors("torch").save_file
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SparseLayer)
    }
    tensors, same, saved_names = _other_tensors(model, layers)
    shapes: dict[str, list[int]] = {}
    for name in [name for name, tensor in tensors.items() if is_smaller_sparse(tensor)]:
        tensor = tensors.pop(name)
        indices = tensor.reshape(-1).nonzero().view(-1)
        shapes[name] = list(tensor.shape)
        tensors[name + ".values"] = tensor.reshape(-1)[indices]
        fits = tensor.numel() < _INT32_LIMIT
        tensors[name + ".indices"] = indices.to(torch.int32) if fits else indices
    for name, layer in layers.items():
        weight = _join(name, "weight")
        if id(layer) in saved_names:
            same[weight] = saved_names[id(layer)]
            continue
        saved_names[id(layer)] = weight
        tensors[weight + ".values"], tensors[weight + ".indices"] = _active_entries(layer)
        shapes[weight] = list(layer.weight_shape)
    if not shapes:
        raise MismatchError(
            "the model has no sparse layer, and no tensor of which half is zero: wrap its "
            "optimizer before training, or save the state dict with safetensors"
        )
    described, sequence = describe_layers(model)
    entries = {"shapes": shapes, "same": same, "layers": described, "sequence": sequence}
    metadata = {name: json.dumps(entry) for name, entry in entries.items()}
    try:
        save_file(tensors, path, metadata={"format": FILE_FORMAT} | metadata)
    except import_safetensors().SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def is_smaller_sparse(tensor: Tensor) -> bool:
    """Whether the nonzeros of a dense tensor and their indices take less memory than all of it."""
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return False
    count, size = int(torch.count_nonzero(tensor)), tensor.numel()
    if size > MAX_ENTRIES_PER_VALUE * max(count, 1):
        return False  # such a file would not be loaded
    index_bytes = 4 if size < _INT32_LIMIT else 8
    return count * (tensor.element_size() + index_bytes) < size * tensor.element_size()


def _other_tensors(
    model: nn.Module, layers: Mapping[str, SparseLayer]
) -> tuple[dict[str, Tensor], dict[str, str], dict[Any, str]]:
    """The state dict without the entries of sparse layers.

    Also the name under which a shared tensor is saved, by its other names, and these names by what
    identifies a tensor.
    """
    structure = "values", *STRUCTURE, BLOCK
    layer_entries = {_join(name, entry) for name in layers for entry in structure}
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    saved_names: dict[Any, str] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in layer_entries:
            if not isinstance(tensor, Tensor):
                raise MismatchError(
                    f"{name} is a {type(tensor).__name__}, but the file can hold tensors alone: "
                    "save the state dict of topkast.densify with torch.save"
                )
            view = tensor.dtype, tensor.is_conj(), tuple(tensor.shape), tensor.stride()
            key = tensor.data_ptr(), *view
            if tensor.numel() and key in saved_names:
                same[name] = saved_names[key]
            else:
                saved_names[key] = name
                whole = tensor.detach().contiguous()
                storage = whole.untyped_storage().data_ptr()
                # safetensors refuses tensors that overlap, such as a matrix and some of its rows.
                tensors[name] = whole.clone() if storage in storages else whole
                storages.add(storage)
    return tensors, same, saved_names


def _active_entries(layer: SparseLayer) -> tuple[Tensor, Tensor]:
    """The values on A and their flat indices, ascending."""
    support = layer.support
    values = layer.values.detach().view(-1)[: support.forward_size].clone()
    indices = support.active_entries.clone()
    if support.blocks is None:
        return values, indices
    indices, order = indices.sort()
    return values[order], indices


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
