"""The kernels for convolutions against PyTorch's, for windows and images of any kind."""

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
    ConvolutionProducts,
    Grid,
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
        self, grid: Grid, counts: tuple[int, int, int], density: float, dtype: Any, seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.grid, self.dtype = grid, dtype
        self.batch, self.channels, self.rows = counts
        weight = rng.standard_normal((self.rows, self.channels, *grid.size)).astype(dtype)
        chance = rng.random(weight.shape)
        self.on_b, self.on_a = chance < density, chance < density / 2
        self.dense_values = weight
        self.weight = weight * self.on_a
        self.images = rng.standard_normal((self.batch, self.channels, *grid.extent)).astype(dtype)
        self.grad_output = rng.standard_normal((self.batch, self.rows, *grid.places)).astype(dtype)
        self.bias = rng.standard_normal(self.rows).astype(dtype)

    def expected(self) -> tuple[Array, Array, Array]:
        """Output, gradient of the images, gradient of the weight on B."""
        images, weight = (
            torch.from_numpy(array).requires_grad_() for array in (self.images, self.weight)
        )
        (top, bottom), (left, right) = self.grid.margins
        padded = torch.nn.functional.pad(images, (left, right, top, bottom))
        found = torch.nn.functional.conv2d(
            padded,
            weight,
            torch.from_numpy(self.bias),
            stride=self.grid.stride,
            dilation=self.grid.dilation,
        )
        for_images, for_weight = torch.autograd.grad(
            found, [images, weight], torch.from_numpy(self.grad_output)
        )
        return found.detach().numpy(), for_images.numpy(), for_weight.numpy()[self.on_b]

    def found(self, threads: int | None = None) -> tuple[Array, Array, Array]:
        """The same, from the kernels; whatever they do not write themselves is not a number."""
        grid, weights = self.grid, math.prod(self.grid.size)
        planes = self.channels * grid.planes
        on_a, on_b = self.on_a.ravel(), self.on_b.ravel()
        active, exploring = (
            np.flatnonzero(flags).astype(np.int32) for flags in (on_a, on_b & ~on_a)
        )
        indices = np.concatenate([active, exploring])
        shape = self.rows, self.channels * weights
        values = self.dense_values.ravel()[indices]

        def layout(part: slice, max_rows: int) -> RowLayout:
            starts = find_row_starts(indices, part, shape=shape)
            return make_row_layout(
                indices, starts, shape=shape, pitch=shape[1], block=5, max_rows=max_rows
            )

        forward = layout(slice(len(active)), 7)
        parts = [layout(part, 2) for part in (slice(len(active)), slice(len(active), None))]
        row, column = (place.astype(np.int32) for place in np.divmod(active, shape[1]))
        transposed = make_layout(
            *grid.transpose(row, column),
            np.arange(len(active), dtype=np.int32),
            shape=(planes, self.rows * weights),
            max_rows=7,
        )
        seen, seeing = grid.seen(self.channels), grid.seeing(self.rows)

        x = self.nothing(planes, grid.length)
        to_planes(self.images, x, grid.of_images, threads=threads)
        y = self.nothing(self.rows, grid.gradient_length)
        to_planes(self.grad_output, y, grid.of_gradients, threads=threads)

        out, found = self.nothing(self.rows, grid.count), np.full_like(self.grad_output, np.nan)
        convolve(shift(forward, seen), values, x, out, bias=self.bias, threads=threads)
        from_planes(out, found, grid.of_output, threads=threads)
        out, for_images = self.nothing(planes, grid.pixels), np.full_like(self.images, np.nan)
        ordered = values[transposed.order]
        convolve(shift(transposed, seeing), ordered, y, out, threads=threads)
        from_planes(out, for_images, grid.of_images, threads=threads)
        for_values = np.full_like(values, np.nan)
        first, second = (shift(part, seen) for part in parts)
        sampled_correlation(
            first,
            y,
            x,
            for_values,
            places=grid.count,
            lead=grid.reach,
            other=second,
            threads=threads,
        )
        return found, for_images, for_values[np.argsort(indices)]

    def nothing(self, planes: int, length: int) -> Array:
        lanes = lanes_of(self.dtype)
        slabs = -(-self.batch * self.grid.bands // lanes)
        return np.full((slabs, planes, length, lanes), np.nan, self.dtype)


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
def test_the_products_are_those_of_pytorch(
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
    for length, extent_of, step, margin in zip(extent, size, dilation, margins, strict=True):
        assume(length + sum(margin) > step * (extent_of - 1))
    assume(bands is None or lanes_of(dtype) % bands == 0)
    grid = Grid(extent, size, dilation, stride, margins, bands or 1)
    if bands is None:
        grid = grid.for_batch(counts[0], lanes_of(dtype))
    problem = Problem(grid, counts, density, dtype)
    tolerance = 2e-4 if dtype == np.float32 else 1e-11
    for found, expected in zip(problem.found(), problem.expected(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_the_products_of_a_convolution(groups: int, dtype: Any) -> None:
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
    packed_slope = np.full(products.packed_gradient_shape(shape, images.dtype), np.nan)
    products.pack_gradient(grad_output, packed_slope, shape=shape)
    output, for_images = np.full(products.output_shape(shape), np.nan), np.full(shape, np.nan)
    for_values = np.full(len(indices), np.nan)
    products.forward(values, packed, output, shape=shape)
    products.input_gradient(values, packed_slope, for_images, shape=shape)
    products.weight_gradient(packed_slope, packed, for_values, shape=shape)
    np.testing.assert_allclose(output, expected.detach().numpy(), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(for_images, grads[0].numpy(), rtol=1e-11, atol=1e-11)
    on_b = grads[1].numpy().ravel()[indices]
    np.testing.assert_allclose(for_values, on_b, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="values must be contiguous"):
        products.input_gradient(values[:9], packed_slope, for_images, shape=shape)
    with pytest.raises(TypeError, match="float32 or float64"):
        products.input_gradient(values.astype(np.float32), packed_slope, for_images, shape=shape)


def test_images_larger_than_what_is_transposed_at_a_time() -> None:
    grid = Grid((70, 90), size=(3, 2), stride=(2, 1), margins=((1, 1), (0, 1)))
    problem = Problem(grid, (18, 2, 3), 0.5, np.float64)
    for found, expected in zip(problem.found(), problem.expected(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("bands", [1, 2])
def test_the_number_of_threads_changes_no_bit(threads: int, bands: int) -> None:
    grid = Grid((12, 13), size=(3, 3), stride=(1, 2), margins=((1, 1), (1, 1)), bands=bands)
    problem = Problem(grid, (33, 8, 16), 0.3, np.float32)
    for found, expected in zip(problem.found(threads), problem.found(1), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_bands_fill_the_lanes_of_few_images() -> None:
    grid, lanes = Grid((32, 32), size=(3, 3), margins=((1, 1), (1, 1))), 16
    assert [grid.for_batch(batch, lanes).bands for batch in (1, 4, 16, 64)] == [16, 4, 1, 1]
    assert grid.for_batch(24, lanes).bands == 2
    assert Grid((1, 9), size=(1, 1)).for_batch(1, lanes).bands == 1


class TestBadInput:
    """The kernels trust addresses: what does not fit must not reach them."""

    def setup_method(self) -> None:
        self.lanes = lanes_of("float32")
        place = np.arange(2, dtype=np.int32)
        row_layout = make_row_layout(place, np.asarray([0, 2]), shape=(1, 2))
        self.by_rows = shift(row_layout, np.asarray([0, 9]))
        layout = make_layout(0 * place, place, place, shape=(1, 2))
        self.shifted = shift(layout, np.asarray([0, 9]))
        self.values = np.ones(2, np.float32)
        self.x, self.out = self.planes(2, 8), self.planes(1, 4)

    def planes(self, count: int, length: int) -> Array:
        return np.zeros((1, count, length, self.lanes), np.float32)

    def test_windows(self) -> None:
        with pytest.raises(ValueError, match="does not fit"):
            Grid((5, 5), size=(3, 6))
        with pytest.raises(ValueError, match="does not fit"):
            Grid((0, 5), size=(1, 1), margins=((1, 1), (0, 0)))
        wrong: list[dict[str, Any]] = [{"size": (0, 1)}, {"stride": (1, 0)}, {"dilation": (-9, 1)}]
        for options in (*wrong, {"bands": 0}):
            with pytest.raises(ValueError, match="must be positive"):
                Grid((5, 5), **({"size": (1, 1)} | options))

    @pytest.mark.parametrize(
        "changed",
        [
            {"width": 4},
            {"lead": 1},
            {"lead": -1},
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
        placement = Grid((4, 5), size=(1, 1)).of_images
        to_planes(images, planes, placement)
        wrong = placement._replace(**changed)
        with pytest.raises(ValueError, match="do not fit planes"):
            to_planes(images, planes, wrong)
        with pytest.raises(ValueError, match="do not fit planes"):
            from_planes(planes, images, wrong)

    def test_other_dtypes_and_sizes_of_planes(self) -> None:
        images, planes = np.zeros((3, 2, 4, 5), np.float32), self.planes(2, 20)
        placement = Grid((4, 5), size=(1, 1)).of_images
        with pytest.raises(TypeError, match="float32 or float64"):
            to_planes(images.astype(np.float64), self.planes(2, 20), placement)
        for wrong in (self.planes(1, 20), self.planes(2, 19), planes[..., 1:].copy()):
            with pytest.raises(ValueError, match="do not fit planes"):
                to_planes(images, wrong, placement)
        for empty in ((3, 2, 0, 5), (3, 2, 4, 0)):
            with pytest.raises(ValueError, match="do not fit planes"):
                to_planes(np.zeros(empty, np.float32), planes, placement)
        with pytest.raises(ValueError, match="contiguous"):
            to_planes(images[:, :, ::-1], planes, placement)

    def test_layouts(self) -> None:
        place = np.arange(2, dtype=np.int32)
        for max_rows in (0, -1):
            with pytest.raises(ValueError, match="must be positive"):
                make_layout(place, place, place, shape=(2, 2), max_rows=max_rows)

    def test_distances(self) -> None:
        for table in ([0], [0, -1], [0, 1 << 31]):
            with pytest.raises(ValueError, match="expected 2 distances"):
                shift(self.shifted.layout, np.asarray(table))
        for shifts in (np.zeros(1, np.int32), np.zeros(2)):
            with pytest.raises(ValueError, match="expected 2 distances"):
                shift(self.by_rows.layout, np.asarray([0, 9]), shifts=shifts)

    def test_what_lies_beyond_the_planes(self) -> None:
        for shifted in (self.shifted, self.by_rows):
            convolve(shifted, self.values, self.x, self.out)
            with pytest.raises(ValueError, match="sees beyond"):
                convolve(shifted, self.values, self.x, self.planes(1, 8))
        with pytest.raises(ValueError, match="sees beyond"):
            sampled_correlation(self.by_rows, self.planes(1, 8), self.x, self.values, places=8)
        for lead in (-1, 5):
            with pytest.raises(ValueError, match="are not in planes of"):
                sampled_correlation(
                    self.by_rows, self.planes(1, 8), self.x, self.values, places=4, lead=lead
                )

    def test_shapes_and_dtypes(self) -> None:
        with pytest.raises(ValueError, match="number of places"):
            convolve(self.shifted, self.values, self.x, self.planes(1, 3))
        with pytest.raises(ValueError, match="must be contiguous and of"):
            convolve(self.shifted, self.values, self.x, self.planes(2, 4))
        with pytest.raises(ValueError, match="must be contiguous and of"):
            convolve(self.shifted, self.values[:1], self.x, self.out)
        with pytest.raises(ValueError, match="must be contiguous and of"):
            convolve(self.shifted, self.values, self.x, self.out, bias=self.values)
        with pytest.raises(ValueError, match="vectors of"):
            convolve(
                self.shifted,
                self.values,
                np.zeros((1, 2, 8, 1), np.float32),
                np.zeros((1, 1, 4, 1), np.float32),
            )
        with pytest.raises(TypeError, match="x is float64"):
            convolve(self.shifted, self.values, self.x.astype(np.float64), self.out)
        with pytest.raises(ValueError, match="must be contiguous and of"):
            sampled_correlation(self.by_rows, self.planes(2, 8), self.x, self.values, places=4)
        with pytest.raises(TypeError, match="make_row_layout"):
            sampled_correlation(self.shifted, self.planes(1, 8), self.x, self.values, places=4)
