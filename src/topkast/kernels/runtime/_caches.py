"""Sizes of this machine's caches, from which the kernels choose how much they work on at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")  # of Linux
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


class Caches(NamedTuple):
    """Bytes of the first cache for data and of the second cache of a core.

    The defaults are the smallest that processors with AVX2 commonly have: too small a guess costs
    less than too large a one, which throws out of a cache what is needed next.
    """

    first: int = 32 << 10
    second: int = 256 << 10


def read_caches(folder: Path = _FOLDER) -> Caches:
    """Read the sizes of the caches from `folder`; the defaults for what it does not tell.

    Examples
    --------
    >>> from pathlib import Path
    >>> read_caches(Path("missing"))
    Caches(first=32768, second=262144)
    """
    sizes: dict[int, int] = {}
    for cache in sorted(folder.glob("index*")):
        try:
            level, cache_type, size = (
                (cache / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        match = re.fullmatch(r"(\d+)([KM]?)", size)
        if cache_type in ("Data", "Unified") and level.isdigit() and match and int(match[1]):
            sizes[int(level)] = int(match[1]) * _UNITS[match[2]]
    default = Caches()
    return Caches(sizes.get(1, default.first), sizes.get(2, default.second))


def panel_columns(caches: Caches, row_bytes: int) -> int:
    """Columns whose rows of a tile, of `row_bytes` each, fill the first cache."""
    return max(1, caches.first // row_bytes)


def max_chunk_rows(caches: Caches, row_bytes: int) -> int:
    """Rows of a chunk whose output takes a quarter of the second cache; the input has the rest."""
    return max(1, caches.second // (4 * row_bytes))


CACHES = read_caches()
