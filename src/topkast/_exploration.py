"""The exploration penalty: it shrinks what is in B, so that others get their turn."""

from __future__ import annotations

from array_api_compat import array_namespace

from topkast._errors import OptionError
from topkast._options import PenaltyKind
from topkast._primitives import Array, device
from topkast._selection import Support


def exploration_weights(support: Support, /, *, density: float, dtype: object) -> Array:
    """Weight of each entry of B in the penalty: 1 on A, 1/D on B∖A; shape (|B|,)."""
    xp = array_namespace(support.active)
    place = device(support.active)
    # Filled there, and not copied from the host, which would wait for an accelerator.
    one = xp.full((), 1.0, dtype=dtype, device=place)
    inverse = xp.full((), 1.0 / density, dtype=dtype, device=place)
    return xp.where(support.active, one, inverse)


def exploration_penalty(
    values: Array,
    support: Support,
    /,
    *,
    penalty: float,
    density: float,
    kind: PenaltyKind = "l2",
) -> Array:
    r"""The exploration penalty of one tensor, a function of its values on B.

    .. math::
       R(\theta) = \frac{\lambda}{2} \sum_{i \in B} w_i \theta_i^2 \;\text{(l2)}, \quad
       R(\theta) = \lambda \sum_{i \in B} w_i |\theta_i| \;\text{(l1)}, \quad
       w_i = \begin{cases} 1 & i \in A \\ 1 / D & i \in B \setminus A \end{cases}

    Parameters
    ----------
    values
        Values on B, as from :func:`topkast.gather`; \|B\| entries of any shape.
    support
        The sets of the tensor.
    penalty
        The coefficient λ.
    density
        The forward **density** D = 1 − ``fwd``, in (0, 1]: not the sparsity.
    kind
        ``"l2"`` or ``"l1"``.

    Returns
    -------
    array
        A 0-d array of the real dtype of `values`. Differentiable where the library is.

    Raises
    ------
    OptionError
        For another kind, or a density outside (0, 1].

    Examples
    --------
    >>> import numpy as np, topkast
    >>> theta = np.asarray([3.0, 2.0, 1.0, 0.0])
    >>> support = topkast.select(theta, fwd=0.75, bwd=0.5)  # A = {0}, B = {0, 1}
    >>> values = topkast.gather(theta, support)
    >>> float(topkast.exploration_penalty(values, support, penalty=0.1, density=0.25))
    1.25

    References
    ----------
    Top-KAST, section 2.3, whose formula is the l1 kind and whose text and pseudocode the l2 one.
    """
    _check(density, kind)
    xp = array_namespace(values)
    flat = xp.reshape(values, (-1,))
    if kind == "l1":
        magnitudes = xp.abs(flat)
        weights = exploration_weights(support, density=density, dtype=magnitudes.dtype)
        return penalty * xp.sum(weights * magnitudes)
    squares = xp.abs(flat) ** 2 if xp.isdtype(flat.dtype, "complex floating") else flat * flat
    weights = exploration_weights(support, density=density, dtype=squares.dtype)
    return penalty / 2 * xp.sum(weights * squares)


def exploration_gradient(
    values: Array,
    support: Support,
    /,
    *,
    penalty: float,
    density: float,
    kind: PenaltyKind = "l2",
) -> Array:
    r"""Gradient of :func:`exploration_penalty` with respect to the values on B.

    :math:`\lambda w_i \theta_i` (l2) or :math:`\lambda w_i \operatorname{sign} \theta_i` (l1).
    The gradient on the reservoir C is zero: nothing there is an argument of the penalty.

    Parameters
    ----------
    values, support, penalty, density, kind
        As for :func:`exploration_penalty`.

    Returns
    -------
    array
        Shape and dtype of `values`.

    Raises
    ------
    OptionError
        As :func:`exploration_penalty`.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> theta = np.asarray([3.0, 2.0, 1.0, 0.0])
    >>> support = topkast.select(theta, fwd=0.75, bwd=0.5)
    >>> values = topkast.gather(theta, support)
    >>> topkast.exploration_gradient(values, support, penalty=0.1, density=0.25)
    array([0.3, 0.8])

    References
    ----------
    Top-KAST, section 2.3 and footnote 3.
    """
    _check(density, kind)
    xp = array_namespace(values)
    weights = exploration_weights(support, density=density, dtype=values.dtype)
    slope = xp.sign(values) if kind == "l1" else values
    return penalty * xp.reshape(weights, values.shape) * slope


def _check(density: float, kind: str) -> None:
    if kind not in ("l2", "l1"):
        raise OptionError(f"kind must be 'l2' or 'l1', got {kind!r}")
    if not 0 < density <= 1:
        raise OptionError(f"density must lie in (0, 1], got {density!r}")
