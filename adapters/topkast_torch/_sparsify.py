"""From masked to sparse execution and back: layers of a model replaced in place."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from topkast import OptionError
from topkast_torch._layers import SparseConv2d, SparseLinear
from topkast_torch._masked import MaskedTensor
from topkast_torch._optimizer import TopKASTOptimizer
from topkast_torch._sparse import SparseTensor
from topkast_torch._sparse_layer import SparseLayer, to_dense

_KINDS: dict[type[nn.Module], type[SparseLayer]] = {
    nn.Linear: SparseLinear,
    nn.Conv2d: SparseConv2d,
}
_ROUNDS = 5


@dataclass(frozen=True)
class LayerExecution:
    """How one sparse tensor is computed with, and why."""

    name: str  # of the tensor, as its optimizer has it
    execution: str  # "sparse" or "masked"
    reason: str
    masked_ms: float | None = None  # forward and backward pass, where they were timed
    sparse_ms: float | None = None


@dataclass(frozen=True)
class ExecutionReport:
    """What :func:`topkast.sparsify` returns: prints as a table, converts with :meth:`to_dict`."""

    layers: tuple[LayerExecution, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as built-in types, for JSON."""
        return {"layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("tensor", "execution", "masked", "sparse", "why")]
        for layer in self.layers:
            times = [
                "" if timed is None else f"{timed:.2f} ms"
                for timed in (layer.masked_ms, layer.sparse_ms)
            ]
            rows.append((layer.name, layer.execution, *times, layer.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def sparsify(
    model: nn.Module,
    optimizer: TopKASTOptimizer,
    *,
    only: str | Sequence[str] | None = None,
    auto: bool = True,
    example: Any = None,
) -> ExecutionReport:
    """The PyTorch part of :func:`topkast.sparsify`."""
    if not isinstance(optimizer, TopKASTOptimizer):
        raise OptionError(
            f"sparsify needs the optimizer that topkast.wrap_optimizer returned, got "
            f"{type(optimizer).__name__}"
        )
    patterns = ["*"] if only is None else [only] if isinstance(only, str) else list(only)
    owners = _owners(model)
    params = {param for group in optimizer.param_groups for param in group["params"]}
    if not params & owners.keys():
        raise OptionError("the optimizer was not built for the parameters of this model")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise OptionError("make a model sparse before DistributedDataParallel takes it over")
    tensors = list(optimizer._core.compact)
    names = [name for tensor in tensors for name in tensor.block.shapes]
    for pattern in patterns:
        if names and not any(fnmatchcase(name, pattern) for name in names):
            raise OptionError(f"only={pattern!r} matches none of the sparse tensors {names}")
    inputs = _inputs(model, example) if auto and example is not None else {}
    found = []
    for tensor in tensors:
        if isinstance(tensor, SparseTensor):
            tensor.adopt_changes()  # or say that its layer was made dense
            found.append(LayerExecution(tensor.block.key, "sparse", "it was already"))
            continue
        assert isinstance(tensor, MaskedTensor)
        if len(tensor.members) > 1:
            found += [
                LayerExecution(name, "masked", "ranked with others: distribution='global'")
                for name in tensor.members
            ]
            continue
        ((name, member),) = tensor.members.items()
        modules = owners.get(member.param, [])
        reason = _obstacle(modules, member.param)
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            reason = reason or f"not in only={only!r}"
        if reason is not None:
            found.append(LayerExecution(name, "masked", reason))
            continue
        tensor.adopt_changes()
        module = modules[0][0]
        execution = LayerExecution(name, "sparse", "not timed")
        if module in inputs:
            execution = _compare(name, module, tensor, inputs[module])
        elif inputs:
            execution = LayerExecution(name, "sparse", "not timed: the example does not reach it")
        if execution.execution == "sparse":
            _replace(optimizer, name, module, tensor)
        found.append(execution)
    return ExecutionReport(tuple(found))


def densify(model: Any) -> Any:
    """The PyTorch part of :func:`topkast.densify`."""
    if isinstance(model, Mapping):
        return _densify_state(model)
    for module in model.modules():
        if isinstance(module, SparseLayer):
            flag = module.values.requires_grad
            weight = Parameter(module.weight.detach(), requires_grad=flag)
            for name in ("indices", "active", "shape", "reservoir"):
                delattr(module, name)
            del module._parameters["values"]
            for name in ("_products", "_versions", "_content", "density"):
                module.__dict__.pop(name, None)
            bias = module._parameters.pop("bias")
            dense: Any = next(dense for dense, kind in _KINDS.items() if isinstance(module, kind))
            module.__class__ = dense
            module.register_parameter("weight", weight)
            module._parameters["bias"] = bias
    return model


def _densify_state(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    dense: dict[str, Any] = {}
    for name, entry in state_dict.items():
        prefix, _, last = name.rpartition(".")
        prefix = prefix + "." if prefix else ""
        if prefix + "indices" not in state_dict or prefix + "shape" not in state_dict:
            dense[name] = entry
        elif last == "values":
            places = state_dict[prefix + "indices"], state_dict[prefix + "active"]
            shape = tuple(state_dict[prefix + "shape"].tolist())
            dense[prefix + "weight"] = to_dense(entry, *places, shape)
        elif last not in ("indices", "active", "shape"):
            dense[name] = entry
    return dense


def _owners(model: nn.Module) -> dict[Tensor, list[tuple[nn.Module, str]]]:
    """The modules that hold each Parameter, with its name there."""
    owners: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                owners.setdefault(param, []).append((module, name))
    return owners


def _obstacle(modules: list[tuple[nn.Module, str]], param: Tensor) -> str | None:
    """Why the layer of a weight cannot be sparse, if it cannot."""
    if not modules:
        return "not a Parameter of this model"
    if len(modules) > 1:
        return f"shared by {len(modules)} layers"
    ((module, name),) = modules
    if type(module) not in _KINDS or name != "weight":
        return f"{name} of {type(module).__name__}, which has no sparse form"
    if "forward" in module.__dict__:
        return "its forward function was replaced"
    if param.dtype not in (torch.float32, torch.float64):
        return f"{param.dtype} has no sparse products"
    return None


def _replace(
    optimizer: TopKASTOptimizer, name: str, module: nn.Module, masked: MaskedTensor
) -> None:
    """Make a layer sparse, and have the optimizer go on with its values."""
    param: Any = masked.members[name].param
    masked.release()
    values = masked.values
    values.requires_grad_(param.requires_grad)
    values.grad = None
    if param.grad is not None:
        values.grad = torch.take(param.grad, masked.support.indices).view(values.shape)
    sparse = SparseTensor.of_masked(masked, _convert(module, values, masked))
    for group, outer in zip(optimizer._core.groups, optimizer.param_groups, strict=True):
        if group.owner.get(name) is masked:
            group.owner[name] = sparse
            group.compact[group.compact.index(masked)] = sparse
            outer["params"] = [values if given is param else given for given in outer["params"]]


def _convert(module: nn.Module, values: Parameter, masked: MaskedTensor) -> SparseLayer:
    """Make a module sparse in place: whoever holds it, and its hooks, stay as they are."""
    kind = _KINDS[type(module)]
    shape = next(iter(masked.block.shapes.values()))
    del module._parameters["weight"]
    module.__class__ = kind
    assert isinstance(module, SparseLayer)
    bias = module._parameters.pop("bias")
    module.set_sparse(values, masked.support, tuple(shape))
    module._parameters["bias"] = bias
    return module


def _inputs(model: nn.Module, example: Any) -> dict[nn.Module, Tensor]:
    """What reaches each layer when the model is given the example."""
    seen: dict[nn.Module, Tensor] = {}

    def remember(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.setdefault(module, arguments[0] if arguments else named["input"])

    hooks = [
        module.register_forward_pre_hook(remember, with_kwargs=True)
        for module in model.modules()
        if type(module) in _KINDS
    ]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.enable_grad():
            model.eval()  # statistics of batches are not to change
            model(*example) if isinstance(example, (tuple, list)) else model(example)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"the model does not take the example: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training.items():
            module.training = flag
    return seen


def _compare(name: str, module: nn.Module, masked: MaskedTensor, given: Tensor) -> LayerExecution:
    """Time a layer both ways, and choose the faster."""
    sparse = _convert(_shadow(module), Parameter(masked.values.detach()), masked)
    ways = {"masked": _passes(_shadow(module), given), "sparse": _passes(sparse, given)}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(_ROUNDS + 1):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            if number:  # the first compiles, and fills caches
                times[way].append(1e3 * (time.perf_counter() - start))
    masked_ms, sparse_ms = (statistics.median(times[way]) for way in ("masked", "sparse"))
    execution = "sparse" if sparse_ms < masked_ms else "masked"
    return LayerExecution(name, execution, "the faster in this example", masked_ms, sparse_ms)


def _shadow(module: nn.Module) -> nn.Module:
    """A module with the same tensors, and without the hooks."""
    shadow = module.__class__.__new__(module.__class__)
    nn.Module.__init__(shadow)
    own = {name: value for name, value in module.__dict__.items() if name not in shadow.__dict__}
    shadow.__dict__.update(own)
    shadow._parameters.update(module._parameters)
    shadow._buffers.update(module._buffers)
    return shadow


def _passes(module: nn.Module, given: Tensor) -> Callable[[], Any]:
    """A forward and a backward pass that leave no gradients behind."""
    inputs = given.detach().requires_grad_(given.requires_grad)
    wanted = [tensor for tensor in (inputs, *module.parameters()) if tensor.requires_grad]

    def run() -> None:
        with torch.enable_grad():
            found = module(inputs)
            if wanted:
                torch.autograd.grad(found, wanted, torch.ones_like(found))
        if given.device.type != "cpu":
            torch.cuda.synchronize(given.device)

    return run
