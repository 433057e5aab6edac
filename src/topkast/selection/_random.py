"""Random words that are a function of (seed, name, purpose, index): the same in every library."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TypeAlias

from array_api_compat import array_namespace

from topkast._primitives import Array, device, take

Key: TypeAlias = tuple[int, int, int, int]  # of 32 bits each

BITS = 30  # of a draw

_MASKS = {shift: (1 << (32 - shift)) - 1 for shift in (2, 15, 16)}


def make_key(seed: int, name: str, purpose: str) -> Key:
    """The key of one stream of words. Streams whose seeds or names differ are independent.

    Both are hashed before an index enters: to combine a seed with indices directly would make the
    words of one seed a rearrangement of another's.
    """
    digest = hashlib.blake2s(f"{seed} {purpose} {name}".encode(), digest_size=16).digest()
    return struct.unpack("<4I", digest)


def random_words(indices: Array, key: Key, draw: Array | int = 0) -> Array:
    """Words of 32 random bits, as int32, for flat indices (k,) of a tensor.

    Those of indices below 2³² all differ: each step below is a bijection. `draw` numbers
    repeated draws: an integer or a 0-d integer array, known or traced.
    """
    xp = array_namespace(indices)
    place = device(indices)
    words = _mix(xp.astype(indices, xp.int32) ^ _constant(key[0], indices))
    if xp.iinfo(indices.dtype).bits > 32:
        high = xp.bitwise_right_shift(indices, xp.asarray(32, dtype=indices.dtype, device=place))
        words = words ^ xp.astype(high, xp.int32)
    for word in key[1:]:
        words = _mix(words ^ _constant(word, indices))
    return _mix(words ^ xp.asarray(draw, dtype=xp.int32, device=place))


def draws(indices: Array, key: Key, draw: Array | int = 0) -> Array:
    """Integers of 30 random bits, int32."""
    return _shift(random_words(indices, key, draw), 32 - BITS)


@dataclass(frozen=True)
class Ranks:
    """The rank of each entry among those of equal magnitude: a function of its position.

    Attributes
    ----------
    key
        Of the words by which they rank.
    first
        The flat index of the entry at position 0.
    indices
        Where the entries are not consecutive, their flat indices after `first`; integers (k,).
    """

    key: Key
    first: Array | int = 0
    indices: Array | None = None

    def __call__(self, positions: Array) -> Array:
        """Ranks at some positions (k,), the largest first; int64 of 32 bits, all different."""
        if self.indices is not None:
            positions = take(self.indices, positions)
        return ranks(positions + self.first, self.key)

    def at(self, indices: Array) -> Ranks:
        """Those of the entries at some positions (k,)."""
        return Ranks(self.key, self.first, indices)


def ranks(indices: Array, key: Key) -> Array:
    """The words as unsigned integers, int64: by them equal magnitudes rank, the largest first."""
    xp = array_namespace(indices)
    words = xp.astype(random_words(indices, key), xp.int64)
    return words & xp.asarray(0xFFFFFFFF, dtype=xp.int64, device=device(indices))


def _mix(words: Array) -> Array:
    """A bijection of 32-bit words without visible structure (constants of Wellons, "lowbias32")."""
    words = words ^ _shift(words, 16)
    words = words * _constant(0x7FEB352D, words)
    words = words ^ _shift(words, 15)
    words = words * _constant(0x846CA68B, words)
    return words ^ _shift(words, 16)


def _shift(words: Array, count: int) -> Array:
    """Shift right and fill with zeros: the standard's shift of signed integers copies the sign."""
    xp = array_namespace(words)
    shifted = xp.bitwise_right_shift(words, _constant(count, words))
    return shifted & _constant(_MASKS[count], words)


def _constant(word: int, beside: Array) -> Array:
    """A 32-bit word as a 0-d int32, for arrays like `beside`."""
    xp = array_namespace(beside)
    signed = word - (1 << 32) if word >= 1 << 31 else word
    return xp.asarray(signed, dtype=xp.int32, device=device(beside))
