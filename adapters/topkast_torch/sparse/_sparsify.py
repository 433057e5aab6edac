"""From masked to sparse execution and back: layers of a model replaced in place."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from topkast import AdapterNotFoundError, OptionError, SparseExportWarning
from topkast.adapter import check_patterns, format_table, matches
from topkast_torch.execution._masked_execution import MaskedExecution
from topkast_torch.execution._sparse_execution import SparseExecution
from topkast_torch.optimizer._callers import is_called_by
from topkast_torch.optimizer._optimizer import TopKASTOptimizer
from topkast_torch.sparse._conversion import SPARSE_FORMS, make_dense, make_sparse
from topkast_torch.sparse._sparse_layer import (
    STRUCTURE,
    SparseLayer,
    check_sets,
    read_structure,
    replace_data,
    to_dense,
)

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
        rows = []
        for layer in self.layers:
            times = [
                "" if timed is None else f"{timed:.2f} ms"
                for timed in (layer.masked_ms, layer.sparse_ms)
            ]
            rows.append((layer.name, layer.execution, *times, layer.reason))
        head = ("tensor", "execution", "masked", "sparse", "why")
        return format_table(head, rows, text_columns=len(head))


def sparsify(
    model: nn.Module,
    optimizer: TopKASTOptimizer,
    *,
    only: str | Sequence[str] | None = None,
    auto: bool = True,
    example: Any = None,
) -> ExecutionReport:
    """The PyTorch part of :func:`topkast.sparsify`."""
    _check_module(model)
    if not isinstance(optimizer, TopKASTOptimizer):
        raise OptionError(
            f"sparsify needs the optimizer that topkast.wrap_optimizer returned, got "
            f"{type(optimizer).__name__}"
        )
    owners = _owners(model)
    params = {param for group in optimizer.param_groups for param in group["params"]}
    if not params & owners.keys():
        raise OptionError("the optimizer was not built for the parameters of this model")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise OptionError("make a model sparse before DistributedDataParallel takes it over")
    if is_called_by("configure_optimizers", "LightningModule"):
        warnings.warn(
            "the model is made sparse in configure_optimizers, before which Lightning loads "
            "checkpoints: those of this model would not load. Wrap and make it sparse in "
            "configure_model, and return the optimizer in configure_optimizers",
            SparseExportWarning,
            stacklevel=3,
        )
    executions = list(optimizer._wrapper_state.executions)
    names = [name for execution in executions for name in execution.ranked.shapes]
    if names:
        check_patterns(names, "only", only)
    inputs = _inputs(model, example) if auto and example is not None else {}
    report = []
    for execution in executions:
        if isinstance(execution, SparseExecution):
            execution.accept_external_writes()  # or say that its layer was made dense
            report.append(LayerExecution(execution.ranked.key, "sparse", "it was already"))
            continue
        assert isinstance(execution, MaskedExecution)
        if len(execution.members) > 1:
            report += [
                LayerExecution(name, "masked", "ranked with others: distribution='global'")
                for name in execution.members
            ]
            continue
        ((name, member),) = execution.members.items()
        modules = owners.get(member.param, [])
        reason = _obstacle(modules, execution)
        if only is not None and not matches(name, only):
            reason = reason or f"not in only={only!r}"
        if reason is not None:
            report.append(LayerExecution(name, "masked", reason))
            continue
        execution.accept_external_writes()
        module = modules[0][0]
        layer = LayerExecution(name, "sparse", "not timed")
        if module in inputs:
            layer = _compare(name, module, execution, inputs[module])
        elif inputs:
            layer = LayerExecution(name, "sparse", "not timed: the example does not reach it")
        if layer.execution == "sparse":
            _replace(optimizer, name, module, execution)
        report.append(layer)
    return ExecutionReport(tuple(report))


def densify(model: Any) -> Any:
    """The PyTorch part of :func:`topkast.densify`."""
    if isinstance(model, Mapping):
        return _densify_state(model)
    _check_module(model)
    for module in model.modules():
        if isinstance(module, SparseLayer):
            # Another Parameter: that of an optimizer stays what the optimizer knows.
            make_dense(module, module.weight.detach().clone(), same=False)
    return model


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise AdapterNotFoundError(
            f"expected a torch.nn.Module, got {type(model).__module__}.{type(model).__qualname__}"
        )


def _densify_state(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    dense: dict[str, Any] = {}
    prefixes = {
        name.removesuffix("values")
        for name in state_dict
        if name.endswith("values")
        and all(name.removesuffix("values") + part in state_dict for part in STRUCTURE)
    }
    for name, entry in state_dict.items():
        prefix, _, last = name.rpartition(".")
        prefix = prefix + "." if prefix else ""
        if prefix not in prefixes or last not in ("values", *STRUCTURE):
            dense[name] = entry
        elif last == "values":
            layer = prefix.rstrip(".")
            support, shape = read_structure(layer, state_dict, prefix)
            check_sets(f"{layer}: the state dict", support, shape, entry.numel())
            dense[prefix + "weight"] = to_dense(entry, support, shape)
    return dense


def _owners(model: nn.Module) -> dict[Tensor, list[tuple[nn.Module, str]]]:
    """The modules that hold each Parameter, with its name there."""
    owners: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                owners.setdefault(param, []).append((module, name))
    return owners


def _obstacle(modules: list[tuple[nn.Module, str]], execution: MaskedExecution) -> str | None:
    """Why the layer of a weight cannot be sparse, if it cannot."""
    ((_, member),) = execution.members.items()
    if not modules:
        return "not a Parameter of this model"
    if len(modules) > 1:
        return f"shared by {len(modules)} layers"
    ((module, name),) = modules
    if type(module) not in SPARSE_FORMS or name != "weight":
        return f"{name} of {type(module).__name__}, which has no sparse form"
    if "forward" in module.__dict__:
        return "its forward function was replaced"
    if execution.ranked.blocks is not None:
        blocks = execution.ranked.blocks
        return f"blocks of {blocks.rows} × {blocks.columns} have no sparse products yet"
    if member.param.dtype not in (torch.float32, torch.float64):
        return f"{member.param.dtype} has no sparse products"
    return None


def _replace(
    optimizer: TopKASTOptimizer, name: str, module: nn.Module, masked: MaskedExecution
) -> None:
    """Make a layer sparse, and have the optimizer go on with its values.

    The Parameter stays the same object, with other data: lists of Parameters that were made before
    hold what is trained.
    """
    param, state = masked.members[name].param, optimizer._wrapper_state
    grad = param.grad
    masked.forget()
    replace_data(param, masked.values.detach())
    if grad is not None:
        places = masked.members[name].places
        param.grad = torch.cat([place.gather(grad) for place in places]).view(param.shape)
    for store in state.stores:
        entries = getattr(state.inner, store, {})
        if masked.values in entries:
            entries[param] = entries.pop(masked.values)
    shape = masked.ranked.shapes[name]
    sparse = SparseExecution.of_masked(masked, make_sparse(module, param, masked.support, shape))
    for group in state.groups:
        if group.owner.get(name) is masked:
            group.owner[name] = sparse
            group.executions[group.executions.index(masked)] = sparse


def _inputs(model: nn.Module, example: Any) -> dict[nn.Module, Tensor]:
    """What reaches each layer when the model is given the example."""
    seen: dict[nn.Module, Tensor] = {}

    def remember(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.setdefault(module, arguments[0] if arguments else named["input"])

    hooks = [
        module.register_forward_pre_hook(remember, with_kwargs=True)
        for module in model.modules()
        if type(module) in SPARSE_FORMS
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


def _compare(
    name: str, module: nn.Module, masked: MaskedExecution, given: Tensor
) -> LayerExecution:
    """Time a layer both ways, and choose the faster."""
    sparse = make_sparse(
        _shadow(module),
        Parameter(masked.values.detach()),
        masked.support,
        masked.ranked.shapes[name],
    )
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
