"""Deep Rewiring."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal

from array_api_compat import array_namespace

from topkast._errors import OptionError
from topkast._method import Method, View
from topkast._primitives import Array, where
from topkast.backends import backend_of
from topkast.selection._random import Ranks, make_key, random_words
from topkast.selection._replace import choose_on_host, grow_at_random
from topkast.selection._select import draw_words
from topkast.selection._support import Support


@dataclass(frozen=True)
class DeepRewiring(Method):
    """Weights walk at random; one that changes its sign is replaced by another, drawn uniformly.

    Each position has a sign of its own, drawn once. The first set consists of weights that have it,
    as far as there are enough. The walk is defined for plain SGD: its steps are those of the
    gradient, with an l1 penalty and noise.

    Parameters
    ----------
    noise
        Standard deviation of the normal noise that is added to the gradient of each weight, at each
        step.

    Raises
    ------
    OptionError
        If the noise is negative or not finite.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> from topkast.methods import DeepRewiring
    >>> tx = topkast.wrap_optimizer(
    ...     topkast.SGD(0.5), fwd=0.75, bwd=0.75, method=DeepRewiring(noise=1.0))
    >>> params = {"w": np.random.default_rng(0).standard_normal((8, 10))}
    >>> first = state = tx.init(params)
    >>> for _ in range(5):
    ...     params, state = tx.step({"w": np.zeros((8, 10))}, state, params)
    >>> before, after = first.supports["w"].indices, state.supports["w"].indices
    >>> len(after), np.array_equal(before, after)
    (20, False)

    References
    ----------
    Bellec et al., "Deep rewiring: training very sparse deep networks", 2018, with the settings of
    its code: noise of 1e-5 and an l1 penalty of 1e-5, at a learning rate of 0.5. Where a position
    is drawn again in its sparse code, it may get another sign; in its dense code it keeps the
    sign, as here. There, weights that were just dropped may be drawn at once, and weights start at
    1e-12; here, others are drawn and start at zero, where the penalty has no gradient.
    """

    noise: float = 1e-5

    needs: ClassVar[frozenset[str]] = frozenset({"sets", "random"})
    forgets: ClassVar[bool] = True
    backward: ClassVar[Literal["any", "equal", "none"]] = "equal"
    default_penalty: ClassVar[float] = 1e-5
    default_penalty_kind: ClassVar[Literal["l2", "l1"]] = "l1"

    def __post_init__(self) -> None:
        noise: Any = self.noise  # callers may pass any type
        is_number = isinstance(noise, Real) and not isinstance(noise, bool)
        if not is_number or not 0 <= float(noise) < math.inf:
            raise OptionError(f"noise must be a finite number of at least 0, got {noise!r}")

    def choose(self, view: View, /) -> Support:
        """Draw weights with the sign of their position; then replace those that lost it."""
        return choose_on_host(self._draw if view.support is None else self._replace, view)

    def _draw(self, view: View) -> Support:
        xp, backend = array_namespace(view.weights), backend_of(view.weights)
        units = xp.arange(view.weights.shape[0], dtype=backend.index_dtype(view.weights))
        agrees = _signs(view, units) == (view.weights >= 0)
        words = draw_words(view.weights, view)
        words = where(agrees, words + (1 << 30), 0) + where(~agrees, words, 0)
        ties = Ranks(make_key(view.seed, view.name, "ties"), view.first)
        return Support(
            backend.largest_first(words, view.forward, view.backward, ties), view.forward
        )

    def _replace(self, view: View) -> Support:
        assert view.support is not None
        is_positive = _signs(view, view.support.active)
        kept = where(is_positive, view.values, 0.0) >= where(~is_positive, view.values, 0.0)
        return grow_at_random(view, kept)


def _signs(view: View, units: Array) -> Array:
    """Whether the weights at these positions are to be positive."""
    return random_words(units, make_key(view.seed, view.name, "signs")) >= 0
