"""Products of weights in units of r × 1, compared with dense NumPy and with PyTorch."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_problems import DTYPES, Array

from topkast.kernels import UnitConvolutionProducts, UnitLinearProducts

ROWS = (2, 4, 8)
CONVOLUTIONS: list[dict[str, Any]] = [
    {"images": (3, 3, 8, 8), "size": (3, 3), "margins": ((1, 1), (1, 1))},
    {"images": (5, 4, 9, 7), "size": (3, 2), "stride": (2, 1), "dilation": (1, 2)},
    {"images": (40, 8, 5, 5), "size": (1, 1)},
    {"images": (17, 6, 11, 7), "size": (3, 3), "stride": (2, 2), "groups": 2},
    {"images": (1, 16, 32, 32), "size": (3, 3), "margins": ((1, 1), (1, 1))},
    {"images": (18, 3, 40, 45), "size": (5, 1), "groups": 3},
]


def random_units(count: int, densities: tuple[float, float], rng: Any) -> tuple[Array, int]:
    """Units of A, then of B∖A, and |A|."""
    chosen, forward = rng.permutation(count), round(densities[0] * count)
    parts = chosen[:forward], chosen[forward : forward + round(densities[1] * count)]
    return np.concatenate([np.sort(part) for part in parts]).astype(np.int32), forward


def flat_indices(units: Array, rows: int, width: int) -> Array:
    """Flat indices of the weights of units, unit by unit."""
    first = units // width * rows * width + units % width
    indices: Array = (first[:, None] + width * np.arange(rows)).ravel()
    return indices


def tolerance(dtype: Any) -> dict[str, Any]:
    return {"rtol": 1e-4, "atol": 1e-3 if dtype == np.float32 else 1e-11}


def linear_products(
    problem: tuple[Any, ...], rows: int, dtype: Any
) -> tuple[list[Array], list[Array]]:
    """Output and gradients of the products, and of dense NumPy."""
    (unit_rows, width), batch, densities, seed = problem
    rng = np.random.default_rng(seed)
    units, forward = random_units(unit_rows * width, densities, rng)
    shape = unit_rows * rows, width
    indices = flat_indices(units, rows, width)
    values, x, y, bias = (
        rng.standard_normal(size).astype(dtype)
        for size in (len(indices), (batch, width), (batch, shape[0]), shape[0])
    )
    dense = np.zeros(shape, dtype)
    dense.reshape(-1)[indices[: forward * rows]] = values[: forward * rows]
    products = UnitLinearProducts(units, forward, shape=shape, rows=rows)
    packed = [np.full(products.packed_shape(a.shape, a.dtype), np.nan, dtype) for a in (x, y)]
    for array, target in zip((x, y), packed, strict=True):
        products.pack(array, target)
    output, for_input, for_values = (np.full_like(array, np.nan) for array in (y, x, values))
    products.forward(values, packed[0], output, bias=bias)
    products.input_gradient(values, packed[1], for_input)
    products.weight_gradient(packed[1], packed[0], for_values)
    gradient = (y.T @ x).ravel()[indices]
    return [output, for_input, for_values], [x @ dense.T + bias, y @ dense, gradient]


@given(
    st.tuples(
        st.tuples(st.integers(1, 40), st.integers(1, 300)),
        st.sampled_from([1, 2, 15, 16, 17, 64, 129, 600]),
        st.sampled_from([(0.1, 0.1), (0.0, 0.3), (1.0, 0.0), (0.02, 0.0), (0.5, 0.5)]),
        st.integers(0, 1000),
    ),
    st.sampled_from(ROWS),
    st.sampled_from(DTYPES),
)
def test_the_products_of_a_linear_layer(problem: tuple[Any, ...], rows: int, dtype: Any) -> None:
    for actual, expected in zip(*linear_products(problem, rows, dtype), strict=True):
        np.testing.assert_allclose(actual, expected, **tolerance(dtype))


def convolution_products(
    case: dict[str, Any], rows: int, dtype: Any
) -> tuple[list[Array], list[Array]]:
    """Output and gradients of the products, and of PyTorch."""
    rng = np.random.default_rng(rows)
    window: dict[str, Any] = {
        "stride": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
        "margins": ((0, 0), (0, 0)),
    }
    window |= {name: value for name, value in case.items() if name != "images"}
    shape, groups = case["images"], window["groups"]
    height, group_width = 2 * rows * groups, shape[1] // groups * int(np.prod(case["size"]))
    units, forward = random_units(height // rows * group_width, (0.2, 0.3), rng)
    indices = flat_indices(units, rows, group_width)
    images, values, bias = (
        rng.standard_normal(size).astype(dtype) for size in (shape, len(indices), height)
    )
    dense = np.zeros((height, shape[1] // groups, *case["size"]), dtype)
    dense.reshape(-1)[indices[: forward * rows]] = values[: forward * rows]
    inputs, weights = (torch.from_numpy(array).requires_grad_() for array in (images, dense))
    (top, bottom), (left, right) = window["margins"]
    result: Any = torch.nn.functional.conv2d(
        torch.nn.functional.pad(inputs, (left, right, top, bottom)),
        weights,
        torch.from_numpy(bias),
        **{name: window[name] for name in ("stride", "dilation", "groups")},
    )
    grad_output = rng.standard_normal(result.shape).astype(dtype)
    result.backward(torch.from_numpy(grad_output))
    assert inputs.grad is not None
    assert weights.grad is not None

    full = height, shape[1] * int(np.prod(case["size"]))
    products = UnitConvolutionProducts(units, forward, shape=full, rows=rows, **window)
    packed = np.full(products.packed_shape(shape, images.dtype), np.nan, dtype)
    gradient = np.full(products.packed_gradient_shape(shape, images.dtype), np.nan, dtype)
    products.pack(images, packed)
    products.pack_gradient(grad_output, gradient, shape=shape)
    output, for_images, for_values = (
        np.full_like(array, np.nan) for array in (grad_output, images, values)
    )
    products.forward(values, packed, output, shape=shape, bias=bias)
    products.input_gradient(values, gradient, for_images, shape=shape)
    products.weight_gradient(gradient, packed, for_values, shape=shape)
    on_b = weights.grad.numpy().ravel()[indices]
    return [output, for_images, for_values], [result.detach().numpy(), inputs.grad.numpy(), on_b]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=range(len(CONVOLUTIONS)))
def test_the_products_of_a_convolution(case: dict[str, Any], rows: int, dtype: Any) -> None:
    for actual, expected in zip(*convolution_products(case, rows, dtype), strict=True):
        np.testing.assert_allclose(actual, expected, **tolerance(dtype))


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_the_number_of_threads_changes_no_bit(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def results() -> list[Array]:
        problem = (60, 300), 100, (0.2, 0.3), 0
        linear, _ = linear_products(problem, 4, np.float32)
        images, _ = convolution_products(CONVOLUTIONS[3], 2, np.float32)
        return linear + images

    expected = results()
    for product in ("multiply", "scatter", "sample"):
        module = sys.modules[f"topkast.kernels.units._{product}"]
        monkeypatch.setattr(module, "default_threads", lambda: threads)
    for actual, other in zip(results(), expected, strict=True):
        np.testing.assert_array_equal(actual, other)


@pytest.mark.parametrize("rows", ROWS)
def test_layouts_take_a_quarter_of_the_unit_numbers(rows: int) -> None:
    size = 1024
    rng = np.random.default_rng(0)
    for densities in ((0.1, 0.1), (0.05, 0.05), (0.02, 0.03)):
        units, forward = random_units(size * size // rows, densities, rng)
        products = UnitLinearProducts(units, forward, shape=(size, size), rows=rows)
        assert products.nbytes <= units.nbytes / 4


def test_an_empty_batch_has_zero_gradient() -> None:
    outputs, _ = linear_products(((3, 9), 0, (0.5, 0.5), 0), 4, np.float32)
    assert outputs[0].shape == (0, 12)
    assert len(outputs[2]) == 108
    assert not outputs[2].any()


class TestWrongInput:
    def setup_method(self) -> None:
        self.units = np.asarray([1, 6, 0, 3], np.int32)
        self.products = UnitLinearProducts(self.units, 2, shape=(4, 5), rows=2)
        self.values = np.ones(8, np.float32)
        self.x = np.zeros(self.products.packed_shape((3, 5), np.float32), np.float32)
        self.y = np.zeros(self.products.packed_shape((3, 4), np.float32), np.float32)
        self.out = np.zeros((3, 4), np.float32)

    @pytest.mark.parametrize("wrong", [[6, 1, 0, 3], [1, 1, 0, 3], [-1, 6, 0, 3], [1, 10, 0, 3]])
    def test_units(self, wrong: list[int]) -> None:
        swapped = wrong[2:] + wrong[:2]
        for units in (wrong, swapped):
            with pytest.raises(ValueError, match=r"must ascend in \[0, 10\)"):
                UnitLinearProducts(np.asarray(units, np.int32), 2, shape=(4, 5), rows=2)

    def test_units_of_groups(self) -> None:
        options: Any = {"shape": (8, 4), "size": (1, 1), "groups": 2, "rows": 2}
        UnitConvolutionProducts(np.asarray([1, 7], np.int32), 1, **options)
        for wrong in ([-1, 3], [1, 8], [8, 1]):
            with pytest.raises(ValueError, match=r"must ascend in \[0, 8\)"):
                UnitConvolutionProducts(np.asarray(wrong, np.int32), 1, **options)
        with pytest.raises(ValueError, match="do not divide"):
            UnitConvolutionProducts(self.units, 1, **options | {"rows": 8})

    def test_options(self) -> None:
        with pytest.raises(TypeError, match="indices must be int32, got int64"):
            UnitLinearProducts(self.units.astype(np.int64), 2, shape=(4, 5), rows=2)
        with pytest.raises(ValueError, match="contiguous vector"):
            UnitLinearProducts(self.units[::2], 1, shape=(4, 5), rows=2)
        with pytest.raises(ValueError, match="2 or 4 or 8 rows, got 3"):
            UnitLinearProducts(self.units, 2, shape=(6, 5), rows=3)
        with pytest.raises(ValueError, match="do not divide a height of 6"):
            UnitLinearProducts(self.units, 2, shape=(6, 5), rows=4)

    def test_arrays(self) -> None:
        forward, backward = self.products.forward, self.products.input_gradient
        with pytest.raises(TypeError, match="x is float32, but the compact vector is float64"):
            forward(self.values.astype(np.float64), self.x, self.out)
        with pytest.raises(ValueError, match="values must be contiguous and of shape"):
            forward(self.values[:7], self.x, self.out)
        with pytest.raises(ValueError, match="do not fit"):
            forward(self.values, self.x, np.zeros((900, 4), np.float32))
        with pytest.raises(ValueError, match="out must be contiguous"):
            forward(self.values, self.x, self.out[:, ::-1])
        with pytest.raises(ValueError, match="gradient must be contiguous and of shape"):
            backward(self.values, self.x, np.zeros((3, 5), np.float32))
        with pytest.raises(ValueError, match="allocate it with the shape of packed_shape"):
            forward(self.values, np.zeros((1, 5, 3), np.float32), self.out)
        self.values.flags.writeable = False
        with pytest.raises(ValueError, match="out is read-only"):
            self.products.weight_gradient(self.y, self.x, self.values)
        with pytest.raises(ValueError, match="bias must be contiguous and of shape"):
            forward(self.values, self.x, self.out, bias=np.zeros(3, np.float32))

    def test_arrays_of_a_convolution(self) -> None:
        shape = 2, 3, 4, 4
        products = UnitConvolutionProducts(self.units, 2, shape=(4, 12), size=(2, 2), rows=2)
        packed = np.zeros(products.packed_shape(shape, np.float32), np.float32)
        gradient = np.zeros(products.packed_gradient_shape(shape, np.float32), np.float32)
        out = np.zeros(products.output_shape(shape), np.float32)
        products.forward(self.values, packed, out, shape=shape)
        with pytest.raises(ValueError, match="packed must be contiguous and of shape"):
            products.forward(self.values, gradient, out, shape=shape)
        with pytest.raises(ValueError, match="gradient must be contiguous and of shape"):
            products.input_gradient(self.values, packed, np.zeros(shape, "float32"), shape=shape)
        with pytest.raises(TypeError, match="packed is float32"):
            products.forward(self.values.astype(np.float64), packed, out, shape=shape)
        self.values.flags.writeable = False
        with pytest.raises(ValueError, match="out is read-only"):
            products.weight_gradient(gradient, packed, self.values, shape=shape)
