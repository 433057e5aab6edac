"""SET with optimizer state that starts anew for each entrant."""

from __future__ import annotations

from dataclasses import dataclass

from topkast.methods.rewiring._set import SET


@dataclass(frozen=True)
class SMET(SET):
    """:class:`SET` with a falling share, under an optimizer whose entrants count their own steps.

    That second part every method of this library has: the displacement of a weight that enters B
    is scaled by its age, so that it moves as in a new optimizer.

    Parameters
    ----------
    fraction, signed, until
        As for :class:`SET`. In the authors' code, `until` is the end of the training, and 0.005 of
        A are replaced then.
    regrow
        Whether weights that are dropped may be drawn at once: not in the authors' code.

    Examples
    --------
    >>> from topkast.methods import SMET
    >>> SMET(until=10_000).fraction
    0.2

    References
    ----------
    Xiao et al., "Memory-efficient LLM training with dynamic sparsity: from stability to practical
    scaling", 2026. There, the first 100 steps of a weight that is grown also rise linearly in size,
    and the learning rate is larger for a smaller density: here, choose it for yours.
    """

    fraction: float = 0.2
    regrow: bool = False
