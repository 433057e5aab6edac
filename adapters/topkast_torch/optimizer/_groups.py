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

from topkast import MismatchError, OptionError, UnsupportedTensorError
from topkast.adapter import (
    FIXED_OPTIONS,
    GROUP_OPTIONS,
    Options,
    TensorInfo,
    check_patterns,
    kept_dense,
    rank_tensors,
)
from topkast_torch.execution._execution import Execution, InnerProfile
from topkast_torch.execution._masked_execution import MaskedExecution
from topkast_torch.execution._sparse_execution import SparseExecution
from topkast_torch.inner._inner_state import steps_taken
from topkast_torch.inner._learn_layout import learn_layout
from topkast_torch.inner._probe import find_traits, probe
from topkast_torch.optimizer._ownership import check_free
from topkast_torch.optimizer._seat import Seat
from topkast_torch.sparse._parametrizations import check_parametrizations
from topkast_torch.sparse._sparse_layer import layer_of


@dataclass
class Group:
    """What a parameter group of the wrapper has beside its options."""

    names: list[str]  # of its parameters, in their order
    params: list[Parameter]
    executions: list[Execution]
    owner: dict[str, Execution]  # by the name of a sparsified parameter
    profiles: dict[int, InnerProfile]  # of the inner optimizer, by number of dimensions
    fixed: dict[str, Any]  # options that must stay as they are
    checked: tuple[Any, ...] = ()  # values of the options when they were checked last

    def check(self, values: dict[str, Any], options: Options) -> None:
        """Raise an error for options that cannot be, or Parameters that were exchanged."""
        present = tuple(values.get(name) for name in GROUP_OPTIONS)
        if present != self.checked:
            for name, value in self.fixed.items():
                if values[name] != value:
                    raise OptionError(
                        f"{name} of a parameter group was changed from {value!r} to "
                        f"{values[name]!r}: the sizes of the sets are fixed when an optimizer is "
                        "wrapped"
                    )
            for execution in self.executions:
                options.override(values | execution.overrides)
            values.update(options.override(values).for_group())
            self.checked = tuple(values[name] for name in GROUP_OPTIONS)
        params = values["params"]
        if len(params) != len(self.params) or any(
            one is not other for one, other in zip(params, self.params, strict=True)
        ):
            raise MismatchError(
                "the Parameters of a group were exchanged: add others by add_param_group, and "
                "after replacing Parameters build and wrap an optimizer anew"
            )

    def given(self) -> list[Parameter]:
        """What the inner optimizer is given: compact vectors, and dense parameters as they are."""
        given: dict[int, Parameter] = {}
        for name, param in zip(self.names, self.params, strict=True):
            param = self.owner[name].values if name in self.owner else param
            given[id(param)] = param
        return list(given.values())

    def layout_stores(self) -> tuple[str, ...]:
        """Attributes in which the inner optimizer keeps entries by Parameter."""
        names = (name for profile in self.profiles.values() for name in profile.layout.stores)
        return tuple(dict.fromkeys(["state", *names]))


@dataclass
class WrapperState:
    """All state of the wrapper, in one object that copies of the wrapper share."""

    # Fixed at wrapping
    inner: torch.optim.Optimizer
    options: Options
    # Grows with add_param_group
    groups: list[Group] = field(default_factory=list)
    # Changed by a step
    updates: int = 0
    overdue: bool = False  # whether a refresh that was due has failed
    refreshes: int = 0  # how often sets have been chosen anew
    warned: bool = False  # of a dense average

    def __post_init__(self) -> None:
        self.seat = Seat(self.inner, self.given)

    def given(self) -> list[list[Parameter]]:
        """What the inner optimizer is given, by group."""
        return [group.given() for group in self.groups]

    @property
    def executions(self) -> Iterator[Execution]:
        """Those of all groups."""
        return (execution for group in self.groups for execution in group.executions)

    @property
    def stores(self) -> tuple[str, ...]:
        """Attributes in which the inner optimizer keeps entries by Parameter."""
        names = (name for group in self.groups for name in group.layout_stores())
        return tuple(dict.fromkeys(["state", *names]))

    @property
    def attributes(self) -> tuple[str, ...]:
        """Attributes in which the inner optimizer counts."""
        names = (
            name
            for group in self.groups
            for profile in group.profiles.values()
            for name in profile.layout.attributes
        )
        return tuple(dict.fromkeys(names))

    def pairs(self) -> Iterator[tuple[Parameter, Parameter]]:
        """Each Parameter of the model, with what the inner optimizer is given in its place."""
        for group in self.groups:
            for name, param in zip(group.names, group.params, strict=True):
                yield param, group.owner[name].values if name in group.owner else param

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"inner": None, "options": self.options.without_functions()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.inner = self.seat.inner


