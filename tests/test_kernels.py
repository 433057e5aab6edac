"""The kernels against dense NumPy, on matrices of any shape with rows of any length."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topkast.kernels import (
    Layout,
    _layout,
    arrange,
    compress,
    gather,
    multiply,
    pack,
    put,
    sampled_product,
    tile_width,
)

Array = np.ndarray[Any, Any]
DTYPES = [np.float32, np.float64]


class Problem:
    """A sparse matrix, whose compact vector is shuffled or in order, and dense activations."""

    def __init__(
        self, shape: tuple[int, int], batch: int, density: float, dtype: Any, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        mask = rng.random(shape) < density
        if mask.size and seed % 3 == 0:
            mask[rng.integers(shape[0])] = seed % 2  # an empty row, or a full one
        self.shape, self.batch = shape, batch
        self.rows, self.columns = (place.astype(np.int32) for place in np.nonzero(mask))
        self.order = rng.permutation(len(self.rows)).astype(np.int32)
        self.values = rng.standard_normal(len(self.rows)).astype(dtype)
        self.dense = np.zeros(shape, dtype)
        self.dense[self.rows, self.columns] = self.values[self.order]
        self.x = rng.standard_normal((batch, shape[1])).astype(dtype)
        self.y = rng.standard_normal((batch, shape[0])).astype(dtype)
        self.bias = rng.standard_normal(shape[0]).astype(dtype)

    def layout(self, *, runs: bool = False) -> Layout:
        order = np.arange(len(self.rows), dtype=np.int32) if runs else self.order
        return arrange(self.rows, self.columns, order, shape=self.shape, runs=runs)


def tiles_of(rows: Array) -> Array:
    width = tile_width(len(rows), rows.dtype)
    tiles = np.full((-(-len(rows) // width), rows.shape[1], width), np.nan, rows.dtype)
    pack(rows, tiles)
    return tiles


problems = st.builds(
    Problem,
    st.tuples(st.integers(1, 70), st.integers(1, 230)),
    st.sampled_from([1, 2, 15, 16, 17, 64, 100, 129, 300]),
    st.sampled_from([0.0, 0.02, 0.2, 0.6, 1.0]),
    st.sampled_from(DTYPES),
    st.integers(0, 1000),
)


@given(problems)
def test_multiply(problem: Problem) -> None:
    out = np.full((problem.batch, problem.shape[0]), np.nan, problem.x.dtype)
    multiply(problem.layout(), problem.values, tiles_of(problem.x), out, bias=problem.bias)
    expected = problem.x @ problem.dense.T + problem.bias
    np.testing.assert_allclose(out, expected, **tolerance(problem))


@given(problems)
def test_sampled_product(problem: Problem) -> None:
    layout = problem.layout(runs=True)
    out = np.full(len(problem.rows), np.nan, problem.x.dtype)
    sampled_product(layout, tiles_of(problem.y), tiles_of(problem.x), out)
    expected = (problem.y.T @ problem.x)[problem.rows, problem.columns]
    np.testing.assert_allclose(out, expected, **tolerance(problem))


def tolerance(problem: Problem) -> dict[str, Any]:
    single = problem.x.dtype == np.float32
    return {"rtol": 1e-4, "atol": 2e-4} if single else {"rtol": 1e-11, "atol": 1e-11}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    problem = Problem((300, 200), 300, 0.1, np.float32, 1)
    x, y = tiles_of(problem.x), tiles_of(problem.y)

    def products(count: int) -> tuple[Array, ...]:
        out = np.empty((300, 300), np.float32)
        gradient = np.empty(len(problem.rows), np.float32)
        multiply(problem.layout(), problem.values, x, out, threads=count)
        sampled_product(problem.layout(runs=True), y, x, gradient, threads=count)
        return out, gradient

    for found, expected in zip(products(threads), products(1), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_blocks_wider_than_the_numbers_of_columns_in_them() -> None:
    """Columns are counted from the start of their block, in 16 bits."""
    assert _layout._MOST_BLOCK == 1 << 16
    columns = np.asarray([5, 70_000, 199_999], np.int32)
    rows = np.zeros(3, np.int32)
    layout = arrange(rows, columns, np.arange(3, dtype=np.int32), shape=(1, 200_000))
    x = tiles_of(np.arange(200_000, dtype=np.float64)[None])
    out = np.empty((1, 1))
    multiply(layout, np.asarray([1.0, 2.0, 4.0]), x, out)
    assert out[0, 0] == 5 + 2 * 70_000 + 4 * 199_999


@given(st.integers(1, 150), st.integers(1, 90), st.sampled_from(DTYPES), st.sampled_from([16, 64]))
def test_pack(batch: int, features: int, dtype: Any, width: int) -> None:
    rows = np.random.default_rng(0).standard_normal((batch, features)).astype(dtype)
    tiles = np.full((-(-batch // width), features, width), np.nan, dtype)
    pack(rows, tiles)
    columns = np.ascontiguousarray(tiles.transpose(1, 0, 2).reshape(features, -1))
    np.testing.assert_array_equal(columns[:, :batch], rows.T)
    assert not columns[:, batch:].any()


def test_a_copied_layout_works_without_the_original() -> None:
    problem = Problem((60, 40), 20, 0.3, np.float64, 1)
    layouts = [copy.deepcopy(problem.layout()), pickle.loads(pickle.dumps(problem.layout()))]
    used = problem.layout()
    x, out = tiles_of(problem.x), np.empty((20, 60))
    multiply(used, problem.values, x, out)  # which remembers where its arrays are
    layouts.append(copy.deepcopy(used))
    del used
    for layout in layouts:
        found = np.full_like(out, np.nan)
        multiply(layout, problem.values, x, found)
        np.testing.assert_array_equal(found, out)
        arrays = layout._arrays
        assert layout._numbers[3:] == tuple(array.ctypes.data for array in arrays)


class TestBadInput:
    """The kernels trust addresses: what does not fit must not reach them."""

    def setup_method(self) -> None:
        self.problem = Problem((8, 9), 3, 0.5, np.float32, 1)
        self.x, self.y = tiles_of(self.problem.x), tiles_of(self.problem.y)
        self.out = np.empty((3, 8), np.float32)

    def test_shapes(self) -> None:
        layout, values = self.problem.layout(), self.problem.values
        narrow = np.zeros((1, 9, self.x.shape[2] - 1), np.float32)
        for x, out, compact, bias in (
            (self.x[:, 1:].copy(), self.out, values, None),
            (self.x, self.out[:, 1:].copy(), values, None),
            (self.x, self.out[:, ::-1], values, None),
            (self.x, self.out, values[1:].copy(), None),
            (self.x, self.out, values, np.zeros(7, np.float32)),
            (self.x[:, ::-1], self.out, values, None),
            (narrow, self.out, values, None),
        ):
            with pytest.raises(ValueError, match=r"must be contiguous and of|a tile cannot"):
                multiply(layout, compact, x, out, bias=bias)
        rows = np.zeros((self.x.shape[0] * self.x.shape[2] + 1, layout.rows), np.float32)
        with pytest.raises(ValueError, match="rows from 1 tiles of"):
            multiply(layout, values, self.x, rows)
        with pytest.raises(ValueError, match="must be contiguous and of"):
            sampled_product(self.problem.layout(runs=True), self.x, self.x, values.copy())

    def test_dtypes(self) -> None:
        layout, values = self.problem.layout(), self.problem.values
        with pytest.raises(TypeError, match="x is float64"):
            multiply(layout, values, self.x.astype(np.float64), self.out)
        with pytest.raises(TypeError, match="float32 or float64"):
            multiply(layout, values.astype(np.float16), self.x, self.out)

    def test_layouts_for_the_other_product(self) -> None:
        with pytest.raises(ValueError, match="runs=False"):
            multiply(self.problem.layout(runs=True), self.problem.values, self.x, self.out)
        with pytest.raises(ValueError, match="runs=True"):
            sampled_product(self.problem.layout(), self.y, self.x, self.problem.values.copy())

    def test_packing(self) -> None:
        with pytest.raises(ValueError, match="cannot pack"):
            pack(self.problem.x, self.x[:, 1:].copy())
        with pytest.raises(TypeError, match="float32 or float64"):
            pack(self.problem.x, self.x.astype(np.float64))

    def test_places(self) -> None:
        place = np.zeros(1, np.int32)
        for rows, columns, source in ((5, 0, 0), (-1, 0, 0), (0, 9, 0), (0, 0, -1)):
            with pytest.raises(ValueError, match=r"must lie in|must not be negative"):
                arrange(place + rows, place + columns, place + source, shape=(5, 9))
        with pytest.raises(ValueError, match="1 rows, 2 columns"):
            arrange(place, np.zeros(2, np.int32), place, shape=(5, 9))

    def test_what_is_read_only_is_not_written(self) -> None:
        self.out.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            multiply(self.problem.layout(), self.problem.values, self.x, self.out)
        self.x.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            pack(self.problem.x, self.x)


def test_they_run_without_pytorch() -> None:
    """On Python's threads, in the child of a process that has used them too."""
    code = """
import os, sys
import numpy as np
from topkast.kernels import arrange, multiply
place = np.arange(500, dtype=np.int32)
layout = arrange(place, place, place, shape=(500, 500))
x = np.ones((1, 500, 16), np.float32)
out = np.empty((16, 500), np.float32)
multiply(layout, place.astype(np.float32), x, out, threads=3)
assert (out == place).all() and "torch" not in sys.modules
child = os.fork()
if not child:
    multiply(layout, place.astype(np.float32), x, out, threads=3)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow  # compiles all kernels anew, half a minute each
@pytest.mark.parametrize("features", [{"avx2": True}, {}], ids=["avx2", "none"])
def test_processors_with_shorter_vectors(features: dict[str, bool], tmp_path: Path) -> None:
    code = f"""
