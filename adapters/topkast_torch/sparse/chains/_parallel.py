"""A container that runs sparse linear layers that read the same activations together."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from topkast import OptionError
from topkast_torch.sparse._layers import SparseLinear
from topkast_torch.sparse._products import CompiledProducts
from topkast_torch.sparse.chains._observers import is_observed, is_transformed
from topkast_torch.sparse.chains._parallel_function import run_parallel
from topkast_torch.sparse.chains._parallel_passes import ParallelPasses


class SparseParallel(nn.Module):
    """Linear layers that read the same activations: what each of them returns, as a tuple.

    The query, key and value of attention are an example, or the gate and the values of a gated
    feed-forward network. Once :func:`topkast.sparsify` has made the layers sparse, all of them are
    one call of compiled code in the forward pass and one in the backward pass: the input is packed
    once and kept once, and the input gradients are added up where they are computed. Outputs and
    gradients of Parameters have the same bits as those of the layers one by one. So has the
    gradient of the input: it is added up from the last layer to the first, as autograd does for
    layers that are called in this order. Where something else reads the input, a residual
    connection for example, autograd adds its gradient to the sum of the layers' gradients.

    Layers run one by one as long as they are dense, and where something may read what goes in or
    out: a layer with hooks, a function transform, ``torch.compile``, or a method that needs the
    gradient outside B. So they do on devices other than CPUs. Layers with other units or another
    dtype than the first sparse one run by themselves.

    Parameters
    ----------
    layers
        Modules, usually ``torch.nn.Linear`` or :class:`SparseLinear`, with the same number of
        input features; their names in the state dict are "0", "1", and so on.
    named
        Modules with names of their own, which come after `layers`.

    Raises
    ------
    OptionError
        If there is no layer, or the layers differ in `in_features`.

    Examples
    --------
    >>> import torch, topkast, topkast_torch
    >>> projections = topkast_torch.SparseParallel(
    ...     query=torch.nn.Linear(20, 20), key=torch.nn.Linear(20, 8), value=torch.nn.Linear(20, 8))
    >>> optimizer = torch.optim.AdamW(projections.named_parameters(), 1e-3)
    >>> optimizer = topkast.wrap_optimizer(optimizer, fwd=0.9, bwd=0.8)
    >>> report = topkast.sparsify(projections, optimizer)
    >>> query, key, value = projections(torch.ones(4, 20))
    >>> query.shape, key.shape
    (torch.Size([4, 20]), torch.Size([4, 8]))
    >>> torch.equal(key, projections.key(torch.ones(4, 20)))
    True
    """

    def __init__(self, *layers: nn.Module, **named: nn.Module) -> None:
        super().__init__()
        members = {str(number): layer for number, layer in enumerate(layers)} | named
        if not members:
            raise OptionError("SparseParallel needs at least one layer, got none")
        for name, layer in members.items():
            self.add_module(name, layer)
        features = {
            name: layer.in_features
            for name, layer in members.items()
            if hasattr(layer, "in_features")
        }
        if len(set(features.values())) > 1:
            raise OptionError(
                "the layers of SparseParallel read the same activations, but differ in "
                f"in_features: {features}"
            )

    def forward(self, input: Any) -> tuple[Any, ...]:  # noqa: A002 - as torch.nn.Linear has it
        """What each layer returns for the same input, in the order of the layers."""
        modules: tuple[Any, ...] = tuple(self._modules.values())
        outputs = {} if is_transformed() else self._run_together(modules, input)
        return tuple(
            outputs[number] if number in outputs else module(input)
            for number, module in enumerate(modules)
        )

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

    def __getitem__(self, number: int) -> Any:
        return tuple(self._modules.values())[number]

    def _run_together(self, modules: tuple[Any, ...], x: Any) -> dict[int, Tensor]:
        """The outputs of the layers that can run together, by number."""
        if not isinstance(x, Tensor) or not x.dim() or is_observed(modules):
            return {}
        group = self._find_group(modules)
        if group is None:
            return {}
        passes, numbers = group
        layers = [modules[number] for number in numbers]
        values, biases = [layer.values for layer in layers], [layer.bias for layer in layers]
        if not passes.accepts(x, values, biases):
            return {}
        *leading, features = x.shape
        if features != layers[0].in_features:
            return {}
        rows = x if len(leading) == 1 else x.reshape(math.prod(leading), features)
        outputs = run_parallel(rows, passes, values, biases)
        if len(leading) != 1:
            outputs = [output.view(*leading, output.shape[1]) for output in outputs]
        return dict(zip(numbers, outputs, strict=True))

    def _find_group(self, modules: tuple[Any, ...]) -> tuple[ParallelPasses, list[int]] | None:
        """The passes of the layers that can run together, and their numbers.

        Found anew if a module, its class or its products have changed.
        """
        products = [module.products if type(module) is SparseLinear else None for module in modules]
        cached = self.__dict__.get("_group")
        if cached is None or not _are_same(products, cached[0]):
            cached = self.__dict__["_group"] = products, _join(products)
        group: tuple[ParallelPasses, list[int]] | None = cached[1]
        return group

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_group"}


def _join(products: list[Any]) -> tuple[ParallelPasses, list[int]] | None:
    """The passes of all products that are like the first compiled ones, and their numbers."""
    compiled = {n: entry for n, entry in enumerate(products) if isinstance(entry, CompiledProducts)}
    keys = {n: (entry.block, entry.dtype, entry.shape[1]) for n, entry in compiled.items()}
    numbers = [number for number, key in keys.items() if key == next(iter(keys.values()))]
    if len(numbers) < 2:
        return None
    return ParallelPasses([compiled[number] for number in numbers]), numbers


def _are_same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(map(operator.is_, first, second))
