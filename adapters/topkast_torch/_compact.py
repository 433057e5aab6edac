"""The weights of one block between steps: values on B, and the reservoir; both are flat vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast import Support
from topkast._compact import Migration, move
from topkast._exploration import exploration_weights
from topkast._options import Options
from topkast._plan import Block


class CompactTensor(ABC):
    """Weights of one block: `values` on B, which the inner optimizer updates, and θ elsewhere.

    How the model sees them is for subclasses to say.
    """

    # Fixed at wrapping
    block: Block
    values: Parameter  # (1, …, |B|)
    reservoir: Tensor  # θ as one vector; stale on B until a refresh
    # Changed by a refresh
    support: Support
    changed: Tensor  # entries new to A, by member
    weights: Tensor  # of the exploration penalty
    # Changed by a step
    exploring: bool  # whether B∖A is still updated

    @abstractmethod
    def install(self) -> None:
        """Show the model α from now on."""

    @abstractmethod
    def adopt_changes(self) -> None:
        """Take over what someone else wrote into the model's Parameters, or refuse it."""

    @abstractmethod
    def load_gradient(self, *, penalty: float, kind: str) -> None:
        """Hand the inner optimizer the gradient on B, with that of the exploration penalty."""

    def unload_gradient(self) -> None:  # noqa: B027 - most have nothing to do
        """Give the model back the gradient that :meth:`load_gradient` took."""

    def carry(self, migration: Migration) -> None:  # noqa: B027
        """Carry over to the new B what the model holds of the old one."""

    @abstractmethod
    def show(self, *, everywhere: bool = False) -> None:
        """Show the model the values; `everywhere`: A has changed."""

    @abstractmethod
    def derive(self) -> None:
        """What follows from the support, computed once a refresh and not once a step."""

    @abstractmethod
    def gather_state(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """State that an optimizer has already, by member, for `values`; empty without any."""

    @abstractmethod
    def held_tensors(self) -> list[Tensor]:
        """What is held besides values, θ, the support and the penalty's weights."""

    def set_exploring(self, until: int | None, updates: int) -> None:
        """Whether the next update, after so many, still moves B∖A."""
        self.exploring = until is None or updates < until

    def add_penalty(self, gradient: Tensor, out: Tensor, *, penalty: float, kind: str) -> None:
        """Into `out`, the gradient of the loss on B (|B|,) and that of the exploration penalty."""
        if penalty:
            values = self.values.detach().view(-1)
            slope = values if kind == "l2" else torch.sgn(values)
            torch.addcmul(gradient, self.weights, slope, value=penalty, out=out)
        elif out is not gradient:
            out.copy_(gradient)
        if not self.exploring:
            out.masked_fill_(~self.support.active, 0)
            self._frozen = self.values.detach().clone()

    def settle(self) -> None:
        """After a step of the inner optimizer: undo it on B∖A once exploration has stopped."""
        if not self.exploring:
            values = self.values.detach()
            active = self.support.active.view(values.shape)
            values.copy_(torch.where(active, values, self._frozen))
        self.unload_gradient()
        self.show()

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
        self.carry(new.migration)
        self.restore(new.support, self.reservoir)

    def restore(self, support: Support, theta: Tensor) -> None:
        """Take these sets, and these weights (size,)."""
        self.support = support
        if theta is not self.reservoir:
            self.reservoir.copy_(theta)
        self.values.detach().view(-1).copy_(self.reservoir.index_select(0, support.indices))
        self.weigh()
        self.derive()
        self.show(everywhere=True)

    def weigh(self) -> None:
        """Weights of the exploration penalty for the current support."""
        self.weights = exploration_weights(
            self.support, density=self.block.density, dtype=self.values.dtype
        )

    def held_bytes(self, state: Mapping[str, Any]) -> int:
        """Bytes of values, gradient, optimizer state, indices and θ."""
        entries = [entry for entry in state.values() if isinstance(entry, Tensor)]
        own = [self.values, self.reservoir, *self.support, self.weights]
        return sum(tensor.nbytes for tensor in (*own, *self.held_tensors(), *entries))
