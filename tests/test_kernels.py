"""Kernels compared with dense NumPy, for matrices of all shapes and rows of all lengths."""

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
from kernel_problems import DTYPES, Array, Problem, tiles_of

from topkast.kernels import (
    Layout,
    LinearProducts,
    RowLayout,
    UnitLinearProducts,
    _layout,
    make_layout,
    make_row_layout,
    multiply,
    pack,
    sampled_product,
)
from topkast.kernels.runtime import _partition

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
def test_multiply_by_rows(problem: Problem) -> None:
    out = np.full((problem.batch, problem.shape[0]), np.nan, problem.x.dtype)
    layout, _ = problem.row_layouts()
    multiply(layout, problem.values, tiles_of(problem.x), out, bias=problem.bias)
    expected = problem.x @ problem.dense_first.T + problem.bias
    np.testing.assert_allclose(out, expected, **tolerance(problem))


@given(problems)
def test_sampled_product(problem: Problem) -> None:
    x, y = tiles_of(problem.x), tiles_of(problem.y)
    first, second = problem.row_layouts()
    out, separate = (np.full(len(problem.rows), np.nan, problem.x.dtype) for _ in range(2))
    sampled_product(first, y, x, out, other=second)
    np.testing.assert_allclose(out, problem.gradient(), **tolerance(problem))
    for layout in problem.row_layouts(panel_width=3):
        sampled_product(layout, y, x, separate)
    np.testing.assert_array_equal(separate, out)


@given(problems, st.sampled_from([np.int32, np.int64]))
def test_the_products_of_a_linear_layer(problem: Problem, dtype: Any) -> None:
    indices = problem.indices.astype(dtype)
    products = LinearProducts(indices, problem.first, shape=problem.shape)
    x, y = (
        np.full(products.packed_shape(rows.shape, rows.dtype), np.nan, rows.dtype)
        for rows in (problem.x, problem.y)
    )
    products.pack(problem.x, x)
    products.pack(problem.y, y)
    output, for_input = np.full_like(problem.y, np.nan), np.full_like(problem.x, np.nan)
    for_values = np.full_like(problem.values, np.nan)
    products.forward(problem.values, x, output, bias=problem.bias)
    products.input_gradient(problem.values, y, for_input)
    products.weight_gradient(y, x, for_values)
    expected = problem.x @ problem.dense_first.T + problem.bias
    np.testing.assert_allclose(output, expected, **tolerance(problem))
    np.testing.assert_allclose(for_input, problem.y @ problem.dense_first, **tolerance(problem))
    np.testing.assert_allclose(for_values, problem.gradient(), **tolerance(problem))


@pytest.mark.parametrize("pair", [(0.9, 0.8), (0.95, 0.9), (0.98, 0.95)])
def test_a_linear_layer_holds_no_more_than_four_bytes_an_entry(pair: tuple[float, float]) -> None:
    """In the layouts of all three products, without the indices."""
    size, rng = 1024, np.random.default_rng(0)
    chosen = rng.permutation(size**2)[: round((1 - pair[1]) * size**2)].astype(np.int32)
    forward = round((1 - pair[0]) * size**2)
    indices = np.concatenate([np.sort(chosen[:forward]), np.sort(chosen[forward:])])
    products = LinearProducts(indices, forward, shape=(size, size))
    assert products.nbytes <= 4 * len(indices)
    wide = LinearProducts(indices.astype(np.int64), forward, shape=(size, size))
    assert wide.nbytes == products.nbytes + 4 * len(indices)  # the new int32 columns


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (8, 0)])
@pytest.mark.parametrize("batch", [0, 3, 20])
def test_matrices_without_entries(
    capfd: pytest.CaptureFixture[str], rows: int, shape: tuple[int, int], batch: int
) -> None:
    indices = np.empty(0, np.int64 if rows == 1 and batch else np.int32)
    products: Any = (
        LinearProducts(indices, 0, shape=shape)
        if rows == 1
        else UnitLinearProducts(indices, 0, shape=shape, rows=rows)
    )
    values, x, y = np.empty(0), np.ones((batch, shape[1])), np.ones((batch, shape[0]))
    packed = np.full(products.packed_shape(x.shape, x.dtype), np.nan)
    products.pack(x, packed)
    packed_gradient = np.full(products.packed_shape(y.shape, y.dtype), np.nan)
    products.pack(y, packed_gradient)
    out, gradient = np.full_like(y, np.nan), np.full_like(x, np.nan)
    products.forward(values, packed, out, bias=np.arange(shape[0], dtype=float))
    products.input_gradient(values, packed_gradient, gradient)
    products.weight_gradient(packed_gradient, packed, values)
    assert (out == np.arange(shape[0])).all()
    assert not gradient.any()
    assert capfd.readouterr().err == ""  # numba prints errors of compiled code, and goes on


