"""Young entries, which entered B late: they start and move as under a fresh optimizer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from topkast.adapter import (
    SETTLED,
    Betas,
    Migration,
    corrections,
    kappa,
    settled_ages,
    young_limit,
)
from topkast_torch.inner._fresh import make_fresh_optimizer, step_without_hooks
from topkast_torch.inner._inner_state import Start, entries_of, walk
from topkast_torch.inner._probe import betas_of
from topkast_torch.sparse._products import has_kernels

if TYPE_CHECKING:
    from topkast_torch.execution._profile import InnerProfile

_KERNEL_MIN_ENTRIES = 1 << 12  # below which a call of a kernel costs more than it saves
_FEW = 1 << 10  # ages that are read first
_MAX_UPDATES = 1 << 14  # since the ages were counted; an entrant's age then still fits in int16


class YoungEntries:
    """The ages of the entries of B, and the correction of the young entries' steps.

    Attributes
    ----------
    ages
        The ages `updates_since` updates ago, int16: negative for what entered B since then.
    updates_since
        Updates since the time of `ages`.
    """

    def __init__(self, ages: Tensor, profile: InnerProfile) -> None:
        self.ages, self.updates_since, self._profile = ages, 0, profile
        self._find_young(None)

    def current_ages(self) -> Tensor:
        """The ages now, int16: updates from each weight's entry into B."""
        ages = self.ages.int().add_(self.updates_since)
        return ages.clamp_(max=SETTLED).short()  # settled entries stay settled

    def restore(self, ages: Tensor, group: Mapping[str, Any] | None = None) -> None:
        """Set the ages."""
        self.ages, self.updates_since = ages, 0
        self._find_young(group)

    def migrate(self, migration: Migration, group: Mapping[str, Any]) -> None:
        """Migrate the ages to the new B; entrants have age 0."""
        self.take(migration.apply(*self.move()), group)

    def move(self) -> tuple[Tensor, int]:
        """The ages, and what entrants get, to be migrated to the new B."""
        if self.updates_since > _MAX_UPDATES:
            self.ages, self.updates_since = self.current_ages(), 0
        return self.ages, -self.updates_since

    def take(self, ages: Tensor, group: Mapping[str, Any]) -> None:
        """Take the migrated ages."""
        self.ages = ages
        self._find_young(group)

    def count_step(self) -> None:
        """Count an update."""
        self.updates_since += 1

    def _find_young(self, group: Mapping[str, Any] | None) -> None:
        """Find the positions of young entries, and of entrants that have not been stepped."""
        betas, since = self.betas(group or {}), self.updates_since
        self._refreshed_at = since
        self._limit = (1 if betas is None else young_limit(betas)) - since  # of `ages`
        # On CPUs, each step finds them anew, to save memory; an accelerator would synchronise.
        self._positions = None
        if self.ages.device.type == "cpu":
            ages = self.ages.numpy()
            # What entered last is young, and most of it is in B∖A, at the end.
            parts = (ages[-_FEW:], ages) if len(ages) else ()
            self._any_young = any(int(part.min()) < self._limit for part in parts)
        else:
            self._positions = _true_positions(self.ages < self._limit)
            self._any_young = len(self._positions) > 0
        self._entrants = self.ages.new_empty(0, dtype=torch.int32)
        if not self._profile.layout.starts_suffice:
            self._entrants = _true_positions(self.ages == -since)

    @property
    def nbytes(self) -> int:
        """Bytes of ages and stored positions."""
        positions = 0 if self._positions is None else self._positions.nbytes
        return self.ages.nbytes + self._entrants.nbytes + positions

    def betas(self, group: Mapping[str, Any]) -> Betas | None:
        """The pair that the inner optimizer uses now; a schedule may change it."""
        learned = self._profile.traits.betas
        current = betas_of(group)
        if learned is None or not current:
            return learned
        mean = 0.0 if learned[0] == 0 else current[0]
        square = min(current[1:], key=lambda beta: abs(beta - learned[1]), default=learned[1])
        return mean, square

    def notice_reset(
        self,
        inner: torch.optim.Optimizer,
        group: Mapping[str, Any],
        values: Parameter,
        steps: int,
    ) -> int:
        """The steps that the inner optimizer's state counts: 0 if its entries were deleted.

        All entries are then as old as each other, as before the first step.
        """
        layout = self._profile.layout
        if not (steps and layout.specs):
            return steps
        entries = entries_of(inner, values, layout.stores)
        if any(entry != {} for entry in entries.values()):
            return steps
        self.restore(settled_ages(len(self.ages), self.ages), group)
        return 0

    def before_step(
        self,
        inner: torch.optim.Optimizer,
        group: Mapping[str, Any],
        values: Parameter,
        betas: Betas | None,
    ) -> None:
        """Save the young entries before the step, and step the entrants separately."""
        self._before = self._first_steps = None
        if not self._any_young:
            return
        if betas is not None:
            self._before = self._save_young(self._moving_tensors(inner, values))
        if (
            not self._profile.layout.starts_suffice
            and self.updates_since == self._refreshed_at
            and self._entrants.numel()
        ):
            self._first_steps = self._step_entrants(inner, group, values)

    def after_step(
        self,
        inner: torch.optim.Optimizer,
        values: Parameter,
        steps: int,
        betas: Betas | None,
    ) -> None:
        """Scale the displacements of young entries; `steps` counts the steps before this one."""
        if self._before is not None and betas is not None:
            factors = _factors(betas, steps + 1, values.device)
            self._scale_young(self._moving_tensors(inner, values), *self._before, factors)
        if self._first_steps is not None:
            self._write_first_steps(inner, values)
        self._before = self._first_steps = None

    def _save_young(self, tensors: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """Positions and entries of what is young; None and all entries where kernels scale them."""
        if all(_suits_kernel(tensor) for tensor in tensors):
            return None, [tensor.clone() for tensor in tensors]
        young = self._positions
        if young is None:
            young = _true_positions(self.ages < self._limit)
        return young, [tensor.index_select(0, young) for tensor in tensors]

    def _scale_young(
        self, tensors: list[Tensor], young: Tensor | None, before: list[Tensor], factors: Tensor
    ) -> None:
        """Multiply the displacements of young entries by the factors of their ages."""
        since = self.updates_since + 1
        if young is None:
            from topkast.kernels import scale_displacement

            for old, new in zip(before, tensors, strict=False):
                table = factors.to(new.dtype).numpy()
                scale_displacement(new.numpy(), old.numpy(), self.ages.numpy(), table, since=since)
            return
        ages = self.ages.index_select(0, young).int() + since
        share = factors.index_select(0, ages.clamp_(max=len(factors) - 1))
        for old, tensor in zip(before, tensors, strict=False):
            new = tensor.index_select(0, young)
            weight = share.to(new.real.dtype if new.is_complex() else new.dtype)
            tensor.index_copy_(0, young.long(), _interpolate(old, new, weight))

    def _moving_tensors(self, inner: torch.optim.Optimizer, values: Parameter) -> list[Tensor]:
        """The values, and the state entries that move with them: those that started as copies."""
        layout = self._profile.layout
        moving = [values.detach().view(-1)]
        if any(isinstance(start, Start) for start in layout.starts.values()):
            entries = entries_of(inner, values, layout.stores)
            moving += [
                entry.view(-1)
                for path, entry in walk(entries)
                if isinstance(layout.starts.get(path), Start) and entry.numel() == values.numel()
            ]
        return moving

    def _step_entrants(
        self, inner: torch.optim.Optimizer, group: Mapping[str, Any], values: Parameter
    ) -> tuple[Tensor, dict[Any, Any]]:
        """The entrants and their state after the first step of a fresh optimizer."""
        assert values.grad is not None
        shape = (1,) * (values.dim() - 1) + (-1,)
        entrants = Parameter(
            values.detach().view(-1).index_select(0, self._entrants).view(shape).clone()
        )
        entrants.grad = values.grad.view(-1).index_select(0, self._entrants).view(shape)
        fresh = make_fresh_optimizer(inner, group, [entrants])
        step_without_hooks(fresh)
        state: dict[Any, list[Tensor]] = {}
        for path, entry in walk(entries_of(fresh, entrants, self._profile.layout.stores)):
            state.setdefault(path, []).append(entry)
        return entrants.detach().view(-1), state

    def _write_first_steps(self, inner: torch.optim.Optimizer, values: Parameter) -> None:
        assert self._first_steps is not None
        weights, state = self._first_steps
        values.detach().view(-1).index_copy_(0, self._entrants.long(), weights)
        layout = self._profile.layout
        for path, entry in walk(entries_of(inner, values, layout.stores)):
            if path in layout.specs and state.get(path):
                axis = layout.specs[path].axis(tuple(values.shape))
                source = state[path][0 if len(state[path]) == 1 else -1]
                entry.index_copy_(axis, self._entrants.long(), source.to(entry.dtype))


def _suits_kernel(tensor: Tensor) -> bool:
    """Whether a kernel can scale the displacement of a vector, and is worth its call."""
    return (
        tensor.numel() >= _KERNEL_MIN_ENTRIES
        and has_kernels(tensor.device, tensor.dtype)
        and tensor.is_contiguous()
    )


def _true_positions(flags: Tensor) -> Tensor:
    """Positions of the true entries, int32 if that can number them."""
    positions = flags.nonzero().view(-1)
    return positions.int() if len(flags) < 1 << 31 else positions


def _interpolate(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """``old + weight · (new − old)``, with the bits of `new` where the weight is 1."""
    if new.dtype in (torch.float16, torch.bfloat16):
        return torch.lerp(old, new, weight)  # which rounds once
    # As the kernel rounds: torch.lerp starts at the other end where the weight is 1/2 or more.
    return torch.where(weight == 1, new, old + (new - old) * weight)


@functools.lru_cache(maxsize=4)  # of tensors that were stepped equally often
def _factors(betas: Betas, steps: int, device: torch.device) -> Tensor:
    """κ(age) / κ(steps) by age; the last is exactly 1, for settled entries."""
    factors = _corrections_on(betas, device) / float(kappa(np.asarray(float(steps)), betas))
    factors[-1] = 1.0
    return factors


@functools.lru_cache(maxsize=16)
def _corrections_on(betas: Betas, device: torch.device) -> Tensor:
    return torch.from_numpy(corrections(betas)).to(device)
