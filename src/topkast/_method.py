"""What a method is: it chooses A and B of one tensor, and says what it looks at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from topkast._primitives import Array
from topkast.selection._support import Support

# What the library can show to a method.
PROVIDED = frozenset({"weights", "random"})


@dataclass(frozen=True)
class View:
    r"""One tensor as a method sees it; of a stacked tensor, one layer.

    Attributes
    ----------
    weights
        θ as one vector (n,), of any library. Where units are blocks of weights, their scores: the
        method chooses n units, whatever they are.
    forward, backward
        \|A\| and \|B\|, in units, which the method must return.
    seed
        The option of :func:`topkast.wrap_optimizer`.
    name
        Of the tensor.
    draw
        Number of the update after which the sets are chosen, 0 for the first ones: it numbers the
        random draws. Inside ``jax.jit`` it is traced.
    first
        Number of the first unit in the tensor; 0 but for layers of stacked tensors.
    """

    weights: Array
    forward: int
    backward: int
    seed: int = 0
    name: str = ""
    draw: Array | int = 0
    first: Array | int = 0


class Method(ABC):
    """How A and B are chosen; the base class of all methods, yours included.

    Attributes
    ----------
    needs
        What :meth:`choose` looks at: ``"weights"``, ``"random"``.
    refreshes
        Whether the sets are ever chosen anew.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> class Leading(topkast.methods.Method):
    ...     def choose(self, view):
    ...         return topkast.Support(np.arange(view.backward), view.forward)
    >>> tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.75, bwd=0.5, method=Leading())
    >>> tx.init({"w": np.ones((2, 4))}).supports["w"].indices
    array([0, 1, 2, 3], dtype=int32)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    refreshes: ClassVar[bool] = True

    @abstractmethod
    def choose(self, view: View, /) -> Support:
        """The sets of one tensor: a function of the view alone."""
