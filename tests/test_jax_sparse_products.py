"""``topkast_jax.sparse_linear``: its values, derivatives and threads against dense products."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import topkast_jax
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from topkast_jax import Structure, sparse_linear
from topkast_jax.sparse._transform import find_threshold

import topkast

Array = np.ndarray[Any, Any]
KERNELS = ("pack", "multiply", "multiply_transposed", "sample", "gather", "put", "build")


class Problem:
    """A weight with sets A and B, as a structure with compact values and as dense matrices."""

    def __init__(
        self,
        shape: tuple[int, int] = (30, 50),
        batch: int = 7,
        densities: tuple[float, float] = (0.1, 0.3),
        *,
        dtype: Any = np.float64,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        size = shape[0] * shape[1]
        backward = round(densities[1] * size)
        chosen = rng.permutation(size)[:backward].astype(np.int32)
        forward = min(backward, round(densities[0] * size))
        self.indices = np.concatenate([np.sort(chosen[:forward]), np.sort(chosen[forward:])])
        self.use(self.indices, forward, shape, batch, dtype, rng)

    def use(
        self, indices: Array, forward: int, shape: tuple[int, int], batch: int, dtype: Any, rng: Any
    ) -> None:
        """Fill the sets with random values."""
        self.indices, self.forward, self.shape = indices, forward, shape
        self.support = topkast.Support(jnp.asarray(indices), forward)
        self.structure = Structure.of(self.support, shape)
        self.values = jnp.asarray(rng.standard_normal((1, len(indices))).astype(dtype))
        self.x = jnp.asarray(rng.standard_normal((batch, shape[0])).astype(dtype))
        self.y = jnp.asarray(rng.standard_normal((batch, shape[1])).astype(dtype))
        self.bias = jnp.asarray(rng.standard_normal(shape[1]).astype(dtype))
        self.alpha = self.dense(self.values, forward)

    def dense(self, values: Any, count: int | None = None) -> Array:
        """The matrix with the first `count` values."""
        flat = np.zeros(self.shape[0] * self.shape[1], np.asarray(values).dtype)
        flat[self.indices[:count]] = np.asarray(values).reshape(-1)[:count]
        return flat.reshape(self.shape)

    def on_backward(self, matrix: Any) -> Array:
        entries: Array = np.asarray(matrix).reshape(-1)[self.indices]
        return entries

    def check(self, tolerance: float = 1e-12) -> None:
        """Compare output and gradients with the dense products at α, in both orientations."""
        in_out = (self.x, self.y, 1, self.alpha)
        for x, y, axis, weight in (in_out, (self.y, self.x, 0, self.alpha.T)):
            bias = self.bias if axis == 1 else None
            output, pull = jax.vjp(
                lambda values, x, axis=axis, bias=bias: sparse_linear(
                    values, self.structure, x, bias, output_axis=axis
                ),
                self.values,
                x,
            )
            expected = np.asarray(x) @ weight + (0 if bias is None else np.asarray(bias))
            values_gradient, x_gradient = pull(y)
            product = np.asarray(self.x).T @ np.asarray(self.y)
            np.testing.assert_allclose(output, expected, atol=tolerance)
            np.testing.assert_allclose(x_gradient, np.asarray(y) @ weight.T, atol=tolerance)
            gradient = self.on_backward(product)
            np.testing.assert_allclose(values_gradient[0], gradient, atol=tolerance)


@pytest.fixture(autouse=True)
def _doubles() -> Any:
    with jax.enable_x64(True):
        yield


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 70),
    batch=st.integers(0, 40),
    densities=st.sampled_from([(0.1, 0.3), (0.0, 0.5), (0.5, 0.5), (1.0, 1.0), (0.02, 0.9)]),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=25)
def test_products_and_gradients_are_those_of_the_dense_product(
    height: int, width: int, batch: int, densities: tuple[float, float], seed: int
) -> None:
    Problem((height, width), batch, densities, seed=seed).check()


@pytest.mark.parametrize("name", ["row", "column", "diagonal", "corners", "last row", "empty A"])
def test_hostile_structures(name: str) -> None:
    """All weights in one row or column, rows without any, several panels, A without weights."""
    shape = (600, 500)
    flat = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    active, exploring = {
        "row": (flat[300], flat[301]),
        "column": (flat[:, 499], flat[:, 0]),
        "diagonal": (np.diagonal(flat), np.diagonal(flat, 1)),
        "corners": (flat[[0, 0, -1, -1], [0, -1, 0, -1]], flat[[1, 1], [0, -1]]),
        "last row": (flat[-1, -3:], flat[:0, 0]),
        "empty A": (flat[:0, 0], flat[::7, 3]),
    }[name]
    indices = np.concatenate([active, exploring]).astype(np.int32)
    problem = Problem((2, 2))
    problem.use(indices, len(active), shape, 19, np.float64, np.random.default_rng(1))
    problem.check(1e-11)


def test_single_precision() -> None:
    Problem((300, 200), 65, dtype=np.float32).check(2e-5)


def test_many_panels_and_chunks() -> None:
    Problem((1100, 2100), 130, (0.05, 0.1)).check(1e-10)


def test_derivatives_of_all_kinds() -> None:
    """Reverse over reverse, forward over reverse: also those that need W on all of B."""
    problem = Problem((6, 9), 4)

    def loss(values: Any, x: Any) -> Any:
        hidden = sparse_linear(values, problem.structure, jnp.sin(x), problem.bias)
        return jnp.sum(jnp.cos(hidden))

    def dense_loss(weight: Any, x: Any) -> Any:
        return jnp.sum(jnp.cos(jnp.sin(x) @ weight + problem.bias))

    check_grads(lambda x: loss(problem.values, x), (problem.x,), 2)
    for outer in (jax.jacfwd, jax.jacrev):
        on_values: Any = outer(jax.grad(loss))(problem.values, problem.x)
        on_weight: Any = outer(jax.grad(dense_loss))(jnp.asarray(problem.alpha), problem.x)
        size = len(problem.indices)
        expected = np.asarray(on_weight).reshape(problem.alpha.size, -1)
        expected = expected[np.ix_(problem.indices, problem.indices)]
        np.testing.assert_allclose(on_values.reshape(size, size), expected, atol=1e-12)
    tangent = jnp.ones_like(problem.values)
    _, forward = jax.jvp(
        lambda values: sparse_linear(values, problem.structure, problem.x),
        (problem.values,),
        (tangent,),
    )
    np.testing.assert_allclose(forward, problem.x @ problem.dense(tangent), atol=1e-12)


def test_batches_of_x_become_rows_of_one_product() -> None:
    problem = Problem()

    def loss(values: Any, x: Any) -> Any:
        rows = jax.vmap(lambda row: sparse_linear(values, problem.structure, row, problem.bias))(x)
        return jnp.sum(jnp.sin(rows))

    compiled: Any = jax.jit(jax.grad(loss, (0, 1))).lower(problem.values, problem.x).compile()
    calls = {name: compiled.as_text().count(f'"topkast_{name}"') for name in KERNELS}
    assert "while" not in compiled.as_text()
    assert calls == dict.fromkeys(KERNELS, 0) | {
        "pack": 2,  # x for both of its products, and the gradient for both of its own
        "multiply": 1,
        "multiply_transposed": 1,
        "sample": 1,
    }
    values_gradient, x_gradient = compiled(problem.values, problem.x)
    outer = np.cos(problem.x @ problem.alpha + problem.bias)
    expected = problem.on_backward(np.asarray(problem.x).T @ outer)
    np.testing.assert_allclose(values_gradient[0], expected, atol=1e-12)
    np.testing.assert_allclose(x_gradient, outer @ problem.alpha.T, atol=1e-12)


def test_vmap_over_values_and_per_example_gradients() -> None:
    problem = Problem()
    stacked = jnp.stack([problem.values, 2 * problem.values])

    def apply(values: Any, x: Any) -> Any:
        return sparse_linear(values, problem.structure, x)

    outputs = jax.vmap(apply, (0, None))(stacked, problem.x)
    for number, factor in enumerate((1, 2)):
        expected: Any = factor * (problem.x @ problem.alpha)
        np.testing.assert_allclose(outputs[number], expected, atol=1e-12)
    gradients = jax.vmap(jax.grad(lambda values, x: apply(values, x).sum()), (None, 0))(
        problem.values, problem.x
    )
    rows = np.asarray(problem.x)[:, :, None] * np.ones(problem.shape[1])
    expected = rows.reshape(len(rows), -1)[:, problem.indices]
    np.testing.assert_allclose(gradients[:, 0], expected, atol=1e-12)


def test_structures_can_be_batched_too() -> None:
    problems = [Problem(seed=seed) for seed in (1, 2)]
    structures = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(problem.structure for problem in problems)
    )
    values = jnp.stack([problem.values for problem in problems])
    outputs = jax.vmap(sparse_linear, (0, 0, None))(values, structures, problems[0].x)
    for output, problem in zip(outputs, problems, strict=True):
        np.testing.assert_allclose(output, problems[0].x @ problem.alpha, atol=1e-12)


def test_leading_axes() -> None:
    problem = Problem()
    x = jnp.stack([problem.x, problem.x])
    output = sparse_linear(problem.values, problem.structure, x)
    np.testing.assert_allclose(output, x @ problem.alpha, atol=1e-12)
    single = sparse_linear(problem.values, problem.structure, problem.x[0])
    np.testing.assert_allclose(single, problem.x[0] @ problem.alpha, atol=1e-12)


def test_without_a_structure_the_product_is_dense() -> None:
    problem = Problem()
    alpha = jnp.asarray(problem.alpha)
    np.testing.assert_array_equal(
        sparse_linear(alpha, None, problem.x, problem.bias), problem.x @ alpha + problem.bias
    )
    output = sparse_linear(alpha, None, problem.y, output_axis=0)
    np.testing.assert_array_equal(output, problem.y @ alpha.T)


def test_no_dense_matrix_is_formed() -> None:
    """In the compiled program of a gradient, no array has as many elements as the weight."""
    problem = Problem((96, 112), 5, dtype=np.float32)

    def loss(values: Any, x: Any) -> Any:
        return jnp.sum(sparse_linear(values, problem.structure, x, problem.bias) ** 2)

    operands = problem.values, problem.x
    text: Any = jax.jit(jax.grad(loss, (0, 1))).lower(*operands).compile().as_text()
    assert "topkast_sample" in text
    for dimensions in ("96,112", "112,96", str(96 * 112)):
        assert f"[{dimensions}]" not in text


_THREADS = """
import sys, numpy as np, jax, jax.numpy as jnp, topkast, topkast_jax
rng = np.random.default_rng(0)
weight = jnp.asarray(rng.standard_normal((700, 900)).astype("float32"))
x = jnp.asarray(rng.standard_normal((150, 700)).astype("float32"))
support = topkast.select(weight, fwd=0.9, bwd=0.8)
structure = topkast_jax.Structure.of(support, weight.shape)
values = topkast.gather(weight, support)[None]

