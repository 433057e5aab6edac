"""Convert layers to sparse and back in place: modules and Parameters keep their identity."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from topkast import Support
from topkast_torch.sparse._layers import SparseConv2d, SparseLinear
from topkast_torch.sparse._sparse_layer import SparseLayer, replace_data, unregister

SPARSE_FORMS: dict[type[nn.Module], type[SparseLayer]] = {
    nn.Linear: SparseLinear,
    nn.Conv2d: SparseConv2d,
}


# Attributes of a module that only sparse layers have.
_OF_SPARSE_LAYERS = (
    "indices",
    "active_count",
    "blocks",
    "reservoir",
    "selection",
    "weight_shape",
    "density",
    "_products",
    "_assignment_count",
    "_valid_version",
    "_is_drawn",
    "_recipe",
    "recording",
    "sharding",
)


def make_sparse(
    module: nn.Module, values: Parameter, support: Support, shape: tuple[int, ...]
) -> SparseLayer:
    """Make a module sparse in place: references to it, and its hooks, stay valid."""
    sparse = SPARSE_FORMS[type(module)]
    del module._parameters["weight"]
    module.__class__ = sparse
    assert isinstance(module, SparseLayer)
    bias = module._parameters.pop("bias")
    module.set_sparse(values, support, tuple(shape))
    module._parameters["bias"] = bias
    return module


def make_dense(module: SparseLayer, weight: Tensor, *, keep_param: bool) -> None:
    """Make a sparse layer dense in place; `keep_param` keeps the Parameter's identity."""
    param, bias = module._parameters.pop("values"), module._parameters.pop("bias")
    assert param is not None
    for name in _OF_SPARSE_LAYERS:
        module.__dict__.pop(name, None)
    if keep_param:
        unregister(param)
        replace_data(param, weight)
    else:
        param = Parameter(weight, requires_grad=param.requires_grad)
    dense_class: Any = next(
        dense for dense, sparse in SPARSE_FORMS.items() if isinstance(module, sparse)
    )
    module.__class__ = dense_class
    module._parameters |= {"weight": param, "bias": bias}
