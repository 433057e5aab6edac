"""Arguments that the kernels refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_problems import Array, Problem, tiles_of

from topkast.kernels import (
    LinearProducts,
    find_row_starts,
    make_layout,
    make_row_layout,
    multiply,
    pack,
    sampled_product,
)


class TestBadInput:
    """Kernels access memory by address: arrays that do not fit must be refused before."""

    def setup_method(self) -> None:
        self.problem = Problem((8, 9), 3, 0.5, np.float32, 4)
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
        with pytest.raises(ValueError, match="rows of out do not fit 1 tiles of"):
            multiply(layout, values, self.x, rows)
        first, second = self.problem.row_layouts()
        with pytest.raises(ValueError, match="must be contiguous and of"):
            sampled_product(first, self.x, self.x, values.copy())
        with pytest.raises(ValueError, match="must be contiguous and of"):
            sampled_product(first, self.y, self.x, values[1:].copy(), other=second)

    def test_dtypes(self) -> None:
        layout, values = self.problem.layout(), self.problem.values
        with pytest.raises(TypeError, match="x is float64"):
            multiply(layout, values, self.x.astype(np.float64), self.out)
        with pytest.raises(TypeError, match="float32 or float64"):
            multiply(layout, values.astype(np.float16), self.x, self.out)

    def test_sampled_product_needs_row_layouts(self) -> None:
        layout: Any = self.problem.layout()
        with pytest.raises(TypeError, match="make_row_layout"):
            sampled_product(layout, self.y, self.x, self.problem.values.copy())

    def test_layouts_with_other_chunks_or_panels(self) -> None:
        first, _ = self.problem.row_layouts()
        for options in ({"panel_width": 4}, {"max_rows": 3}):
            _, second = self.problem.row_layouts(**options)
            with pytest.raises(ValueError, match="same shape, pitch, chunks and panels"):
                sampled_product(first, self.y, self.x, self.problem.values.copy(), other=second)

    def test_columns_that_are_overwritten(self) -> None:
        layout = make_row_layout(self.problem.indices, *self.row_starts(), shape=(8, 9), pitch=9)
        values = self.problem.values
        multiply(layout, values, self.x, self.out)
        for position, index in ((layout.start, -1), (layout.stop - 1, 72)):
            layout = make_row_layout(
                self.problem.indices.copy(), *self.row_starts(), shape=(8, 9), pitch=9
            )
            layout.columns[position] = index
            with pytest.raises(ValueError, match="were overwritten"):
                multiply(layout, values, self.x, self.out)
            with pytest.raises(ValueError, match="were overwritten"):
                sampled_product(layout, self.y, self.x, values.copy())

    def row_starts(self) -> tuple[Array]:
        first = slice(self.problem.first)
        return (find_row_starts(self.problem.indices, first, shape=(8, 9)),)

    def test_columns(self) -> None:
        columns, starts = np.asarray([1, 3, 8], np.int32), np.asarray([0, 2, 2, 3])
        make_row_layout(columns, starts, shape=(3, 4), pitch=4)
        for wrong in ([3, 1, 8], [1, 1, 8], [-1, 3, 8], [1, 4, 8], [1, 3, 7], [1, 3, 12]):
            with pytest.raises(ValueError, match="must ascend in"):
                make_row_layout(np.asarray(wrong, np.int32), starts, shape=(3, 4), pitch=4)
        for dtype in (np.int32, np.int64):
            for wrong in ([3, 1, 8], [1, 1, 8], [-1, 3, 8], [1, 3, 12]):
                for forward in (0, 3):
                    with pytest.raises(ValueError, match="must ascend in"):
                        LinearProducts(np.asarray(wrong, dtype), forward, shape=(3, 4))
        for edges in ([0, 2, 3], [0, 2, 1, 3], [0, 2, 2, 4], [-1, 2, 2, 3]):
            with pytest.raises(ValueError, match="ascending positions"):
                make_row_layout(columns, np.asarray(edges), shape=(3, 4), pitch=4)
        with pytest.raises(TypeError, match="int32"):
            make_row_layout(columns.astype(np.int64), starts, shape=(3, 4), pitch=4)
        for vector in (columns[None], np.zeros(6, np.int32)[::2]):
            with pytest.raises(ValueError, match="contiguous vector"):
                make_row_layout(vector, starts, shape=(3, 4), pitch=4)
        for options in (
            {"pitch": 3},
            {"panel_width": 0},
            {"panel_width": 1 << 16},
            {"max_rows": 0},
        ):
            with pytest.raises(ValueError, match=r"pitch must|panel_width must|max_rows must"):
                make_row_layout(columns, starts, shape=(3, 4), **{"pitch": 4} | options)

    def test_packing(self) -> None:
        with pytest.raises(ValueError, match="cannot pack"):
            pack(self.problem.x, self.x[:, 1:].copy())
        with pytest.raises(TypeError, match="float32 or float64"):
            pack(self.problem.x, self.x.astype(np.float64))

    def test_rows_columns_and_value_index(self) -> None:
        zero = np.zeros(1, np.int32)
        for rows, columns, index in ((5, 0, 0), (-1, 0, 0), (0, 9, 0), (0, 0, -1)):
            with pytest.raises(ValueError, match=r"must lie in|must not be negative"):
                make_layout(zero + rows, zero + columns, zero + index, shape=(5, 9))
        with pytest.raises(ValueError, match="must have the same length, got 1, 2 and 1"):
            make_layout(zero, np.zeros(2, np.int32), zero, shape=(5, 9))

    def test_read_only_outputs(self) -> None:
        self.out.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            multiply(self.problem.layout(), self.problem.values, self.x, self.out)
        self.x.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            pack(self.problem.x, self.x)
