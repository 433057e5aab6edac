"""Masked execution: the model's Parameters stay dense, and hold the forward view α."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from topkast import MismatchError, UnsupportedTensorError
from topkast.adapter import Options, RankedTensors
from topkast_torch._reservoirs import make_reservoir
from topkast_torch.execution._execution import Execution
from topkast_torch.execution._flat import FlatEntries, compress, restrict
from topkast_torch.execution._profile import InnerProfile
from topkast_torch.inner._inner_state import join_entries, restrict_entries
from topkast_torch.optimizer._ownership import claim, release

Stamp = tuple[int, int, int]
NEVER: Stamp = (-1, -1, -1)


@dataclass
class Member:
    """One tensor, and its entries of A and of B∖A in the compact vector and in the tensor."""

    param: Parameter
    slices: tuple[slice, slice]  # of the compact vector
    entries: tuple[FlatEntries, FlatEntries]  # in the tensor
    written_stamp: Stamp = NEVER  # of the Parameter after our last write
    restricted_stamp: Stamp = NEVER  # of its gradient, which is zero outside B
    dropped_stamp: Stamp = NEVER  # of its gradient after we zeroed it outside B


class MaskedExecution(Execution):
    """The members are dense Parameters that hold α between steps; their gradients vanish outside B.

    Each step gathers the gradient on B and writes the new values on A back.
    """

    # Fixed at wrapping
    gradient: Tensor  # (|B|,)
    # Changed by a refresh
    members: dict[str, Member]

    def __init__(
        self,
        ranked: RankedTensors,
        params: Mapping[str, Parameter],
        options: Options,
        profile: InnerProfile,
        updates: int,
        steps: int,
    ) -> None:
        self.ranked = ranked
        self._params = {name: params[name] for name in ranked.shapes}
        theta = ranked.flatten(
            {name: param.detach() for name, param in self._params.items()}
        ).clone()
        own_options = options.for_tensor(ranked.key)
        self.support = ranked.select(theta, own_options)
        values = theta.index_select(0, self.support.entries)
        self.values = Parameter(values.reshape(ranked.compact_shape), requires_grad=True)
        self.gradient = torch.empty_like(self.values).detach().view(-1)
        self._hooks: dict[str, RemovableHandle] = {}
        self._replaced: list[str] = []
        self.set_up(profile, options, updates, steps)
        self.update_positions()
        self.reservoir = make_reservoir(theta, ranked, own_options, self._params)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hooks": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()
        for member in self.members.values():
            member.written_stamp = make_stamp(member.param)

    def install(self) -> None:
        self.write_forward_view(everywhere=True)
        self._connect()

    def _connect(self) -> None:
        """Claim the Parameters, and zero their gradients outside B as they are accumulated."""
        for name, member in self.members.items():
            claim(member.param, self)
            requires_grad = member.param.requires_grad
            member.param.requires_grad_(True)  # a frozen tensor takes no hook, but keeps one
            hook = _RestrictGradient(weakref.ref(self), name)
            self._hooks[name] = member.param.register_post_accumulate_grad_hook(hook)
            member.param.requires_grad_(requires_grad)
            weakref.finalize(self, self._hooks[name].remove)

    def uninstall(self, *, dense: bool) -> None:
        if dense:
            for name, theta in self.ranked.unflatten(self.theta()).items():
                self.members[name].param.detach().copy_(theta)
        self.disconnect()

    def disconnect(self) -> None:
        for name, member in self.members.items():
            self._hooks.pop(name).remove()
            release(member.param)

    def note_replacement(self, param: Tensor, *, is_replaced: bool) -> None:
        for name, own in self._params.items():
            if own is param:
                others = [replaced for replaced in self._replaced if replaced != name]
                self._replaced = [*others, name] if is_replaced else others

    def accept_external_writes(self, *, thorough: bool = False) -> None:
        if self._replaced:
            raise MismatchError(
                f"{', '.join(self._replaced)} is another Parameter in the model now, as after "
                "load_state_dict(assign=True): the model no longer computes with the Parameter "
                "that this optimizer trains. Load without assign, or build and wrap a new optimizer"
            )
        values = self.values.detach().view(-1)
        for name, member in self.members.items():
            if make_stamp(member.param) != member.written_stamp:
                self._check_write(name, member)
            # Always gather: writes through `param.data` or NumPy leave the stamp unchanged.
            on_active = values[member.slices[0]]
            member.entries[0].gather(member.param.detach(), out=on_active)
            if thorough and bool(_count_set(member.param.detach()) != _count_set(on_active)):
                self._check_write(name, member)

    def _check_write(self, name: str, member: Member) -> None:
        if (member.param.device, member.param.dtype) != (self.values.device, self.values.dtype):
            raise MismatchError(
                f"{name} is {member.param.dtype} on {member.param.device} now, but was "
                f"{self.values.dtype} on {self.values.device} when the optimizer was wrapped: "
                "convert and move the model before building its optimizer"
            )
        current = member.entries[0].gather(member.param.detach())
        if torch.count_nonzero(member.param) > torch.count_nonzero(current):
            raise MismatchError(
                f"{name} has nonzero weights outside its forward set, as after "
                "model.load_state_dict with dense weights, or param.data.normal_(). Write them "
                "before wrapping the optimizer, or load the optimizer's state dict too, which "
                "holds all weights"
            )
        member.written_stamp = make_stamp(member.param)

    def gather_gradient(self) -> Tensor | None:
        if all(member.param.grad is None for member in self.members.values()):
            return None
        for name, member in self.members.items():
            grad = member.param.grad
            if grad is None:
                for section in member.slices:
                    self.gradient[section].zero_()
                continue
            if grad.layout != torch.strided:
                raise UnsupportedTensorError(
                    f"{name} has a gradient of layout {grad.layout}: Top-KAST needs a strided "
                    "gradient (for nn.Embedding, sparse=False)"
                )
            if self.awaits_gradient and make_stamp(grad) == member.dropped_stamp:
                raise MismatchError(
                    f"the gradient of {name} outside B, which {type(self.method).__name__} needs "
                    "after this step, was dropped by the backward pass: run a new one. Set "
                    "refresh_every before the optimizer's zero_grad"
                )
            self.restrict_gradient(member)
            # Gather again: a gradient scaler, or a write through `grad.data`, may have changed the
            # gradient since backward and leaves the stamp unchanged.
            for section, entries in zip(member.slices, member.entries, strict=True):
                entries.gather(grad, out=self.gradient[section])
        return self.gradient

    def restrict_gradient(self, member: Member) -> None:
        """Zero a gradient outside B, unless it is unchanged since the last time."""
        grad = member.param.grad
        if (
            grad is None
            or grad.layout != torch.strided
            or grad.device != self.gradient.device  # which the step will refuse
            or self.awaits_gradient
            or make_stamp(grad) == member.restricted_stamp
        ):
            return
        kept = member.entries if self.step.exploring else member.entries[:1]
        if sum(map(len, kept)) < grad.numel():
            if grad.requires_grad:  # after backward(create_graph=True), as part of the graph
                member.param.grad = grad = restrict(grad, kept)
            else:
                slices = member.slices[: len(kept)]
                compress(grad, kept, [self.gradient[section] for section in slices])
            member.dropped_stamp = make_stamp(grad)
        member.restricted_stamp = make_stamp(grad)

    def whole_gradient(self) -> Tensor | None:
        grads = {name: member.param.grad for name, member in self.members.items()}
        if all(grad is None for grad in grads.values()):
            return None
        gradient: Tensor = self.ranked.flatten(
            {
                name: torch.zeros_like(self._params[name]) if grad is None else grad
                for name, grad in grads.items()
            }
        )
        return gradient

    def gradient_buffer(self) -> Tensor:
        return self.gradient

    def restore_gradient(self) -> None:
        pass  # the model's gradients were not touched

    def write_forward_view(self, *, everywhere: bool = False) -> None:
        values = self.values.detach().view(-1)
        for member in self.members.values():
            param = member.param.detach()
            if everywhere:
                param.zero_()
            member.entries[0].put(param, values[member.slices[0]])
            member.written_stamp = make_stamp(member.param)

    def restrict_state(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        if not states:
            return {}
        if len(states) < len(self.members):
            raise MismatchError(
                f"{self.ranked.key}: only {sorted(states)} have optimizer state, but the members "
                "of a global ranking share one; wrap the optimizer before its first step"
            )
        layout, compact = self.profile.layout, self.ranked.compact_shape
        sections = [
            restrict_entries(
                states[name],
                layout,
                tuple(member.param.shape),
                compact,
                member.entries[section].c_order,
            )
            for section in range(2)
            for name, member in self.members.items()
        ]
        try:
            return dict(join_entries(sections, layout, compact))
        except MismatchError as error:
            raise MismatchError(
                f"{self.ranked.key}: the members of a global ranking share one optimizer state, "
                f"and {error}; wrap the optimizer before its first step"
            ) from None

    def gradient_bytes(self) -> int:
        return self.gradient.nbytes

    def layout_bytes(self) -> int:
        support_memory = self.support.indices.untyped_storage().data_ptr()
        return sum(
            tensor.nbytes
            for member in self.members.values()
            for entries in member.entries
            for tensor in entries.tensors()
            if tensor.untyped_storage().data_ptr() != support_memory
        )

    def update_positions(self) -> None:
        entries, bounds = self.support.entries, self.ranked.bounds
        blocks = self.support.blocks
        ascending = blocks is None or blocks.rows == 1
        self.members = {}
        for name, slices in self.member_slices().items():
            start, _ = bounds[name]
            first, second = (
                FlatEntries(
                    entries[section] - start if start else entries[section], ascending=ascending
                )
                for section in slices
            )
            self.members[name] = Member(self._params[name], slices, (first, second))


@dataclass(frozen=True)
class _RestrictGradient:
    """Hook that zeroes a gradient outside B after backward has accumulated it."""

    owner: weakref.ref[MaskedExecution]
    name: str

    def __call__(self, param: Tensor) -> None:
        owner = self.owner()
        if owner is not None:
            owner.restrict_gradient(owner.members[self.name])


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _count_set(tensor: Tensor) -> Tensor:
    """The number () of entries, or of their real and imaginary parts, with any bit set, as in -0.

    PyTorch counts nonzero integers several times faster than floats. A sum of bits would be faster
    still, but those of equal weights cancel: that of four times 2.0 is 0.
    """
    tensor = tensor.resolve_conj().resolve_neg()  # which change the bits that are read
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return torch.count_nonzero(real.view(_INTEGERS[real.itemsize]))


def make_stamp(tensor: Tensor) -> Stamp:
    """A stamp that changes if a tensor is written to or gets other memory (``param.data = …``)."""
    return id(tensor), tensor._version, tensor.data_ptr()
