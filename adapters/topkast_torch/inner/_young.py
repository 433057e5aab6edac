"""Entries that entered B late: they start, and move, as a fresh optimizer would move them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from topkast.adapter import SETTLED, Betas, Migration, corrections, kappa, young_limit
from topkast_torch.inner._fresh import fresh_optimizer, step_without_hooks
from topkast_torch.inner._inner_state import Start, entries_of, walk
from topkast_torch.inner._probe import betas_of

if TYPE_CHECKING:
    from topkast_torch.execution._execution import InnerProfile


class Young:
    """Ages of the entries of one B, and what the inner optimizer does to the young ones.

    Attributes
    ----------
    ages
        Updates since each entry entered B, int16, as they were at the last refresh.
    since
        Updates since then.
    """

    def __init__(self, ages: Tensor, profile: InnerProfile) -> None:
        self.ages, self.since, self._profile = ages, 0, profile
        self._find(None)

    def current(self) -> Tensor:
        """The ages now, int16."""
        grown = self.ages.int() + self.since
        ages = torch.where(self.ages == SETTLED, SETTLED, grown.clamp_(max=SETTLED))
        return ages.to(torch.int16)

    def restore(self, ages: Tensor, group: Mapping[str, Any] | None = None) -> None:
        """Take these ages."""
        self.ages, self.since = ages, 0
        self._find(group)

    def migrate(self, migration: Migration, group: Mapping[str, Any]) -> None:
        """Carry the ages over to the next B, whose entrants are of age 0."""
        self.restore(migration.apply(self.current()), group)

    def count_step(self) -> None:
        """One more update was made."""
        self.since += 1

    def _find(self, group: Mapping[str, Any] | None) -> None:
        """Positions of the entries that are young, or have not been stepped at all."""
        betas = self.betas(group or {})
        self._limit = 1 if betas is None else young_limit(betas)
        positions = _true_positions(self.ages < self._limit)
        # To find them again is cheaper than to hold them, but on an accelerator it would wait.
        self._any_young = len(positions) > 0
        self._positions = None if self.ages.device.type == "cpu" else positions
        self._entrants = self.ages.new_empty(0, dtype=torch.int32)
        if not self._profile.layout.starts_suffice:
            self._entrants = _true_positions(self.ages == 0)

    @property
    def nbytes(self) -> int:
        """Bytes of ages, and of positions that are held."""
        held = 0 if self._positions is None else self._positions.nbytes
        return self.ages.nbytes + self._entrants.nbytes + held

    def betas(self, group: Mapping[str, Any]) -> Betas | None:
        """The pair that the inner optimizer uses now: a schedule may change it."""
        found = self._profile.traits.betas
        present = betas_of(group)
        if found is None or not present:
            return found
        mean = 0.0 if found[0] == 0 else present[0]
        square = min(present[1:], key=lambda beta: abs(beta - found[1]), default=found[1])
        return mean, square

    def before_step(
        self,
        inner: torch.optim.Optimizer,
        group: Mapping[str, Any],
        values: Parameter,
        betas: Betas | None,
    ) -> None:
        """Remember what is to be scaled after the step, and step entrants by themselves."""
        self._before = self._first = None
        if not self._any_young:
            return
        if betas is not None:
            young = self._positions
            if young is None:
                young = _true_positions(self.ages < self._limit)
            old = [flat.index_select(0, young) for flat in self._moving(inner, values)]
            self._before = young, old
        if not self._profile.layout.starts_suffice and not self.since and self._entrants.numel():
            self._first = self._step_entrants(inner, group, values)

    def after_step(
        self,
        inner: torch.optim.Optimizer,
        values: Parameter,
        steps: int,
        betas: Betas | None,
    ) -> None:
        """Scale the displacement of young entries; `steps` are those before this one."""
        if self._before is not None and betas is not None:
            young, before = self._before
            factors = self._factors(betas, steps + 1, values.device)
            ages = self.ages.index_select(0, young).int() + (self.since + 1)
            ages.clamp_(max=len(factors) - 1)
            share = factors.index_select(0, ages)
            for old, flat in zip(before, self._moving(inner, values), strict=False):
                new = flat.index_select(0, young)
                weight = share.to(new.real.dtype if new.is_complex() else new.dtype)
                flat.index_copy_(0, young.long(), _interpolate(old, new, weight))
        if self._first is not None:
            self._adopt_first(inner, values)
        self._before = self._first = None

    @staticmethod
    def _factors(betas: Betas, steps: int, device: torch.device) -> Tensor:
        """κ(age) / κ(steps) by age; exactly 1 at the end, where entries are settled."""
        table = _table(betas, device)
        factors = table / float(kappa(np.asarray(float(steps)), betas))
        factors[-1] = 1.0
        return factors

    def _moving(self, inner: torch.optim.Optimizer, values: Parameter) -> list[Tensor]:
        """The values, and what moves as they do: entries that started as copies of them."""
        layout = self._profile.layout
        moving = [values.detach().view(-1)]
        if any(isinstance(start, Start) for start in layout.starts.values()):
            kept = entries_of(inner, values, layout.stores)
            moving += [
                entry.view(-1)
                for path, entry in walk(kept)
                if isinstance(layout.starts.get(path), Start) and entry.numel() == values.numel()
            ]
        return moving

    def _step_entrants(
        self, inner: torch.optim.Optimizer, group: Mapping[str, Any], values: Parameter
    ) -> tuple[Tensor, dict[Any, Any]]:
        """What a fresh optimizer makes of the entrants in its first step."""
        assert values.grad is not None
        shape = (1,) * (values.dim() - 1) + (-1,)
        entrants = Parameter(
            values.detach().view(-1).index_select(0, self._entrants).view(shape).clone()
        )
        entrants.grad = values.grad.view(-1).index_select(0, self._entrants).view(shape)
        fresh = fresh_optimizer(inner, group, [entrants])
        step_without_hooks(fresh)
        kept = entries_of(fresh, entrants, self._profile.layout.stores)
        first: dict[Any, list[Tensor]] = {}
        for path, entry in walk(kept):
            first.setdefault(path, []).append(entry)
        return entrants.detach().view(-1), first

    def _adopt_first(self, inner: torch.optim.Optimizer, values: Parameter) -> None:
        assert self._first is not None
        weights, first = self._first
        values.detach().view(-1).index_copy_(0, self._entrants.long(), weights)
        layout = self._profile.layout
        for path, entry in walk(entries_of(inner, values, layout.stores)):
            if path in layout.specs and first.get(path):
                axis = layout.specs[path].axis(tuple(values.shape))
                source = first[path][0 if len(first[path]) == 1 else -1]
                entry.index_copy_(axis, self._entrants.long(), source.to(entry.dtype))


def _true_positions(flags: Tensor) -> Tensor:
    """Positions of the true entries, int32: B has fewer entries than that can number."""
    positions = flags.nonzero().view(-1)
    return positions.int() if len(flags) < 1 << 31 else positions


def _interpolate(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """``old + weight · (new − old)``, the bits of `new` where the weight is 1."""
    if new.is_complex():
        return torch.where(weight == 1, new, old + (new - old) * weight)
    return torch.lerp(old, new, weight)


@functools.lru_cache(maxsize=16)
def _table(betas: Betas, device: torch.device) -> Tensor:
    return torch.from_numpy(corrections(betas)).to(device)
