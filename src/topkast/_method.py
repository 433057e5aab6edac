"""The interface of methods, which choose A and B of one tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from topkast._primitives import Array
from topkast.selection._support import Support

# The inputs that the library can give to a method.
PROVIDED = frozenset({"weights", "random"})


@dataclass(frozen=True)
class View:
    r"""One tensor, or one layer of a stacked tensor, as a method sees it.

    Attributes
    ----------
    weights
        θ as one vector (n,) of any library, or the scores of n blocks. The method chooses among
        these n units.
    forward, backward
        The numbers of units \|A\| and \|B\| that the method must choose.
    seed
        The option of :func:`topkast.wrap_optimizer`.
    name
        Name of the tensor.
    draw
        Number of updates so far, 0 for the first sets: it numbers the random draws. Inside
        ``jax.jit`` it is traced.
    first
        Number of the view's first unit in the tensor; 0 except for layers of stacked tensors.
    group_size
        Number of consecutive weights in a group, under the option `pattern`: each group must hold
        equally many of A, and of B. None: no pattern.
    """

    weights: Array
    forward: int
    backward: int
    seed: int = 0
    name: str = ""
    draw: Array | int = 0
    first: Array | int = 0
    group_size: int | None = None


class Method(ABC):
    """A way to choose A and B: the base class of all methods, yours included.

    Attributes
    ----------
    needs
        The inputs that :meth:`choose` uses: ``"weights"``, ``"random"``.
    refreshes
        Whether the sets are chosen again at each refresh.
    takes_largest
        Whether A and B are the largest magnitudes, as :class:`topkast.methods.TopKAST` chooses
        them: a refresh may then look at few candidates instead of all weights.
    by_group
        Whether :meth:`choose` respects the ``group_size`` of a view, so that the option `pattern`
        can be used with the method.
    forgets
        Whether weights that leave B are lost, and entries that enter start at zero: outside B,
        nothing is kept then (PyTorch; the functional forms refuse such a method if it refreshes).
        False: an entry that enters continues with the weight it had.

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
    takes_largest: ClassVar[bool] = False
    by_group: ClassVar[bool] = False
    forgets: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "choose" in cls.__dict__:
            for claim in {"takes_largest", "by_group"} - cls.__dict__.keys():
                setattr(cls, claim, False)  # inherited, it would be a claim about another choice

    @abstractmethod
    def choose(self, view: View, /) -> Support:
        """Choose the sets of one tensor; they may depend on the view alone."""
