"""A container that runs sparse linear layers in a row, and the ReLUs between them, together."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from topkast_torch.sparse._functions import unflatten
from topkast_torch.sparse._layers import SparseLinear
from topkast_torch.sparse._products import CompiledProducts
from topkast_torch.sparse.chains._chain import run_chain
from topkast_torch.sparse.chains._observers import is_observed, is_transformed
from topkast_torch.sparse.chains._passes import Passes


class SparseSequential(nn.Sequential):
    """A ``torch.nn.Sequential`` that runs sparse linear layers in a row together.

    Neighbouring :class:`SparseLinear` layers, with or without a ``torch.nn.ReLU`` after each, are
    one call of compiled code in the forward pass and one in the backward pass: activations between
    them stay in the form that the next product reads. Results have the same bits as those of the
    layers one by one. :func:`topkast.sparsify` turns each ``torch.nn.Sequential`` with such
    neighbours into this class, and :func:`topkast.densify` turns it back. Modules, their names and
    the state dict stay the same.

    Layers run one by one where something may read what lies between them: a module with hooks, a
    function transform, ``torch.compile``, or a method that needs the gradient outside B. So they do
    on devices other than CPUs.

    Examples
    --------
    >>> import torch, topkast_torch
    >>> layers = [topkast_torch.SparseLinear(20, 20, fwd=0.9, bwd=0.8) for _ in range(2)]
    >>> x = torch.ones(4, 20)
    >>> chain = topkast_torch.SparseSequential(layers[0], torch.nn.ReLU(), layers[1])
    >>> torch.equal(chain(x), layers[1](layers[0](x).relu()))
    True
    """

    def forward(self, input: Any) -> Any:  # noqa: A002 - as torch.nn.Sequential has it
        """What the last module returns; each gets what the one before it returned."""
        if is_transformed():
            return super().forward(input)  # type: ignore[no-untyped-call]
        current = input
        for run in self._find_runs():
            output = run(current)
            if output is None:
                for module in run.modules:
                    current = module(current)
            else:
                current = output
        return current

    def _find_runs(self) -> list[_Run]:
        """The modules in groups; found anew if a module or its class has changed."""
        modules = tuple(self._modules.values())
        key = modules, tuple(map(type, modules))
        cached = self.__dict__.get("_runs")
        if cached is None or cached[0] != key:
            cached = self.__dict__["_runs"] = key, [_Run(group) for group in _group(modules)]
        runs: list[_Run] = cached[1]
        return runs

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_runs"}


def link_layers(model: nn.Module) -> None:
    """Turn each plain ``torch.nn.Sequential`` with layers to run together into this class."""
    for module in model.modules():
        if type(module) is nn.Sequential:
            groups = _group(tuple(module._modules.values()))
            if any(len(group) > 1 for group in groups):
                module.__class__ = SparseSequential


def unlink_layers(module: Any) -> None:
    """Turn a :class:`SparseSequential` into a plain ``torch.nn.Sequential``."""
    if type(module) is SparseSequential:
        module.__dict__.pop("_runs", None)
        module.__class__ = nn.Sequential  # type: ignore[assignment]


class _Run:
    """Modules that run together: sparse linear layers, or one module of any class."""

    def __init__(self, modules: list[Any]) -> None:
        self.modules = modules
        self._layers = [module for module in modules if type(module) is SparseLinear]
        self._rectifies = [
            type(module) is SparseLinear and type(after) is nn.ReLU
            for module, after in zip(modules, [*modules[1:], None], strict=True)
            if type(module) is SparseLinear
        ]
        self._passes: Passes | None = None

    def __call__(self, x: Any) -> Tensor | None:
        """The output of all modules; None if they have to be called one by one."""
        if len(self.modules) == 1 or not isinstance(x, Tensor) or is_observed(self.modules):
            return None
        products = [layer.products for layer in self._layers]
        passes = self._passes
        if passes is None or any(map(_differ, products, passes.products)):
            if not all(isinstance(entry, CompiledProducts) for entry in products):
                return None
            passes = self._passes = Passes(products, self._rectifies)
        values = [layer.values for layer in self._layers]
        biases = [layer.bias for layer in self._layers]
        if not passes.accepts(x, values, biases):
            return None
        *leading, features = x.shape or (0,)
        if features != self._layers[0].in_features:
            return None
        rows = x if len(leading) == 1 else x.reshape(math.prod(leading), features)
        output = run_chain(rows, passes, values, biases)
        return unflatten(output, leading)


def _group(modules: tuple[Any, ...]) -> list[list[Any]]:
    """The modules in order, in groups of those that can run together."""
    groups: list[list[Any]] = []
    for module in modules:
        previous = groups[-1] if groups else [None]
        if type(module) is SparseLinear:
            joins = type(previous[0]) is SparseLinear and _fits(previous, module)
        else:
            joins = type(module) is nn.ReLU and type(previous[-1]) is SparseLinear
        if joins:
            previous.append(module)
        else:
            groups.append([module])
    return groups


def _fits(group: list[Any], layer: SparseLinear) -> bool:
    """Whether a layer takes the outputs of a group."""
    last = next(module for module in reversed(group) if type(module) is SparseLinear)
    is_alike = last.values.dtype == layer.values.dtype and last.block == layer.block
    return is_alike and last.out_features == layer.in_features


def _differ(first: object, second: object) -> bool:
    return first is not second
