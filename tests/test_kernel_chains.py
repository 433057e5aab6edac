"""Chains of products on memory, without a framework."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from topkast.kernels import LinearChain, LinearProducts, ParallelLinear, UnitLinearProducts
from topkast.kernels.chains._plan import Plan, Slot, Stage


def make_products(rows: int, width: int) -> LinearProducts:
    return LinearProducts(
        np.arange(rows * width, dtype=np.int32), rows * width, shape=(rows, width)
    )


@pytest.mark.parametrize("batch", [0, 1, 5, 200])
def test_passes_are_those_of_dense_layers(batch: int) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((7, 4)), rng.standard_normal((3, 7))
    bias, x = rng.standard_normal(7), rng.standard_normal((batch, 4))
    chain = LinearChain([make_products(7, 4), make_products(3, 7)], [True, False], "float64")
    packed, output = np.empty(chain.packed_size(batch)), np.empty((batch, 3))
    forward = x, packed, output, first, second, bias
    chain.forward(batch, [array.ctypes.data for array in forward], has_bias=(True, False))
    hidden = np.maximum(x @ first.T + bias, 0)
    np.testing.assert_allclose(output, hidden @ second.T, atol=1e-12)

    grad_output, gradients = rng.standard_normal((batch, 3)), np.empty(chain.gradient_size(batch))
    grad_x, grad_first, grad_second = np.empty((batch, 4)), np.empty((7, 4)), np.empty((3, 7))
    grad_bias = np.empty(7)
    read = grad_output, gradients, packed, output, first, second
    backward = *read, grad_x, grad_first, grad_second, grad_bias
    needed = True, (True, True), (True, False)
    chain.backward(batch, [array.ctypes.data for array in backward], needed=needed)
    grad_hidden = (grad_output @ second) * (hidden > 0)
    np.testing.assert_allclose(grad_second, grad_output.T @ hidden, atol=1e-12)
    np.testing.assert_allclose(grad_first, grad_hidden.T @ x, atol=1e-12)
    np.testing.assert_allclose(grad_bias, grad_hidden.sum(0), atol=1e-12)
    np.testing.assert_allclose(grad_x, grad_hidden @ first, atol=1e-12)


@pytest.mark.parametrize("batch", [0, 1, 5, 200])
@pytest.mark.parametrize("used", [(True, True, True), (True, False, True), (False, True, False)])
def test_layers_of_the_same_activations_are_dense_layers(
    batch: int, used: tuple[bool, ...]
) -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((rows, 4)) for rows in (7, 3, 5)]
    bias, x = rng.standard_normal(3), rng.standard_normal((batch, 4))
    shifts: list[Any] = [0, bias, 0]
    parallel = ParallelLinear([make_products(*weight.shape) for weight in weights], "float64")
    packed = np.empty(parallel.packed_size(batch))
    outputs = [np.empty((batch, len(weight))) for weight in weights]
    forward = x, packed, *outputs, *weights, bias
    has_bias = False, True, False
    parallel.forward(batch, [array.ctypes.data for array in forward], has_bias=has_bias)
    for weight, output, shift in zip(weights, outputs, shifts, strict=True):
        np.testing.assert_allclose(output, x @ weight.T + shift, atol=1e-12)

    grads = [rng.standard_normal(output.shape) for output in outputs]
    gradients = np.empty(parallel.gradient_size(batch))
    grad_x, grad_bias = np.empty((batch, 4)), np.empty(3)
    grad_weights = [np.empty_like(weight) for weight in weights]
    backward = [
        *(grad for grad, is_used in zip(grads, used, strict=True) if is_used),
        *(gradients, packed, *weights, grad_x),
        *(grad for grad, is_used in zip(grad_weights, used, strict=True) if is_used),
        *([grad_bias] if used[1] else []),
    ]
    needed = True, used, (False, used[1], False)
    parallel.backward(
        batch, [array.ctypes.data for array in backward], has_gradient=used, needed=needed
    )
    total = np.zeros_like(x)
    for weight, grad, grad_weight, is_used in zip(weights, grads, grad_weights, used, strict=True):
        if is_used:
            total += grad @ weight
            np.testing.assert_allclose(grad_weight, grad.T @ x, atol=1e-12)
    np.testing.assert_allclose(grad_x, total, atol=1e-12)
    if used[1]:
        np.testing.assert_allclose(grad_bias, grads[1].sum(0), atol=1e-12)


def test_products_that_may_run_at_the_same_time_have_scratch_memory_of_their_own() -> None:
    parallel = ParallelLinear([make_products(rows, 4) for rows in (8, 8, 16)], "float64")
    plan = parallel._plan_forward(5, (False,) * 3)
    offsets = [offset for _, offset in plan._scratch]
    assert len(set(offsets)) == 3
    (width,) = {products.packed_shape((5, 4), "float64")[2] for products in parallel.products}
    bytes_of_layers = [  # a chunk of rows of a tile
        products._active.max_chunk_rows * 8 * width  # type: ignore[union-attr]
        for products in parallel.products
    ]
    assert offsets == [0, *np.cumsum(bytes_of_layers)[:-1]]
    assert plan._scratch_bytes == sum(bytes_of_layers)


def test_layers_that_cannot_read_the_same_activations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"differ in width: \[4, 5\]"):
        ParallelLinear([make_products(3, 4), make_products(3, 5)], "float32")
    with pytest.raises(ValueError, match="at least one layer"):
        ParallelLinear([], "float32")
    parallel = ParallelLinear([make_products(3, 4)] * 2, "float32")
    no_layer = False, False
    needed = False, (True, False), no_layer
    with pytest.raises(ValueError, match="the output of layer 0 has no gradient"):
        parallel.backward(1, [], has_gradient=(False, True), needed=needed)
    with pytest.raises(ValueError, match="no output has a gradient"):
        parallel.backward(1, [], has_gradient=no_layer, needed=(True, no_layer, no_layer))


def test_layers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="of 7 outputs cannot be followed by one of 4 inputs"):
        LinearChain([make_products(7, 4)] * 2, [True, True], "float32")
    with pytest.raises(ValueError, match="got 1 layers and 2 flags"):
        LinearChain([make_products(7, 4)], [True, True], "float32")
    units = [
        UnitLinearProducts(np.arange(2, dtype=np.int32), 2, shape=(4, 4), rows=rows)
        for rows in (2, 4)
    ]
    with pytest.raises(ValueError, match="units of the same size"):
        LinearChain(units, [True, True], "float32")
    with pytest.raises(ValueError, match="at least one layer"):
        LinearChain([], [], "float32")


def test_a_stage_names_the_arguments_that_are_wrong() -> None:
    stage = Stage("sum", {"source": Slot("x"), "target": Slot("x"), "tiles": 1, "rows": 1}, 1)
    with pytest.raises(TypeError, match=r"arguments \['out', 'target', 'width'\] of a sum stage"):
        Plan([stage], ["x"], "float32")


def test_a_stage_waits_for_at_most_two_earlier_ones() -> None:
    arguments: dict[str, int | Slot] = {
        "source": Slot("x"),
        "out": Slot("x"),
        "tiles": 1,
        "rows": 1,
        "width": 1,
    }
    for awaited in ((3,), (4,), (-1,), (0, 1, 2)):
        stages = [Stage("sum", arguments, 1)] * 3 + [Stage("sum", arguments, 1, awaited)]
        with pytest.raises(ValueError, match="stage 3 can wait for at most two earlier stages"):
            Plan(stages, ["x"], "float32")
