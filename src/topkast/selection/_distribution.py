"""Density of each tensor (uniform or Erdős–Rényi-Kernel), and exact counts of kept entries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from topkast._errors import OptionError
from topkast._options import Distribution, check_sparsities

Shape = tuple[int, ...]


def densities(
    shapes: Mapping[str, Shape], sparsity: float, *, distribution: Distribution = "uniform"
) -> dict[str, float]:
    r"""Distribute a sparsity over tensors: the density of each.

    ``"uniform"`` gives every tensor the density :math:`1 - s`. ``"erk"`` (Erdős–Rényi-Kernel)
    makes the density proportional to the sum of the tensor's dimensions over their product,

    .. math:: d_l = \min\Bigl(1, \varepsilon \frac{\sum_i n_{l,i}}{\prod_i n_{l,i}}\Bigr),

    with :math:`\varepsilon` such that :math:`\sum_l d_l n_l = (1 - s) \sum_l n_l`: thin layers
    are denser.

    Parameters
    ----------
    shapes
        Shape of each tensor, by name.
    sparsity
        Share of zeros over all tensors together, in [0, 1).
    distribution
        ``"uniform"`` or ``"erk"``.

    Returns
    -------
    dict of str to float
        Densities in (0, 1], by name; 1 for an empty tensor under ``"erk"``.

    Raises
    ------
    OptionError
        For a sparsity outside [0, 1), or for ``"global"``, whose densities depend on the weights.

    Examples
    --------
    >>> import topkast
    >>> shapes = {"hidden": (300, 784), "output": (10, 300)}
    >>> topkast.densities(shapes, 0.9)
    {'hidden': 0.1, 'output': 0.1}
    >>> erk = topkast.densities(shapes, 0.9, distribution="erk")
    >>> {name: round(density, 3) for name, density in erk.items()}
    {'hidden': 0.089, 'output': 1.0}

    References
    ----------
    Evci et al., "Rigging the Lottery", 2020, section 3 (ERK). Top-KAST compares at ERK too.
    """
    return {
        name: float(density)
        for name, density in exact_densities(shapes, sparsity, distribution=distribution).items()
    }


def exact_densities(
    shapes: Mapping[str, Shape], sparsity: float, *, distribution: Distribution
) -> dict[str, Fraction]:
    """:func:`densities` in rational arithmetic, so that counts derived from them are exact."""
    check_sparsities(sparsity, sparsity)
    density = 1 - exact_fraction(sparsity)
    if distribution == "uniform":
        return dict.fromkeys(shapes, density)
    if distribution == "erk":
        return _erdos_renyi_kernel(shapes, density)
    raise OptionError(
        f"distribution={distribution!r} fixes the density only in total, not of each tensor: "
        "expected 'uniform' or 'erk'"
    )


def kept_count(size: int, density: Fraction) -> int:
    """Number of entries kept out of `size`: ``max(1, size - floor(sparsity * size))``.

    >>> kept_count(100_000_007, 1 - exact_fraction(0.9))
    10000001
    >>> kept_count(3, 1 - exact_fraction(0.99)), kept_count(0, Fraction(1))
    (1, 0)
    """
    if size == 0:
        return 0
    return max(1, size - math.floor((1 - density) * size))


def exact_fraction(sparsity: float) -> Fraction:
    """Convert a float by its decimal digits: 0.9 is nine tenths and not the nearest double."""
    return Fraction(str(sparsity))


def _erdos_renyi_kernel(shapes: Mapping[str, Shape], density: Fraction) -> dict[str, Fraction]:
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: Fraction(sum(shapes[name]), size) for name, size in sizes.items() if size}
    budget = density * sum(sizes.values())
    full: set[str] = {name for name, size in sizes.items() if not size}
    while True:
        # Tensors whose density would exceed 1 are full; the others share the remaining budget.
        weight = sum((raw[name] * sizes[name] for name in raw if name not in full), Fraction())
        remaining = budget - sum(sizes[name] for name in full)
        scale = remaining / weight if weight else Fraction()
        over = {name for name in raw if name not in full and scale * raw[name] > 1}
        if not over:
            break
        full |= over
    return {name: Fraction(1) if name in full else scale * raw[name] for name in shapes}
