"""The weights of one block between steps: values on B, and the reservoir; both are flat vectors."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from topkast import MismatchError, Support, UnsupportedTensorError
from topkast._compact import move
from topkast._exploration import exploration_weights
from topkast._options import Options
from topkast._plan import Block


@dataclass
class Member:
    """One tensor of a block: where its entries of B and A are, in it and in the compact vector."""

    param: Parameter
    first: int  # its entries of B are first:last of the compact vector
    last: int
    backward: Tensor  # flat indices of B in the tensor, int64
    forward: Tensor  # of A
    stamp: tuple[int, int] = (-1, -1)  # of the parameter after our last write to it


class CompactTensor:
    """Weights of one block: `values` on B, which the inner optimizer updates, and θ elsewhere.

    Between steps the Parameters of the model hold the forward view α.
    """

    # Fixed at wrapping
    block: Block
    values: Parameter  # (1, …, |B|)
    gradient: Tensor  # (|B|,)
    reservoir: Tensor  # θ as one vector; stale on B until a refresh
    # Changed by a refresh
    support: Support
    changed: Tensor  # entries new to A, by member
    members: dict[str, Member]
    active_positions: Tensor  # of A in the compact vector
    weights: Tensor  # of the exploration penalty
    # Changed by a step
    exploring: bool  # whether B∖A is still updated

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
        self._derive(params)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hooks": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.register_hooks()
        for member in self.members.values():
            member.stamp = _stamp(member.param)

    def install(self) -> None:
        """Make the Parameters hold α, and their gradients vanish outside B from now on."""
        self.write_forward(everywhere=True)
        self.register_hooks()

    def register_hooks(self) -> None:
        """Restrict gradients as they are accumulated; again for tensors that were frozen before."""
        for name, member in self.members.items():
            if name not in self._hooks and member.param.requires_grad:
                restrict = _Restrict(weakref.ref(self), name)
                handle = member.param.register_post_accumulate_grad_hook(restrict)
                self._hooks[name] = handle
                weakref.finalize(self, handle.remove)

    def set_exploring(self, until: int | None, updates: int) -> None:
        """Whether the next update, after so many, still moves B∖A."""
        self.exploring = until is None or updates < until

    def adopt_changes(self) -> None:
        """Take over what someone else wrote into the Parameters on A (a clamp, loaded weights)."""
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
        if penalty:
            values = self.values.detach().view(-1)
            slope = values if kind == "l2" else torch.sgn(values)
            self.gradient.addcmul_(self.weights, slope, value=penalty)
        if not self.exploring:
            self.gradient.masked_fill_(~self.support.active, 0)
            self._frozen = self.values.detach().clone()
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

    def settle(self) -> None:
        """After a step of the inner optimizer: undo it on B∖A once exploration has stopped."""
        if not self.exploring:
            values = self.values.detach()
            active = self.support.active.view(values.shape)
            values.copy_(torch.where(active, values, self._frozen))
        self.write_forward()

    def write_forward(self, *, everywhere: bool = False) -> None:
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

    def theta(self) -> Tensor:
        """All weights of the block as one vector: the reservoir, brought up to date."""
        self.reservoir.index_copy_(0, self.support.indices, self.values.detach().view(-1))
        return self.reservoir

    def refresh(
        self,
        options: Options,
        round_: int,
        state: dict[str, Any],
        initial: Mapping[str, float | None],
    ) -> None:
        """Select anew; carry values and the optimizer's `state` over to the new B."""
        new = self.block.refresh(self.theta(), self.support, options, round_)
        for name, entry in state.items():
            if isinstance(entry, Tensor) and entry.shape == self.values.shape:
                entry.copy_(move(entry, new.migration, initial.get(name) or 0.0))
        self.changed = new.changed
        self.restore(new.support, self.reservoir)

    def restore(self, support: Support, theta: Tensor) -> None:
        """Take these sets, and these weights (size,)."""
        self.support = support
        if theta is not self.reservoir:
            self.reservoir.copy_(theta)
        self.values.detach().view(-1).copy_(self.reservoir.index_select(0, support.indices))
        self._derive({name: member.param for name, member in self.members.items()})
        self.write_forward(everywhere=True)

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

    def held_bytes(self, state: Mapping[str, Any]) -> int:
        """Bytes of values, gradient, optimizer state, indices and θ."""
        members = self.members.values()
        own = [
            *self.support,
            self.active_positions,
            self.weights,
            *(member.forward for member in members),
            *(member.backward for member in members if len(members) > 1),
        ]
        held = [entry for entry in state.values() if isinstance(entry, Tensor)]
        return sum(map(_nbytes, [self.values, self.gradient, self.reservoir, *own, *held]))

    def _derive(self, params: Mapping[str, Parameter]) -> None:
        """What follows from the support, computed once a refresh and not once a step."""
        indices, active = self.support
        self.active_positions = torch.nonzero(active).view(-1)
        self.weights = exploration_weights(
            self.support, density=self.block.density, dtype=self.values.dtype
        )
        forward = indices.index_select(0, self.active_positions)
        self.members = {}
        for name, (start, stop) in self.block.bounds.items():
            edges = torch.tensor([start, stop], device=indices.device)
            first, last = torch.searchsorted(indices, edges).tolist()
            head, tail = torch.searchsorted(forward, edges).tolist()
            backward_, forward_ = indices[first:last], forward[head:tail]
            if start:
                backward_, forward_ = backward_ - start, forward_ - start
            self.members[name] = Member(params[name], first, last, backward_, forward_)


@dataclass(frozen=True)
class _Restrict:
    """Hook that zeroes a gradient outside B whenever backward has added to it."""

    owner: weakref.ref[CompactTensor]
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


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
