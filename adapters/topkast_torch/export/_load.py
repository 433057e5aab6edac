"""Load files of the forward view: as a dense state dict, or into sparse layers."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from topkast import MismatchError, Support
from topkast.adapter import FileContents, check_entries, read_file
from topkast_torch.optimizer._ownership import owner_of
from topkast_torch.sparse._conversion import SPARSE_FORMS, make_sparse
from topkast_torch.sparse._sparse_layer import SparseLayer
from topkast_torch.sparse.chains._sequential import link_layers


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
        If the file is damaged, :func:`save_forward` did not write it, or its indices do not fit its
        shapes.

    Examples
    --------
    See :func:`save_forward`.
    """
    tensors, contents = read_file(path, "pt", _read_tensors)
    for name, shape in contents.shapes.items():
        values, indices = tensors.pop(name + ".values"), tensors.pop(name + ".indices")
        tensors[name] = _to_dense(values, indices, shape)
    return tensors | {name: tensors[saved] for name, saved in contents.same.items()}


def load_sparse(model: nn.Module, path: str | PathLike[str]) -> None:
    """Load a file of :func:`save_forward` into a model, whose layers become sparse in place.

    For inference, on any device: the layers hold and multiply A alone, so B is A. No dense weight
    is formed where a layer becomes sparse, and a model that was built on the meta device gets all
    its tensors from the file. Layers become sparse as with :func:`topkast.sparsify`: ``nn.Linear``
    and ``nn.Conv2d`` in float32 and float64. Other weights of the file are loaded dense. To train,
    load the file with :func:`load_forward` instead, wrap, and sparsify.

    Parameters
    ----------
    model
        The dense model: its modules, in the dtype and on the device of the result.
    path
        The file.

    Raises
    ------
    MismatchError
        If the file is damaged or was not written by :func:`save_forward`, if names or shapes are
        not those of the model, if the model has sparse layers already, or if a wrapped optimizer
        trains it. The model is as before then.

    Examples
    --------
    >>> import tempfile, torch, topkast_torch
    >>> layer = topkast_torch.SparseLinear(20, 30, fwd=0.9, bwd=0.8)
    >>> model = torch.nn.Linear(20, 30, device="meta")
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     topkast_torch.save_forward(layer, file.name)
    ...     topkast_torch.load_sparse(model, file.name)
    >>> type(model).__name__, model.values.shape
    ('SparseLinear', torch.Size([1, 60]))
    >>> torch.equal(model(torch.ones(1, 20)), layer(torch.ones(1, 20)))
    True
    """
    _check_free(model)
    tensors, contents = read_file(path, "pt", _read_tensors)
    entries = {
        name: (tensors.pop(name + ".values"), tensors.pop(name + ".indices"), shape)
        for name, shape in contents.shapes.items()
    }
    modules = dict(model.named_modules(remove_duplicate=False))
    # A weight that two modules share, such as tied embeddings, stays dense.
    tied = {
        saved
        for name, saved in contents.same.items()
        if modules.get(name.rpartition(".")[0]) is not modules.get(saved.rpartition(".")[0])
    }
    layers = {
        _join(name, "weight"): module
        for name, module in model.named_modules()
        if _join(name, "weight") in entries.keys() - tied and _can_be_sparse(module)
    }
    for name, entry in entries.items():
        if name not in layers:
            tensors[name] = _to_dense(*entry)
    _check_names(model, path, tensors, entries, contents)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: shape for name, (_, _, shape) in entries.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes |= {name: shapes[saved] for name, saved in contents.same.items()}
    for name, shape in shapes.items():
        if expected[name] != shape:
            raise MismatchError(f"{path} has {name} of shape {shape}, the model {expected[name]}")
    is_meta = any(tensor.is_meta for tensor in model.state_dict().values())
    shared = {name: tensors[saved] for name, saved in contents.same.items() if saved in tensors}
    model.load_state_dict(tensors | shared, strict=False, assign=is_meta)
    for name, module in layers.items():
        values, indices, shape = entries[name]
        weight: Any = module.weight
        device = values.device if weight.is_meta else weight.device
        param = Parameter(values.to(device, weight.dtype).view(1, -1), requires_grad=False)
        make_sparse(module, param, Support(indices.to(device), len(indices)), shape)
    link_layers(model)


def _check_free(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            raise MismatchError(
                f"{name or 'the model'} is a sparse layer already: build the dense model anew, or "
                "call topkast.densify(model) first"
            )
    for name, param in model.named_parameters():
        if owner_of(param) is not None:
            raise MismatchError(
                f"{name} is trained by a wrapped optimizer: load_sparse is for inference; build "
                "another model"
            )


def _check_names(
    model: nn.Module,
    path: Any,
    tensors: dict[str, Tensor],
    entries: dict[str, Any],
    contents: FileContents,
) -> None:
    """Raise :class:`topkast.MismatchError` unless the file has the names of the model."""
    saved, expected = tensors.keys() | entries.keys() | contents.same.keys(), {*model.state_dict()}
    if saved != expected:
        raise MismatchError(
            f"{path} does not fit the model: it lacks {sorted(expected - saved)} and has "
            f"{sorted(saved - expected)} in addition"
        )


def _can_be_sparse(module: nn.Module) -> bool:
    is_known = type(module) in SPARSE_FORMS and "forward" not in module.__dict__
    weight: Any = getattr(module, "weight", None)
    return is_known and weight.dtype in (torch.float32, torch.float64)


def _read_tensors(file: Any, contents: FileContents) -> tuple[dict[str, Tensor], FileContents]:
    """The tensors of a file, checked, as copies: others would change when the file is replaced."""
    tensors: dict[str, Tensor] = {
        name: file.get_tensor(name).clone()
        for name in file.keys()  # noqa: SIM118
    }
    for name, shape in contents.shapes.items():
        values, indices = tensors[name + ".values"], tensors[name + ".indices"]
        check_entries(name, shape, tuple(values.shape), indices.numpy())
    for saved in contents.same.values():
        if saved not in tensors and saved not in contents.shapes:
            raise ValueError(f"it names a tensor {saved} that it lacks")
    return tensors, contents


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _to_dense(values: Tensor, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    dense = values.new_zeros(shape)
    dense.view(-1).index_copy_(0, indices.long(), values)
    return dense
