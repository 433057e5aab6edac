"""The compact representation: what learns of a tensor is one vector, its values on B."""

from __future__ import annotations

import math
from typing import NamedTuple

from array_api_compat import array_namespace, is_jax_array

from topkast._host import common_positions
from topkast._primitives import Array, device, host_view, like, take
from topkast._primitives import scatter as scatter_flat
from topkast._selection import Support


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
        Shape (\|B\|,), dtype of `params`, in the order of ``support.indices``.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> theta = np.asarray([[0.1, -0.9], [0.5, 0.3]])
    >>> topkast.gather(theta, topkast.select(theta, fwd=0.75, bwd=0.5))
    array([-0.9,  0.5])
    """
    return take(array_namespace(params).reshape(params, (-1,)), support.indices)


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
    >>> support = topkast.Support(np.asarray([0, 3]), active=np.asarray([True, False]))
    >>> topkast.scatter(np.asarray([1.0, 2.0]), support, shape=(2, 2))
    array([[1., 0.],
           [0., 2.]])
    """
    xp = array_namespace(values)
    flat = scatter_flat(xp.reshape(values, (-1,)), support.indices, math.prod(shape), fill)
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
    flat = xp.reshape(values, (-1,))
    zero = xp.zeros((), dtype=flat.dtype, device=device(flat))
    return scatter(xp.where(support.active, flat, zero), support, shape=shape)


class Migration(NamedTuple):
    """How entries move from one B to the next: `source` (|B|,) into the old, where `survives`."""

    source: Array
    survives: Array


def migration(old: Array, new: Array, size: int | None = None, /) -> Migration:
    """The move from ascending indices `old` to ascending indices `new`, both (|B|,).

    `size` is that of the tensor; where it is known, JAX need not search.
    """
    xp = array_namespace(old, new)
    hosts = host_view(old), host_view(new)
    if hosts[0] is not None and hosts[1] is not None:
        source, survives = common_positions(hosts[0], hosts[1])
        return Migration(like(source, old, old.dtype), like(survives, old))
    if is_jax_array(old) and size is not None:
        from topkast import _xla

        return Migration(*_xla.common_positions(old, new, size))
    last = xp.asarray(max(old.shape[0] - 1, 0), dtype=old.dtype, device=device(old))
    source = xp.minimum(xp.astype(xp.searchsorted(old, new), old.dtype), last)
    return Migration(source, xp.take(old, source) == new)


def move(entry: Array, move_: Migration, fresh: Array | float = 0.0) -> Array:
    """`entry` (shape (1, …, |B|), any dtype) after a migration, `fresh` where B was entered."""
    xp = array_namespace(entry)
    flat = xp.reshape(entry, (-1,))
    if isinstance(fresh, (int, float)):
        fresh = xp.asarray(fresh, dtype=entry.dtype, device=device(entry))
    else:
        fresh = xp.astype(xp.reshape(fresh, (-1,)), entry.dtype)
    moved = xp.where(move_.survives, xp.take(flat, move_.source), fresh)
    return xp.reshape(moved, entry.shape)


def migrate(entry: Array, old: Support, new: Support, /, *, fresh: Array | float = 0.0) -> Array:
    """Carry a vector over B from one support to the next.

    Entries of indices that stay in B keep their bits, those of indices that leave are dropped.

    Parameters
    ----------
    entry
        One value per index of ``old.indices``, of any dtype: a moment, say.
    old, new
        The supports before and after a refresh.
    fresh
        Value for indices that enter B: a number, or an array like `entry`.

    Returns
    -------
    array
        Shape and dtype of `entry`, in the order of ``new.indices``.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> old = topkast.Support(np.asarray([0, 2, 5]), None)
    >>> new = topkast.Support(np.asarray([2, 3, 5]), None)
    >>> topkast.migrate(np.asarray([10.0, 20.0, 30.0]), old, new)
    array([20.,  0., 30.])
    """
    return move(entry, migration(old.indices, new.indices), fresh)
