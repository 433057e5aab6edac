"""Parameter groups: which tensors are sparse, and the inner optimizer's Parameters for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from topkast import MismatchError, OptionError, UnsupportedTensorError
from topkast.adapter import (
    FIXED_OPTIONS,
    GROUP_OPTIONS,
    Method,
    Options,
    TensorInfo,
    check_patterns,
    kept_dense,
    rank_tensors,
)
from topkast_torch._reservoirs import discarding
from topkast_torch.distributed._local_param import LocalParam
from topkast_torch.distributed._sharded_execution import ShardedExecution
from topkast_torch.distributed._sharding import is_sharded
from topkast_torch.execution._execution import Execution
from topkast_torch.execution._masked_execution import MaskedExecution
from topkast_torch.execution._profile import InnerProfile, Trials
from topkast_torch.execution._sparse_execution import SparseExecution
from topkast_torch.inner._inner_state import count_steps
from topkast_torch.optimizer._inner_optimizer import InnerOptimizer
from topkast_torch.optimizer._ownership import check_free
from topkast_torch.sparse._sparse_layer import SparseLayer, layer_of


@dataclass
class Group:
    """The Parameters, executions and profiles of one parameter group."""

    names: list[str]  # of the Parameters, in order
    params: list[Parameter]
    executions: list[Execution]
    execution_by_name: dict[str, Execution]  # of each sparse Parameter
    locals: dict[str, LocalParam]  # of each dense Parameter that is a DTensor
    profiles: dict[int, InnerProfile]  # of the inner optimizer, by number of dimensions
    fixed: dict[str, Any]  # options that must not change
    method: Method | None
    checked: list[Any] = field(default_factory=list)  # values of the options at the last check

    def check(self, param_group: dict[str, Any], options: Options) -> None:
        """Raise an error for invalid options, or Parameters that were replaced."""
        if watched(param_group) != self.checked:
            for name, value in self.fixed.items():
                if param_group.get(name, value) != value:
                    raise OptionError(
                        f"{name} of a parameter group was changed from {value!r} to "
                        f"{param_group[name]!r}, but is fixed when an optimizer is wrapped: build "
                        "and wrap a new one"
                    )
            for execution in self.executions:
                options.override(param_group | execution.overrides)
            current_options = options.override(param_group | {"method": self.method})
            param_group.update(current_options.for_group())
            self.checked = watched(param_group)
        params = param_group["params"]
        if len(params) != len(self.params) or any(
            param is not known for param, known in zip(params, self.params, strict=True)
        ):
            raise MismatchError(
                "the Parameters of a group were replaced: add Parameters with add_param_group; "
                "after replacing some, build and wrap a new optimizer"
            )

    def inner_params(self) -> list[Parameter]:
        """The inner optimizer's Parameters: compact vectors, and dense Parameters unchanged."""
        params = (inner for _, _, inner in self.inner_params_by_name())
        return list({id(param): param for param in params}.values())

    def inner_params_by_name(self) -> Iterator[tuple[str, Parameter, Parameter]]:
        """Name of each Parameter of the model, it, and the inner optimizer's in its place."""
        for name, param in zip(self.names, self.params, strict=True):
            execution, local = self.execution_by_name.get(name), self.locals.get(name)
            if execution is not None:
                yield name, param, execution.values
            else:
                yield name, param, param if local is None else local.part

    def masked(self) -> dict[str, Parameter]:
        """The Parameters that masked execution trains, by name."""
        return {
            name: param
            for name, param in zip(self.names, self.params, strict=True)
            if isinstance(self.execution_by_name.get(name), MaskedExecution)
        }

    def sharded_names(self) -> list[str]:
        """Names of the Parameters of which this process holds a part."""
        pairs = zip(self.names, self.params, strict=True)
        return [name for name, param in pairs if is_sharded(param)]

    def stores(self) -> tuple[str, ...]:
        """Attributes in which the inner optimizer keeps entries by Parameter."""
        names = (name for profile in self.profiles.values() for name in profile.layout.stores)
        return tuple(dict.fromkeys(["state", *names]))


