"""The compact representation: the trained weights of a tensor are one vector, its values on B."""

from __future__ import annotations

import math

from array_api_compat import array_namespace

from topkast._errors import MismatchError
from topkast._primitives import Array, flatten, scatter_flat, take
from topkast.selection._support import Support


def gather(params: Array, support: Support, /) -> Array:
    r"""Read the values of a tensor on B.

    Parameters
    ----------
    params
        A tensor of any shape. As in :func:`topkast.select`, a JAX array that is sharded over
        explicit axes of a mesh is gathered on every device.
    support
        The sets of the tensor.

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
    return take(flatten(params), support.entries)


def scatter(
    values: Array, support: Support, /, *, shape: tuple[int, ...], fill: float = 0.0
) -> Array:
    r"""Make the tensor that has `values` on B and `fill` elsewhere.

    Parameters
    ----------
    values
        Values on B; \|B\| entries of any shape.
    support
        The sets of the tensor.
    shape
        Shape of the tensor.
    fill
        Value of the reservoir C.

    Returns
    -------
    array
        An array of the given shape and the dtype of `values`.

    Raises
    ------
    MismatchError
        If `values` has another number of entries.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> support = topkast.Support.of(active=np.asarray([3]), exploring=np.asarray([0]))
    >>> topkast.scatter(np.asarray([1.0, 2.0]), support, shape=(2, 2))
    array([[2., 0.],
           [0., 1.]])
    """
    check_compact(values, support)
    xp = array_namespace(values)
    flat = scatter_flat(xp.reshape(values, (-1,)), support.entries, math.prod(shape), fill)
    return xp.reshape(flat, shape)


def forward_view(values: Array, support: Support, /, *, shape: tuple[int, ...]) -> Array:
    r"""Make the forward view α: the weights on A with the same bits, and +0 elsewhere.

    .. math:: \alpha_i = \begin{cases} \theta_i & i \in A \\ 0 & \text{otherwise} \end{cases}

    Parameters
    ----------
    values
        Values on B, as :func:`gather` returns them: \|B\| entries of any shape.
    support
        The sets of the tensor.
    shape
        Shape of the tensor.

    Returns
    -------
    array
        An array of the given shape and the dtype of `values`.

    Raises
    ------
    MismatchError
        If `values` has another number of entries.

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
    check_compact(values, support)
    xp = array_namespace(values)
    active = xp.reshape(values, (-1,))[: support.forward_size]
    flat = scatter_flat(active, support.active_entries, math.prod(shape), 0.0)
    return xp.reshape(flat, shape)


def check_compact(values: Array, support: Support) -> None:
    """Raise :class:`topkast.MismatchError` unless there is one value for each weight in B."""
    if math.prod(values.shape) != support.backward_size:
        raise MismatchError(
            f"expected the {support.backward_size} values of a tensor on B, as topkast.gather "
            f"returns them, got an array of shape {tuple(values.shape)}"
        )
