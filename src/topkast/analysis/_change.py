"""How sets differ over training: their change in an interval, and the use of the reservoir."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from topkast._errors import MismatchError
from topkast.analysis._sets import (
    Bits,
    ByTensor,
    Sets,
    check_not_empty,
    check_same_tensors,
    count,
    read_sets,
    shapes_of,
    shares_by_tensor,
)


class Change(NamedTuple):
    r"""The change of a tensor's sets between two points of training, as shares from 0 to 1.

    Attributes
    ----------
    forward
        Share of A that left it, \|A∖A'\| / \|A\|. Where \|A\| is fixed, as many entered.
    backward
        Share of B that left it, \|B∖B'\| / \|B\|.
    flipped
        Share of all weights that entered or left A, \|A △ A'\| / n: the measure of the paper's
        figure 3a. It is at most twice the density of A.
    """

    forward: float
    backward: float
    flipped: float


class ReservoirUse(NamedTuple):
    """Use of the weights that a tensor's sets left out at the start, as shares from 0 to 1.

    Attributes
    ----------
    reservoir
        Share of the reservoir, the weights outside B at the start, that has been in A at some time
        since: the paper's figure 3b. NaN if there is no reservoir (``bwd=0``).
    outside
        Share of all weights outside A at the start that has been in A since.
    kept
        Share of the A of the start that is in the last A.
    """

    reservoir: float
    outside: float
    kept: float


def mask_change(before: Any, after: Any, /, params: Any = None) -> ByTensor[Change]:
    r"""Compare the sets of a network at two points of training.

    Parameters
    ----------
    before, after
        Sets of the same tensors; see :mod:`topkast.analysis`. A wrapped PyTorch optimizer changes
        in training: keep ``topkast.masks(optimizer)`` for the comparison.
    params
        The weights, needed with a functional state and with supports.

    Returns
    -------
    ByTensor of Change
        The shares that changed, by tensor and in all. A share of an empty set is NaN.

    Raises
    ------
    MismatchError
        If tensors or shapes differ, if the masks are not boolean, or if A is empty everywhere.

    Notes
    -----
    Section 4.2 of the paper measures :math:`(m^t - m^{t+5000})^2 / |\theta|`, which is `flipped`.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.analysis import mask_change
    >>> before = np.asarray([[True, True], [False, False]])
    >>> after = np.asarray([[True, False], [True, False]])
    >>> mask_change(before, after).total
    Change(forward=0.5, backward=0.5, flipped=0.5)
    """
    old = read_sets(before, params, what="the sets before")
    new = read_sets(after, params, what="the sets after")
    check_same_tensors(shapes_of(old), new, names=("the sets before", "the sets after"))
    return change_of(old, new)


def reservoir_use(start: Any, /, *later: Any, params: Any = None) -> ByTensor[ReservoirUse]:
    """Measure which of the weights that were unused at the start have been used since.

    Parameters
    ----------
    start
        Sets at the start; see :mod:`topkast.analysis`.
    later
        Sets of the same tensors afterwards, in order. What was in A only between two of them does
        not count.
    params
        The weights, needed with functional states and with supports.

    Returns
    -------
    ByTensor of ReservoirUse
        Shares by tensor and in all.

    Raises
    ------
    MismatchError
        If there is nothing later, if tensors or shapes differ, if the masks are not boolean, or if
        A is empty at the start.

    Notes
    -----
    Section 4.2 of the paper finds that about 5 % of the reservoir is ever used.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> from topkast.analysis import reservoir_use
    >>> start = topkast.Masks(
    ...     forward=np.asarray([True, True, False, False, False, False]),
    ...     backward=np.asarray([True, True, True, True, False, False]))
    >>> first = np.asarray([False, True, True, False, False, False])
    >>> second = np.asarray([False, True, False, False, True, False])
    >>> reservoir_use(start, first, second).total
    ReservoirUse(reservoir=0.5, outside=0.5, kept=0.5)
    """
    if not later:
        raise MismatchError("reservoir_use needs the sets of the start and at least one later")
    first = read_sets(start, params, what="the sets of the start")
    used = {name: np.zeros_like(tensor.forward) for name, tensor in first.items()}
    last = first
    for number, sets in enumerate(later, 1):
        what = f"later sets {number}"
        last = read_sets(sets, params, what=what)
        check_same_tensors(shapes_of(first), last, names=("the sets of the start", what))
        used = {name: bits | last[name].forward for name, bits in used.items()}
    return use_of(first, used, last)


def change_of(old: Sets, new: Sets) -> ByTensor[Change]:
    """Compare sets of the same tensors."""
    check_not_empty(old, "the sets before")
    counts = {}
    for name, before in old.items():
        after = new[name]
        left, entered = before.forward & ~after.forward, after.forward & ~before.forward
        counts[name] = [
            (count(left), count(before.forward)),
            (count(before.backward & ~after.backward), count(before.backward)),
            (count(left) + count(entered), before.size),
        ]
    return shares_by_tensor(Change, counts)


def use_of(start: Sets, used: dict[str, Bits], now: Sets) -> ByTensor[ReservoirUse]:
    """Measure the use from the union of every A since the start, and the last sets."""
    check_not_empty(start, "the sets of the start")
    counts = {}
    for name, sets in start.items():
        forward, backward = count(sets.forward), count(sets.backward)
        counts[name] = [
            (count(used[name] & ~sets.backward), sets.size - backward),
            (count(used[name] & ~sets.forward), sets.size - forward),
            (count(sets.forward & now[name].forward), forward),
        ]
    return shares_by_tensor(ReservoirUse, counts)
