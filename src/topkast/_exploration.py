"""The exploration penalty: it shrinks the weights in B, so that others can replace them."""

from __future__ import annotations

from array_api_compat import array_namespace

from topkast._errors import OptionError
from topkast._options import PenaltyKind
from topkast._primitives import Array
from topkast.selection._compact import check_compact
from topkast.selection._support import Support, scale_by_set


def exploration_penalty(
    values: Array,
    support: Support,
    /,
    *,
    penalty: float,
    density: float,
    penalty_kind: PenaltyKind = "l2",
) -> Array:
    r"""The exploration penalty of one tensor, a function of its values on B.

    .. math::
       R(\theta) = \frac{\lambda}{2} \sum_{i \in B} w_i \theta_i^2 \;\text{(l2)}, \quad
       R(\theta) = \lambda \sum_{i \in B} w_i |\theta_i| \;\text{(l1)}, \quad
       w_i = \begin{cases} 1 & i \in A \\ 1 / D & i \in B \setminus A \end{cases}

    Parameters
    ----------
    values
        Values on B, as :func:`topkast.gather` returns them: \|B\| entries of any shape.
    support
        The sets of the tensor.
    penalty
        The coefficient λ.
    density
        The forward **density** D = 1 − ``fwd``, in (0, 1]: not the sparsity.
    penalty_kind
        ``"l2"`` or ``"l1"``.

    Returns
    -------
    array
        A 0-d array of the real dtype of `values`, differentiable if the library supports it.

    Raises
    ------
    OptionError
        For an unknown `penalty_kind`, or a density outside (0, 1].
    MismatchError
        If `values` has another number of entries than B.

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
    Top-KAST, section 2.3, whose formula is the l1 penalty, but whose text and
    pseudocode describe the l2 penalty.
    """
    _check(density, penalty_kind)
    check_compact(values, support)
    xp = array_namespace(values)
    flat = xp.reshape(values, (-1,))
    if penalty_kind == "l1":
        terms, factor = xp.abs(flat), penalty
    else:
        is_complex = xp.isdtype(flat.dtype, "complex floating")
        terms, factor = (xp.abs(flat) ** 2 if is_complex else flat * flat), penalty / 2
    on_active, on_exploring = (
        xp.sum(of_set) for of_set in (terms[: support.forward_size], terms[support.forward_size :])
    )
    return factor * (on_active + on_exploring / density)


def exploration_gradient(
    values: Array,
    support: Support,
    /,
    *,
    penalty: float,
    density: float,
    penalty_kind: PenaltyKind = "l2",
) -> Array:
    r"""Gradient of :func:`exploration_penalty` with respect to the values on B.

    :math:`\lambda w_i \theta_i` (l2) or :math:`\lambda w_i \operatorname{sign} \theta_i` (l1).
    The gradient on the reservoir C is zero: the penalty does not depend on it.

    Parameters
    ----------
    values, support, penalty, density, penalty_kind
        As for :func:`exploration_penalty`.

    Returns
    -------
    array
        Shape and dtype of `values`.

    Raises
    ------
    OptionError, MismatchError
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
    _check(density, penalty_kind)
    check_compact(values, support)
    direction = array_namespace(values).sign(values) if penalty_kind == "l1" else values
    return scale_by_set(direction, support, penalty, penalty / density)


def _check(density: float, penalty_kind: str) -> None:
    if penalty_kind not in ("l2", "l1"):
        raise OptionError(f"penalty_kind must be 'l2' or 'l1', got {penalty_kind!r}")
    if not 0 < density <= 1:
        raise OptionError(f"density must lie in (0, 1], got {density!r}")
