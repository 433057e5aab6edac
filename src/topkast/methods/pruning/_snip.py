"""Single-shot pruning by connection sensitivity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from array_api_compat import array_namespace

from topkast._errors import OptionError
from topkast._method import Method, View
from topkast._primitives import Array
from topkast.selection._select import choose_at_random, choose_by_magnitude
from topkast.selection._support import Support


@dataclass(frozen=True, eq=False)
class SNIP(Method):
    r"""A is the largest sensitivities \|gradient · weight\| at the start, and never changes.

    Parameters
    ----------
    sensitivities
        By name of tensor, the product of the gradient of the loss and the weight, at the start, for
        one batch or the sum of several; arrays of the tensor's shape and library. With
        ``distribution="global"``, all tensors are ranked as one, as in the paper.
    shuffled
        Draw the sets of each tensor uniformly, with the counts that the sensitivities give: the
        control of Frankle et al., which does as well if only these counts matter.

    Raises
    ------
    OptionError
        If a tensor has no sensitivities, or others in shape.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> from topkast.methods import SNIP
    >>> weights, gradient = np.asarray([[0.1, -0.9], [2.0, 0.3]]), np.asarray([[8.0, 1], [0, 1]])
    >>> method = SNIP({"w": gradient * weights})
    >>> tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.5, method=method)
    >>> tx.init({"w": weights}).supports["w"].indices
    array([0, 1], dtype=int32)

    References
    ----------
    Lee et al., "SNIP: single-shot network pruning based on connection sensitivity", 2019. Frankle
    et al., "Pruning neural networks at initialization: why are we missing the mark?", 2021.
    """

    sensitivities: Mapping[str, Any]
    shuffled: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    refreshes: ClassVar[bool] = False
    forgets: ClassVar[bool] = True
    backward: ClassVar[Literal["any", "equal", "none"]] = "equal"
    default_penalty: ClassVar[float] = 0.0

    def choose(self, view: View, /) -> Support:
        """Choose the largest sensitivities."""
        shapes = view.shapes or {view.name: tuple(view.weights.shape)}
        if sum(map(math.prod, shapes.values())) != view.weights.shape[0]:
            raise OptionError(
                f"SNIP ranks the single weights of {view.name}: leave out block and stacked"
            )
        members = {name: self._of(name, shape, view) for name, shape in shapes.items()}
        scores = array_namespace(view.weights).concat(list(members.values()))
        chosen = choose_by_magnitude(replace(view, weights=scores), view.backward)
        if not self.shuffled:
            return chosen
        return self._shuffle(view, chosen, members)

    def _of(self, name: str, shape: tuple[int, ...], view: View) -> Array:
        """The sensitivities of one tensor, as a vector."""
        if name not in self.sensitivities:
            raise OptionError(
                f"SNIP got no sensitivities of {name}, but of "
                f"{', '.join(self.sensitivities) or 'nothing'}: pass those of all tensors that are "
                "sparsified, by name"
            )
        own = self.sensitivities[name]
        try:
            xp = array_namespace(view.weights, own)
        except TypeError:
            raise OptionError(
                f"the sensitivities of {name} are a {type(own).__module__}."
                f"{type(own).__qualname__}, expected the library of its weights, "
                f"{type(view.weights).__module__}"
            ) from None
        if tuple(own.shape) != tuple(shape) and view.shapes:
            raise OptionError(
                f"the sensitivities of {name} have shape {tuple(own.shape)}, but its weights "
                f"{tuple(shape)}"
            )
        return xp.reshape(own, (-1,))

    @staticmethod
    def _shuffle(view: View, chosen: Support, members: Mapping[str, Any]) -> Support:
        """Draw as many units of each member as are `chosen`."""
        xp = array_namespace(chosen.indices)
        drawn, start = [], 0
        for name, member in members.items():
            stop = start + member.shape[0]
            inside = (chosen.indices >= start) & (chosen.indices < stop)
            count = int(xp.count_nonzero(inside))
            own = replace(view, weights=member, forward=count, backward=count, name=name)
            indices = choose_at_random(own).indices
            drawn.append(xp.astype(indices, chosen.indices.dtype) + start)
            start = stop
        return Support(xp.concat(drawn), view.forward)
