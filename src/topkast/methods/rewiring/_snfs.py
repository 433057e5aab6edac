"""Sparse networks from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from topkast.methods._schedules import check_share
from topkast.methods.rewiring._rigl import RigL


@dataclass(frozen=True)
class SNFS(RigL):
    """The smallest weights are dropped, and those with the largest momentum grown: B is A.

    The momentum is a running mean of the gradient on all weights. It takes as much memory as the
    dense weights, and a dense gradient at each step: sparse layers refuse it.

    Parameters
    ----------
    until, fraction, regrow
        As for :class:`RigL`. In the authors' code, `until` is the end of the training, and 0.005 of
        A are replaced then.
    momentum
        Share of the running mean that a step keeps.

    Raises
    ------
    OptionError
        For values out of range.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> from topkast.methods import SNFS
    >>> tx = topkast.wrap_optimizer(
    ...     topkast.SGD(0.0), fwd=0.5, bwd=0.5, method=SNFS(fraction=0.5), refresh_every=2)
    >>> params = {"w": np.asarray([[0.4, 0.1], [0.3, 0.2]])}
    >>> state = tx.init(params)
    >>> for gradient in ([[3.0, 3.0], [3.0, 3.0]], [[-3.0, 0.0], [1.0, 1.0]]):
    ...     params, state = tx.step({"w": np.asarray(gradient)}, state, params)
    >>> state.momenta["w"]  # 0.9 · 0.1 · 3 + 0.1 · (-3, 0, 1, 1)
    array([-0.03,  0.27,  0.37,  0.37])

    References
    ----------
    Dettmers and Zettlemoyer, "Sparse networks from scratch: faster training without losing
    performance", 2019. There, the sets change at the end of each epoch, the momentum is that of the
    optimizer, with which a weight that is grown continues, and tensors exchange weights in
    proportion to their mean momentum on A. Here, it is a mean of its own, a weight that is grown
    starts without momentum, and tensors exchange weights with ``distribution="global"`` alone,
    which ranks them as one.
    """

    fraction: float = 0.5
    momentum: float = 0.9

    needs: ClassVar[frozenset[str]] = frozenset({"sets", "momentum", "random"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("momentum", self.momentum)
