"""The compact representation: what learns of a tensor is one vector, its values on B."""

from __future__ import annotations

import math

from array_api_compat import array_namespace

from topkast._primitives import Array, scatter_flat, take
from topkast.selection._support import Support


def gather(params: Array, support: Support, /) -> Array:
    r"""Values of a tensor on B.

    Parameters
    ----------
    params
        A tensor of any shape.
    support
        Its sets.

    Returns
    -------
    array
        Shape (\|B\|,), dtype of `params`, in the order of ``support.entries``.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> theta = np.asarray([[0.1, -0.9], [0.5, 0.3]])
    >>> topkast.gather(theta, topkast.select(theta, fwd=0.75, bwd=0.5))
    array([-0.9,  0.5])
    """
    return take(array_namespace(params).reshape(params, (-1,)), support.entries)


def scatter(
    values: Array, support: Support, /, *, shape: tuple[int, ...], fill: float = 0.0
) -> Array:
    r"""The tensor with `values` on B and `fill` elsewhere.

    Parameters
    ----------
    values
        Values on B; \|B\| entries of any shape.
    support
        The sets of the tensor.
    shape
        Shape of the tensor.
    fill
        What the reservoir C is filled with.

    Returns
    -------
    array
        Of the given shape, dtype of `values`.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> support = topkast.Support.of(active=np.asarray([3]), exploring=np.asarray([0]))
    >>> topkast.scatter(np.asarray([1.0, 2.0]), support, shape=(2, 2))
    array([[2., 0.],
           [0., 1.]])
    """
    xp = array_namespace(values)
    flat = scatter_flat(xp.reshape(values, (-1,)), support.entries, math.prod(shape), fill)
    return xp.reshape(flat, shape)


def forward_view(values: Array, support: Support, /, *, shape: tuple[int, ...]) -> Array:
    r"""The forward view α: the weights on A with the same bits, and +0 elsewhere.

    .. math:: \alpha_i = \begin{cases} \theta_i & i \in A \\ 0 & \text{otherwise} \end{cases}

    Parameters
    ----------
    values
        Values on B, as from :func:`gather`; \|B\| entries of any shape.
    support
        The sets of the tensor.
    shape
        Shape of the tensor.

    Returns
    -------
    array
        Of the given shape, dtype of `values`.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> theta = np.asarray([[0.1, -0.9], [0.5, 0.3]])
    >>> support = topkast.select(theta, fwd=0.75, bwd=0.5)
    >>> topkast.forward_view(topkast.gather(theta, support), support, shape=(2, 2))
    array([[ 0. , -0.9],
           [ 0. ,  0. ]])

    References
    ----------
    Top-KAST, section 2.1.
    """
    xp = array_namespace(values)
    active = xp.reshape(values, (-1,))[: support.forward_size]
    flat = scatter_flat(active, support.active_entries, math.prod(shape), 0.0)
    return xp.reshape(flat, shape)
