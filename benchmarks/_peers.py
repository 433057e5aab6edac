"""Networks with the sparse layers of rival libraries: sparseprop and sparselab, both for CPUs.

Both keep one fixed mask (A = B), here the largest magnitudes of the dense weights, and train with
any of `torch.optim`'s optimizers, `Adam(fused=True)` included. Batches are contiguous, of shape
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
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[nn.Sequential, float], nn.Module]


def available() -> dict[str, Build]:
    """Of each rival that can be imported, what makes a sparse network of a dense one."""
    return {
        f"{name} {version(name)}": partial(_replace, convert)
        for name, convert in CONVERT.items()
        if _error(name) is None
    }


def missing() -> dict[str, str]:
    """Of each rival that cannot be imported, why not."""
    errors = {name: _error(name) for name in CONVERT}
    return {name: error for name, error in errors.items() if error is not None}


def set_num_threads(threads: int) -> None:
    """As `torch.set_num_threads`, for the rivals too: sparselab brings an OpenMP of its own."""
    for name in CONVERT:
        _error(name)
    torch.set_num_threads(threads)
    maps = Path("/proc/self/maps")
    mapped = maps.read_text().splitlines() if maps.exists() else []
    for library in {line.split(maxsplit=5)[-1] for line in mapped if "libgomp" in line}:
        ctypes.CDLL(library).omp_set_num_threads(threads)


class SparselabLinear(nn.Module):
    """sparselab's layer, with a given mask.

    `SparseLinear.forward` copies its input twice, to transpose it. Its kernel is called directly
    here, and no copy is made where the input comes from another such layer. No room is left for
    weights to come either: the mask is fixed.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        ops = import_module("sparselab.ops")
        self.csr: Any = import_module("sparselab").PaddedCSR.from_dense(weight, padding_ratio=0.0)
        ops._transpose_cache.pop(id(self.csr), None)  # may be of a dead one with the same id
        self.product: Callable[..., Tensor] = ops._SpMMFunction.apply
        self.values = nn.Parameter(torch.from_numpy(self.csr.values))  # shares csr's memory
        self.bias = None if bias is None else nn.Parameter(bias.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.product(self.values, self.csr, inputs.t().contiguous(), "simd").t()
        return outputs if self.bias is None else outputs + self.bias


def by_sparseprop(weight: Tensor, bias: Tensor | None) -> nn.Module:
    if torch.count_nonzero(weight) > 2**24:
        raise ValueError("sparseprop rounds row offsets above 2^24 to float32")
    own = None if bias is None else nn.Parameter(bias.clone())
    sparse: nn.Module = import_module("sparseprop.modules.linear").SparseLinear(weight, own)
    return sparse


CONVERT: dict[str, Callable[[Tensor, Tensor | None], nn.Module]] = {
    "sparseprop": by_sparseprop,
    "sparselab": SparselabLinear,
}


def _replace(
    convert: Callable[[Tensor, Tensor | None], nn.Module], dense: nn.Sequential, sparsity: float
) -> nn.Module:
    last = max(place for place, layer in enumerate(dense) if isinstance(layer, nn.Linear))
    layers: list[nn.Module] = []
    for place, layer in enumerate(dense):
        if not isinstance(layer, nn.Linear):
            layers.append(nn.ReLU())
        elif place < last:
            held = layer.state_dict()
            layers.append(convert(_masked(held["weight"], sparsity), held.get("bias")))
        else:
            layers.append(deepcopy(layer))
    return nn.Sequential(*layers)


def _masked(weight: Tensor, sparsity: float) -> Tensor:
    kept = weight.numel() - int(sparsity * weight.numel())
    flat = weight.reshape(-1)
    largest = flat.abs().topk(kept, sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, largest, flat[largest]).view_as(weight)


def _error(name: str) -> str | None:
    try:
        import_module(name)
        import_module("sparseprop.modules.linear" if name == "sparseprop" else "sparselab.ops")
    except Exception as error:  # a library that does not load fails in many ways
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None
