"""Convolution kernels compared with PyTorch, for windows and images of all sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from topkast.kernels import (
    Bands,
    ConvGeometry,
    ConvolutionProducts,
    RowLayout,
    convolve,
    find_row_starts,
    from_planes,
    lanes_of,
    make_layout,
    make_row_layout,
    sampled_correlation,
    shift,
    to_planes,
)

Array = np.ndarray[Any, Any]
DTYPES = [np.float32, np.float64]


class Problem:
    """A sparse convolution: A within B, images, and the gradient of the output."""

    def __init__(
        self,
        geometry: ConvGeometry,
        counts: tuple[int, int, int],
        density: float,
        dtype: Any,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.geometry, self.dtype = geometry, dtype
        self.batch, self.channels, self.rows = counts
        weight = rng.standard_normal((self.rows, self.channels, *geometry.size)).astype(dtype)
        chance = rng.random(weight.shape)
        self.on_b, self.on_a = chance < density, chance < density / 2
        self.dense_values = weight
        self.weight = weight * self.on_a
        self.images = rng.standard_normal((self.batch, self.channels, *geometry.extent)).astype(
            dtype
        )
        self.grad_output = rng.standard_normal(
            (self.batch, self.rows, *geometry.output_extent)
        ).astype(dtype)
        self.bias = rng.standard_normal(self.rows).astype(dtype)

    def expected(self) -> tuple[Array, Array, Array]:
        """Output, gradient of the images, gradient of the weight on B."""
        images, weight = (
            torch.from_numpy(array).requires_grad_() for array in (self.images, self.weight)
        )
        (top, bottom), (left, right) = self.geometry.margins
        padded = torch.nn.functional.pad(images, (left, right, top, bottom))
        actual = torch.nn.functional.conv2d(
            padded,
            weight,
            torch.from_numpy(self.bias),
            stride=self.geometry.stride,
            dilation=self.geometry.dilation,
        )
        for_images, for_weight = torch.autograd.grad(
            actual, [images, weight], torch.from_numpy(self.grad_output)
        )
        return actual.detach().numpy(), for_images.numpy(), for_weight.numpy()[self.on_b]

    def actual(self, threads: int | None = None) -> tuple[Array, Array, Array]:
        """The same from the kernels. Buffers start as NaN, so that unwritten entries show."""
        geometry, weights = self.geometry, math.prod(self.geometry.size)
        planes = self.channels * geometry.planes_per_channel
        on_a, on_b = self.on_a.ravel(), self.on_b.ravel()
        active, exploring = (
            np.flatnonzero(flags).astype(np.int32) for flags in (on_a, on_b & ~on_a)
        )
        indices = np.concatenate([active, exploring])
        shape = self.rows, self.channels * weights
        values = self.dense_values.ravel()[indices]

        def layout(entries: slice, max_rows: int) -> RowLayout:
            starts = find_row_starts(indices, entries, shape=shape)
            return make_row_layout(
                indices, starts, shape=shape, pitch=shape[1], panel_width=5, max_rows=max_rows
            )

        forward = layout(slice(len(active)), 7)
        layouts = [layout(entries, 2) for entries in (slice(len(active)), slice(len(active), None))]
        row, column = (index.astype(np.int32) for index in np.divmod(active, shape[1]))
        transposed = make_layout(
            *geometry.transpose(row, column),
            np.arange(len(active), dtype=np.int32),
            shape=(planes, self.rows * weights),
            max_rows=7,
        )
        input_offsets, output_offsets = (
            geometry.input_offsets(self.channels),
            geometry.output_offsets(self.rows),
        )

        x = self.nan_planes(planes, geometry.length)
        to_planes(self.images, x, geometry.image_layout, threads=threads)
        y = self.nan_planes(self.rows, geometry.gradient_length)
        to_planes(self.grad_output, y, geometry.gradient_layout, threads=threads)

        out, actual = (
            self.nan_planes(self.rows, geometry.positions),
            np.full_like(self.grad_output, np.nan),
        )
        convolve(shift(forward, input_offsets), values, x, out, bias=self.bias, threads=threads)
        from_planes(out, actual, geometry.output_layout, threads=threads)
        out, for_images = (
            self.nan_planes(planes, geometry.pixels),
            np.full_like(self.images, np.nan),
        )
        ordered = values[transposed.order]
        convolve(shift(transposed, output_offsets), ordered, y, out, threads=threads)
        from_planes(out, for_images, geometry.image_layout, threads=threads)
        for_values = np.full_like(values, np.nan)
        first, second = (shift(row_layout, input_offsets) for row_layout in layouts)
        sampled_correlation(
            first,
            y,
            x,
            for_values,
            positions=geometry.positions,
            leading_zeros=geometry.max_offset,
            other=second,
            threads=threads,
        )
        return actual, for_images, for_values[np.argsort(indices)]

    def nan_planes(self, planes: int, length: int) -> Array:
        lanes = lanes_of(self.dtype)
        image_groups = -(-self.batch * self.geometry.bands // lanes)
        return np.full((image_groups, planes, length, lanes), np.nan, self.dtype)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
margins = st.tuples(st.integers(0, 2), st.integers(0, 2))


@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    pairs,
    pairs,
    pairs,
    st.tuples(margins, margins),
    st.sampled_from([None, 1, 2, 4]),
    st.tuples(st.sampled_from([0, 1, 2, 8, 16, 17, 40]), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from(DTYPES),
)
def test_products_match_pytorch(
    extent: tuple[int, int],
    size: tuple[int, int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
    margins: tuple[tuple[int, int], tuple[int, int]],
    bands: int | None,
    counts: tuple[int, int, int],
    density: float,
    dtype: Any,
) -> None:
    for length, window_size, step, margin in zip(extent, size, dilation, margins, strict=True):
        assume(length + sum(margin) > step * (window_size - 1))
    assume(bands is None or lanes_of(dtype) % bands == 0)
    geometry = ConvGeometry(extent, size, dilation, stride, margins, bands or 1)
    if bands is None:
        geometry = geometry.for_batch(counts[0], lanes_of(dtype))
    problem = Problem(geometry, counts, density, dtype)
    tolerance = 2e-4 if dtype == np.float32 else 1e-11
    for actual, expected in zip(problem.actual(), problem.expected(), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_convolution_products_match_pytorch(groups: int, dtype: Any) -> None:
    rng = np.random.default_rng(groups)
    window: dict[str, Any] = {"size": (3, 2), "dilation": (1, 2), "stride": (2, 1)}
    images = rng.standard_normal((5, 8, 9, 7))
    weight = rng.standard_normal((12, 8 // groups, 3, 2))
    chosen = rng.permutation(weight.size)[: weight.size // 2]
    active, exploring = np.sort(chosen[: weight.size // 4]), np.sort(chosen[weight.size // 4 :])
    indices = np.concatenate([active, exploring]).astype(dtype)
    values, sparse = weight.ravel()[indices], np.zeros_like(weight)
    sparse.reshape(-1)[active] = values[: len(active)]
    inputs, weights = (torch.from_numpy(array).requires_grad_() for array in (images, sparse))
    options = {"stride": window["stride"], "dilation": window["dilation"], "groups": groups}
    expected: Any = torch.nn.functional.conv2d(
        torch.nn.functional.pad(inputs, (0, 1, 1, 1)), weights, **options
    )
    grad_output = rng.standard_normal(expected.shape)
    grads = torch.autograd.grad(expected, [inputs, weights], torch.from_numpy(grad_output))

    products = ConvolutionProducts(
        indices,
        len(active),
        shape=(12, 8 * 6),
        margins=((1, 1), (0, 1)),
        groups=groups,
        **window,
    )
    shape = images.shape
    packed = np.full(products.packed_shape(shape, images.dtype), np.nan)
    products.pack(images, packed)
    packed_gradient = np.full(products.packed_gradient_shape(shape, images.dtype), np.nan)
    products.pack_gradient(grad_output, packed_gradient, shape=shape)
    output, for_images = np.full(products.output_shape(shape), np.nan), np.full(shape, np.nan)
    for_values = np.full(len(indices), np.nan)
    products.forward(values, packed, output, shape=shape)
    products.input_gradient(values, packed_gradient, for_images, shape=shape)
    products.weight_gradient(packed_gradient, packed, for_values, shape=shape)
    np.testing.assert_allclose(output, expected.detach().numpy(), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(for_images, grads[0].numpy(), rtol=1e-11, atol=1e-11)
    on_b = grads[1].numpy().ravel()[indices]
    np.testing.assert_allclose(for_values, on_b, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="values must be contiguous"):
        products.input_gradient(values[:9], packed_gradient, for_images, shape=shape)
    with pytest.raises(TypeError, match="float32 or float64"):
        products.input_gradient(values.astype(np.float32), packed_gradient, for_images, shape=shape)


def test_images_larger_than_one_transposed_piece() -> None:
    geometry = ConvGeometry((70, 90), size=(3, 2), stride=(2, 1), margins=((1, 1), (0, 1)))
    problem = Problem(geometry, (18, 2, 3), 0.5, np.float64)
    for actual, expected in zip(problem.actual(), problem.expected(), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("bands", [1, 2])
def test_the_number_of_threads_changes_no_bit(threads: int, bands: int) -> None:
    geometry = ConvGeometry(
        (12, 13), size=(3, 3), stride=(1, 2), margins=((1, 1), (1, 1)), bands=bands
    )
    problem = Problem(geometry, (33, 8, 16), 0.3, np.float32)
    for actual, expected in zip(problem.actual(threads), problem.actual(1), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_bands_fill_the_lanes_of_few_images() -> None:
    geometry, lanes = ConvGeometry((32, 32), size=(3, 3), margins=((1, 1), (1, 1))), 16
    assert [geometry.for_batch(batch, lanes).bands for batch in (1, 4, 16, 64)] == [16, 4, 1, 1]
    assert geometry.for_batch(24, lanes).bands == 2
    assert ConvGeometry((1, 9), size=(1, 1)).for_batch(1, lanes).bands == 1


class TestBadInput:
    """Kernels access memory by address: arrays that do not fit must be refused before."""

    def setup_method(self) -> None:
        self.lanes = lanes_of("float32")
        index = np.arange(2, dtype=np.int32)
        row_layout = make_row_layout(index, np.asarray([0, 2]), shape=(1, 2))
        self.by_rows = shift(row_layout, np.asarray([0, 9]))
        layout = make_layout(0 * index, index, index, shape=(1, 2))
        self.by_entry = shift(layout, np.asarray([0, 9]))
        self.values = np.ones(2, np.float32)
        self.x, self.out = self.planes(2, 8), self.planes(1, 4)

    def planes(self, count: int, length: int) -> Array:
        return np.zeros((1, count, length, self.lanes), np.float32)

    def test_windows(self) -> None:
        with pytest.raises(ValueError, match="does not fit"):
            ConvGeometry((5, 5), size=(3, 6))
        with pytest.raises(ValueError, match="does not fit"):
            ConvGeometry((0, 5), size=(1, 1), margins=((1, 1), (0, 0)))
        wrong: list[dict[str, Any]] = [{"size": (0, 1)}, {"stride": (1, 0)}, {"dilation": (-9, 1)}]
        for options in (*wrong, {"bands": 0}):
            with pytest.raises(ValueError, match="must be positive"):
                ConvGeometry((5, 5), **({"size": (1, 1)} | options))

    @pytest.mark.parametrize(
        "changed",
        [
            {"width": 4},
            {"leading_zeros": 1},
            {"leading_zeros": -1},
            {"margin": (1, 0)},
            {"margin": (0, 1)},
            {"stride": (2, 1)},
            {"stride": (0, 1)},
            {"bands": Bands(1, 0, 3)},
            {"bands": Bands(1, 0, 5)},
            {"bands": Bands(3, 2, 2)},
            {"bands": Bands(0, 2, 2)},
            {"phases": np.arange(2)},
            {"phases": np.arange(1, dtype=np.int32)},
            {"phases": np.full(1, -1)},
            {"stride": (1, 2), "phases": np.asarray([0, 9, -1, 9])[::2]},
        ],
        ids=str,
    )
    def test_images_that_do_not_fit_planes(self, changed: dict[str, Any]) -> None:
        images, planes = np.zeros((3, 2, 4, 5), np.float32), self.planes(2, 20)
        layout = ConvGeometry((4, 5), size=(1, 1)).image_layout
        to_planes(images, planes, layout)
        wrong = layout._replace(**changed)
        with pytest.raises(ValueError, match="do not fit planes"):
            to_planes(images, planes, wrong)
        with pytest.raises(ValueError, match="do not fit planes"):
            from_planes(planes, images, wrong)

    def test_other_dtypes_and_sizes_of_planes(self) -> None:
        images, planes = np.zeros((3, 2, 4, 5), np.float32), self.planes(2, 20)
        layout = ConvGeometry((4, 5), size=(1, 1)).image_layout
        with pytest.raises(TypeError, match="float32 or float64"):
            to_planes(images.astype(np.float64), self.planes(2, 20), layout)
        for wrong in (self.planes(1, 20), self.planes(2, 19), planes[..., 1:].copy()):
            with pytest.raises(ValueError, match="do not fit planes"):
                to_planes(images, wrong, layout)
        for empty in ((3, 2, 0, 5), (3, 2, 4, 0)):
            with pytest.raises(ValueError, match="do not fit planes"):
                to_planes(np.zeros(empty, np.float32), planes, layout)
        with pytest.raises(ValueError, match="contiguous"):
            to_planes(images[:, :, ::-1], planes, layout)

    def test_layouts(self) -> None:
        index = np.arange(2, dtype=np.int32)
        for max_rows in (0, -1):
            with pytest.raises(ValueError, match="max_rows must lie in"):
                make_layout(index, index, index, shape=(2, 2), max_rows=max_rows)

    def test_offsets(self) -> None:
        for table in ([0], [0, -1], [0, 1 << 31]):
            with pytest.raises(ValueError, match="table must have 2 offsets"):
                shift(self.by_entry.layout, np.asarray(table))
        for shifts in (np.zeros(1, np.int32), np.zeros(2)):
            with pytest.raises(ValueError, match="shifts must be int32"):
                shift(self.by_rows.layout, np.asarray([0, 9]), shifts=shifts)

    def test_offsets_beyond_the_planes(self) -> None:
        for shifted in (self.by_entry, self.by_rows):
            convolve(shifted, self.values, self.x, self.out)
            with pytest.raises(ValueError, match="reach beyond"):
                convolve(shifted, self.values, self.x, self.planes(1, 8))
        with pytest.raises(ValueError, match="reach beyond"):
            sampled_correlation(self.by_rows, self.planes(1, 8), self.x, self.values, positions=8)
        for leading_zeros in (-1, 5):
            with pytest.raises(ValueError, match="leading zeros do not fit planes"):
                sampled_correlation(
                    self.by_rows,
                    self.planes(1, 8),
                    self.x,
                    self.values,
                    positions=4,
                    leading_zeros=leading_zeros,
                )

    def test_shapes_and_dtypes(self) -> None:
        with pytest.raises(ValueError, match="number of positions"):
            convolve(self.by_entry, self.values, self.x, self.planes(1, 3))
        with pytest.raises(ValueError, match="must be contiguous and of"):
            convolve(self.by_entry, self.values, self.x, self.planes(2, 4))
        with pytest.raises(ValueError, match="must be contiguous and of"):
            convolve(self.by_entry, self.values[:1], self.x, self.out)
        with pytest.raises(ValueError, match="must be contiguous and of"):
            convolve(self.by_entry, self.values, self.x, self.out, bias=self.values)
        with pytest.raises(ValueError, match="vectors of"):
            convolve(
                self.by_entry,
                self.values,
                np.zeros((1, 2, 8, 1), np.float32),
                np.zeros((1, 1, 4, 1), np.float32),
            )
        with pytest.raises(TypeError, match="x is float64"):
            convolve(self.by_entry, self.values, self.x.astype(np.float64), self.out)
        with pytest.raises(ValueError, match="must be contiguous and of"):
            sampled_correlation(self.by_rows, self.planes(2, 8), self.x, self.values, positions=4)
        with pytest.raises(TypeError, match="make_row_layout"):
            sampled_correlation(self.by_entry, self.planes(1, 8), self.x, self.values, positions=4)
