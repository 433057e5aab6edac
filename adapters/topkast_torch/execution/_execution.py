"""An execution stores and steps the weights of one tensor, or of several ranked as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast import OptionError, Support
from topkast.adapter import (
    IncrementalSelection,
    Method,
    Migration,
    Options,
    PreparedRefresh,
    RankedTensors,
    Refresh,
    Step,
    decide,
    is_due,
    method_of,
    noise_key,
    settled_ages,
)
from topkast.reservoirs import Reservoir
from topkast_torch._reservoirs import STREAMED, all_weights, exchange_weights
from topkast_torch.execution._penalized import add_penalty
from topkast_torch.execution._profile import InnerProfile
from topkast_torch.execution._saved_form import SavedForm
from topkast_torch.inner._fresh import class_name
from topkast_torch.inner._inner_state import (
    Moving,
    add_entries,
    check_migratable,
    entries_of,
    is_identity,
)
from topkast_torch.inner._young import YoungEntries

# Options of a group that a step is decided from; those of moving averages as `betas_of` reads them.
_OPTIONS = "penalty", "penalty_kind", "explore_until", "refresh_every", "maximize"
_DECIDING = *_OPTIONS, "betas", "beta1", "beta2", "b1", "b2"


class Execution(ABC):
    """The values on B, which the inner optimizer updates, and θ elsewhere.

    Subclasses define how the model sees the values.
    """

    # Fixed at wrapping
    ranked: RankedTensors
    values: Parameter  # (1, …, |B|)
    reservoir: Reservoir  # θ outside B
    profile: InnerProfile
    overrides: dict[str, Any]  # options set for these tensors only
    power: float
    method: Method
    saved_form: SavedForm = SavedForm()
    options_checksum: int = 0  # which all processes must share
    # Changed by a refresh
    support: Support
    entered_active: Tensor  # number of entries new to A, by member
    young: YoungEntries | None
    momentum: Tensor | None  # the running mean of the gradient on all weights (n,), if needed
    selection: IncrementalSelection
    is_divided: bool = False  # while a refresh or a load changes the fields
    # Changed by a step
    step: Step  # the next step
    awaits_gradient: bool  # whether the refresh after it needs the gradient outside B
    _decided_from: Any = None  # what `step` was decided from
    _frozen: Tensor | None = None  # values on B∖A, which rest in the step
    _noise_key: Any  # of random words
    _base: tuple[Tensor, Tensor] | None  # during a step under `power`: φ and the weights
    steps: int  # taken by the inner optimizer on these weights

    def set_up(self, profile: InnerProfile, options: Options, updates: int, steps: int) -> None:
        """Initialise the fields that all executions share; weights and sets must be set."""
        self.profile, self.steps = profile, steps
        self.overrides = {"method": options.method} | options.overrides_of(self.ranked.key)
        self.overrides.pop("reservoir", None)  # which is fixed
        self.method, self.power = method_of(options.for_tensor(self.ranked.key)), options.power
        if self.power != 1 and profile.layout.copies_weights:
            raise OptionError(
                f"power={self.power} cannot be combined with an optimizer whose state holds copies "
                "of the weights: pass power=1, or choose one without averages, such as AdamW"
            )
        self._base, self._noise_key = None, noise_key(options, self.ranked.key)
        self.entered_active = self.ranked.no_change(self.support.indices)
        self.young, self.momentum, self.selection = None, None, IncrementalSelection()
        if "momentum" in self.method.needs:
            self.momentum = self.values.new_zeros(self.ranked.size, requires_grad=False)
        if profile.needs_ages:
            self.young = YoungEntries(
                settled_ages(self.values.numel(), self.support.indices), profile
            )
        self.decide(options.for_group(), updates)

    @property
    def held(self) -> Support:
        """The entries of the sets whose values this process holds: all, unless they are sharded."""
        return self.support

    @property
    def refreshes(self) -> bool:
        """Whether the method ever chooses new sets."""
        return self.method.refreshes

    def option(self, group: Mapping[str, Any], name: str) -> Any:
        """The value of an option for these tensors: the override, else the group's."""
        return self.overrides.get(name, group[name])

    @abstractmethod
    def install(self) -> None:
        """Write α into the model and connect to it."""

    @abstractmethod
    def uninstall(self, *, dense: bool) -> None:
        """Leave α, or θ if `dense`, in the model and disconnect from it."""

    @abstractmethod
    def disconnect(self) -> None:
        """Remove the hooks and give up the Parameters."""

    @abstractmethod
    def note_replacement(self, param: Tensor, *, is_replaced: bool) -> None:
        """Record whether the model has another Parameter in place of `param`."""

    @abstractmethod
    def accept_external_writes(self, *, thorough: bool = False) -> None:
        """Accept what others wrote into the model's Parameters, or raise MismatchError.

        If `thorough`, find writes outside A too that left no trace, as those by ``param.data``.
        """

    @abstractmethod
    def gather_gradient(self) -> Tensor | None:
        """The gradient of the loss on B (|B|,); None if the Parameters have none."""

    @abstractmethod
    def whole_gradient(self) -> Any:
        """The gradient of the loss on all weights (n,), or an object that yields it in blocks.

        None if the Parameters have none. It is kept before refreshes that need it.
        """

    @abstractmethod
    def gradient_buffer(self) -> Tensor | None:
        """A buffer (|B|,) for the sum of the gradients of loss and penalty; None for a new one."""

    @abstractmethod
    def restore_gradient(self) -> None:
        """Restore the model's gradient, which the inner optimizer saw with the penalty added."""

    def move_gradient(self, moving: Moving) -> None:  # noqa: B027
        """Move a gradient that the model holds from the old B to the new B."""

    @abstractmethod
    def write_forward_view(self, *, everywhere: bool = False) -> None:
        """Write the values on A into the model, and zeros elsewhere if `everywhere`."""

    @abstractmethod
    def update_positions(self) -> None:
        """Compute everything derived from the support; once per refresh."""

    @abstractmethod
    def restrict_state(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The inner optimizer's existing state for `values`, from its state by member."""

    @abstractmethod
    def gradient_bytes(self) -> int:
        """Bytes of the gradient on B."""

    @abstractmethod
    def layout_bytes(self) -> int:
        """Bytes of everything derived from the support."""

    def decide(self, group: Mapping[str, Any], updates: int, *, overdue: bool = False) -> None:
        """Decide the next step of these tensors, after `updates` updates.

        `overdue` tells whether the last refresh has failed, so that one follows in any case.
        """
        counts = (
            self.method.noise
            or "gradient" in self.method.needs
            or self.option(group, "explore_until") is not None
        )
        options = [group.get(name) for name in _DECIDING]
        count = (updates, overdue) if counts else None
        basis = count, self.method, self.young is None, self.ranked.density, options
        if basis == self._decided_from:  # as at most steps
            return
        self._decided_from = basis
        ascends = group.get("maximize", self.profile.traits.ascends)
        self.step = decide(
            penalty=self.option(group, "penalty"),
            penalty_kind=self.option(group, "penalty_kind"),
            density=self.ranked.density,
            ascends=bool(ascends),
            explore_until=self.option(group, "explore_until") if self.method.explores else 0,
            updates=updates,
            betas=None if self.young is None else self.young.betas(group),
            power=self.power,
            noise=self.method.noise,
            key=self._noise_key,
        )
        refreshes = self.is_due(group, updates + 1) or (overdue and self.refreshes)
        needs_gradient = "gradient" in self.method.needs and refreshes
        self.awaits_gradient = self.momentum is not None or needs_gradient

    def is_due(self, group: Mapping[str, Any], updates: int) -> bool:
        """Whether a refresh is due after `updates` updates."""
        due: bool = is_due(self.option(group, "refresh_every"), updates)
        return self.refreshes and due

    def load_gradient(self, inner: torch.optim.Optimizer, group: Mapping[str, Any]) -> None:
        """Give the inner optimizer the gradient on B, the exploration penalty's included."""
        gradient = self.gather_gradient()
        if gradient is None:
            self.values.grad = None
            return
        if self.momentum is not None:
            whole: Any = self.whole_gradient()
            self.momentum.lerp_(whole.detach().to(self.momentum.dtype), 1 - self.method.momentum)
        step = self.step
        if step.penalty or not step.exploring or self.power != 1 or step.noise:
            values, buffer = self.values.detach().view(-1), self.gradient_buffer()
            gradient = add_penalty(gradient, values, self.held, step, buffer)
        self.values.grad = gradient.view(self.values.shape)
        if not self.step.exploring:
            self._frozen = self._exploring_values().clone()
        if self.power != 1:
            self._enter_base(gradient)
        if self.young is not None:
            self.steps = self.young.notice_reset(inner, group, self.values, self.steps)
            self.young.before_step(inner, group, self.values, self.step.betas)

    def _enter_base(self, gradient: Tensor) -> None:
        """Replace weights and gradient (|B|,) by φ and its gradient, for the inner optimizer."""
        values = self.values.detach().view(-1)
        base = self.step.to_base(values)
        self._base = base, values.clone()
        values.copy_(base)
        gradient.copy_(self.step.chain(gradient, base))

    def _leave_base(self) -> None:
        """Replace φ by the weights."""
        if self._base is not None:
            values = self.values.detach().view(-1)
            values.copy_(self.step.to_weights(values, *self._base))
            self._base = None

    def _exploring_values(self) -> Tensor:
        return self.values.detach().view(-1)[self.held.forward_size :]

    def finish_step(
        self, inner: torch.optim.Optimizer, group: Mapping[str, Any], *, stepped: bool
    ) -> None:
        """Write the values back into the model, whether the inner optimizer `stepped` or failed."""
        if self.values.grad is not None:
            if self.young is not None and stepped:
                self.young.after_step(inner, self.values, self.steps, self.step.betas)
            self._leave_base()
            if self._frozen is not None:
                self._exploring_values().copy_(self._frozen)
            self.write_forward_view()
        self._frozen = None
        self.restore_gradient()

    def count_step(self) -> None:
        """Count a step of the inner optimizer."""
        if self.values.grad is not None:
            self.steps += 1
            if self.young is not None:
                self.young.count_step()

    def member_slices(self) -> dict[str, tuple[slice, slice]]:
        """Slices of the compact vector that hold each member's entries of A and of B∖A."""
        support = self.support
        if len(self.ranked.shapes) == 1:
            split, stop = support.forward_size, support.backward_size
            return {self.ranked.key: (slice(0, split), slice(split, stop))}
        device = support.indices.device
        starts = torch.tensor([start for start, _ in self.ranked.bounds.values()], device=device)
        ranges = []
        for indices, offset in ((support.active, 0), (support.exploring, support.forward)):
            edges = (torch.searchsorted(indices, starts.to(indices.dtype)) + offset).tolist()
            ranges.append(map(slice, edges, [*edges[1:], offset + len(indices)]))
        return dict(zip(self.ranked.shapes, zip(*ranges, strict=True), strict=True))

    def theta(self) -> Tensor:
        """All weights as one vector, which may be the reservoir's own memory."""
        return all_weights(self.reservoir, self.support, self.values)

    def dense_weights(self) -> dict[str, Tensor]:
        """Copies of all weights, by member."""
        weights: dict[str, Tensor] = self.ranked.unflatten(self.theta().clone())
        return weights

    def choose_sets(self, options: Options, updates: int) -> Refresh | PreparedRefresh:
        """Choose the next sets from the current weights, without applying them."""
        chosen = self._choose_incrementally(options)
        if chosen is not None:
            return chosen
        values = self.values.detach().view(-1)
        # Other methods read nothing but the shape, device and dtype of the weights.
        reads_all = "weights" in self.method.needs
        weights = self.theta() if reads_all else values.new_zeros(1).expand(self.ranked.size)
        gradient = self.whole_gradient() if "gradient" in self.method.needs else self.momentum
        return self.ranked.refresh(weights, self.support, options, updates, values, gradient)

    def _choose_incrementally(self, options: Options) -> PreparedRefresh | None:
        """Choose the next sets from few candidates; None if all weights have to be read."""
        stays = self.values.device.type != "cpu" and self.reservoir.kind == "device"
        if stays or self.values.dtype not in STREAMED:
            return None
        values, indices = (
            tensor.detach().view(-1).cpu().numpy() for tensor in (self.values, self.support.indices)
        )
        old = Support(indices, self.support.forward, self.support.blocks)
        return self.ranked.prepare_refresh(values, self.reservoir, old, options, self.selection)

    def check_migratable(self, inner: torch.optim.Optimizer) -> None:
        """Raise :class:`UnsupportedOptimizerError` for state that cannot be migrated."""
        layout = self.profile.layout
        entries = entries_of(inner, self.values, layout.stores)
        check_migratable(entries, layout, self.values.numel(), class_name(inner))

    def apply_refresh(
        self,
        refresh: Refresh | PreparedRefresh,
        inner: torch.optim.Optimizer,
        group: Mapping[str, Any],
    ) -> None:
        """Switch to new sets; migrate values, gradient, inner state and ages to the new B."""
        if isinstance(refresh, Refresh):
            new, migration, entered_active = refresh
            old = self.values.detach().view(-1)
            values = exchange_weights(self.reservoir, self.support, new, migration, old)
            self.selection = IncrementalSelection(loss=self.selection.loss)
        else:
            # One tensor after the other: what is made for it is used while it is in the caches.
            chosen = refresh()
            host, migration = chosen.support, Migration(*map(self._to_device, chosen.migration))
            values, entered_active = map(self._to_device, (chosen.values, chosen.entered_active))
            new = Support(self._to_device(host.indices), host.forward, host.blocks)
            self.is_divided = True  # from the first write on
            self.reservoir.write(*chosen.left, host.ascending_entries())
            self.selection = chosen.selection
        self.is_divided = True
        moving = Moving(migration)
        self.move_gradient(moving)
        self.values.detach().view(-1).copy_(values)
        if self.method.forgets:
            self.values.detach().view(-1)[new.forward_size :].zero_()
        self._switch_to(new)
        self.entered_active = entered_active
        entries = entries_of(inner, self.values, self.profile.layout.stores)
        if not is_identity(migration):
            add_entries(moving, entries, self.profile.layout, self.values)
        if (young := self.young) is not None:
            moving.add(*young.move(), lambda ages: young.take(ages, group))
        moving.run()
        self.is_divided = False

    def _to_device(self, host: Any) -> Tensor:
        return torch.from_numpy(host).to(self.values.device)

    def restore(self, support: Support, values: Tensor, reservoir: Reservoir) -> None:
        """Set the support, the values on B (|B|,) and the weights outside B."""
        self.reservoir = reservoir
        self.values.detach().view(-1).copy_(values)
        self._switch_to(support)
        self.selection = IncrementalSelection(loss=self.selection.loss)
        self.is_divided = False

    def _switch_to(self, support: Support) -> None:
        """Take a support whose values are set, and write them into the model."""
        self.support = support
        self.update_positions()
        self.write_forward_view(everywhere=True)

    def count_bytes(self, entries: list[Tensor]) -> dict[str, int]:
        """Bytes in memory by what they hold; `entries` are the inner optimizer's."""
        return {
            "values": self.values.nbytes,
            "gradient": self.gradient_bytes(),
            "state": sum(entry.nbytes for entry in entries),
            "indices": self.support.indices.nbytes,
            "layouts": self.layout_bytes(),
            "ages": 0 if self.young is None else self.young.nbytes,
            "momentum": 0 if self.momentum is None else self.momentum.nbytes,
            "reserve": self.selection.nbytes,
            "reservoir": self.reservoir.nbytes,
        }
