"""How the weights of one tensor (or of several ranked as one) are held and stepped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast import Support
from topkast.adapter import (
    Migration,
    Options,
    RankedTensors,
    Refresh,
    Step,
    Traits,
    decide,
    is_due,
    method_of,
    settled_ages,
)
from topkast_torch.inner._fresh import name_of
from topkast_torch.inner._inner_state import Layout, check_known, entries_of, migrate
from topkast_torch.inner._young import Young


@dataclass(frozen=True)
class InnerProfile:
    """What trials showed of the inner optimizer, for tensors with one number of dimensions."""

    layout: Layout
    traits: Traits

    @property
    def needs_ages(self) -> bool:
        """Whether it matters how long an entry has been in B."""
        return self.traits.betas is not None or not self.layout.starts_suffice


class Execution(ABC):
    """Weights on B, `values`, which the inner optimizer updates, and θ elsewhere.

    How the model sees them is for subclasses to say.
    """

    # Fixed at wrapping
    ranked: RankedTensors
    values: Parameter  # (1, …, |B|)
    reservoir: Tensor  # θ as one vector; stale on B until a refresh
    profile: InnerProfile
    overrides: dict[str, Any]  # options of these tensors alone
    refreshes: bool  # whether their method ever chooses sets anew
    # Changed by a refresh
    support: Support
    entered_active: Tensor  # entries new to A, by member
    young: Young | None
    # Changed by a step
    step: Step  # what the next one does
    steps: int  # of the inner optimizer on these weights

    def start(self, profile: InnerProfile, options: Options, updates: int, steps: int) -> None:
        """What all executions begin with, once they have weights and sets."""
        self.profile, self.steps = profile, steps
        self.overrides = {"method": options.method} | options.overrides_of(self.ranked.key)
        self.refreshes = method_of(options.for_tensor(self.ranked.key)).refreshes
        self.entered_active = self.ranked.no_change(self.support.indices)
        self.young = None
        if profile.needs_ages:
            self.young = Young(
                settled_ages(self.support.backward_size, self.support.indices), profile
            )
        self.decide(options.for_group(), updates)

    def option(self, group: Mapping[str, Any], name: str) -> Any:
        """The value of a group's option for these tensors."""
        return self.overrides.get(name, group[name])

    @abstractmethod
    def install(self) -> None:
        """Make the model see α from now on."""

    @abstractmethod
    def uninstall(self, *, dense: bool) -> None:
        """Leave the model with α, or with θ if `dense`, and have no effect on it any more."""

    @abstractmethod
    def forget(self) -> None:
        """Have no effect on the model any more."""

    @abstractmethod
    def replaced(self, param: Tensor) -> None:
        """A Parameter was replaced in the model by another one."""

    @abstractmethod
    def accept_external_writes(self) -> None:
        """Take over what someone else wrote into the model's Parameters, or refuse it."""

    @abstractmethod
    def gather_gradient(self) -> Tensor | None:
        """The gradient of the loss on B (|B|,), None where there is none."""

    @abstractmethod
    def gradient_buffer(self) -> Tensor:
        """Where the gradient with the penalty's may be written, (|B|,)."""

    @abstractmethod
    def restore_gradient(self) -> None:
        """Give the model back the gradient that the inner optimizer was handed."""

    def migrate_gradient(self, migration: Migration) -> None:  # noqa: B027
        """Carry over to the next B what the model holds of the present one."""

    @abstractmethod
    def write_forward_view(self, *, everywhere: bool = False) -> None:
        """Make the model see the values; `everywhere`: A has changed."""

    @abstractmethod
    def update_positions(self) -> None:
        """What follows from the support, computed once a refresh and not once a step."""

    @abstractmethod
    def restrict_state(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """State that an optimizer has already, by member, for `values`; empty without any."""

    @abstractmethod
    def held_tensors(self) -> list[Tensor]:
        """What is held besides values, θ and the support."""

    def decide(self, group: Mapping[str, Any], updates: int) -> None:
        """What the next update, after some number of them, does to these tensors."""
        ascends = group.get("maximize", self.profile.traits.ascends)
        self.step = decide(
            penalty=self.option(group, "penalty"),
            penalty_kind=self.option(group, "penalty_kind"),
            density=self.ranked.density,
            ascends=bool(ascends),
            explore_until=self.option(group, "explore_until"),
            updates=updates,
            betas=None if self.young is None else self.young.betas(group),
        )

    def is_due(self, group: Mapping[str, Any], updates: int) -> bool:
        """Whether other sets are to be chosen after a number of updates."""
        due: bool = is_due(self.option(group, "refresh_every"), updates)
        return self.refreshes and due

    def load_gradient(self, inner: torch.optim.Optimizer, group: Mapping[str, Any]) -> None:
        """Hand the inner optimizer the gradient on B, with that of the exploration penalty."""
        gradient = self.gather_gradient()
        if gradient is None:
            self.values.grad = None
            return
        if self.step.penalty or not self.step.exploring:
            buffer = self.gradient_buffer()
            self._add_penalty(gradient, buffer)
            gradient = buffer
        self.values.grad = gradient.view(self.ranked.compact_shape)
        if not self.step.exploring:
            self._frozen = self._exploring_values().clone()
        if self.young is not None:
            self.young.before_step(inner, group, self.values, self.step.betas)

    def _add_penalty(self, gradient: Tensor, out: Tensor) -> None:
        """Write a gradient (|B|,), with what the step adds to it, to `out`."""
        values, split, step = self.values.detach().view(-1), self.support.forward_size, self.step
        if step.penalty:
            direction = values if step.penalty_kind == "l2" else torch.sgn(values)
            both = (slice(split), step.on_active), (slice(split, None), step.on_exploring)
            for part, factor in both:
                torch.add(gradient[part], direction[part], alpha=factor, out=out[part])
        elif out is not gradient:
            out.copy_(gradient)
        if not step.exploring:
            out[split:].zero_()

    def _exploring_values(self) -> Tensor:
        return self.values.detach().view(-1)[self.support.forward_size :]

    def finish_step(
        self, inner: torch.optim.Optimizer, group: Mapping[str, Any], *, stepped: bool
    ) -> None:
        """After the inner optimizer has stepped, or has failed to: the model sees what is there."""
        if self.values.grad is not None:
            if self.young is not None and stepped:
                self.young.after_step(inner, self.values, self.steps, self.step.betas)
            if not self.step.exploring:
                self._exploring_values().copy_(self._frozen)
            self.write_forward_view()
        self.restore_gradient()

    def count_step(self) -> None:
        """Another step of the inner optimizer was made."""
        if self.values.grad is not None:
            self.steps += 1
            if self.young is not None:
                self.young.count_step()

    def member_parts(self) -> dict[str, tuple[slice, slice]]:
        """Where each member's entries of A and of B∖A are in the compact vector."""
        support = self.support
        if len(self.ranked.shapes) == 1:
            split, stop = support.forward_size, support.backward_size
            return {self.ranked.key: (slice(0, split), slice(split, stop))}
        device = support.indices.device
        starts = torch.tensor([start for start, _ in self.ranked.bounds.values()], device=device)
        ranges = []
        for part, first in ((support.active, 0), (support.exploring, support.forward)):
            edges = (torch.searchsorted(part, starts.to(part.dtype)) + first).tolist()
            ranges.append(map(slice, edges, [*edges[1:], first + len(part)]))
        return dict(zip(self.ranked.shapes, zip(*ranges, strict=True), strict=True))

    def theta(self) -> Tensor:
        """All weights as one vector: the reservoir, brought up to date."""
        self.reservoir.index_copy_(0, self.support.entries.long(), self.values.detach().view(-1))
        return self.reservoir

    def choose(self, options: Options, updates: int) -> Refresh:
        """The next sets, from the present weights; changes nothing."""
        return self.ranked.refresh(self.theta(), self.support, options, updates)

    def check_known(self, inner: torch.optim.Optimizer) -> None:
        """Raise :class:`UnsupportedOptimizerError` for state that could not follow B."""
        layout = self.profile.layout
        kept = entries_of(inner, self.values, layout.stores)
        check_known(kept, layout, self.values.numel(), name_of(inner))

    def adopt(
        self, chosen: Refresh, inner: torch.optim.Optimizer, group: Mapping[str, Any]
    ) -> None:
        """Take other sets; carry values and what the inner optimizer keeps over to the next B."""
        self.entered_active = chosen.entered_active
        self.migrate_gradient(chosen.migration)
        self.restore(chosen.support, self.reservoir)
        kept = entries_of(inner, self.values, self.profile.layout.stores)
        migrate(kept, self.profile.layout, self.values, chosen.migration)
        if self.young is not None:
            self.young.migrate(chosen.migration, group)

    def restore(self, support: Support, theta: Tensor) -> None:
        """Take these sets, and these weights (size,)."""
        self.support = support
        if theta is not self.reservoir:
            self.reservoir.copy_(theta)
        self.values.detach().view(-1).copy_(self.reservoir.index_select(0, support.entries))
        self.update_positions()
        self.write_forward_view(everywhere=True)

    def held_bytes(self, entries: list[Tensor]) -> int:
        """Bytes of values, gradient, the inner optimizer's entries, indices, ages and θ."""
        own = [self.values, self.reservoir, self.support.indices]
        young = 0 if self.young is None else self.young.nbytes
        held: int = sum(tensor.nbytes for tensor in (*own, *self.held_tensors(), *entries))
        return young + held
