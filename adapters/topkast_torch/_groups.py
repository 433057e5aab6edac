"""Parameter groups: which tensors are sparsified, and what the inner optimizer is given instead."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from topkast import OptionError, UnsupportedTensorError
from topkast._options import FIXED_OPTIONS, GROUP_OPTIONS, Options, check_patterns, kept_dense
from topkast._plan import plan
from topkast_torch._compact import CompactTensor
from topkast_torch._masked import MaskedTensor
from topkast_torch._probe import initial_state
from topkast_torch._sparse import SparseTensor
from topkast_torch._sparse_layer import layer_of


@dataclass
class Group:
    """What a parameter group of the wrapper has beside its options."""

    names: list[str]  # of its parameters, in their order
    compact: list[CompactTensor]
    owner: dict[str, CompactTensor]  # by the name of a sparsified parameter
    initial: dict[str, float | None]  # what the inner optimizer initialises its state to
    fixed: dict[str, Any]  # options that must stay as they are

    def check_fixed(self, options: Mapping[str, Any]) -> None:
        for name, value in self.fixed.items():
            if options[name] != value:
                raise OptionError(
                    f"{name} of a parameter group was changed from {value!r} to {options[name]!r}: "
                    "the sizes of the sets are fixed when an optimizer is wrapped"
                )

    def inner_params(self, params: list[Parameter]) -> list[Parameter]:
        """What the inner optimizer is given: compact vectors, and dense parameters as they are."""
        given: dict[int, Parameter] = {}
        for name, param in zip(self.names, params, strict=True):
            param = self.owner[name].values if name in self.owner else param
            given[id(param)] = param
        return list(given.values())

    def inner_names(self) -> list[str]:
        keys = [self.owner[name].block.key if name in self.owner else name for name in self.names]
        return list(dict.fromkeys(keys))


@dataclass
class Core:
    """All state of the wrapper, in one object that copies of the wrapper share."""

    # Fixed at wrapping
    inner: torch.optim.Optimizer
    options: Options
    # Grows with add_param_group
    groups: list[Group] = field(default_factory=list)
    # Changed by a step
    updates: int = 0

    @property
    def compact(self) -> Iterator[CompactTensor]:
        return (compact for group in self.groups for compact in group.compact)


def prepare(core: Core, group: Mapping[str, Any], options: Options) -> Group:
    """Choose the sets of a group's tensors, changing nothing."""
    params: list[Parameter] = group["params"]
    names = _names(group, core.groups)
    tensors = dict(zip(names, params, strict=True))
    for name, param in tensors.items():
        if isinstance(param, torch.nn.UninitializedParameter):
            raise UnsupportedTensorError(
                f"{name} is not initialised: run the model once before building the optimizer"
            )
        if type(param).__name__ == "FlatParameter":
            raise UnsupportedTensorError(
                f"{name} is a FlatParameter of FSDP, which has no rows and columns to sparsify: "
                "sharded parameters are not supported yet"
            )
    if "dense" in group:
        check_patterns(tensors, options.dense)
    dense = kept_dense(tensors, options.dense)
    layers = {name: layer_of(param) for name, param in tensors.items() if name not in dense}
    sparse = {name: tensors[name] for name, layer in layers.items() if layer is None}
    for name, param in sparse.items():
        _check_tensor(name, param)
    blocks = plan({name: tuple(param.shape) for name, param in sparse.items()}, options)
    for block in blocks:
        kinds = {(sparse[name].dtype, sparse[name].device) for name in block.shapes}
        if len(kinds) > 1:
            raise OptionError(
                "distribution='global' ranks the tensors of a group together, which must have one "
                f"dtype and one device, got {sorted(map(str, kinds))}"
            )
    compact: list[CompactTensor] = []
    with torch.no_grad():
        for block in blocks:
            members = {name: sparse[name] for name in block.shapes}
            compact.append(MaskedTensor(block, members, options, core.updates))
        for name, layer in layers.items():
            if layer is not None:
                compact.append(SparseTensor.of_layer(name, layer, options, core.updates))
    owner = {name: tensor for tensor in compact for name in tensor.block.shapes}
    initial = initial_state(core.inner, group) if compact else {}
    fixed = {name: getattr(options, name) for name in FIXED_OPTIONS}
    return Group(names, compact, owner, initial, fixed)


def gather_state(
    state: Mapping[Tensor, Any], group: Group, params: list[Parameter]
) -> dict[Tensor, Any]:
    """State that an optimizer has already, for what it will hold instead of its Parameters."""
    by_name = {
        name: state[param]
        for name, param in zip(group.names, params, strict=True)
        if param in state
    }
    gathered: dict[Tensor, Any] = {}
    for compact in group.compact:
        entries = compact.gather_state(
            {name: by_name[name] for name in compact.block.shapes if name in by_name}
        )
        if entries:
            gathered[compact.values] = entries
    for name, param in zip(group.names, params, strict=True):
        if name not in group.owner and name in by_name:
            gathered[param] = by_name[name]
    return gathered


def install(group: Group, inner_group: dict[str, Any]) -> None:
    """Hand the inner optimizer the compact tensors in place of the Parameters."""
    inner_group["params"] = group.inner_params(inner_group["params"])
    if "param_names" in inner_group:
        inner_group["param_names"] = group.inner_names()
    for name in ("dense", *GROUP_OPTIONS):
        inner_group.pop(name, None)
    for compact in group.compact:
        compact.install()


def _names(group: Mapping[str, Any], others: list[Group]) -> list[str]:
    """Names of the parameters: those given to the optimizer, else ``"<group>.<index>"``."""
    index = len(others)
    numbered = [f"{index}.{place}" for place in range(len(group["params"]))]
    taken = {name for other in others for name in other.names}
    names: list[str] = list(group.get("param_names", numbered))
    return [f"{index}.{name}" if name in taken else name for name in names]


def _check_tensor(name: str, param: Tensor) -> None:
    problem = None
    if _is_wrapper(param):
        problem = f"a {type(param).__name__} (sharded or wrapped: not supported yet)"
    elif param.layout != torch.strided or param.is_meta or param.is_quantized:
        problem = f"of layout {param.layout} on {param.device}: a strided tensor is needed"
    elif not (param.is_floating_point() or param.is_complex()):
        problem = f"of dtype {param.dtype}: weights must be floats"
    elif any(
        stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True)
    ):
        problem = "expanded: several of its entries share one place in memory"
    if problem:
        raise UnsupportedTensorError(f"{name} cannot be kept sparse: it is {problem}")


def _is_wrapper(tensor: Tensor) -> bool:
    return bool(is_traceable_wrapper_subclass(tensor))  # DTensor is one


def check_overlap(groups: list[Group], param_groups: list[dict[str, Any]]) -> None:
    """Two Parameters on the same memory would each undo what the other writes."""
    spans = sorted(
        (param.data_ptr(), param.data_ptr() + param.numel() * param.element_size(), name)
        for group, outer in zip(groups, param_groups, strict=True)
        for name, param in zip(group.names, outer["params"], strict=True)
        if name in group.owner and param.numel() and _is_packed(param)
    )
    for (_, stop, first), (start, _, second) in itertools.pairwise(spans):
        if start < stop:
            raise UnsupportedTensorError(
                f"{first} and {second} share memory but are two Parameters: tie weights by using "
                "one Parameter in both places"
            )


def _is_packed(tensor: Tensor) -> bool:
    """Whether the tensor fills its span of memory, in whatever order of its dimensions."""
    dims = sorted(range(tensor.dim()), key=lambda dim: tensor.stride(dim), reverse=True)
    return tensor.permute(dims).is_contiguous()