@jax.jit
def gradients(values, x):
    def loss(values, x):
        # Several products at once, which XLA may run side by side.
        outputs = [
            topkast_jax.sparse_linear(values, structure, factor * x) for factor in (1.0, 2.0, 3.0)
        ]
        return sum(jnp.sum(jnp.sin(output)) for output in outputs)
    return jax.grad(loss, (0, 1))(values, x)

results = [gradients(values, x) for _ in range(40)]
for result in results[1:]:
    for array, first in zip(result, results[0]):
        assert np.array_equal(array, first)
sys.stdout.buffer.write(b"".join(np.asarray(array).tobytes() for array in results[0]))
"""


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """Nor does a pool of one thread, or of more threads than cores, wait for itself."""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", _THREADS],
            capture_output=True,
            check=True,
            timeout=120,
            env=os.environ | {"NPROC": str(threads), "JAX_PLATFORMS": "cpu"},
        ).stdout
        for threads in (1, 2, 7)
    }
    assert len(outputs) == 1
    assert len(outputs.pop()) == 4 * (126_000 + 150 * 700)


def test_wrong_arguments_are_refused_by_name() -> None:
    problem = Problem()
    values, structure, x = problem.values, problem.structure, problem.x
    cases: list[tuple[Any, str]] = [
        ((values[:, 1:], structure, x), r"values has the shape \(1, 449\)"),
        ((values, structure, problem.y), r"takes 30 features in the last axis"),
        ((values, structure, x, problem.bias[1:]), r"bias has the shape \(49,\)"),
        ((values, structure, x.astype(jnp.float32)), "convert x"),
        ((values.astype(jnp.int32), structure, x.astype(jnp.int32)), "float32 or float64"),
    ]
    for arguments, message in cases:
        with pytest.raises(topkast.MismatchError, match=message):
            sparse_linear(*arguments)
    with pytest.raises(topkast.MismatchError, match="output_axis must be 0 or 1"):
        sparse_linear(values, structure, x, output_axis=-1)
    blocks = topkast.Blocks(rows=1, columns=2, height=2, width=2)
    with pytest.raises(topkast.MismatchError, match="blocks"):
        Structure.of(topkast.Support(jnp.asarray([0], jnp.int32), 1, blocks), (2, 2))


@pytest.mark.parametrize("indices", [[3, 1], [1, 1], [-1, 2], [2, 900], [5, 4, 3]])
def test_indices_out_of_order_or_bounds_are_refused(indices: list[int]) -> None:
    support = topkast.Support(jnp.asarray(indices, jnp.int32), len(indices))
    with pytest.raises(Exception, match="must ascend inside the weight"):
        jax.block_until_ready(Structure.of(support, (10, 10)).layouts.vector)


def test_a_vector_that_is_no_structure_is_refused() -> None:
    problem = Problem()
    empty: Structure = jax.tree.map(jnp.zeros_like, problem.structure)
    with pytest.raises(Exception, match="does not belong"):
        jax.block_until_ready(sparse_linear(problem.values, empty, problem.x))


def test_other_platforms_compute_densely() -> None:
    """Lowered for a GPU, the products call no kernel."""
    problem = Problem(dtype=np.float32)

    def loss(values: Any, x: Any) -> Any:
        return jnp.sum(sparse_linear(values, problem.structure, x) ** 2)

    gradient = jax.jit(jax.grad(loss))
    traced = gradient.trace(problem.values, problem.x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "topkast" not in text
    assert "dot_general" in text


def test_the_dense_lowering_agrees() -> None:
    from topkast_jax.sparse import _products

    problem = Problem()
    arrays = problem.structure.indices, problem.structure.layouts.vector
    meta: dict[str, Any] = {"shape": problem.shape, "forward": problem.forward}
    for transposed, operand in ((True, problem.x), (False, problem.y)):
        dense = _products._multiply_dense(
            problem.values, operand, *arrays, transposed=transposed, **meta
        )
        by_kernel = _products.multiply(
            problem.values, operand, problem.structure, transposed=transposed
        )
        np.testing.assert_allclose(dense, by_kernel, atol=1e-12)
    dense = _products._sample_dense(problem.x, problem.y, *arrays)
    by_kernel = _products.sample_p.bind(problem.x, problem.y, *arrays, transposed=False, **meta)
    np.testing.assert_allclose(dense, by_kernel, atol=1e-12)


@pytest.mark.slow
@given(
    size=st.integers(1, 200),
    count=st.integers(0, 220),
    spread=st.sampled_from([1, 3, 1 << 10, 1 << 21, (1 << 31) - 1]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_thresholds_are_those_of_the_bisection(
    size: int, count: int, spread: int, seed: int
) -> None:
    """The k-th largest key, ties and NaN (-1) among them, and more keys asked for than exist."""
    from topkast.backends import _xla

    rng = np.random.default_rng(seed)
    keys = jnp.asarray(rng.integers(-1, spread, size, endpoint=True).astype(np.int32))
    expected = _xla._kth_largest(_xla._pad(keys, -2), count)
    assert int(find_threshold(keys, count)) == int(expected)


def test_thresholds_of_many_keys() -> None:
    keys = np.random.default_rng(0).integers(0, 1 << 30, 300_000).astype(np.int32)
    for count in (1, 1000, 299_999, 300_000):
        assert int(find_threshold(jnp.asarray(keys), count)) == np.sort(keys)[-count]


def test_public_names() -> None:
    assert {"sparse_linear", "sparsify", "densify", "Structure"} <= {*topkast_jax.__all__}


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices")
def test_gradients_on_several_devices_are_summed_or_refused() -> None:
    """With ``check_vma`` JAX sums gradients by types, which the products do not have."""
    problem = Problem(batch=8)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec: Any = jax.sharding.PartitionSpec

    def loss(values: Any, bias: Any, structure: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(sparse_linear(values, structure, x, bias)))

    differentiate = jax.grad(loss, argnums=(0, 1))

    def summed(*arguments: Any) -> Any:
        return jax.lax.psum(differentiate(*arguments), "data")

    def on_devices(function: Any, *, check_vma: bool) -> Any:
        specs = spec(), spec(), spec(), spec("data")
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=spec(), check_vma=check_vma
        )
        return jax.jit(mapped)(*arguments)

    arguments = problem.values, problem.bias, problem.structure, problem.x
    actual = on_devices(summed, check_vma=False)
    for gradient, expected in zip(actual, differentiate(*arguments), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-9)
    with pytest.raises(topkast.UnsupportedTensorError, match="check_vma=False"):
        on_devices(differentiate, check_vma=True)
