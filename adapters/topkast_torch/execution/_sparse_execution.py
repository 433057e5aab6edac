"""Sparse execution: the values on B are the model's Parameter; α is never a dense tensor."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from topkast import MismatchError, OptionError
from topkast.adapter import (
    Method,
    Options,
    RankedTensors,
    group_size_of,
    method_of,
    pattern_densities,
)
from topkast_torch._reservoirs import take_over
from topkast_torch.execution._execution import Execution
from topkast_torch.execution._masked_execution import MaskedExecution
from topkast_torch.execution._profile import InnerProfile
from topkast_torch.execution._recorded import RecordedGradient, Recording
from topkast_torch.inner._inner_state import Moving
from topkast_torch.optimizer._ownership import claim, release
from topkast_torch.sparse._conversion import make_dense
from topkast_torch.sparse._sparse_layer import SparseLayer


class SparseExecution(Execution):
    """One tensor, the weight of a sparse layer."""

    layer: SparseLayer
    _dtype: torch.dtype  # of the values, when the optimizer was built
    # During a step
    _gradient: Tensor | None  # of the loss alone, while values.grad includes the penalty's

    @classmethod
    def of_layer(
        cls,
        name: str,
        layer: SparseLayer,
        options: Options,
        profile: InnerProfile,
        updates: int,
        steps: int,
    ) -> SparseExecution:
        """The execution of a layer that is sparse already: its values, sets and sparsities."""
        if options.distribution == "global":
            raise OptionError(
                f"{name} is the weight of a {type(layer).__name__}, whose sets have fixed sizes: "
                "distribution='global' would move weights between tensors"
            )
        if options.is_stacked(name):
            raise OptionError(
                f"{name} is the weight of a {type(layer).__name__}, whose sets are those of the "
                "whole weight, but stacked ranks each index of its first axis separately: leave it "
                "out of stacked, or build a dense layer, and call topkast.sparsify after wrapping"
            )
        if not layer._is_drawn:
            raise MismatchError(
                f"the weights of {name} were never drawn, since its {type(layer).__name__} was "
                "built on the meta device: call reset_parameters() after to_empty(), or load a "
                "state dict, before building its optimizer"
            )
        own_options = _options_of(name, layer, options.for_tensor(name))
        method = method_of(own_options)
        if "momentum" in method.needs:
            raise OptionError(
                f"{type(method).__name__} keeps a dense momentum, but {name} is the weight of a "
                f"{type(layer).__name__}, which never has a dense gradient: choose a method that "
                "needs the gradient at refreshes only, such as RigL"
            )
        if not method.refreshes and "weights" in method.needs:
            raise OptionError(
                f"{type(method).__name__} chooses its sets once, but {name} is the weight of a "
                f"{type(layer).__name__}, which has sets already: wrap the optimizer of a dense "
                "model, and then call topkast.sparsify"
            )
        check_processes(name, method)
        support, blocks = layer.support, layer.blocks
        size = math.prod(layer.weight_shape) if blocks is None else blocks.count
        forward = support.forward
        backward = {"equal": forward, "none": size}.get(method.backward, support.backward)
        if support.backward != backward:
            raise OptionError(
                f"{name} is the weight of a {type(layer).__name__} with |A|, |B| = {forward}, "
                f"{support.backward}, but {type(method).__name__} needs |B| = {backward}: "
                "build the layer with this backward sparsity, or override its method"
            )
        execution = cls.__new__(cls)
        density = getattr(layer, "density", forward / size)
        execution.ranked = RankedTensors(
            {name: layer.weight_shape},
            forward,
            support.backward,
            density,
            blocks=blocks,
            group_size=_group_size(name, layer, own_options),
        )
        execution.layer = layer
        execution._take_over(own_options)
        execution.support = support.in_groups(execution.ranked.group_size)
        execution._begin()
        try:
            execution.set_up(profile, options, updates, steps)
        except BaseException:
            execution.reservoir.discard(layer.reservoir)
            raise
        if layer.selection is not None and execution.reservoir is layer.reservoir:
            execution.selection = layer.selection
        return execution

    @classmethod
    def of_masked(cls, masked: MaskedExecution, layer: SparseLayer) -> SparseExecution:
        """Continue a masked execution: the same values, sets and weights."""
        execution = cls.__new__(cls)
        for name in Execution.__annotations__:
            setattr(execution, name, getattr(masked, name))
        execution.values, execution.layer = layer.values, layer
        execution.support = replace(masked.support)  # without the entries that were computed
        execution._begin()
        execution._connect()
        execution._record_if_awaited()
        return execution

    def _take_over(self, options: Options) -> None:
        """Take over the values of the layer, and the weights outside B."""
        self.values = self.layer.values
        self.reservoir = take_over(self.layer.reservoir, self.values, self.ranked, options)

    def _begin(self) -> None:
        self._gradient, self._replaced, self._dtype = None, False, self.values.dtype

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hook": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()
        self._record_if_awaited()

    def install(self) -> None:
        self.layer.reservoir = self.layer.selection = None  # this execution holds them now
        self._connect()

    def _connect(self) -> None:
        claim(self.values, self)
        self._sets_version = self.layer.sets_version
        requires_grad = self.values.requires_grad
        self.values.requires_grad_(True)  # a frozen tensor takes no hook, but keeps one
        hook = _RestrictGradient(weakref.ref(self))
        self._hook = self.values.register_post_accumulate_grad_hook(hook)
        self.values.requires_grad_(requires_grad)
        weakref.finalize(self, self._hook.remove)

    def uninstall(self, *, dense: bool) -> None:
        self.disconnect()
        if dense:
            theta = self.theta().clone().view(self.layer.weight_shape)
            make_dense(self.layer, theta, keep_param=True)
        else:
            self.layer.reservoir = self.reservoir.copy()

    def disconnect(self) -> None:
        self._hook.remove()
        self.layer.recording = None
        release(self.values)

    def note_replacement(self, param: Tensor, *, is_replaced: bool) -> None:
        self._replaced = is_replaced

    def accept_external_writes(self, *, thorough: bool = False) -> None:
        layer, name = self.layer, self.ranked.key
        values = getattr(layer, "values", None)
        if values is None:
            raise MismatchError(
                f"the layer of {name} was made dense by topkast.densify: its optimizer no longer "
                "trains it. To export and train on, densify a copy.deepcopy of the model"
            )
        is_moved = values.device != self.support.indices.device
        if self._replaced or values is not self.values or values.dtype != self._dtype or is_moved:
            raise MismatchError(
                f"the layer of {name} was converted or moved to another device, or got another "
                "Parameter, after its optimizer was built: convert and move the model before "
                "building its optimizer"
            )
        if layer.sets_version != self._sets_version:
            raise MismatchError(
                f"the sets of {name} differ from its optimizer's, as after model.load_state_dict: "
                "load the optimizer's state dict too, which holds all sets. If "
                "DistributedDataParallel caused this, start all processes with the same weights"
            )

    def gather_gradient(self) -> Tensor | None:
        self._gradient = self.values.grad
        if self.awaits_gradient and self._gradient is not None:
            passes = self.layer.recording.passes_in(self._gradient)
            if not passes and self._gradient.any():
                raise MismatchError(
                    f"the layer of {self.ranked.key} recorded no backward pass, but "
                    f"{type(self.method).__name__} needs the gradient outside B after this step: "
                    "it was computed by function transforms, written by hand, or belongs to a pass "
                    "before topkast.sparsify or before refresh_every was set, which has to precede "
                    "the optimizer's zero_grad. Run a new one"
                )
        return None if self._gradient is None else self._gradient.view(-1)

    def decide(self, group: Mapping[str, Any], updates: int, *, overdue: bool = False) -> None:
        super().decide(group, updates, overdue=overdue)
        self._record_if_awaited()

    def _record_if_awaited(self) -> None:
        """Let the layer record its passes before a refresh that needs them, and only then."""
        layer: Any = self.layer
        if not isinstance(layer, SparseLayer):
            return  # densify has made it dense
        if not self.awaits_gradient:
            if layer.recording is not None:
                layer.recording = None
        elif layer.recording is None:
            layer.recording = Recording()

    def whole_gradient(self) -> RecordedGradient | None:
        layer, grad = self.layer, self.values.grad
        if grad is None:
            return None
        return RecordedGradient(
            layer.recording.passes_in(grad),
            layer.weight_shape,
            layer.values.detach(),
            layer._window,
            int(getattr(layer, "groups", 1)),
        )

    def gradient_buffer(self) -> Tensor | None:
        return None  # the model keeps its own gradient

    def restore_gradient(self) -> None:
        if self._gradient is not None:
            self.values.grad = self._gradient
            self._gradient = None

    def move_gradient(self, moving: Moving) -> None:
        if self.values.grad is not None:  # the next backward may add to it
            moving.add(self.values.grad.detach(), 0.0, self._set_gradient)

    def _set_gradient(self, moved: Tensor) -> None:
        # Not a view, which `detach_` of old training loops refuses.
        self.values.grad = torch.ops.aten._unsafe_view(moved, self.values.shape)

    def write_forward_view(self, *, everywhere: bool = False) -> None:
        pass  # the inner optimizer updated the model's Parameter itself

    def update_positions(self) -> None:
        layer: Any = self.layer
        if isinstance(layer, SparseLayer):  # densify may have made it dense
            layer.set_support(self.support, is_valid=True)
            if layer.recording is not None:
                layer.recording = None
            self._sets_version = layer.sets_version

    def restrict_state(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return dict(next(iter(states.values()), {}))

    def gradient_bytes(self) -> int:
        return 0 if self.values.grad is None else self.values.grad.nbytes

    def layout_bytes(self) -> int:
        layer: Any = self.layer
        nbytes = layer.products.nbytes if isinstance(layer, SparseLayer) else 0
        return int(nbytes) + self.support.cached_bytes


def check_processes(name: str, method: Method) -> None:
    """Raise :class:`OptionError` for a sparse layer whose sets would differ between processes."""
    if "gradient" not in method.needs or not (dist.is_available() and dist.is_initialized()):
        return
    if dist.get_world_size() > 1:
        raise OptionError(
            f"{type(method).__name__} needs the gradient of {name} outside B, but "
            f"{dist.get_world_size()} processes would each have their own, since sparse layers do "
            "not send it: keep this layer masked (sparsify(..., only=...)), whose gradient "
            "DistributedDataParallel averages, or choose a method without gradients, as SET"
        )


def _options_of(name: str, layer: SparseLayer, options: Options) -> Options:
    """The options of a layer's weight, with the block of the layer.

    Raises :class:`topkast.OptionError` for another block, and for options that do not go with it.
    """
    block, single = layer.block, (1, 1)
    if options.block not in (None, block or single):
        raise OptionError(
            f"{name} is the weight of a {type(layer).__name__} with block={block}, but the "
            f"optimizer has block={options.block}: build the layer with this block, or leave the "
            f'option out, for this layer by overrides={{{name!r}: {{"block": None}}}}'
        )
    try:
        return replace(options, block=block, overrides=None)
    except OptionError as error:
        raise OptionError(
            f"{name} is the weight of a {type(layer).__name__} with block={block}: {error}"
        ) from None


def _group_size(name: str, layer: SparseLayer, options: Options) -> int | None:
    """The size of groups; raises :class:`topkast.OptionError` unless the layer's sets fit them."""
    group_size = group_size_of(name, layer.weight_shape, options.pattern)
    if options.pattern is None or group_size is None:
        return None
    size, support = math.prod(layer.weight_shape), layer.support.in_groups(group_size)
    forward, backward = pattern_densities(options.pattern, options.fwd, options.bwd)
    fits = (support.forward, support.backward) == (int(forward * size), int(backward * size))
    try:
        support.check(size, "it")
    except MismatchError:
        fits = False
    if not fits:
        raise OptionError(
            f"{name} is the weight of a {type(layer).__name__}, whose sets were chosen without "
            f"pattern={options.pattern}. Make the model dense with topkast.densify before building "
            f'its optimizer, or pass overrides={{{name!r}: {{"pattern": None}}}}'
        )
    return group_size


@dataclass(frozen=True)
class _RestrictGradient:
    """Hook that zeroes the gradient on a resting B∖A, and keeps what the layer has recorded."""

    owner: weakref.ref[SparseExecution]

    def __call__(self, param: Tensor) -> None:
        owner = self.owner()
        if owner is None or param.grad is None:
            return
        if not owner.step.exploring:
            param.grad.view(-1)[owner.support.forward_size :].zero_()
        recording = getattr(owner.layer, "recording", None)  # densify may have made it dense
        if recording is not None:
            recording.accept(param.grad)
