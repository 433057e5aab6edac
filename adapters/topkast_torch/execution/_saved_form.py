"""The form in which a checkpoint has what is stored for each weight of B."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class SavedForm:
    """The form of vectors over B that one process holds: they are saved as they are."""

    def save_entries(self, stores: Any) -> Any:
        """The inner optimizer's entries, by store, as a checkpoint has them."""
        return stores

    def load_entries(self, stores: Any) -> Any:
        """The inverse of :meth:`save_entries`; may share memory."""
        return stores

    def save_vector(self, vector: Tensor) -> Tensor:
        """A vector over the values that this process holds, as a checkpoint has it (|B|,)."""
        return vector

    def load_vector(self, vector: Tensor) -> Tensor:
        """The inverse of :meth:`save_vector`; may share memory."""
        return vector
