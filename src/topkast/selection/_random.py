"""Random words as a hash of (seed, name, purpose, index), the same in every library."""

from __future__ import annotations

import hashlib
import math
import re
import struct
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from array_api_compat import array_namespace

from topkast._primitives import Array, device, take

Key: TypeAlias = tuple[int, int, int, int]  # 32 bits each

BITS = 30  # bits of a draw

_MASKS = {shift: (1 << (32 - shift)) - 1 for shift in (2, 15, 16)}


# Prefixes that PyTorch's wrappers of modules give to the names of tensors.
_WRAPPERS = "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"
_PREFIX = re.compile(rf"(?:^|(?<=[. ]))(?:{'|'.join(_WRAPPERS)})\.")


def bare_name(name: str) -> str:
    """The name of a tensor without the prefixes that PyTorch's wrappers of modules add.

    Random words depend on it, so that a model in DistributedDataParallel or torch.compile has the
    sets that it has alone.

    Examples
    --------
    >>> from topkast.adapter import bare_name
    >>> bare_name("module._orig_mod.layers.0.weight")
    'layers.0.weight'
    """
    return _PREFIX.sub("", name)


def make_key(seed: int, name: str, purpose: str) -> Key:
    """Make the key of one stream of words. Streams of different seeds or names are independent.

    Seed and name are hashed before they meet an index: combining a seed with indices directly
    would make the words of one seed a permutation of another's.
    """
    digest = hashlib.blake2s(
        f"{seed} {purpose} {bare_name(name)}".encode(), digest_size=16
    ).digest()
    return struct.unpack("<4I", digest)


def random_words(indices: Array, key: Key, draw: Array | int = 0) -> Array:
    """Words of 32 random bits, as int32, for flat indices (k,) of a tensor.

    The words of indices below 2³² all differ, because each step is a bijection. `draw` numbers
    repeated draws: an integer of 32 bits, or a 0-d integer array, which may be traced.
    """
    xp = array_namespace(indices)
    words = _mix(xp.astype(indices, xp.int32) ^ _signed(key[0]))
    if xp.iinfo(indices.dtype).bits > 32:
        words = words ^ xp.astype(indices >> 32, xp.int32)
    for word in key[1:]:
        words = _mix(words ^ _signed(word))
    if isinstance(draw, int):
        return _mix(words ^ _signed(draw))
    return _mix(words ^ xp.asarray(draw, dtype=xp.int32, device=device(indices)))


def random_draws(indices: Array, key: Key, draw: Array | int = 0) -> Array:
    """Integers of 30 random bits for flat indices (k,); int32."""
    return _shift(random_words(indices, key, draw), 32 - BITS)


def random_normals(indices: Array, key: Key, draw: Array | int, dtype: Any) -> Array:
    """Numbers of a standard normal distribution for flat indices (k,), by Box and Muller."""
    xp = array_namespace(indices)
    first, second = (
        (xp.astype(random_draws(indices, key, 2 * draw + half), dtype) + 0.5) / (1 << BITS)
        for half in range(2)
    )
    return xp.sqrt(-2 * xp.log(first)) * xp.cos(2 * math.pi * second)


@dataclass(frozen=True)
class Ranks:
    """A function from positions to ranks among equal magnitudes; the largest rank comes first.

    Attributes
    ----------
    key
        Key of the random words that serve as ranks.
    first
        Flat index of the entry at position 0.
    indices
        Flat indices of entries that are not consecutive, relative to `first`; integers (k,).
    """

    key: Key
    first: Array | int = 0
    indices: Array | None = None

    def __call__(self, positions: Array) -> Array:
        """Ranks at positions (k,): distinct 32-bit numbers as int64."""
        if self.indices is not None:
            positions = take(self.indices, positions)
        return ranks(positions + self.first, self.key)

    def at(self, indices: Array) -> Ranks:
        """The ranks of the entries at `indices` (k,)."""
        return Ranks(self.key, self.first, indices)


def ranks(indices: Array, key: Key) -> Array:
    """Random words as unsigned integers in int64; the largest of equal magnitudes ranks first."""
    xp = array_namespace(indices)
    words = xp.astype(random_words(indices, key), xp.int64)
    return words & 0xFFFFFFFF


def _mix(words: Array) -> Array:
    """Hash 32-bit words by a bijection (Wellons' "lowbias32")."""
    words = words ^ _shift(words, 16)
    words = words * _signed(0x7FEB352D)
    words = words ^ _shift(words, 15)
    words = words * _signed(0x846CA68B)
    return words ^ _shift(words, 16)


def _shift(words: Array, count: int) -> Array:
    """Shift right and fill with zeros; the standard's shift of signed integers copies the sign."""
    if isinstance(words, np.ndarray):  # in fewer calls
        return (words.view(np.uint32) >> np.uint32(count)).view(np.int32)
    return (words >> count) & _MASKS[count]


def _signed(word: int) -> int:
    """The signed integer of the same 32 bits: a plain number is not copied to a device."""
    return word - (1 << 32) if word >= 1 << 31 else word