@dataclass
class WrapperState:
    """All state of the wrapper, in one object that shallow copies of the wrapper share."""

    # Fixed at wrapping
    inner: torch.optim.Optimizer
    options: Options
    # Grows with add_param_group
    groups: list[Group] = field(default_factory=list)
    # Changed by a step
    updates: int = 0
    overdue: bool = False  # whether a due refresh has failed
    refreshes: int = 0  # number of refreshes so far
    warned: bool = False  # about a dense average

    def __post_init__(self) -> None:
        self.handle = InnerOptimizer(self.inner, self.inner_params)

    def inner_params(self) -> list[list[Parameter]]:
        """The inner optimizer's Parameters, by group."""
        return [group.inner_params() for group in self.groups]

    @property
    def executions(self) -> Iterator[Execution]:
        """The executions of all groups."""
        return (execution for group in self.groups for execution in group.executions)

    def check_whole(self) -> None:
        """Raise :class:`MismatchError` if sets and values do not belong together any more."""
        for execution in self.executions:
            if execution.is_divided:
                raise MismatchError(
                    f"a refresh, or a load_state_dict, of {execution.ranked.key} failed halfway: "
                    "its sets, values and optimizer state do not belong together any more. Load a "
                    "state dict that was saved before"
                )

    @property
    def stores(self) -> tuple[str, ...]:
        """Attributes in which the inner optimizer keeps entries by Parameter."""
        names = (name for group in self.groups for name in group.stores())
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

    def param_pairs(self) -> Iterator[tuple[Parameter, Parameter]]:
        """Each Parameter of the model with the inner optimizer's Parameter in its place."""
        for group in self.groups:
            for _, param, inner in group.inner_params_by_name():
                yield param, inner

    @property
    def locals(self) -> Iterator[LocalParam]:
        """The dense Parameters that are DTensors, and of which this process steps a part."""
        return (local for group in self.groups for local in group.locals.values())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"inner": None, "options": self.options.without_functions()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.inner = self.handle.inner


def prepare_group(
    state: WrapperState, param_group: Mapping[str, Any], options: Options, trials: Trials
) -> Group:
    """Choose the sets of a group's tensors, without changing anything."""
    _check_options(param_group, state.inner)
    params: list[Parameter] = list(param_group["params"])
    names = _name_params(param_group, state.groups)
    tensors = dict(zip(names, params, strict=True))
    for name, param in tensors.items():
        _check_initialised(name, param)
    if "dense" in param_group:
        check_patterns(
            tensors, "dense", None if callable(options.dense) else _dense_patterns(options)
        )
    layers = {name: layer_of(param) for name, param in tensors.items()}
    for name, layer in layers.items():
        if layer is not None and layer.sharding is None and is_sharded(tensors[name]):
            _refuse_placement(name, layer, tensors[name])
    weights = {
        name: tensors[name] if layer is None else TensorInfo(layer.weight_shape, layer.values.dtype)
        for name, layer in layers.items()
    }
    dense = kept_dense(weights, options.dense, options.stacked)
    layers = {name: layer for name, layer in layers.items() if name not in dense}
    masked = {name: tensors[name] for name, layer in layers.items() if layer is None}
    for name, param in masked.items():
        _check_tensor(name, param)
    for name in layers:
        _check_device(name, tensors[name])
    check_free((name, tensors[name]) for name in layers)
    rankings = rank_tensors({name: tuple(param.shape) for name, param in masked.items()}, options)
    for ranked in rankings:
        types = {(masked[name].dtype, masked[name].device) for name in ranked.shapes}
        if len(types) > 1:
            raise OptionError(
                "distribution='global' needs one dtype and one device for all tensors of a group, "
                f"got {sorted(map(str, types))}"
            )
    shapes = {name: tuple(tensors[name].shape) for name in masked}
    shapes |= {name: layer.weight_shape for name, layer in layers.items() if layer is not None}
    profiles = trials.find_profiles(param_group, list(shapes.values()), options)
    executions: list[Execution] = []
    with torch.no_grad(), discarding(executions):
        for ranked in rankings:
            members = {name: masked[name] for name in ranked.shapes}
            steps = count_steps(state.inner, param_group, members.values())
            profile = profiles[len(ranked.compact_shape)]
            executions.append(
                MaskedExecution(ranked, members, options, profile, state.updates, steps)
            )
        for name, layer in layers.items():
            if layer is not None:
                steps = count_steps(state.inner, param_group, [tensors[name]])
                profile = profiles[len(layer.weight_shape)]
                execution_type = SparseExecution if layer.sharding is None else ShardedExecution
                executions.append(
                    execution_type.of_layer(name, layer, options, profile, state.updates, steps)
                )
    by_name = {name: execution for execution in executions for name in execution.ranked.shapes}
    fixed = {name: getattr(options, name) for name in FIXED_OPTIONS}
    fixed |= {"dense": None, "method": options.method}  # neither is kept in the group
    if "method" in state.inner.defaults or not isinstance(param_group.get("method"), Method | None):
        del fixed["method"]  # it is an option of the inner optimizer
    others = {name: param for name, param in tensors.items() if name not in by_name}
    locals_ = {
        name: LocalParam(name, param, trials.find_layout(param_group, param.dim(), profiles))
        for name, param in others.items()
        if is_sharded(param)
    }
    return Group(names, params, executions, by_name, locals_, profiles, fixed, options.method)


def watched(param_group: Mapping[str, Any]) -> list[Any]:
    """Options of a group, and what must not be set in it once it is wrapped."""
    return [param_group.get(name) for name in (*GROUP_OPTIONS, "dense", "method")]


