"""What sets must be, checked entry by entry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import topkast
from topkast import Blocks, Support


@pytest.mark.parametrize(
    ("indices", "forward", "message"),
    [
        ([1, 4, 0], -1, r"between 0 and \|B\|"),
        ([1, 4, 0], 4, r"between 0 and \|B\|"),
        ([1, 4, 0], 2.0, r"between 0 and \|B\|"),
        ([4, 1, 0], 2, "indices of A that do not ascend"),
        ([0, 4, 2], 3, "indices of A that do not ascend"),
        ([4, 1, 1], 1, "indices of B∖A that do not ascend"),
        ([4, 0, 1, 1], 1, "indices of B∖A that do not ascend"),
        ([-1, 4, 0], 2, r"outside of \[0, 5\)"),
        ([1, 5, 0], 2, r"outside of \[0, 5\)"),
        ([1, 4, 4], 2, "an index twice"),
    ],
)
def test_wrong_sets_are_refused(indices: list[int], forward: Any, message: str) -> None:
    with pytest.raises(topkast.MismatchError, match=message):
        Support(np.asarray(indices, np.int32), forward).check(5, "w")


@pytest.mark.parametrize(
    ("indices", "forward"), [([1, 4, 0], 2), ([0, 4], 2), ([0, 4], 0), ([], 0)]
)
def test_sets_that_pass(indices: list[int], forward: int) -> None:
    Support(np.asarray(indices, np.int32), forward).check(5, "w")


def test_groups_hold_equally_many() -> None:
    for indices, forward in (([0, 2, 3], 3), ([0, 2, 3], 2), ([1, 4, 0, 2, 3], 2), ([], 0)):
        Support(np.asarray(indices, np.int32), forward, None, 5).check(5, "w")  # one group
    Support(np.asarray([1, 4, 6, 8, 0, 9], np.int32), 4, None, 5).check(10, "w")
    for indices, forward, name in (
        ([1, 4, 6, 0, 9], 3, "A"),
        ([1, 2, 4, 6, 0, 9], 4, "A"),
        ([1, 4, 6, 8, 0, 2], 4, "B∖A"),
    ):
        support = Support(np.asarray(indices, np.int32), forward, None, 5)
        with pytest.raises(topkast.MismatchError, match=f"w .* units of {name} in each group of 5"):
            support.check(10, "w")


def test_entries_of_blocks_are_counted_once_they_are_kept() -> None:
    support = Support(np.asarray([1], np.int32), 1, Blocks(rows=2, columns=1, height=2, width=3))
    assert support.cached_bytes == 0
    assert support.entries.tolist() == [1, 4]
    assert support.cached_bytes == 2 * 4


@pytest.mark.parametrize(("width", "dtype"), [((1 << 30) - 1, np.int32), (1 << 30, np.int64)])
def test_entries_have_64_bits_where_32_are_too_few(width: int, dtype: Any) -> None:
    blocks = Blocks(rows=2, columns=1, height=2, width=width)
    entries = blocks.entries(np.asarray([width - 1], np.int32))
    assert entries.dtype == dtype
    assert entries.tolist() == [width - 1, 2 * width - 1]
