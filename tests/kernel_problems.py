"""Sparse matrices and dense activations for the tests of the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from topkast.kernels import (
    Layout,
    RowLayout,
    find_columns,
    find_row_starts,
    make_layout,
    make_row_layout,
    pack,
    tile_width,
)

Array = np.ndarray[Any, Any]
DTYPES = [np.float32, np.float64]


class Problem:
    """A sparse matrix, with its compact vector shuffled or ordered by row, and dense activations.

    Ordered by row, the compact vector has two parts, like A and B∖A.
    """

    def __init__(
        self, shape: tuple[int, int], batch: int, density: float, dtype: Any, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        mask = rng.random(shape) < density
        if mask.size and seed % 3 == 0:
            mask[rng.integers(shape[0])] = seed % 2  # an empty row, or a full one
        self.shape, self.batch = shape, batch
        self.rows, self.columns = (index.astype(np.int32) for index in np.nonzero(mask))
        self.order = rng.permutation(len(self.rows)).astype(np.int32)
        self.values = rng.standard_normal(len(self.rows)).astype(dtype)
        self.dense = np.zeros(shape, dtype)
        self.dense[self.rows, self.columns] = self.values[self.order]
        flat = np.flatnonzero(mask).astype(np.int32)
        is_first = rng.random(len(flat)) < (0.5, 0.0, 1.0, 0.1)[seed % 4]
        self.indices = np.concatenate([flat[is_first], flat[~is_first]])
        self.first = int(is_first.sum())
        self.dense_first = np.zeros(shape, dtype)
        self.dense_first.reshape(-1)[self.indices[: self.first]] = self.values[: self.first]
        self.x = rng.standard_normal((batch, shape[1])).astype(dtype)
        self.y = rng.standard_normal((batch, shape[0])).astype(dtype)
        self.bias = rng.standard_normal(shape[0]).astype(dtype)

    def layout(self) -> Layout:
        return make_layout(self.rows, self.columns, self.order, shape=self.shape)

    def row_layouts(self, **options: Any) -> tuple[RowLayout, RowLayout]:
        columns, pitch = find_columns(self.indices, shape=self.shape)
        row_starts = (
            find_row_starts(self.indices, entries, shape=self.shape)
            for entries in (slice(self.first), slice(self.first, None))
        )
        first, second = (
            make_row_layout(
                columns, starts, shape=self.shape, **{"pitch": pitch, "panel_width": 97} | options
            )
            for starts in row_starts
        )
        return first, second

    def gradient(self) -> Array:
        """The weight gradient at all entries."""
        gradient: Array = (self.y.T @ self.x).ravel()[self.indices]
        return gradient


def tiles_of(rows: Array) -> Array:
    width = tile_width(len(rows), rows.dtype)
    tiles = np.full((-(-len(rows) // width), rows.shape[1], width), np.nan, rows.dtype)
    pack(rows, tiles)
    return tiles
