"""The interface of methods, which choose A and B of one tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from topkast._primitives import Array
from topkast.selection._support import Support

# The inputs that the library can give to a method.
PROVIDED = frozenset({"weights", "random", "sets", "gradient", "momentum"})


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
    support
        The present sets; None when the first sets are chosen. For methods that need ``"sets"``.
    values
        The weights on the present B (\|B\|,), in the order of `support`. For the same methods,
        which should read these: in sparse layers, `weights` of theirs has a shape but no memory.
    gradient
        The gradient of the loss (n,) before the last step, outside B too; None when the first sets
        are chosen. For methods that need ``"gradient"``. Sparse layers never form it: there, it is
        an object whose ``blocks()`` yields pieces of it with their first indices. For methods that
        need ``"momentum"``, the running mean of the gradient instead. None too if PyTorch computed
        no gradient: the tensor was not used, or is frozen.
    members
        First index and end of each tensor, by name, if several are ranked as one.
    group_size
        Number of consecutive weights in a group, under the option `pattern`: each group must hold
        equally many of A, and of B. None: no pattern.
    shapes
        Shape of the tensor by its name; of several, in order, if they are ranked as one.
    """

    weights: Array
    forward: int
    backward: int
    seed: int = 0
    name: str = ""
    draw: Array | int = 0
    first: Array | int = 0
    support: Support | None = None
    values: Array = None
    gradient: Array = None
    members: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    group_size: int | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class Method(ABC):
    """A way to choose A and B: the base class of all methods, yours included.

    Attributes
    ----------
    needs
        The inputs that :meth:`choose` uses: ``"weights"``, ``"random"``, the present ``"sets"``
        and the values on them, the ``"gradient"`` of the loss outside B, or its running mean, the
        ``"momentum"``, for which the attribute `momentum` is the share that a step keeps.
    refreshes
        Whether the sets are chosen again at each refresh.
    takes_largest
        Whether A and B are the largest magnitudes, as :class:`topkast.methods.TopKAST` chooses
        them: a refresh may then look at few candidates instead of all weights.
    by_group
        Whether :meth:`choose` respects the ``group_size`` of a view, so that the option `pattern`
        can be used with the method.
    forgets
        Whether a refresh sets all weights outside A to zero: outside B, nothing is kept then in
        PyTorch. False: an entry that enters B continues with the weight it had. If B∖A rests too,
        what enters A starts at zero, with fresh state of the optimizer.
    explores
        Whether the weights in B∖A are updated.
    schedules
        Whether the number of units in A changes in training, in all or in single tensors: JAX,
        whose shapes are fixed, refuses such methods.
    backward
        The backward sparsity that the method takes: ``"any"``; ``"equal"`` to the forward
        sparsity, so that B is A; or ``"none"``, 0, so that B holds all weights.
    noise
        Standard deviation of normal noise that is added to the gradient on B, at each step.
    default_penalty, default_penalty_kind, default_refresh_every
        The options `penalty` and `refresh_every` if :func:`topkast.wrap_optimizer` gets this
        method and not these. A method of single tensors or of a parameter group has those of all
        tensors, unless its override or group sets its own.

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
    explores: ClassVar[bool] = True
    schedules: ClassVar[bool] = False
    backward: ClassVar[Literal["any", "equal", "none"]] = "any"
    momentum: float = 0.0
    noise: float = 0.0
    default_penalty: ClassVar[float] = 1e-4
    default_penalty_kind: ClassVar[Literal["l2", "l1"]] = "l2"
    default_refresh_every: ClassVar[int] = 1

    def __init_subclass__(cls) -> None:
        if "choose" in cls.__dict__:
            for claim in {"takes_largest", "by_group"} - cls.__dict__.keys():
                setattr(cls, claim, False)  # inherited, it would be a claim about another choice

    @abstractmethod
    def choose(self, view: View, /) -> Support:
        """Choose the sets of one tensor; they may depend on the view alone."""
