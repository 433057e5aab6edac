"""Random numbers that are a function of (seed, round, index): the same in every array library."""

from __future__ import annotations

from array_api_compat import array_namespace

from topkast._primitives import Array, device

_MASKS = {shift: (1 << (32 - shift)) - 1 for shift in (8, 15, 16)}


def uniform(size: int, seed: int, round_: Array | int, *, like: Array) -> Array:
    """`size` float32 numbers in [0, 1) with 24 random bits, in the library and place of `like`.

    `seed` is a Python integer, `round_` an integer or a 0-d integer array, known or traced.
    """
    xp = array_namespace(like)
    place = device(like)
    words = xp.arange(size, dtype=xp.int64 if size > 2**31 else xp.int32, device=place)
    words = xp.astype(words, xp.int32)
    for word in (seed, seed >> 32, seed >> 64):
        words = _mix(words ^ xp.asarray(_signed(word & 0xFFFFFFFF), dtype=xp.int32, device=place))
    words = _mix(words ^ xp.asarray(round_, dtype=xp.int32, device=place))
    return xp.astype(_shift(words, 8), xp.float32) * 2.0**-24


def _mix(words: Array) -> Array:
    """A bijection of 32-bit words without visible structure (constants of Wellons, "lowbias32")."""
    words = words ^ _shift(words, 16)
    words = _multiply(words, 0x7FEB352D)
    words = words ^ _shift(words, 15)
    words = _multiply(words, 0x846CA68B)
    return words ^ _shift(words, 16)


def _multiply(words: Array, factor: int) -> Array:
    xp = array_namespace(words)
    return words * xp.asarray(_signed(factor), dtype=xp.int32, device=device(words))


def _shift(words: Array, places: int) -> Array:
    """Shift right and fill with zeros: the standard's shift of signed integers copies the sign."""
    xp = array_namespace(words)
    shifted = xp.bitwise_right_shift(
        words, xp.asarray(places, dtype=xp.int32, device=device(words))
    )
    return shifted & xp.asarray(_MASKS[places], dtype=xp.int32, device=device(words))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
