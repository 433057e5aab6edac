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
from topkast._options import Options
from topkast._plan import Block
from topkast_torch._compact import CompactTensor


@dataclass
class Member:
    """One tensor of a block: where its entries of B and A are, in it and in the compact vector."""

    param: Parameter
    first: int  # its entries of B are first:last of the compact vector
    last: int
    backward: Tensor  # flat indices of B in the tensor, int64
    forward: Tensor  # of A
    stamp: tuple[int, int] = (-1, -1)  # of the parameter after our last write to it


class MaskedTensor(CompactTensor):
    """A block whose members are dense Parameters: α between steps, their gradients zero outside B.

    Their gradient is gathered on B at each step, and the new values on A are written back.
    """

    # Fixed at wrapping
    gradient: Tensor  # (|B|,)
    # Changed by a refresh
    members: dict[str, Member]
    active_positions: Tensor  # of A in the compact vector

    def __init__(
        self, block: Block, params: Mapping[str, Parameter], options: Options, updates: int
    ) -> None:
        self.block = block
        tensors = {name: params[name].detach() for name in block.shapes}
        self.reservoir = block.flatten(tensors).clone()
        self.support = block.select(self.reservoir, options)
        self.changed = block.no_change(self.support.indices)
        self.values = Parameter(
            self.reservoir[self.support.indices].reshape(block.compact_shape), requires_grad=True
        )
        self.gradient = torch.empty_like(self.values).detach().view(-1)
        self.set_exploring(options.explore_until, updates)
        self._hooks: dict[str, RemovableHandle] = {}
        self._params = {name: params[name] for name in block.shapes}
        self.weigh()
        self.derive()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hooks": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.register_hooks()
        for member in self.members.values():
            member.stamp = _stamp(member.param)

    def install(self) -> None:
        """Make the Parameters hold α, and their gradients vanish outside B from now on."""
        self.show(everywhere=True)
        self.register_hooks()

    def register_hooks(self) -> None:
        """Restrict gradients as they are accumulated; again for tensors that were frozen before."""
        for name, member in self.members.items():
            if name not in self._hooks and member.param.requires_grad:
                restrict = _Restrict(weakref.ref(self), name)
                handle = member.param.register_post_accumulate_grad_hook(restrict)
                self._hooks[name] = handle
                weakref.finalize(self, handle.remove)

    def release(self) -> None:
        """Leave the Parameters as they are from now on."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks = {}

    def adopt_changes(self) -> None:
        """Take over what someone else wrote into the Parameters on A (a clamp, loaded weights)."""
        self.register_hooks()
        for name, member in self.members.items():
            if _stamp(member.param) == member.stamp:
                continue
            if (member.param.device, member.param.dtype) != (self.values.device, self.values.dtype):
                raise MismatchError(
                    f"{name} is {member.param.dtype} on {member.param.device} now, and was "
                    f"{self.values.dtype} on {self.values.device} when the optimizer was wrapped: "
                    "convert and move the model before building its optimizer"
                )
            current = torch.take(member.param.detach(), member.forward)
            if torch.count_nonzero(member.param) > torch.count_nonzero(current):
                raise MismatchError(
                    f"{name} was given nonzero weights outside its forward set, as by "
                    "model.load_state_dict with dense weights. Load them first and wrap the "
                    "optimizer then, or load the optimizer's state dict too, which holds them all"
                )
            inside = (self.active_positions >= member.first) & (self.active_positions < member.last)
            self.values.detach().view(-1)[self.active_positions[inside]] = current
            member.stamp = _stamp(member.param)

    def load_gradient(self, *, penalty: float, kind: str) -> None:
        """Gather the gradient on B and add that of the exploration penalty, if there is one."""
        if all(member.param.grad is None for member in self.members.values()):
            self.values.grad = None
            return
        for name, member in self.members.items():
            self._gather(name, member)
        self.add_penalty(self.gradient, self.gradient, penalty=penalty, kind=kind)
        self.values.grad = self.gradient.view(self.block.compact_shape)

    def _gather(self, name: str, member: Member) -> None:
        grad, place = member.param.grad, self.gradient[member.first : member.last]
        if grad is None:
            place.zero_()
        elif grad.layout != torch.strided:
            raise UnsupportedTensorError(
                f"{name} has a gradient of layout {grad.layout}: Top-KAST gathers the gradient "
                "on B from a strided one (for nn.Embedding, sparse=False)"
            )
        elif grad.dtype == place.dtype:
            torch.take(grad, member.backward, out=place)
        else:
            place.copy_(torch.take(grad, member.backward))

    def show(self, *, everywhere: bool = False) -> None:
        """Write α into the Parameters; `everywhere` also its zeros, after A has changed."""
        # The gradient has been used: its memory is free to hold the values on A.
        active = self.gradient[: self.block.forward]
        torch.index_select(self.values.detach().view(-1), 0, self.active_positions, out=active)
        start = 0
        for member in self.members.values():
            param = member.param.detach()
            stop = start + member.forward.numel()
            if everywhere:
                param.zero_()
            _put(param, member.forward, active[start:stop])
            start = stop
            member.stamp = _stamp(member.param)

    def gather_state(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """State of the dense optimizer, by member, restricted to B; empty without any."""
        if not states:
            return {}
        if len(states) < len(self.members):
            raise MismatchError(
                f"{self.block.key}: only {sorted(states)} have optimizer state, and a global "
                "ranking shares one; wrap the optimizer before its first step"
            )
        gathered: dict[str, Any] = {}
        for key in next(iter(states.values())):
            parts = [self._restrict_entry(name, states.get(name, {}).get(key)) for name in states]
            if all(isinstance(part, Tensor) and part.dim() == 1 for part in parts):
                gathered[key] = torch.cat(parts).reshape(self.values.shape)
            elif all(_same(part, parts[0]) for part in parts):
                gathered[key] = parts[0]
            else:
                raise MismatchError(
                    f"{self.block.key}: the members of a global ranking share one optimizer state, "
                    f"but their {key!r} differ; wrap the optimizer before its first step"
                )
        return gathered

    def _restrict_entry(self, name: str, entry: Any) -> Any:
        member = self.members[name]
        if isinstance(entry, Tensor) and entry.shape == member.param.shape:
            return torch.take(entry, member.backward)
        return entry

    def held_tensors(self) -> list[Tensor]:
        members = self.members.values()
        return [
            self.gradient,
            self.active_positions,
            *(member.forward for member in members),
            *(member.backward for member in members if len(members) > 1),
        ]

    def derive(self) -> None:
        indices, active = self.support
        self.active_positions = torch.nonzero(active).view(-1)
        forward = indices.index_select(0, self.active_positions)
        self.members = {}
        for name, (start, stop) in self.block.bounds.items():
            edges = torch.tensor([start, stop], device=indices.device)
            first, last = torch.searchsorted(indices, edges).tolist()
            head, tail = torch.searchsorted(forward, edges).tolist()
            backward_, forward_ = indices[first:last], forward[head:tail]
            if start:
                backward_, forward_ = backward_ - start, forward_ - start
            self.members[name] = Member(self._params[name], first, last, backward_, forward_)


@dataclass(frozen=True)
class _Restrict:
    """Hook that zeroes a gradient outside B whenever backward has added to it."""

    owner: weakref.ref[MaskedTensor]
    name: str

    def __call__(self, param: Tensor) -> None:
        owner = self.owner()
        grad = param.grad
        if owner is None or grad is None or grad.layout != torch.strided:
            return
        member = owner.members[self.name]
        indices = member.backward if owner.exploring else member.forward
        if indices.numel() < grad.numel():
            kept = torch.take(grad, indices)
            grad.zero_()
            _put(grad, indices, kept)


def _put(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write `values` at flat C-order `indices`, whatever the strides of `tensor`."""
    if tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, indices, values)
    else:
        tensor.put_(indices, values)


def _stamp(param: Tensor) -> tuple[int, int]:
    """Changes when someone writes to a parameter, or gives it other memory (``param.data = …``)."""
    return param._version, param.data_ptr()


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return bool(first == second)