def restrict_state(
    state: Mapping[Tensor, Any], group: Group, params: list[Parameter]
) -> dict[Tensor, Any]:
    """The inner optimizer's existing state, restricted to B and keyed by its new Parameters."""
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
        if name not in group.execution_by_name and name in by_name:
            local = group.locals.get(name)
            key, entries = (
                (param, by_name[name]) if local is None else local.take_state(by_name[name])
            )
            restricted[key] = entries
    return restricted


def _dense_patterns(options: Options) -> Any:
    return None if isinstance(options.dense, bool) else options.dense


def _name_params(param_group: Mapping[str, Any], earlier: list[Group]) -> list[str]:
    """Names of the Parameters: those that the optimizer has, else ``"<group>.<index>"``."""
    number = len(earlier)
    numbered = [f"{number}.{index}" for index in range(len(param_group["params"]))]
    taken = {name for group in earlier for name in group.names}
    names: list[str] = list(param_group.get("param_names", numbered))
    return [f"{number}.{name}" if name in taken else name for name in names]


# Options of the whole optimizer. An inner optimizer may have options of such names.
_NOT_OF_GROUPS = ("stacked", "overrides", "power", "seed", "probe")


def _check_options(param_group: Mapping[str, Any], inner: torch.optim.Optimizer) -> None:
    unused = [name for name in _NOT_OF_GROUPS if name in param_group and name not in inner.defaults]
    if unused:
        raise OptionError(
            f"a parameter group cannot set {', '.join(unused)}, which would have no effect: pass "
            "them to topkast.wrap_optimizer, where overrides= sets the options of single tensors"
        )


def _check_initialised(name: str, param: Tensor) -> None:
    if isinstance(param, torch.nn.UninitializedParameter):
        raise UnsupportedTensorError(
            f"{name} is not initialised: run the model once before building the optimizer"
        )
    if type(param).__name__ == "FlatParameter":
        raise UnsupportedTensorError(
            f"{name} is a FlatParameter of FSDP, which has no rows and columns: use FSDP2, by "
            "topkast_torch.fully_shard and layers built as topkast_torch.SparseLinear"
        )


def _refuse_placement(name: str, layer: SparseLayer, param: Any) -> NoReturn:
    raise UnsupportedTensorError(
        f"{name} is a DTensor, placed {tuple(param.placements)}, of a {type(layer).__name__}, "
        "which only topkast_torch.fully_shard can shard: call it instead of PyTorch's fully_shard, "
        "and leave sparse layers out of tensor parallelism (parallelize_module, distribute_module)"
    )


def _check_tensor(name: str, param: Any) -> None:
    problem = None
    if is_sharded(param):
        raise UnsupportedTensorError(
            f"{name} cannot be kept sparse: it is a DTensor, placed {tuple(param.placements)}, "
            "but masked execution needs whole tensors. For FSDP2, build the layer as "
            "topkast_torch.SparseLinear and shard it by topkast_torch.fully_shard; for tensor "
            "parallelism, keep it dense (dense=...), or use fully_shard instead"
        )
    if _is_wrapper(param):
        problem = f"a {type(param).__name__} (wrapped: not supported yet)"
    elif param.layout != torch.strided or param.is_meta or param.is_quantized:
        problem = f"of layout {param.layout} on {param.device}, but must be a strided tensor"
    elif not (param.is_floating_point() or param.is_complex()):
        problem = f"of dtype {param.dtype}, but weights must be floats"
    elif param.is_inference():
        problem = "an inference tensor, which nothing can train: build it outside inference mode"
    elif any(
        stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True)
    ):
        problem = "expanded: several of its entries share memory"
    if problem:
        raise UnsupportedTensorError(f"{name} cannot be kept sparse: it is {problem}")


def _check_device(name: str, param: Tensor) -> None:
    if param.device.type == "mps":
        raise UnsupportedTensorError(
            f"{name} cannot be kept sparse: it is on {param.device}, which has no float64, in "
            "which optimizers are tried and ages counted: move the model to a CPU or a CUDA device"
        )


def _is_wrapper(tensor: Tensor) -> bool:
    return bool(is_traceable_wrapper_subclass(tensor))


def check_overlap(groups: list[Group]) -> None:
    """Refuse two Parameters that share memory: each would overwrite the other's zeros."""
    spans = sorted(
        (param.data_ptr(), param.data_ptr() + param.numel() * param.element_size(), name)
        for group in groups
        for name, param in zip(group.names, group.params, strict=True)
        if name in group.execution_by_name
        and not is_sharded(param)
        and param.numel()
        and _is_packed(param)
    )
    for (_, stop, first), (start, _, second) in itertools.pairwise(spans):
        if start < stop:
            raise UnsupportedTensorError(
                f"{first} and {second} share memory but are two Parameters: tie weights by using "
                "one Parameter for both"
            )


def _is_packed(tensor: Tensor) -> bool:
    """Whether the tensor is contiguous after some permutation of its dimensions."""
    dims = sorted(range(tensor.dim()), key=lambda dim: tensor.stride(dim), reverse=True)
    return tensor.permute(dims).is_contiguous()