def prepare(state: WrapperState, group: Mapping[str, Any], options: Options) -> Group:
    """Choose the sets of a group's tensors, changing nothing."""
    params: list[Parameter] = list(group["params"])
    names = _names(group, state.groups)
    tensors = dict(zip(names, params, strict=True))
    for name, param in tensors.items():
        _check_initialised(name, param)
    if "dense" in group:
        check_patterns(tensors, "dense", None if callable(options.dense) else _patterns(options))
    layers = {name: layer_of(param) for name, param in tensors.items()}
    weights = {
        name: tensors[name] if layer is None else TensorInfo(layer.weight_shape, layer.values.dtype)
        for name, layer in layers.items()
    }
    dense = kept_dense(weights, options.dense, options.stacked)
    layers = {name: layer for name, layer in layers.items() if name not in dense}
    masked = {name: tensors[name] for name, layer in layers.items() if layer is None}
    for name, param in masked.items():
        _check_tensor(name, param)
    check_free((name, tensors[name]) for name in layers)
    check_parametrizations(masked)
    ranked = rank_tensors({name: tuple(param.shape) for name, param in masked.items()}, options)
    for tensor in ranked:
        kinds = {(masked[name].dtype, masked[name].device) for name in tensor.shapes}
        if len(kinds) > 1:
            raise OptionError(
                "distribution='global' ranks the tensors of a group together, which must have one "
                f"dtype and one device, got {sorted(map(str, kinds))}"
            )
    shapes = {name: tuple(tensors[name].shape) for name in masked}
    shapes |= {name: layer.weight_shape for name, layer in layers.items() if layer is not None}
    profiles = _find_profiles(state.inner, group, list(shapes.values()), options)
    executions: list[Execution] = []
    with torch.no_grad():
        for tensor in ranked:
            members = {name: masked[name] for name in tensor.shapes}
            steps = steps_taken(state.inner, group, members.values())
            profile = profiles[len(tensor.compact_shape)]
            executions.append(
                MaskedExecution(tensor, members, options, profile, state.updates, steps)
            )
        for name, layer in layers.items():
            if layer is not None:
                steps = steps_taken(state.inner, group, [tensors[name]])
                profile = profiles[len(layer.weight_shape)]
                executions.append(
                    SparseExecution.of_layer(name, layer, options, profile, state.updates, steps)
                )
    owner = {name: execution for execution in executions for name in execution.ranked.shapes}
    fixed = {name: getattr(options, name) for name in FIXED_OPTIONS}
    return Group(names, params, executions, owner, profiles, fixed)


def _find_profiles(
    inner: torch.optim.Optimizer,
    group: Mapping[str, Any],
    shapes: list[tuple[int, ...]],
    options: Options,
) -> dict[int, InnerProfile]:
    """What trials of the inner optimizer show, by the number of dimensions of a tensor."""
    if options.probe:
        probe(inner, group, shapes, joint=options.distribution == "global" and len(shapes) > 1)
    profiles = {}
    for dimensions in {len(shape) for shape in shapes}:
        layout = learn_layout(inner, group, dimensions)
        profiles[dimensions] = InnerProfile(layout, find_traits(inner, group, layout, dimensions))
    return profiles


def restrict_state(
    state: Mapping[Tensor, Any], group: Group, params: list[Parameter]
) -> dict[Tensor, Any]:
    """State that an optimizer has already, for what it will be given instead of its Parameters."""
    by_name = {
        name: state[param]
        for name, param in zip(group.names, params, strict=True)
        if param in state
    }
    restricted: dict[Tensor, Any] = {}
    for execution in group.executions:
        entries = execution.restrict_state(
            {name: {"state": by_name[name]} for name in execution.ranked.shapes if name in by_name}
        )
        if entries:
            restricted[execution.values] = entries["state"]
    for name, param in zip(group.names, params, strict=True):
        if name not in group.owner and name in by_name:
            restricted[param] = by_name[name]
    return restricted


def _patterns(options: Options) -> Any:
    return None if isinstance(options.dense, bool) else options.dense


def _names(group: Mapping[str, Any], others: list[Group]) -> list[str]:
    """Names of the parameters: those given to the optimizer, else ``"<group>.<index>"``."""
    index = len(others)
    numbered = [f"{index}.{number}" for number in range(len(group["params"]))]
    taken = {name for other in others for name in other.names}
    names: list[str] = list(group.get("param_names", numbered))
    return [f"{index}.{name}" if name in taken else name for name in names]


def _check_initialised(name: str, param: Tensor) -> None:
    if isinstance(param, torch.nn.UninitializedParameter):
        raise UnsupportedTensorError(
            f"{name} is not initialised: run the model once before building the optimizer"
        )
    if type(param).__name__ == "FlatParameter":
        raise UnsupportedTensorError(
            f"{name} is a FlatParameter of FSDP, which has no rows and columns to sparsify: "
            "sharded parameters are not supported yet"
        )


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


def check_overlap(groups: list[Group]) -> None:
    """Two Parameters on the same memory would each undo what the other writes."""
    spans = sorted(
        (param.data_ptr(), param.data_ptr() + param.numel() * param.element_size(), name)
        for group in groups
        for name, param in zip(group.names, group.params, strict=True)
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