def test_an_empty_batch_has_zero_gradient() -> None:
    problem = Problem((8, 9), 0, 0.5, np.float32, 1)
    products = LinearProducts(problem.indices, problem.first, shape=problem.shape)
    x, y = (
        np.empty(products.packed_shape(rows.shape, rows.dtype), rows.dtype)
        for rows in (problem.x, problem.y)
    )
    out = np.full_like(problem.values, np.nan)
    products.weight_gradient(y, x, out)
    assert not out.any()


def tolerance(problem: Problem) -> dict[str, Any]:
    single = problem.x.dtype == np.float32
    return {"rtol": 1e-4, "atol": 2e-4} if single else {"rtol": 1e-11, "atol": 1e-11}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    problem = Problem((300, 200), 300, 0.1, np.float32, 4)
    x, y = tiles_of(problem.x), tiles_of(problem.y)
    first, second = problem.row_layouts()

    def products(count: int) -> tuple[Array, ...]:
        out, other = np.empty((300, 300), np.float32), np.empty((300, 300), np.float32)
        gradient = np.empty(len(problem.rows), np.float32)
        multiply(problem.layout(), problem.values, x, out, threads=count)
        multiply(first, problem.values, x, other, threads=count)
        sampled_product(first, y, x, gradient, other=second, threads=count)
        return out, other, gradient

    for actual, expected in zip(products(threads), products(1), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_the_size_of_chunks_changes_no_bit() -> None:
    problem = Problem((300, 200), 300, 0.1, np.float32, 4)
    x, y = tiles_of(problem.x), tiles_of(problem.y)
    results = []
    for max_rows in (1, 7, 300):
        first, second = problem.row_layouts(max_rows=max_rows)
        out, gradient = np.empty((300, 300), np.float32), np.empty(len(problem.rows), np.float32)
        multiply(first, problem.values, x, out)
        sampled_product(first, y, x, gradient, other=second)
        results.append((out, gradient))
    for arrays in results[1:]:
        for actual, expected in zip(arrays, results[0], strict=True):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("by_rows", [False, True])
def test_a_matrix_wider_than_a_panel(by_rows: bool) -> None:
    """A uint16 holds the columns of a panel and the length of a segment."""
    assert _partition.MAX_PANEL == (1 << 16) - 1
    columns = np.asarray([5, 70_000, 199_999], np.int32)
    rows = np.zeros(3, np.int32)
    shape = 1, 200_000
    layout = (
        make_row_layout(columns, np.asarray([0, 3]), shape=shape)
        if by_rows
        else make_layout(rows, columns, np.arange(3, dtype=np.int32), shape=shape)
    )
    x = tiles_of(np.arange(200_000, dtype=np.float64)[None])
    out = np.empty((1, 1))
    multiply(layout, np.asarray([1.0, 2.0, 4.0]), x, out)
    assert out[0, 0] == 5 + 2 * 70_000 + 4 * 199_999


def test_segments_of_maximum_length() -> None:
    size = 140_000
    columns = np.arange(size, dtype=np.int32)
    layout = make_row_layout(columns, np.asarray([0, size]), shape=(1, size), panel_width=65_535)
    assert layout.segment_lengths.tolist() == [65_535, 65_535, size - 2 * 65_535]
    out = np.empty((1, 1))
    multiply(layout, np.ones(size), tiles_of(np.ones((1, size))), out)
    assert out[0, 0] == size


@given(st.integers(1, 150), st.integers(1, 90), st.sampled_from(DTYPES), st.sampled_from([16, 64]))
def test_pack(batch: int, features: int, dtype: Any, width: int) -> None:
    rows = np.random.default_rng(0).standard_normal((batch, features)).astype(dtype)
    tiles = np.full((-(-batch // width), features, width), np.nan, dtype)
    pack(rows, tiles)
    columns = np.ascontiguousarray(tiles.transpose(1, 0, 2).reshape(features, -1))
    np.testing.assert_array_equal(columns[:, :batch], rows.T)
    assert not columns[:, batch:].any()


@pytest.mark.parametrize("by_rows", [False, True])
def test_a_copied_layout_works_without_the_original(by_rows: bool) -> None:
    problem = Problem((60, 40), 20, 0.3, np.float64, 4)

    def make() -> Layout | RowLayout:
        return problem.row_layouts()[0] if by_rows else problem.layout()

    layouts = [copy.deepcopy(make()), pickle.loads(pickle.dumps(make()))]
    used = make()
    x, out = tiles_of(problem.x), np.empty((20, 60))
    multiply(used, problem.values, x, out)  # caches the addresses of its arrays
    layouts.append(copy.deepcopy(used))
    del used
    for layout in layouts:
        actual = np.full_like(out, np.nan)
        multiply(layout, problem.values, x, actual)
        np.testing.assert_array_equal(actual, out)
        known = dict(zip(_layout.LAYOUT.names or (), layout._record, strict=True))
        for name, number in known.items():
            array = getattr(layout, name, None)
            assert not isinstance(array, np.ndarray) or array.ctypes.data == number


def test_kernels_run_without_pytorch() -> None:
    """They run on Python's threads, also in a child of a process that has used these."""
    code = """
import os, sys
import numpy as np
from topkast.kernels import make_layout, multiply
index = np.arange(500, dtype=np.int32)
layout = make_layout(index, index, index, shape=(500, 500))
x = np.ones((1, 500, 16), np.float32)
out = np.empty((16, 500), np.float32)
multiply(layout, index.astype(np.float32), x, out, threads=3)
assert (out == index).all() and "torch" not in sys.modules
child = os.fork()
if not child:
    multiply(layout, index.astype(np.float32), x, out, threads=3)
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
from topkast.kernels import LinearProducts
from topkast.kernels.runtime import _vector
assert _vector.VECTOR_BYTES == {32 if features else 16}
rng = np.random.default_rng(0)
chosen = rng.permutation(70 * 90)[:1900].astype(np.int32)
indices = np.concatenate([np.sort(chosen[:800]), np.sort(chosen[800:])])
products = LinearProducts(indices, 800, shape=(70, 90))
for dtype in (np.float32, np.float64):
    values = rng.standard_normal(len(indices)).astype(dtype)
    dense = np.zeros((70, 90), dtype)
    dense.reshape(-1)[indices[:800]] = values[:800]
    for batch in (1, 9, 200):
        rows = [rng.standard_normal((batch, size)).astype(dtype) for size in (90, 70)]
        x, y = (np.empty(products.packed_shape(array.shape, dtype), dtype) for array in rows)
        products.pack(rows[0], x)
        products.pack(rows[1], y)
        out, back = np.empty((batch, 70), dtype), np.empty((batch, 90), dtype)
        products.forward(values, x, out)
        np.testing.assert_allclose(out, rows[0] @ dense.T, atol=1e-4)
        products.input_gradient(values, y, back)
        np.testing.assert_allclose(back, rows[1] @ dense, atol=1e-4)
        gradient = np.empty_like(values)
        products.weight_gradient(y, x, gradient)
        np.testing.assert_allclose(gradient, (rows[1].T @ rows[0]).ravel()[indices], atol=1e-4)
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_kernel_convolutions import ConvGeometry, Problem, lanes_of
from test_kernel_units import CONVOLUTIONS, convolution_products, linear_products, tolerance
for rows, dtype in ((2, np.float32), (4, np.float64), (8, np.float32)):
    for pair in (
        linear_products(((5, 90), 70, (0.2, 0.3), 0), rows, dtype),
        convolution_products(CONVOLUTIONS[3], rows, dtype),
    ):
        for actual, expected in zip(*pair, strict=True):
            np.testing.assert_allclose(actual, expected, **tolerance(dtype))
for batch, dtype in ((1, np.float32), (3, np.float64), (40, np.float32)):
    geometry = ConvGeometry((7, 9), size=(3, 2), stride=(1, 2), margins=((1, 1), (0, 1)))
    problem = Problem(geometry.for_batch(batch, lanes_of(dtype)), (batch, 3, 4), 0.5, dtype)
    for actual, expected in zip(problem.actual(), problem.expected(), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200, env=environment)
