"""The weight of a sparse layer as a dense copy, which is read-only: a write would be lost."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from topkast import MismatchError, Support
from topkast_torch.sparse.chains._observers import in_transform
from topkast_torch.sparse.derivatives._gradients import LoopedFunction

_WRITING = {"__set__", "__setitem__"}
_NOT_WRITING = {"requires_grad_", "retain_grad"}


def to_dense(values: Tensor, support: Support, shape: tuple[int, ...]) -> Tensor:
    """The forward view α as a dense tensor."""
    dense = values.new_zeros(math.prod(shape))
    active = values.detach().view(-1)[: support.forward_size]
    return dense.index_copy_(0, support.active_entries.long(), active).view(shape)


def weight_of(layer: Any) -> Tensor:
    """The dense weight of a sparse layer, W on A, with a gradient on B as that of the products.

    It is read-only, except inside function transforms and compilation, which see no memory.
    """
    if torch.compiler.is_compiling():
        compiled: Tensor = _make_dense_untraced(layer)
        return compiled
    dense = _make_dense(layer)
    return dense if in_transform() else dense.as_subclass(ReadOnlyTensor)


def _make_dense(layer: Any) -> Tensor:
    arguments = layer.values, layer.support, layer.weight_shape, layer.record
    dense: Tensor = _ToDense.apply(*arguments)  # type: ignore[no-untyped-call]
    return dense


_make_dense_untraced: Any = torch.compiler.disable(
    _make_dense, reason="topkast's sparse layers are not traced: compile without fullgraph=True"
)


class _ToDense(LoopedFunction):
    @staticmethod
    def forward(values: Tensor, support: Support, shape: tuple[int, ...], _: Any) -> Tensor:
        return to_dense(values, support, shape)

    @staticmethod
    def setup_context(context: Any, inputs: Any, output: Tensor) -> None:
        values, support, _, context.record = inputs
        context.save_for_backward(support.entries)
        context.shape = values.shape

    @staticmethod
    def backward(context: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (entries,) = context.saved_tensors
        if not torch._C._are_functorch_transforms_active():
            context.record(grad_output, None)
        on_b = grad_output.reshape(-1).index_select(0, entries)
        return on_b.view(context.shape), None, None, None


class ReadOnlyTensor(Tensor):
    """A tensor that raises an error if it, its ``data`` or a view of it is written to."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        written = [kwargs.get("out")]
        if args and _writes(getattr(function, "__name__", "")):
            written += args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
        if any(isinstance(tensor, ReadOnlyTensor) for tensor in written):
            raise MismatchError(
                "the weight of a sparse layer is a read-only copy: write to layer.values, or call "
                "topkast.densify(model) first, for example before merging an adapter"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
        memory = {_memory(arg) for arg in args if isinstance(arg, ReadOnlyTensor)}
        return tree_map(lambda value: _match_memory(value, memory), result)


def _writes(name: str) -> bool:
    """Whether a function of this name writes into its first argument."""
    if name in _WRITING:
        return True
    return name.endswith("_") and not name.endswith("__") and name not in _NOT_WRITING


def _memory(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage().data_ptr()


def _match_memory(value: Any, memory: set[int]) -> Any:
    """Make views of `memory` read-only, and other tensors plain."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return value
    with torch._C.DisableTorchFunctionSubclass():
        shared = value.untyped_storage().data_ptr() in memory
        return value.as_subclass(ReadOnlyTensor if shared else Tensor)
