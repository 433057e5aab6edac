"""Networks with the sparse layers of rival libraries: sparseprop, sparselab, and PyTorch itself.

PyTorch's layer is a product with a sparse tensor in CSR format, differentiated by autograd. All
keep one fixed mask (A = B), here the largest magnitudes of the dense weights, and train with any
optimizer of `torch.optim`, `Adam(fused=True)` included. Batches are contiguous, of shape
(batch, features); sparseprop is fastest if both are multiples of 16.

To install them, with the virtual environment active (sparseprop's set-up calls `pip` and
`python3` by name)::

    pip install numpy torch setuptools wheel pybind11
    pip install sparselab
    pip install --no-build-isolation sparseprop
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from copy import deepcopy
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[..., nn.Module]


def available() -> dict[str, Build]:
    """Return a conversion for each rival library that can be imported, by its name and version.

    It makes the layers of a network sparse in place. Its arguments are the network, a sparsity,
    patterns of the parameters that stay dense, and example inputs. It raises TypeError if the rival
    has no sparse form of a layer.
    """
    return {
        f"{name} {version(name)}{' CSR' if name == 'torch' else ''}": partial(_replace, convert)
        for name, convert in CONVERT.items()
        if _error(name) is None
    }


def missing() -> dict[str, str]:
    """Return the import error of each rival library that cannot be imported."""
    errors = {name: _error(name) for name in CONVERT}
    return {name: error for name, error in errors.items() if error is not None}


def set_num_threads(threads: int) -> None:
    """Set the threads of PyTorch and of the rivals: sparselab loads its own OpenMP."""
    for name in CONVERT:
        _error(name)
    torch.set_num_threads(threads)
    maps = Path("/proc/self/maps")
    mapped = maps.read_text().splitlines() if maps.exists() else []
    for library in {line.split(maxsplit=5)[-1] for line in mapped if "libgomp" in line}:
        ctypes.CDLL(library).omp_set_num_threads(threads)


class SparselabLinear(nn.Module):
    """sparselab's linear layer with a fixed mask.

    `SparseLinear.forward` copies its input twice, to transpose it. This layer calls the kernel
    directly, without a copy if the input comes from another such layer. It leaves no room for new
    weights, because the mask is fixed.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        ops = import_module("sparselab.ops")
        self.csr: Any = import_module("sparselab").PaddedCSR.from_dense(weight, padding_ratio=0.0)
        ops._transpose_cache.pop(id(self.csr), None)  # may belong to a dead object with the same id
        self.product: Callable[..., Tensor] = ops._SpMMFunction.apply
        self.values = nn.Parameter(torch.from_numpy(self.csr.values))  # shares csr's memory
        self.bias = None if bias is None else nn.Parameter(bias.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.product(self.values, self.csr, inputs.t().contiguous(), "simd").t()
        return outputs if self.bias is None else outputs + self.bias


class Rows(nn.Module):
    """A layer that takes rows of features, applied to inputs of any leading shape."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dim() == 2:
            outputs: Tensor = self.layer(inputs)
            return outputs
        return self.layer(inputs.flatten(0, -2)).unflatten(0, inputs.shape[:-1])  # type: ignore[no-any-return]


def by_sparseprop(layer: nn.Module, weight: Tensor, shape: tuple[int, ...]) -> nn.Module:
    if torch.count_nonzero(weight) > 2**24:
        raise ValueError("sparseprop rounds row offsets above 2^24 to float32")
    masked = deepcopy(layer)
    assert isinstance(masked, nn.Linear | nn.Conv2d)
    masked.weight.data = weight
    modules: Any = import_module("sparseprop.modules")
    if isinstance(masked, nn.Conv2d):
        # This picks the faster of sparseprop's two kernels.
        converted: nn.Module = modules.sparsify_conv2d_auto(masked, shape)
        return converted
    return Rows(modules.SparseLinear.from_dense(masked))


def by_sparselab(layer: nn.Module, weight: Tensor, shape: tuple[int, ...]) -> nn.Module:
    if not isinstance(layer, nn.Linear):
        raise TypeError("sparselab has no sparse convolution")
    return Rows(SparselabLinear(weight, layer.bias))


class CSRLinear(nn.Module):
    """A linear layer by PyTorch's own product of a CSR matrix, with a fixed mask."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        matrix = weight.to_sparse_csr()
        self.row_starts, self.columns = matrix.crow_indices().int(), matrix.col_indices().int()
        self.shape, self.values = weight.shape, nn.Parameter(matrix.values().clone())
        self.bias = None if bias is None else nn.Parameter(bias.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        matrix = torch.sparse_csr_tensor(self.row_starts, self.columns, self.values, self.shape)
        outputs: Tensor = (matrix @ inputs.t()).t()
        return outputs if self.bias is None else outputs + self.bias


def by_torch(layer: nn.Module, weight: Tensor, shape: tuple[int, ...]) -> nn.Module:
    if not isinstance(layer, nn.Linear):
        raise TypeError("PyTorch has no sparse convolution")
    return Rows(CSRLinear(weight, layer.bias))


CONVERT: dict[str, Callable[[nn.Module, Tensor, tuple[int, ...]], nn.Module]] = {
    "sparseprop": by_sparseprop,
    "sparselab": by_sparselab,
    "torch": by_torch,
}


def _replace(
    convert: Callable[[nn.Module, Tensor, tuple[int, ...]], nn.Module],
    model: nn.Module,
    sparsity: float,
    dense: list[str],
    example: Tensor,
) -> nn.Module:
    shapes: dict[str, tuple[int, ...]] = {}

    def record_shape(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes[name] = tuple(inputs[0].shape)

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and not any(fnmatch(f"{name}.weight", pattern) for pattern in dense)
    }
    hooks = [
        module.register_forward_pre_hook(partial(record_shape, name))
        for name, module in layers.items()
    ]
    model(example)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        weight = layer.weight.detach()
        assert isinstance(weight, Tensor)
        parent, _, attribute = name.rpartition(".")
        converted = convert(layer, _masked(weight, sparsity), shapes[name])
        setattr(model.get_submodule(parent), attribute, converted)
    return model


def _masked(weight: Tensor, sparsity: float) -> Tensor:
    count = weight.numel() - int(sparsity * weight.numel())
    flat = weight.reshape(-1)
    largest = flat.abs().topk(count, sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, largest, flat[largest]).view_as(weight)


_MODULES = {
    "sparseprop": "sparseprop.modules.linear",
    "sparselab": "sparselab.ops",
    "torch": "torch.sparse",
}


def _error(name: str) -> str | None:
    try:
        import_module(name)
        import_module(_MODULES[name])
    except Exception as error:  # a broken installation raises many types
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None
