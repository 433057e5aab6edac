"""Tests that need a GPU; ``nox -s gpu`` runs them, and without a GPU they are skipped.

They import no other test module, so that they run with any subset of the libraries.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np
import pytest
import topkast_cupy

import topkast
from topkast.testing import assert_same_support, to_numpy

# On a GPU, libraries warn about prototypes and slow settings.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

Array = np.ndarray[Any, Any]


def _why_not(library: str) -> str | None:
    if library == "cupy":
        return topkast_cupy.why_unavailable()
    if importlib.util.find_spec(library) is None:
        return f"{library} is not installed"
    if library == "torch":
        import torch

        return None if torch.cuda.is_available() else "PyTorch sees no GPU"
    import jax

    try:
        return None if jax.default_backend() == "gpu" else "JAX sees no GPU"
    except RuntimeError as error:
        return f"JAX: {error}"


def _needs(library: str) -> pytest.MarkDecorator:
    reason = _why_not(library)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


needs_cupy, needs_torch, needs_jax = map(_needs, ("cupy", "torch", "jax"))


def _to_cupy(array: Array) -> Any:
    import cupy

    return cupy.asarray(array)


def _to_torch(array: Array) -> Any:
    import torch

    return torch.asarray(array.copy(), device="cuda")


def _to_jax(array: Array) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(array)


@pytest.fixture(
    params=[
        pytest.param(_to_cupy, id="cupy", marks=needs_cupy),
        pytest.param(_to_torch, id="torch", marks=needs_torch),
        pytest.param(_to_jax, id="jax", marks=needs_jax),
    ]
)
def to_device(request: pytest.FixtureRequest) -> Iterator[Callable[[Array], Any]]:
    """Convert NumPy arrays to a library on the device, with 64-bit floats."""
    context: Any = nullcontext()
    if request.param is _to_jax:
        import jax

        context = jax.enable_x64(True)
    with context:
        yield request.param


def vectors() -> Iterator[Array]:
    rng = np.random.default_rng(0)
    for size in (1, 4097, 1_000_003):
        normal = rng.standard_normal(size)
        yield normal
        yield normal.astype(np.float32)
        yield normal.astype(np.float16)
        yield np.round(normal)
        yield np.where(rng.random(size) < 0.9, np.float32(-0.0), normal.astype(np.float32))


@pytest.mark.parametrize("explore", ["magnitude", "random"])
def test_sets_equal_numpys(to_device: Callable[[Array], Any], explore: Any) -> None:
    for vector in vectors():
        expected = topkast.select(vector, fwd=0.9, bwd=0.8, explore=explore, seed=5)
        support = topkast.select(to_device(vector), fwd=0.9, bwd=0.8, explore=explore, seed=5)
        assert_same_support(support, expected)


@pytest.mark.parametrize("explore", ["magnitude", "random"])
def test_sets_in_groups_equal_numpys(to_device: Callable[[Array], Any], explore: Any) -> None:
    theta = np.round(np.random.default_rng(0).standard_normal((500, 400)), 2).astype(np.float32)
    options: dict[str, Any] = {"fwd": 0.5, "bwd": 0.25, "pattern": (2, 4), "explore": explore}
    support = topkast.select(to_device(theta), **options)
    assert_same_support(support, topkast.select(theta, **options))


OPTIONS: list[dict[str, Any]] = [{}, {"penalty_kind": "l1"}, {"explore_until": 12}]


def train(convert: Callable[[Array], Any], rule: Any, **options: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    start = {"w": rng.standard_normal((300, 200)), "b": rng.standard_normal(200)}
    params = {name: convert(array) for name, array in start.items()}
    tx = topkast.wrap_optimizer(rule, fwd=0.9, bwd=0.8, refresh_every=5, **options)
    state = tx.init(params)
    for step_number in range(20):
        alpha = topkast.forward_params(params, state)
        grads = {
            name: alpha[name] - 0.1 * convert(rng.standard_normal(array.shape))
            for name, array in start.items()
        }
        if step_number % 2:
            params, state = tx.step(grads, state, params)
        else:
            updates, state = tx.update(grads, state, params)
            params = topkast.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rule", [topkast.SGD(0.1, momentum=0.9), topkast.AdamW(0.02)], ids=repr)
def test_training_equals_numpys(
    to_device: Callable[[Array], Any], rule: Any, options: dict[str, Any]
) -> None:
    expected, expected_state = train(np.array, rule, **options)
    params, state = train(to_device, rule, **options)
    for name, param in expected.items():
        np.testing.assert_allclose(to_numpy(params[name]), param, rtol=1e-9, atol=1e-9)
    assert_same_support(state.supports["w"], expected_state.supports["w"])


@needs_cupy
class TestCuPy:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
    def test_no_synchronisation_between_refreshes(
        self, dtype: str, options: dict[str, Any]
    ) -> None:
        """A step can be captured as a CUDA graph, which forbids synchronisation with the host."""
        import cupy

        tx = topkast.wrap_optimizer(
            topkast.AdamW(1e-3), fwd=0.9, bwd=0.8, refresh_every=1000, **options
        )
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            params = {"w": cupy.asarray(np.random.default_rng(0).normal(size=(512, 512)), dtype)}
            grads = {"w": cupy.ones_like(params["w"])}
            state = tx.init(params)
            for _ in range(3):  # fills the memory pool
                params, state = tx.step(grads, state, params)
            stream.synchronize()
            stream.begin_capture()
            captured, _ = tx.step(grads, state, params)
            graph = stream.end_capture()
            graph.launch()
            expected, _ = tx.step(grads, state, params)
            np.testing.assert_array_equal(captured["w"].get(), expected["w"].get())

    def test_negative_zeros_stay(self) -> None:
        """Weights outside B keep their bits, because their updates are -0.0."""
        import cupy

        tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.8, explore_until=0)
        params = {"w": cupy.full((30, 30), -0.0)}
        updates, _ = tx.update({"w": cupy.ones((30, 30))}, tx.init(params), params)
        kept = topkast.apply_updates(params, updates)["w"].get()
        assert int(np.signbit(kept).sum()) == 900

    def test_mixed_libraries_and_bad_dtypes(self) -> None:
        import cupy

        tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.5)
        with pytest.raises(topkast.MismatchError, match="v a numpy"):
            tx.init({"w": cupy.ones((3, 3)), "v": np.ones((3, 3))})
        for dtype in ("c8", "i4"):
            with pytest.raises(topkast.UnsupportedTensorError, match="w: weights"):
                tx.init({"w": cupy.ones((3, 3), dtype)})

    def test_second_device(self) -> None:
        import cupy

        if cupy.cuda.runtime.getDeviceCount() < 2:
            pytest.skip("needs two GPUs")
        tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.5)
        with cupy.cuda.Device(1):
            params = {"w": cupy.arange(9.0).reshape(3, 3)}
            stepped, _ = tx.step(params, tx.init(params), params)
            assert stepped["w"].device.id == 1
        for misplaced in (params, {"v": cupy.ones((3, 3)), **params}):
            with pytest.raises(topkast.MismatchError, match="device"):
                tx.init(misplaced)


@contextmanager
def forbid_synchronisation() -> Iterator[None]:
    import torch

    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_torch
class TestTorch:
    def prepare(self, make: Any = None, block: Any = None, **options: Any) -> tuple[Any, Any, Any]:
        import torch
        from torch import nn

        torch.manual_seed(0)
        dtype = options.pop("dtype", torch.float32)
        model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
        model = model.to("cuda", dtype)
        inner = (make or torch.optim.AdamW)(model.named_parameters(), 1e-3, **options)
        opt = topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8, refresh_every=1000, block=block)
        return model, opt, torch.randn(64, 256, device="cuda", dtype=dtype)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=str)
    def test_no_synchronisation_between_refreshes(
        self, options: dict[str, Any], dtype: str
    ) -> None:
        import torch

        model, opt, inputs = self.prepare(dtype=getattr(torch, dtype), **options)
        for step_number in range(3):
            opt.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            with forbid_synchronisation() if step_number else nullcontext():
                opt.step()

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_no_synchronisation_with_plain_tensors(self, options: dict[str, Any]) -> None:
        import torch

        tx = topkast.wrap_optimizer(
            topkast.AdamW(1e-3), fwd=0.9, bwd=0.8, refresh_every=1000, **options
        )
        params = {"w": torch.randn(300, 200, device="cuda")}
        state = tx.init(params)
        for step_number in range(3):
            with forbid_synchronisation() if step_number else nullcontext():
                grads = topkast.forward_params(params, state)
                params, state = tx.step(grads, state, params)

    def test_a_captured_step(self) -> None:
        """Between refreshes a whole training step is one CUDA graph."""
        import torch

        model, opt, inputs = self.prepare(torch.optim.SGD, momentum=0.9)
        twin, twin_opt, _ = self.prepare(torch.optim.SGD, momentum=0.9)

        def step(model: Any, opt: Any) -> None:
            opt.zero_grad(set_to_none=False)
            model(inputs).square().mean().backward()
            opt.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(model, opt)
                step(twin, twin_opt)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(model, opt)
        for _ in range(5):
            graph.replay()
            step(twin, twin_opt)
        for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(param, expected, rtol=1e-4, atol=1e-5)

    def test_compiled_models(self) -> None:
        import torch

        model, opt, inputs = self.prepare(fused=True)
        compiled: Any = torch.compile(model)
        for _ in range(3):
            opt.zero_grad()
            compiled(inputs).square().mean().backward()
            opt.step()
        torch.testing.assert_close(compiled(inputs), model(inputs), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("block", [None, (4, 1), (2, 2)])
    def test_sparse_execution(self, block: Any) -> None:
        import torch

        runs = []
        for sparse in (False, True):
            model, opt, inputs = self.prepare(torch.optim.SGD, block, momentum=0.9)
            if sparse:
                topkast.sparsify(model, opt)
            for _ in range(10):
                opt.zero_grad()
                model(inputs).square().mean().backward()
                opt.step()
            runs.append(topkast.dense_params(opt))
        for name, theta in runs[1].items():
            torch.testing.assert_close(theta, runs[0][name], rtol=1e-4, atol=1e-5)


@needs_jax
def test_a_jitted_optax_step_keeps_its_sets() -> None:
    import jax
    import jax.numpy as jnp
    import optax

    rng = np.random.default_rng(0)
    start = {"w": rng.standard_normal((300, 200))}
    tx = topkast.wrap_optimizer(optax.adamw(0.02), fwd=0.9, bwd=0.8, refresh_every=5)

    def train_on(device: Any) -> Any:
        with jax.default_device(device):
            params = jax.tree.map(jnp.asarray, start)
            state = tx.init(params)
            step = jax.jit(tx.step)
            for _ in range(20):
                params, state = step(topkast.forward_params(params, state), state, params)
            return state.supports["w"]

    with jax.enable_x64(True):
        assert_same_support(train_on(jax.devices("gpu")[0]), train_on(jax.devices("cpu")[0]))
