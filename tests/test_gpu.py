"""What only a GPU can show; ``nox -s gpu`` runs it, and elsewhere all of it is skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import topkast_cupy
import torch
from torch import Tensor, nn

import topkast
from topkast.testing import assert_same_support

pytestmark = pytest.mark.gpu

Array = np.ndarray[Any, Any]

NO_CUPY = topkast_cupy.why_unavailable()
NO_JAX = None if jax.default_backend() == "gpu" else "JAX sees no GPU"
NO_TORCH = None if torch.cuda.is_available() else "PyTorch sees no GPU"

needs_cupy = pytest.mark.skipif(NO_CUPY is not None, reason=str(NO_CUPY))
needs_jax = pytest.mark.skipif(NO_JAX is not None, reason=str(NO_JAX))
needs_torch = pytest.mark.skipif(NO_TORCH is not None, reason=str(NO_TORCH))


def _to_cupy(array: Array) -> Any:
    import cupy

    return cupy.asarray(array)


def _to_torch(array: Array) -> Tensor:
    return torch.asarray(array.copy(), device="cuda")


@pytest.fixture(
    params=[
        pytest.param(_to_cupy, id="cupy", marks=needs_cupy),
        pytest.param(_to_torch, id="torch", marks=needs_torch),
        pytest.param(jnp.asarray, id="jax", marks=needs_jax),
    ]
)
def to_device(request: pytest.FixtureRequest) -> Callable[[Array], Any]:
    function: Callable[[Array], Any] = request.param
    return function


def vectors() -> Iterator[Array]:
    rng = np.random.default_rng(0)
    for size in (1, 4097, 1_000_003):
        normal = rng.standard_normal(size).astype(np.float32)
        yield normal
        yield normal.astype(np.float16)
        yield np.round(normal)
        yield np.where(rng.random(size) < 0.9, np.float32(-0.0), normal)


def test_sets_are_those_of_numpy(to_device: Callable[[Array], Any]) -> None:
    for vector in vectors():
        for explore in ("magnitude", "random"):
            expected = topkast.select(vector, fwd=0.9, bwd=0.8, explore=explore, seed=5)
            found = topkast.select(to_device(vector), fwd=0.9, bwd=0.8, explore=explore, seed=5)
            assert_same_support(found, expected)


@pytest.mark.parametrize("rule", [topkast.SGD(0.1, momentum=0.9), topkast.AdamW(0.02)], ids=repr)
def test_training_is_that_of_numpy(to_device: Callable[[Array], Any], rule: Any) -> None:
    def train(convert: Callable[[Array], Any]) -> tuple[Any, Any]:
        rng = np.random.default_rng(0)
        start = {"w": rng.standard_normal((300, 200)), "b": rng.standard_normal(200)}
        params = {name: convert(array.astype(np.float32)) for name, array in start.items()}
        tx = topkast.wrap_optimizer(rule, fwd=0.9, bwd=0.8, refresh_every=5, explore_until=12)
        state = tx.init(params)
        for _ in range(20):
            noise = {name: rng.standard_normal(array.shape) for name, array in start.items()}
            alpha = topkast.forward_params(params, state)
            grads = {
                name: alpha[name] - 0.1 * convert(noise[name].astype(np.float32)) for name in alpha
            }
            params, state = tx.step(grads, state, params)
        return params, state

    expected, expected_state = train(np.array)
    found, state = train(to_device)
    for name, param in expected.items():
        difference = topkast.testing.to_numpy(found[name]) - param
        assert np.linalg.norm(difference) <= 1e-5 * np.linalg.norm(param)
    assert_same_support(state.supports["w"], expected_state.supports["w"])


@needs_cupy
class TestCuPy:
    def test_nothing_waits_between_refreshes(self) -> None:
        """A step can be captured as a CUDA graph, which refuses whatever waits for the host."""
        import cupy

        tx = topkast.wrap_optimizer(topkast.AdamW(1e-3), fwd=0.9, bwd=0.8)
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            params = {"w": cupy.random.standard_normal((512, 512)).astype("f4")}
            grads = {"w": cupy.ones_like(params["w"])}
            state = tx.init(params)
            for _ in range(3):  # fills the pool of memory
                params, state = tx.step(grads, state, params)
            stream.synchronize()
            stream.begin_capture()
            captured, _ = tx.step(grads, state, params)
            graph = stream.end_capture()
            graph.launch()
            expected, _ = tx.step(grads, state, params)
            cupy.testing.assert_array_equal(captured["w"], expected["w"])

    def test_arrays_that_do_not_belong_together(self) -> None:
        import cupy

        tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.5)
        with pytest.raises(topkast.MismatchError, match="v a numpy"):
            tx.init({"w": cupy.ones((3, 3)), "v": np.ones((3, 3))})
        if cupy.cuda.runtime.getDeviceCount() > 1:
            with cupy.cuda.Device(1):
                other = cupy.ones((3, 3))
            with pytest.raises(topkast.MismatchError, match="device"):
                tx.init({"w": cupy.ones((3, 3)), "v": other})


@contextmanager
def nothing_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_torch
class TestTorch:
    def prepare(self, **options: Any) -> tuple[nn.Module, Any, Tensor]:
        torch.manual_seed(0)
        dtype = options.pop("dtype", torch.float32)
        model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
        model = model.to("cuda", dtype)
        inner = torch.optim.AdamW(model.named_parameters(), 1e-3, **options)
        opt = topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8, refresh_every=1000)
        return model, opt, torch.randn(64, 256, device="cuda", dtype=dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=str)
    def test_nothing_waits_between_refreshes(
        self, options: dict[str, Any], dtype: torch.dtype
    ) -> None:
        model, opt, inputs = self.prepare(dtype=dtype, **options)
        for turn in range(3):
            opt.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            if turn:
                with nothing_waits():
                    opt.step()
            else:
                opt.step()

    def test_a_captured_step(self) -> None:
        """Between refreshes a whole training step is one CUDA graph."""
        model, opt, inputs = self.prepare(capturable=True)
        twin, twin_opt, _ = self.prepare(capturable=True)

        def step(model: nn.Module, opt: Any) -> None:
            opt.zero_grad(set_to_none=False)
            model(inputs).square().mean().backward()
            opt.step()

        side = torch.cuda.Stream()
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
            torch.testing.assert_close(param, expected)

    def test_compiled_models(self) -> None:
        model, opt, inputs = self.prepare(fused=True)
        compiled = torch.compile(model)
        for _ in range(3):
            opt.zero_grad()
            compiled(inputs).square().mean().backward()
            opt.step()
        torch.testing.assert_close(compiled(inputs), model(inputs), rtol=1e-4, atol=1e-4)

    def test_sparse_execution(self) -> None:
        model, opt, inputs = self.prepare(fused=True)
        twin, twin_opt, _ = self.prepare(fused=True)
        topkast.sparsify(model, opt)
        for network, optimizer in ((model, opt), (twin, twin_opt)):
            for _ in range(10):
                optimizer.zero_grad()
                network(inputs).square().mean().backward()
                optimizer.step()
        expected = topkast.dense_params(twin_opt)
        for name, theta in topkast.dense_params(opt).items():
            torch.testing.assert_close(theta, expected[name], rtol=1e-4, atol=1e-5)


@needs_jax
def test_a_jitted_optax_step_keeps_its_sets() -> None:
    rng = np.random.default_rng(0)
    start = {"w": rng.standard_normal((300, 200)).astype(np.float32)}
    tx = topkast.wrap_optimizer(optax.adamw(0.02), fwd=0.9, bwd=0.8, refresh_every=5)

    def train(place: Any) -> Any:
        with jax.default_device(place):
            params = jax.tree.map(jnp.asarray, start)
            state = tx.init(params)
            step = jax.jit(tx.step)
            for _ in range(20):
                params, state = step(topkast.forward_params(params, state), state, params)
            return state.supports["w"]

    assert_same_support(train(jax.devices("gpu")[0]), train(jax.devices("cpu")[0]))
