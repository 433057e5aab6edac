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
from topkast_torch.execution._execution import Execution, InnerProfile
from topkast_torch.execution._flat import Flat, compress
from topkast_torch.inner._inner_state import join, restrict
from topkast_torch.optimizer._ownership import claim, release

Stamp = tuple[int, int, int]
NEVER: Stamp = (-1, -1, -1)


@dataclass
class Member:
    """One tensor: where its entries of A and of B∖A are, in the compact vector and in it."""

    param: Parameter
    parts: tuple[slice, slice]  # of the compact vector
    places: tuple[Flat, Flat]  # of the tensor
    written: Stamp = NEVER  # of the parameter after our last write to it
    restricted: Stamp = NEVER  # of its gradient after we restricted it


class MaskedExecution(Execution):
    """The members are dense Parameters: α between steps, their gradients zero outside B.

    Their gradient is gathered on B at each step, and the new values on A are written back.
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
        self.reservoir = ranked.flatten(
            {name: param.detach() for name, param in self._params.items()}
        ).clone()
        self.support = ranked.select(self.reservoir, options.for_tensor(ranked.key))
        values = self.reservoir.index_select(0, self.support.entries)
        self.values = Parameter(values.reshape(ranked.compact_shape), requires_grad=True)
        self.gradient = torch.empty_like(self.values).detach().view(-1)
        self._hooks: dict[str, RemovableHandle] = {}
        self._replaced: list[str] = []
        self.start(profile, options, updates, steps)
        self.update_positions()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hooks": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._take_over()
        for member in self.members.values():
            member.written = _stamp(member.param)

    def install(self) -> None:
        self.write_forward_view(everywhere=True)
        self._take_over()

    def _take_over(self) -> None:
        """Restrict gradients as they are accumulated, whether they are wanted now or later."""
        for name, member in self.members.items():
            claim(member.param, self)
            wanted = member.param.requires_grad
            member.param.requires_grad_(True)  # hooks of frozen tensors are refused, and stay
            restrict_ = _Restrict(weakref.ref(self), name)
            self._hooks[name] = member.param.register_post_accumulate_grad_hook(restrict_)
            member.param.requires_grad_(wanted)
            weakref.finalize(self, self._hooks[name].remove)

    def uninstall(self, *, dense: bool) -> None:
        if dense:
            for name, theta in self.ranked.unflatten(self.theta()).items():
                self.members[name].param.detach().copy_(theta)
        self.forget()

    def forget(self) -> None:
        for name, member in self.members.items():
            self._hooks.pop(name).remove()
            release(member.param)

    def replaced(self, param: Tensor) -> None:
        self._replaced += [name for name, one in self._params.items() if one is param]

    def accept_external_writes(self) -> None:
        if self._replaced:
            raise MismatchError(
                f"{', '.join(self._replaced)} is another Parameter in the model now, as after "
                "load_state_dict(assign=True): what this optimizer trains is not what the model "
                "computes with. Load without assign, or build and wrap an optimizer afterwards"
            )
        values = self.values.detach().view(-1)
        for name, member in self.members.items():
            if _stamp(member.param) != member.written:
                self._check_write(name, member)
            # What is written through `param.data` or NumPy leaves no stamp: so always.
            member.places[0].gather(member.param.detach(), out=values[member.parts[0]])

    def _check_write(self, name: str, member: Member) -> None:
        if (member.param.device, member.param.dtype) != (self.values.device, self.values.dtype):
            raise MismatchError(
                f"{name} is {member.param.dtype} on {member.param.device} now, and was "
                f"{self.values.dtype} on {self.values.device} when the optimizer was wrapped: "
                "convert and move the model before building its optimizer"
            )
        current = member.places[0].gather(member.param.detach())
        if torch.count_nonzero(member.param) > torch.count_nonzero(current):
            raise MismatchError(
                f"{name} was given nonzero weights outside its forward set, as by "
                "model.load_state_dict with dense weights. Load them first and wrap the "
                "optimizer then, or load the optimizer's state dict too, which holds them all"
            )
        member.written = _stamp(member.param)

    def gather_gradient(self) -> Tensor | None:
        if all(member.param.grad is None for member in self.members.values()):
            return None
        for name, member in self.members.items():
            grad = member.param.grad
            if grad is None:
                for part in member.parts:
                    self.gradient[part].zero_()
                continue
            if grad.layout != torch.strided:
                raise UnsupportedTensorError(
                    f"{name} has a gradient of layout {grad.layout}: Top-KAST gathers the "
                    "gradient on B from a strided one (for nn.Embedding, sparse=False)"
                )
            self.restrict_gradient(member)
            # What backward has gathered may be scaled since, through `grad.data` or by a gradient
            # scaler, which leave no stamp: so again.
            for part, place in zip(member.parts, member.places, strict=True):
                place.gather(grad, out=self.gradient[part])
        return self.gradient

    def restrict_gradient(self, member: Member) -> None:
        """Zero a gradient outside B, unless nobody has written to it since that was done."""
        grad = member.param.grad
        if grad is None or grad.layout != torch.strided or _stamp(grad) == member.restricted:
            return
        kept = member.places if self.step.exploring else member.places[:1]
        if sum(map(len, kept)) < grad.numel():
            compress(grad, kept, [self.gradient[part] for part in member.parts[: len(kept)]])
        member.restricted = _stamp(grad)

    def gradient_buffer(self) -> Tensor:
        return self.gradient

    def restore_gradient(self) -> None:
        pass  # the model's gradients are its own

    def write_forward_view(self, *, everywhere: bool = False) -> None:
        values = self.values.detach().view(-1)
        for member in self.members.values():
            param = member.param.detach()
            if everywhere:
                param.zero_()
            member.places[0].put(param, values[member.parts[0]])
            member.written = _stamp(member.param)

    def restrict_state(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        if not states:
            return {}
        if len(states) < len(self.members):
            raise MismatchError(
                f"{self.ranked.key}: only {sorted(states)} have optimizer state, and a global "
                "ranking shares one; wrap the optimizer before its first step"
            )
        layout, compact = self.profile.layout, self.ranked.compact_shape
        parts = [
            restrict(states[name], layout, tuple(member.param.shape), member.places[part].c_order)
            for part in range(2)
            for name, member in self.members.items()
        ]
        try:
            return dict(join(parts, layout, compact))
        except MismatchError as error:
            raise MismatchError(
                f"{self.ranked.key}: the members of a global ranking share one optimizer state, "
                f"and {error}; wrap the optimizer before its first step"
            ) from None

    def held_tensors(self) -> list[Tensor]:
        own = self.support.indices.untyped_storage().data_ptr()
        return [
            self.gradient,
            *(
                tensor
                for member in self.members.values()
                for place in member.places
                for tensor in place.held()
                if tensor.untyped_storage().data_ptr() != own
            ),
        ]

    def update_positions(self) -> None:
        entries, bounds = self.support.entries, self.ranked.bounds
        blocks = self.support.blocks
        ascending = blocks is None or blocks.rows == 1
        self.members = {}
        for name, parts in self.member_parts().items():
            start, _ = bounds[name]
            first, second = (
                Flat(entries[part] - start if start else entries[part], ascending=ascending)
                for part in parts
            )
            self.members[name] = Member(self._params[name], parts, (first, second))


@dataclass(frozen=True)
class _Restrict:
    """Hook that zeroes a gradient outside B whenever backward has added to it."""

    owner: weakref.ref[MaskedExecution]
    name: str

    def __call__(self, param: Tensor) -> None:
        owner = self.owner()
        if owner is not None:
            owner.restrict_gradient(owner.members[self.name])


def _stamp(tensor: Tensor) -> Stamp:
    """Changes when someone writes to a tensor, or gives it other memory (``param.data = …``)."""
    return id(tensor), tensor._version, tensor.data_ptr()
