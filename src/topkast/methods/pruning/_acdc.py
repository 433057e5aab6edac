"""AC/DC: alternating compressed and decompressed training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from topkast._method import Method, View
from topkast.methods._schedules import check_updates, updates_of
from topkast.selection._replace import split_by_magnitude
from topkast.selection._support import Support


@dataclass(frozen=True, kw_only=True)
class ACDC(Method):
    """Phases with all weights and phases with the largest ones alternate; a sparse one is last.

    At the start of a sparse phase, all other weights become zero; at the start of the next phase,
    they learn again, from zero and with fresh state of the optimizer. Phases begin at refreshes:
    `refresh_every` should divide the numbers below. The paper ranks all tensors as one:
    ``distribution="global"``.

    Parameters
    ----------
    warm_up
        Updates of the first phase, in which all weights are trained.
    sparse, dense
        Updates of a sparse phase, and of a phase with all weights.
    end
        Update at which the last sparse phase begins.

    Raises
    ------
    OptionError
        For values out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.methods import ACDC, View
    >>> method = ACDC(warm_up=10, sparse=5, dense=5, end=20)
    >>> weights = np.asarray([0.1, -0.9, 0.5])
    >>> [
    ...     method.choose(View(weights, forward=1, backward=3, draw=update)).forward
    ...     for update in (0, 5, 10, 15, 20, 25)
    ... ]
    [3, 3, 1, 3, 1, 1]

    References
    ----------
    Peste et al., "AC/DC: alternating compressed/decompressed training of deep neural networks",
    2021. There, the momentum of weights outside A falls without a gradient through a sparse phase,
    and what is left of it acts in the next one.
    """

    warm_up: int
    sparse: int
    dense: int
    end: int

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "sets"})
    forgets: ClassVar[bool] = True
    explores: ClassVar[bool] = False
    schedules: ClassVar[bool] = True
    backward: ClassVar[Literal["any", "equal", "none"]] = "none"
    default_penalty: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check_updates("warm_up", self.warm_up, least=0)
        for name in ("sparse", "dense", "end"):
            check_updates(name, getattr(self, name))

    def choose(self, view: View, /) -> Support:
        """Choose all weights, the largest, or those of the present sparse phase."""
        if not self.is_sparse(updates_of(view, self)):
            return split_by_magnitude(view, view.backward)
        if view.support is not None and view.support.forward == view.forward < view.backward:
            return view.support
        return split_by_magnitude(view, view.forward)

    def is_sparse(self, update: int) -> bool:
        """Whether a refresh after `update` updates is in a sparse phase."""
        if update >= self.end:
            return True
        return update >= self.warm_up and (
            (update - self.warm_up) % (self.sparse + self.dense) < self.sparse
        )
