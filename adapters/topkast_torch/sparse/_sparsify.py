"""Switch the layers of a model from masked to sparse execution, and back to dense."""

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
from topkast_torch._example import hooked, run_example
from topkast_torch.execution._masked_execution import MaskedExecution
from topkast_torch.execution._sparse_execution import SparseExecution, check_processes
from topkast_torch.optimizer._callers import is_called_by
from topkast_torch.optimizer._optimizer import TopKASTOptimizer
from topkast_torch.sparse._conversion import SPARSE_FORMS, make_dense, make_sparse
from topkast_torch.sparse._dense_weight import to_dense
from topkast_torch.sparse._sparse_layer import SparseLayer, replace_data
from topkast_torch.sparse._structure import BLOCK, STRUCTURE, check_sets, read_structure
from topkast_torch.sparse.chains._sequential import link_layers, unlink_layers

_ROUNDS = 5


@dataclass(frozen=True)
class LayerExecution:
    """The execution of one sparse tensor, and the reason for it."""

    name: str  # the tensor's name in the optimizer
    execution: str  # "sparse" or "masked"
    reason: str
    masked_ms: float | None = None  # forward and backward pass, if timed
    sparse_ms: float | None = None


@dataclass(frozen=True)
class ExecutionReport:
    """The report of :func:`topkast.sparsify`; prints as a table, converts with :meth:`to_dict`."""

    layers: tuple[LayerExecution, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as built-in types, for JSON."""
        return {"layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        rows = []
        for layer in self.layers:
            times = [
                "" if time_ms is None else f"{time_ms:.2f} ms"
                for time_ms in (layer.masked_ms, layer.sparse_ms)
            ]
            rows.append((layer.name, layer.execution, *times, layer.reason))
        header = ("tensor", "execution", "masked", "sparse", "why")
        return format_table(header, rows, text_columns=len(header))


def sparsify(
    model: nn.Module,
    optimizer: TopKASTOptimizer,
    *,
    only: str | Sequence[str] | None = None,
    auto: bool = True,
    example: Any = None,
) -> ExecutionReport:
    """Implements :func:`topkast.sparsify` for PyTorch."""
    _check_module(model)
    if not isinstance(optimizer, TopKASTOptimizer):
        raise OptionError(
            f"sparsify needs the optimizer that topkast.wrap_optimizer returned, got "
            f"{type(optimizer).__name__}"
        )
    modules_by_param = _find_modules(model)
    params = {param for group in optimizer.param_groups for param in group["params"]}
    if not params & modules_by_param.keys():
        raise OptionError("the optimizer was not built for the parameters of this model")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise OptionError("call sparsify before wrapping the model in DistributedDataParallel")
    if is_called_by("configure_optimizers", "LightningModule"):
        warnings.warn(
            "sparsify is called in configure_optimizers, but Lightning loads checkpoints before "
            "it: checkpoints of this model would not load. Wrap and sparsify in configure_model, "
            "and return the optimizer in configure_optimizers",
            SparseExportWarning,
            stacklevel=3,
        )
    executions = list(optimizer._wrapper_state.executions)
    names = [name for execution in executions for name in execution.ranked.shapes]
    if names:
        check_patterns(names, "only", only)
    inputs = _record_inputs(model, example) if auto and example is not None else {}
    report = []
    for execution in executions:
        if isinstance(execution, SparseExecution):
            execution.accept_external_writes()  # raises if its layer was made dense
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
        modules = modules_by_param.get(member.param, [])
        reason = _find_obstacle(modules, execution)
        if only is not None and not matches(name, only):
            reason = reason or f"not in only={only!r}"
        if reason is not None:
            report.append(LayerExecution(name, "masked", reason))
            continue
        check_processes(name, execution.method)
        execution.accept_external_writes()
        module = modules[0][0]
        layer = LayerExecution(name, "sparse", "not timed")
        if module in inputs:
            layer = _choose_by_time(name, module, execution, inputs[module])
        elif inputs:
            layer = LayerExecution(name, "sparse", "not timed: the example does not reach it")
        if layer.execution == "sparse":
            _make_layer_sparse(optimizer, name, module, execution)
        report.append(layer)
    link_layers(model)
    return ExecutionReport(tuple(report))


def densify(model: Any) -> Any:
    """Implements :func:`topkast.densify` for PyTorch."""
    if isinstance(model, Mapping):
        return _densify_state(model)
    _check_module(model)
    for module in model.modules():
        if isinstance(module, SparseLayer):
            module._check_whole("topkast.densify")
            # A new Parameter: the old one still belongs to the optimizer.
            make_dense(module, module.weight.detach().clone(), keep_param=False)
        unlink_layers(module)
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
        and all(name.removesuffix("values") + entry in state_dict for entry in STRUCTURE)
    }
    for name, entry in state_dict.items():
        prefix, _, last = name.rpartition(".")
        prefix = prefix + "." if prefix else ""
        if prefix not in prefixes or last not in ("values", *STRUCTURE, BLOCK):
            dense[name] = entry
        elif last == "values":
            layer = prefix.rstrip(".")
            support, shape = read_structure(layer, state_dict, prefix)
            check_sets(f"{layer}: the state dict", support, shape, entry.numel())
            dense[prefix + "weight"] = to_dense(entry, support, shape)
    return dense


def _find_modules(model: nn.Module) -> dict[Tensor, list[tuple[nn.Module, str]]]:
    """The modules that hold each Parameter, with its name in each."""
    modules: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                modules.setdefault(param, []).append((module, name))
    return modules


def _find_obstacle(modules: list[tuple[nn.Module, str]], execution: MaskedExecution) -> str | None:
    """The reason why a weight's layer cannot be sparse, or None."""
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
    if execution.momentum is not None:
        return f"{type(execution.method).__name__} keeps a dense momentum"
    blocks = execution.support.blocks
    if blocks is not None and blocks.height != len(member.param):
        return "its blocks are cut from the layers of a stacked tensor"
    if member.param.dtype not in (torch.float32, torch.float64):
        return f"{member.param.dtype} has no sparse products"
    return None


def _make_layer_sparse(
    optimizer: TopKASTOptimizer, name: str, module: nn.Module, masked: MaskedExecution
) -> None:
    """Make a layer sparse, and have the optimizer train its values.

    The Parameter stays the same object and gets new data: existing lists of Parameters stay valid.
    """
    param, state = masked.members[name].param, optimizer._wrapper_state
    grad = param.grad
    masked.disconnect()
    replace_data(param, masked.values.detach())
    if grad is not None:
        sets = masked.members[name].entries
        on_b = torch.cat([entries.gather(grad.detach()) for entries in sets])
        param.grad = torch.ops.aten._unsafe_view(on_b, param.shape)
    for store in state.stores:
        entries = getattr(state.inner, store, {})
        if masked.values in entries:
            entries[param] = entries.pop(masked.values)
    shape = masked.ranked.shapes[name]
    sparse = SparseExecution.of_masked(masked, make_sparse(module, param, masked.support, shape))
    for group in state.groups:
        if group.execution_by_name.get(name) is masked:
            group.execution_by_name[name] = sparse
            group.executions[group.executions.index(masked)] = sparse


def _record_inputs(model: nn.Module, example: Any) -> dict[nn.Module, Tensor]:
    """The first input of each layer in a forward pass on the example."""
    inputs: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs.setdefault(module, arguments[0] if arguments else named["input"])

    with hooked(
        module.register_forward_pre_hook(record, with_kwargs=True)
        for module in model.modules()
        if type(module) in SPARSE_FORMS
    ):
        run_example(model, example)
    return inputs


def _choose_by_time(
    name: str, module: nn.Module, masked: MaskedExecution, layer_input: Tensor
) -> LayerExecution:
    """Time masked and sparse execution of a layer, and choose the faster."""
    sparse = make_sparse(
        _copy_without_hooks(module),
        Parameter(masked.values.detach()),
        masked.support,
        masked.ranked.shapes[name],
    )
    passes = {
        "masked": _make_passes(_copy_without_hooks(module), layer_input),
        "sparse": _make_passes(sparse, layer_input),
    }
    times: dict[str, list[float]] = {name: [] for name in passes}
    for round_index in range(_ROUNDS + 1):
        for execution, run in passes.items():
            start = time.perf_counter()
            run()
            if round_index:  # the first round compiles and fills caches
                times[execution].append(1e3 * (time.perf_counter() - start))
    masked_ms, sparse_ms = (statistics.median(times[name]) for name in ("masked", "sparse"))
    execution = "sparse" if sparse_ms < masked_ms else "masked"
    return LayerExecution(name, execution, "the faster in this example", masked_ms, sparse_ms)


def _copy_without_hooks(module: nn.Module) -> nn.Module:
    """A module with the same tensors and attributes, without the hooks."""
    copied = module.__class__.__new__(module.__class__)
    nn.Module.__init__(copied)
    attributes = {
        name: value for name, value in module.__dict__.items() if name not in copied.__dict__
    }
    copied.__dict__.update(attributes)
    copied._parameters.update(module._parameters)
    copied._buffers.update(module._buffers)
    return copied


def _make_passes(module: nn.Module, layer_input: Tensor) -> Callable[[], Any]:
    """A function that runs a forward and a backward pass and stores no gradients."""
    inputs = layer_input.detach().requires_grad_(layer_input.requires_grad)
    sources = [tensor for tensor in (inputs, *module.parameters()) if tensor.requires_grad]

    def run() -> None:
        with torch.enable_grad():
            output = module(inputs)
            if sources:
                torch.autograd.grad(output, sources, torch.ones_like(output))
        if layer_input.device.type != "cpu":
            torch.cuda.synchronize(layer_input.device)

    return run
