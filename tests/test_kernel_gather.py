"""Entries of long vectors, gathered, written and kept by kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_problems import DTYPES, Array

from topkast.kernels import compress, gather, put


@st.composite
def sets(draw: st.DrawFn) -> tuple[Array, Array, Array]:
    """A vector of one chunk or several, and two sets of its indices, of which one may be empty."""
    size = draw(st.sampled_from([1, 7, 16_384, 16_385, 70_001]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    flat = rng.standard_normal(size).astype(draw(st.sampled_from(DTYPES)))
    shares = draw(st.sampled_from([(0.8, 0.1, 0.1), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)]))
    kinds = rng.choice(3, size, p=shares)
    first, second = (np.flatnonzero(kinds == kind).astype(np.int32) for kind in (1, 2))
    return flat, first, second


@given(problem=sets())
def test_entries_are_gathered_written_and_kept(problem: tuple[Array, Array, Array]) -> None:
    flat, *parts = problem
    outs = [np.full(len(part), np.nan, flat.dtype) for part in parts]
    for part, out in zip(parts, outs, strict=True):
        gather(flat, part, out)
        np.testing.assert_array_equal(out, flat[part])
        written, expected = flat.copy(), flat.copy()
        put(written, part, -out)
        expected[part] = -out
        np.testing.assert_array_equal(written, expected)
    for used in (parts, parts[:1]):
        kept, expected = flat.copy(), np.zeros_like(flat)
        for part in used:
            expected[part] = flat[part]
        found = [np.full(len(part), np.nan, flat.dtype) for part in used]
        compress(kept, *zip(used, found, strict=True))
        np.testing.assert_array_equal(kept, expected)
        for part, out in zip(used, found, strict=True):
            np.testing.assert_array_equal(out, flat[part])


@pytest.mark.parametrize("function", [gather, put, lambda flat, *part: compress(flat, part)])
def test_gathering_refuses_what_it_cannot_do(function: Any) -> None:
    flat, indices, values = np.ones(9), np.asarray([0, 4, 8], np.int32), np.ones(3)
    changes: list[Any] = [
        (flat.astype(np.float16), indices, values),
        (flat, indices, values.astype(np.float32)),
        (flat, indices.astype(np.int64), values),
    ]
    for change in changes:
        with pytest.raises(TypeError, match=r"float|int32"):
            function(*change)
    changes = [
        (flat[::2], indices, values),
        (flat, indices[:2], values),
        (flat, indices + 1, values),
        (flat, indices - 1, values),
        (flat.reshape(3, 3), indices, values),
    ]
    for change in changes:
        with pytest.raises(ValueError, match=r"contiguous|indices"):
            function(*change)
