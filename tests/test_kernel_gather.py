"""Kernels that gather, write and compress entries of long vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_problems import DTYPES, Array

from topkast.kernels import compress, gather, put


@st.composite
def problems(draw: st.DrawFn) -> tuple[Array, Array, Array]:
    """A vector of one or several chunks, and two sets of its indices, of which one may be empty."""
    size = draw(st.sampled_from([1, 7, 16_384, 16_385, 70_001]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    flat = rng.standard_normal(size).astype(draw(st.sampled_from(DTYPES)))
    shares = draw(st.sampled_from([(0.8, 0.1, 0.1), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)]))
    labels = rng.choice(3, size, p=shares)
    first, second = (np.flatnonzero(labels == label).astype(np.int32) for label in (1, 2))
    return flat, first, second


@given(problem=problems())
def test_gather_put_and_compress(problem: tuple[Array, Array, Array]) -> None:
    flat, *sets = problem
    outs = [np.full(len(indices), np.nan, flat.dtype) for indices in sets]
    for indices, out in zip(sets, outs, strict=True):
        gather(flat, indices, out)
        np.testing.assert_array_equal(out, flat[indices])
        for order in (slice(None), np.random.default_rng(0).permutation(len(indices))):
            written, expected = flat.copy(), flat.copy()
            put(written, indices[order], -out[order], ascending=isinstance(order, slice))
            expected[indices] = -out
            np.testing.assert_array_equal(written, expected)
    for used in (sets, sets[:1]):
        kept, expected = flat.copy(), np.zeros_like(flat)
        for indices in used:
            expected[indices] = flat[indices]
        outs = [np.full(len(indices), np.nan, flat.dtype) for indices in used]
        compress(kept, *zip(used, outs, strict=True))
        np.testing.assert_array_equal(kept, expected)
        for indices, out in zip(used, outs, strict=True):
            np.testing.assert_array_equal(out, flat[indices])


@pytest.mark.parametrize("function", [gather, put, lambda flat, *arrays: compress(flat, arrays)])
def test_bad_input_is_refused(function: Any) -> None:
    flat, indices, values = np.ones(9), np.asarray([0, 4, 8], np.int32), np.ones(3)
    changes: list[Any] = [
        (flat.astype(np.float16), indices, values),
        (flat, indices, values.astype(np.float32)),
        (flat, indices.astype(np.int64), values),
    ]
    for change in changes:
        with pytest.raises(TypeError, match=r"float32 or float64|int32"):
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


def test_what_is_written_to_is_writable() -> None:
    def frozen(count: int) -> Array:
        array = np.ones(count)
        array.flags.writeable = False
        return array

    indices = np.asarray([0, 4, 8], np.int32)
    with pytest.raises(ValueError, match="out is read-only"):
        gather(np.ones(9), indices, frozen(3))
    with pytest.raises(ValueError, match="flat is read-only"):
        put(frozen(9), indices, np.zeros(3))
    with pytest.raises(ValueError, match="flat is read-only"):
        compress(frozen(9), (indices, np.ones(3)))
    with pytest.raises(ValueError, match="out is read-only"):
        compress(np.ones(9), (indices, frozen(3)))


@pytest.mark.parametrize("indices", [[0, 9, 1], [4, -1, 8]])
def test_put_checks_indices_in_any_order(indices: list[int]) -> None:
    flat = np.ones(9)
    with pytest.raises(ValueError, match=r"must lie in \[0, 9\)"):
        put(flat, np.asarray(indices, np.int32), np.zeros(3), ascending=False)
    assert flat.all()
