"""What an execution has to know about the inner optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from topkast.adapter import Traits
from topkast_torch.inner._inner_state import Layout


@dataclass(frozen=True)
class InnerProfile:
    """What trials found about the inner optimizer, for tensors of one number of dimensions."""

    layout: Layout
    traits: Traits

    @property
    def needs_ages(self) -> bool:
        """Whether the step of an entry depends on how long it has been in B."""
        return self.traits.betas is not None or not self.layout.starts_suffice
