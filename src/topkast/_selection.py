"""Selection of the forward set A and the backward set B by magnitude."""

from __future__ import annotations

import math
from typing import NamedTuple

from array_api_compat import array_namespace, is_jax_array, is_numpy_array, is_torch_array

from topkast._distribution import as_written, kept_count
from topkast._errors import NonFiniteError, UnsupportedTensorError
from topkast._host import largest_flags, largest_on_host
from topkast._options import Explore, check_sparsities
from topkast._primitives import (
    Array,
    device,
    fast_paths,
    host_view,
    index_dtype,
    is_traced,
    like,
    true_indices,
)
from topkast._random import uniform


class Support(NamedTuple):
    r"""The sets of one tensor: where B is, and which of its entries are in A.

    Attributes
    ----------
    indices
        Flat (C-order) indices of the backward set B, ascending; integers of shape (\|B\|,).
    active
        Which of them are in the forward set A; booleans of shape (\|B\|,), \|A\| of them true.
    """

    indices: Array
    active: Array


def select(
    params: Array,
    /,
    *,
    fwd: float,
    bwd: float,
    explore: Explore = "magnitude",
    seed: int = 0,
) -> Support:
    r"""Choose A and B: the largest magnitudes of a tensor, in exact numbers.

    .. math:: A = \mathrm{TopK}(|\theta|, D), \quad B = \mathrm{TopK}(|\theta|, D + M),
       \quad D = 1 - \mathtt{fwd}, \quad D + M = 1 - \mathtt{bwd}

    :math:`|A| = \max(1, n - \lfloor \mathtt{fwd} \cdot n \rfloor)` and likewise for B. Ties go
    to the lower flat index, so that both sets are unique, nested and the same in every library.

    Parameters
    ----------
    params
        A tensor of any shape and real or complex floating dtype; n is its size.
    fwd, bwd
        Forward and backward sparsity, ``0 <= bwd <= fwd < 1``.
    explore
        ``"magnitude"``, or ``"random"``: B∖A is then drawn uniformly from what is not in A.
    seed
        Of the random draw. The same seed draws the same set in every library.

    Returns
    -------
    Support
        In the library and on the device of `params`.

    Raises
    ------
    OptionError
        If the sparsities are not as above.
    NonFiniteError
        If an entry is NaN or infinite. Inside ``jax.jit``, where values cannot be looked at, NaN
        ranks last instead, and the counts stay exact.

    Examples
    --------
    >>> import numpy as np, topkast
    >>> theta = np.asarray([[0.1, -0.9, 0.5, 0.0], [0.3, 0.0, -0.7, 0.3]])
    >>> support = topkast.select(theta, fwd=0.75, bwd=0.5)
    >>> support.indices
    array([1, 2, 4, 6])
    >>> support.active
    array([ True, False, False,  True])

    References
    ----------
    Top-KAST, sections 2.1 and 2.2; table 1 for the random choice.
    """
    check_sparsities(fwd, bwd)
    size = math.prod(params.shape)
    return select_counts(
        params,
        kept_count(size, 1 - as_written(fwd)),
        kept_count(size, 1 - as_written(bwd)),
        explore=explore,
        seed=seed,
    )


def select_counts(
    params: Array,
    forward: int,
    backward: int,
    *,
    explore: Explore = "magnitude",
    seed: int = 0,
    round_: Array | int = 0,
) -> Support:
    """As :func:`select`, for given numbers of entries; `round_` numbers the random draws."""
    xp = array_namespace(params)
    flat = xp.reshape(params, (-1,))
    if xp.isdtype(flat.dtype, "complex floating"):
        flat = xp.abs(flat)
    host = host_view(flat)
    work = flat if host is None else host
    dtype = index_dtype(xp, device(params))
    if flat.shape[0] > xp.iinfo(dtype).max:
        raise UnsupportedTensorError(
            f"{flat.shape[0]} entries are too many for indices of {dtype}: in JAX, enable 64 bits"
        )
    if backward == 0:
        nothing = xp.zeros(0, dtype=dtype, device=device(params))
        return Support(nothing, xp.zeros(0, dtype=xp.bool, device=device(params)))
    paths = fast_paths(work)
    if explore == "random":
        support = _random_support(work, forward, backward, seed, round_)
    elif paths is not None:
        indices, magnitudes = paths.largest(work, backward)
        support = Support(indices, paths.largest_flags(magnitudes, forward))
    elif is_numpy_array(work):
        indices, magnitudes = largest_on_host(work, backward)
        support = Support(indices, largest_flags(magnitudes, forward))
    else:
        keys = _rank_keys(work)
        indices = true_indices(_largest(keys, backward), backward)
        support = Support(indices, _largest(xp.take(keys, indices), forward))
    if host is None:
        return support
    return Support(like(support.indices, params, dtype), like(support.active, params))


def _random_support(
    flat: Array, forward: int, backward: int, seed: int, round_: Array | int
) -> Support:
    """A by magnitude, then B∖A by the largest of random numbers that all lie below A's."""
    xp = array_namespace(flat)
    in_forward = _flags(flat, forward)
    draws = uniform(flat.shape[0], seed, round_, like=flat)
    in_backward = _flags(xp.where(in_forward, xp.asarray(2.0, dtype=draws.dtype), draws), backward)
    indices = true_indices(in_backward, backward)
    return Support(indices, xp.take(in_forward, indices))


def _flags(flat: Array, count: int) -> Array:
    paths = fast_paths(flat)
    if paths is not None:
        return paths.largest_flags(flat, count)
    if is_numpy_array(flat):
        return largest_flags(flat, count)
    return _largest(_rank_keys(flat), count)


def _largest(keys: Array, count: int) -> Array:
    """Flags (n,) of the `count` largest keys (n,), ties going to the lower index."""
    if is_jax_array(keys):
        from topkast import _xla

        return _xla.largest_flags(keys, count)
    xp = array_namespace(keys)
    if is_torch_array(keys):  # on an accelerator, by radix selection; on the host NumPy does it
        threshold = keys.topk(count, sorted=False).values.amin()
    else:
        threshold = xp.sort(keys)[keys.shape[0] - count]
    above = keys > threshold
    ties = keys == threshold
    dtype = index_dtype(xp, device(keys))
    room = count - xp.sum(xp.astype(above, dtype), dtype=dtype)
    rank = xp.cumulative_sum(xp.astype(ties, dtype), dtype=dtype)
    return above | (ties & (rank <= room))


def _rank_keys(flat: Array) -> Array:
    """Keys (n,) that order as the magnitudes do, with NaN below all of them."""
    xp = array_namespace(flat)
    magnitudes = xp.abs(flat)
    nan = xp.isnan(flat)
    check_finite(flat)
    if is_jax_array(flat):
        # Non-negative floats order as their bit patterns do, and XLA, which may flush
        # subnormal floats to zero, leaves integers alone.
        import jax

        integer = {1: xp.int8, 2: xp.int16, 4: xp.int32, 8: xp.int64}[flat.dtype.itemsize]
        magnitudes = jax.lax.bitcast_convert_type(magnitudes, integer)
    return xp.where(nan, xp.asarray(-1, dtype=magnitudes.dtype), magnitudes)


def check_finite(array: Array) -> None:
    """Raise :class:`NonFiniteError` for NaN or infinity, where values can be looked at."""
    if not is_traced(array):
        xp = array_namespace(array)
        bad = int(xp.sum(xp.astype(~xp.isfinite(array), xp.int32)))
        if bad:
            raise NonFiniteError(f"{bad} of {math.prod(array.shape)} entries are NaN or infinite")