import sys
from llvmlite import binding
features = binding.FeatureMap()
features.update({features})
binding.get_host_cpu_features = lambda: features
import numpy as np
from topkast.kernels import _vector, arrange, multiply, pack, sampled_product, tile_width
assert _vector.VECTOR_BYTES == {32 if features else 16}
rng = np.random.default_rng(0)
rows, columns = (part.astype(np.int32) for part in np.nonzero(rng.random((70, 90)) < 0.3))
order = np.arange(len(rows), dtype=np.int32)
values = rng.standard_normal(len(rows)).astype(np.float32)
dense = np.zeros((70, 90), np.float32)
dense[rows, columns] = values
for batch in (1, 9, 200):
    x, y = (rng.standard_normal((batch, size)).astype(np.float32) for size in (90, 70))
    width = tile_width(batch, np.float32)
    tiles = [np.empty((-(-batch // width), part.shape[1], width), np.float32) for part in (x, y)]
    pack(x, tiles[0])
    pack(y, tiles[1])
    out = np.empty((batch, 70), np.float32)
    multiply(arrange(rows, columns, order, shape=(70, 90)), values, tiles[0], out)
    np.testing.assert_allclose(out, x @ dense.T, atol=1e-4)
    found = np.empty_like(values)
    layout = arrange(rows, columns, order, shape=(70, 90), runs=True)
    sampled_product(layout, tiles[1], tiles[0], found)
    np.testing.assert_allclose(found, (y.T @ x)[rows, columns], atol=1e-4)
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_kernel_convolutions import Grid, Problem, lanes_of
for batch, dtype in ((1, np.float32), (3, np.float64), (40, np.float32)):
    grid = Grid((7, 9), size=(3, 2), stride=(1, 2), margins=((1, 1), (0, 1)))
    problem = Problem(grid.for_batch(batch, lanes_of(dtype)), (batch, 3, 4), 0.5, dtype)
    for found, expected in zip(problem.found(), problem.expected(), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200, env=environment)


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
