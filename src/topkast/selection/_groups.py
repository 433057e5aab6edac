"""N:M sparsity: A and B hold the same number of weights in each group of consecutive ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral

from array_api_compat import array_namespace

from topkast._errors import OptionError
from topkast._primitives import Array, device
from topkast.backends import backend_of
from topkast.selection._random import Ranks, random_words

_ROUNDING = 1e-9  # by which n/m may differ from the share that a float gives, as 1 - 1 / 3


def check_pattern(pattern: object) -> tuple[int, int] | None:
    """Validate the option `pattern`: two Python integers or None, else :class:`OptionError`."""
    if pattern is None:
        return None
    numbers = list(pattern) if isinstance(pattern, Sequence) and len(pattern) == 2 else []
    if not numbers or any(
        isinstance(number, bool) or not isinstance(number, Integral) for number in numbers
    ):
        raise OptionError(_expected(pattern))
    kept, size = map(int, numbers)
    if not 1 <= kept <= size:
        raise OptionError(_expected(pattern))
    return kept, size


def _expected(pattern: object) -> str:
    return (
        "pattern must be two integers n and m with 1 <= n <= m, such as (2, 4) for the 2 largest "
        f"of each 4 consecutive weights, or None, got {pattern!r}"
    )


def pattern_densities(
    pattern: tuple[int, int], fwd: float, bwd: float
) -> tuple[Fraction, Fraction]:
    """Densities of A and B as shares of a group.

    Raises :class:`topkast.OptionError` unless `fwd` is the sparsity of the pattern, and `bwd` keeps
    a whole number of weights in each group.
    """
    kept, size = pattern
    if abs((1 - fwd) * size - kept) > _ROUNDING * size:
        raise OptionError(
            f"pattern={pattern} keeps {kept} of each {size} weights, which is fwd="
            f"{_format_sparsity(kept, size)}, but fwd={fwd!r} was given: pass "
            f"fwd={_format_sparsity(kept, size)}, another pattern, or pattern=None"
        )
    exact = (1 - bwd) * size
    backward = round(exact)
    if abs(exact - backward) > _ROUNDING * size:
        # bwd <= fwd: the whole numbers on both sides lie between `kept` and `size`.
        nearest = " or ".join(
            f"bwd={_format_sparsity(count, size)} ({count} of {size})"
            for count in (math.ceil(exact), math.floor(exact))
        )
        raise OptionError(
            f"bwd={bwd!r} keeps {exact:.6g} of each {size} weights with pattern={pattern}, "
            f"expected a whole number: pass {nearest}"
        )
    return Fraction(kept, size), Fraction(backward, size)


def _format_sparsity(kept: int, size: int) -> str:
    return f"{1 - kept / size:.10g}"


def group_size_of(
    name: str, shape: tuple[int, ...], pattern: tuple[int, int] | None, *, stacked: bool = False
) -> int | None:
    """Number of weights in a group of a tensor; None without a pattern.

    Raises :class:`topkast.OptionError` unless groups divide the rows of the tensor as a matrix, or
    of each layer of a `stacked` tensor.
    """
    if pattern is None:
        return None
    width = math.prod(shape[2 if stacked else 1 :])
    if width % pattern[1]:
        raise OptionError(
            f"{name}: pattern={pattern} needs rows of a multiple of {pattern[1]} weights, but they "
            f"have {width} (first axis × all others{' of each layer' if stacked else ''}). Choose "
            f"another pattern, keep the tensor dense with dense={name!r}, or rank all its weights "
            f'together with overrides={{{name!r}: {{"pattern": None}}}}'
        )
    return pattern[1]


def places_in_groups(values: Array, group_size: int, ties: Ranks) -> Array:
    """Places (n,) of entries in their groups of consecutive ones: 0 is the largest in a group.

    Floats are ranked by magnitude, integers by value, and equal ones by `ties`, as by the functions
    of a backend; so are the errors and the treatment of NaN. Integers of 8, 16 or 32 bits.
    """
    xp = array_namespace(values)
    keys = _columns(backend_of(values).magnitudes(values), group_size)
    words = _columns(_tie_words(values, ties), group_size)
    dtype = xp.int8 if group_size < 1 << 7 else xp.int16 if group_size < 1 << 15 else xp.int32
    places = xp.zeros(keys.shape, dtype=dtype, device=device(values))
    for column in range(group_size):
        key, word = keys[column, :][None, :], words[column, :][None, :]
        is_larger = (key > keys) | ((key == keys) & (word > words))
        places = places + xp.astype(is_larger, dtype)
    return xp.reshape(xp.permute_dims(places, (1, 0)), (-1,))


def _columns(flat: Array, group_size: int) -> Array:
    """A vector (n,) as a contiguous matrix (group_size, n / group_size): one column per group."""
    xp = array_namespace(flat)
    columns = xp.permute_dims(xp.reshape(flat, (-1, group_size)), (1, 0))
    return xp.reshape(xp.reshape(columns, (-1,)), (group_size, -1))


def _tie_words(values: Array, ties: Ranks) -> Array:
    """Integers of 32 bits (n,) in the order of the ranks `ties`, whose words have no sign."""
    xp = array_namespace(values)
    dtype = backend_of(values).index_dtype(values)
    positions = xp.arange(values.shape[0], dtype=dtype, device=device(values))
    words = random_words(positions + ties.first, ties.key)
    return words ^ xp.asarray(-(1 << 31), dtype=xp.int32, device=device(values))
