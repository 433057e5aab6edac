"""CuPy's backend without a GPU: its passes in NumPy, and the CUDA source run on the host."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda_on_host
import numpy as np
import pytest
import topkast_cupy
import torch
from hypothesis import given
from hypothesis import strategies as st
from products import star
from topkast_cupy._backend import CuPyBackend
from topkast_cupy._module import options, source

import topkast
import topkast.testing
from topkast.backends import _find
from topkast.selection._random import Ranks, make_key, ranks

Array = np.ndarray[Any, Any]
LOAD_BACKEND = _find.load_backend
DTYPES: list[Any] = [np.float16, np.float32, np.float64]

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None,
    reason="needs Linux and g++ to run the CUDA source on the host",
)
IMPLEMENTATIONS = ["passes", pytest.param("compiled", marks=needs_compiler)]


@pytest.fixture(params=IMPLEMENTATIONS)
def backend(request: pytest.FixtureRequest) -> CuPyBackend:
    return cuda_on_host.make_backend(request.param)


@pytest.fixture
def in_core(backend: CuPyBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The core uses `backend` for NumPy arrays."""

    def load_backend(array_type: Any) -> Any:
        return backend if array_type is np.ndarray else LOAD_BACKEND(array_type)

    with monkeypatch.context() as patch:
        patch.setattr(_find, "load_backend", load_backend)
        yield patch


RANKS = Ranks(make_key(0, "w", "ties"))


def ranks_of(size: int) -> Array:
    return np.asarray(ranks(np.arange(size), make_key(0, "w", "ties")))


def largest_by_sorting(vector: Array, count: int, tie_ranks: Array) -> Array:
    """Ascending indices of the `count` largest magnitudes; ties by rank, the largest first."""
    selected = np.lexsort((-tie_ranks, -np.abs(vector.astype(np.float64))))[:count]
    return np.sort(selected)


@st.composite
def vectors(draw: st.DrawFn) -> tuple[Array, int]:
    """Weights with many ties, zeros of both signs and subnormal numbers, in up to three tiles."""
    dtype = draw(st.sampled_from(DTYPES))
    size = draw(st.sampled_from([1, 2, 31, 257, 4095, 4096, 4097, 9001]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    vector = rng.standard_normal(size)
    distribution = draw(st.sampled_from(["normal", "rounded", "zeros", "tiny", "wide", "signs"]))
    if distribution == "rounded":
        vector = np.round(vector)
    elif distribution == "zeros":
        vector[rng.random(size) < 0.9] = -0.0
    elif distribution == "tiny":
        vector *= float(np.finfo(dtype).smallest_subnormal) * 3
    elif distribution == "wide":
        vector = np.exp2(rng.uniform(-14, 14, size))
    elif distribution == "signs":
        vector = np.sign(vector)
    return vector.astype(dtype), draw(st.integers(1, size))


@given(vectors())
def test_largest(backend: CuPyBackend, problem: tuple[Array, int]) -> None:
    vector, count = problem
    tie_ranks = ranks_of(vector.size)
    expected = largest_by_sorting(vector, count, tie_ranks)
    indices, magnitudes = backend.largest(vector, count, RANKS)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(magnitudes, vector[expected])
    flags = backend.largest_flags(vector, count, RANKS)
    np.testing.assert_array_equal(np.flatnonzero(flags), expected)
    np.testing.assert_array_equal(backend.true_indices(flags, count), expected)
    coarse = (tie_ranks >> 22).astype(np.int32)  # integers with many ties
    flags = backend.largest_flags(coarse, count, RANKS)
    expected = largest_by_sorting(coarse, count, tie_ranks)
    np.testing.assert_array_equal(np.flatnonzero(flags), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_put(backend: CuPyBackend, dtype: Any, rng: np.random.Generator) -> None:
    indices = np.sort(rng.choice(9000, 5000, replace=False))
    out, values = np.zeros(9000, dtype), rng.standard_normal((1, 5000)).astype(dtype)
    backend.write(out, indices, values)
    expected = np.zeros(9000, dtype)
    expected[indices] = values[0]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(backend: CuPyBackend, dtype: Any) -> None:
    vector = np.ones(5000, dtype)
    vector[[7, 4500]] = np.nan, -np.inf
    for function in (backend.largest, backend.largest_flags):
        with pytest.raises(topkast.NonFiniteError, match="2 of 5000 entries"):
            function(vector, 10, RANKS)


@pytest.mark.usefixtures("in_core")
@given(vectors(), st.sampled_from(["magnitude", "random"]))
def test_selection_equals_numpys(
    in_core: pytest.MonkeyPatch, problem: tuple[Array, int], explore: Any
) -> None:
    vector = problem[0]
    support = topkast.select(vector, fwd=0.9, bwd=0.7, explore=explore, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_find, "load_backend", LOAD_BACKEND)
        expected = topkast.select(vector, fwd=0.9, bwd=0.7, explore=explore, seed=3)
    topkast.testing.assert_same_support(support, expected)


RULES = {
    "sgd": topkast.SGD(0.1, weight_decay=0.1),
    "momentum": topkast.SGD(0.1, momentum=0.9),
    "nesterov": topkast.SGD(lambda step: 0.1 / (1 + step), momentum=0.9, nesterov=True),
    "adam": topkast.Adam(0.02, weight_decay=0.1),
    "adamw": topkast.AdamW(lambda step: 0.02 / (1 + step), betas=(0.8, 0.9)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "l1": {"penalty_kind": "l1", "penalty": 0.01},
    "stopping": {"explore_until": 5},
    "random": {"explore": "random"},
    "global": {"distribution": "global", "dense": "bias"},
    "blocks": {"block": (2, 5)},
    "pattern": {"pattern": (1, 10)},
    "pattern, random": {"pattern": (1, 10), "explore": "random"},
    "block maxima": {"block": (10, 1), "block_score": "max", "explore": "random"},
}


def train(rule: Any, dtype: Any, **options: Any) -> tuple[dict[str, Array], Any, list[Any]]:
    rng = np.random.default_rng(0)
    params: dict[str, Array] = {
        "hidden": rng.standard_normal((90, 70)).astype(dtype),
        "bias": rng.standard_normal(70).astype(dtype),
        "output": rng.standard_normal((70, 10)).astype(dtype),
    }
    tx = topkast.wrap_optimizer(rule, fwd=0.9, bwd=0.7, refresh_every=3, **options)
    state = tx.init(params)
    supports = []
    for _ in range(10):
        grads = {
            name: (view - 0.1 * rng.standard_normal(view.shape)).astype(dtype)
            for name, view in topkast.forward_params(params, state).items()
        }
        params, state = tx.step(grads, state, params)
        supports.append(state.supports)
    return params, state, supports


def test_other_rules_are_not_fused(in_core: pytest.MonkeyPatch) -> None:
    class Twice(topkast.SGD):
        def update(self, *arguments: Any) -> Any:
            displacements, state = super().update(*arguments)
            return {name: 2 * displacements[name] for name in displacements}, state

    params, _, _ = train(Twice(0.1), np.float64)
    in_core.setattr(_find, "load_backend", LOAD_BACKEND)
    expected, _, _ = train(topkast.SGD(0.2), np.float64)
    for name, param in expected.items():
        np.testing.assert_allclose(params[name], param, rtol=1e-12)


@pytest.mark.parametrize(("rule", "options"), star(RULES, OPTIONS))
def test_training_equals_numpys(
    in_core: pytest.MonkeyPatch, rule: Any, options: Mapping[str, Any]
) -> None:
    params, state, supports = train(rule, np.float64, **options)
    in_core.setattr(_find, "load_backend", LOAD_BACKEND)
    expected_params, expected_state, expected_supports = train(rule, np.float64, **options)
    for by_key, expected in zip(supports, expected_supports, strict=True):
        for key in expected:
            topkast.testing.assert_same_support(by_key[key], expected[key])
    for name, param in expected_params.items():
        np.testing.assert_allclose(params[name], param, rtol=1e-12, atol=1e-12)
    for entries, expected in zip(state.inner, expected_state.inner, strict=True):
        if isinstance(expected, dict):
            assert entries.keys() == expected.keys()
            for key, entry in expected.items():
                assert entries[key].shape == entry.shape
                np.testing.assert_allclose(entries[key], entry, rtol=1e-12, atol=1e-12)
        else:
            assert entries == expected


@pytest.mark.usefixtures("in_core")
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_step_in_lower_precision(dtype: Any) -> None:
    """One step from the same weights agrees with float64 to the precision of the dtype."""
    rng = np.random.default_rng(1)
    params = {"w": rng.standard_normal((60, 50)).astype(dtype)}
    grads = {"w": rng.standard_normal((60, 50)).astype(dtype)}
    for rule in (topkast.SGD(0.1, momentum=0.9), topkast.AdamW(0.1, eps=1e-4)):
        tx = topkast.wrap_optimizer(rule, fwd=0.9, bwd=0.7, refresh_every=100)
        stepped, state = tx.step(grads, tx.init(params), params)
        exact_params = {"w": params["w"].astype(np.float64)}
        exact_grads = {"w": grads["w"].astype(np.float64)}
        expected, _ = tx.step(exact_grads, tx.init(exact_params), exact_params)
        assert stepped["w"].dtype == dtype
        np.testing.assert_allclose(
            stepped["w"].astype(np.float64), expected["w"], rtol=2 * np.finfo(dtype).eps, atol=1e-6
        )
        outside = np.ones(3000, np.bool_)
        outside[state.supports["w"].indices] = False
        np.testing.assert_array_equal(stepped["w"].ravel()[outside], params["w"].ravel()[outside])


@needs_compiler
def test_half_precision_is_converted_as_numpy_does() -> None:
    """Tries all halves, and floats around every rounding boundary."""
    backend = cuda_on_host.make_backend("compiled")
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    count = len(halves)
    zero = np.zeros(count, np.float16)
    whole_tensor = np.arange(count, dtype=np.int32), count, count, 0.0, 0.0, 0, 1
    # A step of SGD with a rate of 1 writes weight - gradient, rounded once.
    rate = np.asarray(1.0)
    rng = np.random.default_rng(0)
    for gradients in (zero, rng.permutation(halves), np.nextafter(halves, np.float16(0))):
        params = halves.copy()
        backend._stride(
            "sgd", params, count, *whole_tensor, params, gradients, None, None, rate, 0.0, 0, 0.0
        )
        with np.errstate(over="ignore"):
            expected = (halves.astype(np.float32) - gradients.astype(np.float32)).astype(np.float16)
        np.testing.assert_array_equal(params, expected)


class TestBadInput:
    @pytest.mark.usefixtures("in_core")
    @pytest.mark.parametrize("dtype", [np.complex64, np.int32, np.longdouble])
    def test_dtypes(self, dtype: Any) -> None:
        tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.5)
        with pytest.raises(topkast.UnsupportedTensorError, match="w: weights"):
            tx.init({"w": np.ones((3, 3), dtype)})

    @pytest.mark.usefixtures("in_core")
    def test_integers_are_not_ranked_as_floats(self) -> None:
        with pytest.raises(topkast.UnsupportedTensorError, match="int32"):
            topkast.select(np.arange(9, dtype=np.int32), fwd=0.5, bwd=0.5)

    def test_wrong_device(self) -> None:
        backend = CuPyBackend(np, lambda *bits: cuda_on_host.Passes(), lambda: "another")
        vector = np.ones(3)
        for use in (
            lambda: backend.check("w", vector),
            lambda: backend.largest(vector, 1, RANKS),
            lambda: backend.true_indices(vector > 0, 3),
            lambda: backend.write(vector, np.arange(3), vector),
        ):
            with pytest.raises(topkast.MismatchError, match=r"'cpu', .* `with array.device:`"):
                use()

    def test_mixed_libraries_and_devices(self) -> None:
        tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.5)
        params = {"w": torch.ones(3, 3), "v": torch.ones(3, 3)}
        with pytest.raises(topkast.MismatchError, match=r"w is a torch\.Tensor and v a numpy"):
            tx.init({**params, "v": np.ones((3, 3))})
        with pytest.raises(topkast.MismatchError, match="w is on cpu and v on meta"):
            tx.init({**params, "v": torch.ones(3, 3, device="meta")})
        state = tx.init(params)
        with pytest.raises(topkast.MismatchError, match="the gradient of w"):
            tx.step({"w": np.ones((3, 3), np.float32), "v": params["v"]}, state, params)


@pytest.mark.usefixtures("in_core")
def test_complex_values_and_short_indices_are_scattered() -> None:
    support = topkast.Support(np.asarray([3, 1], np.int32), 1)
    for dtype in (np.float32, np.bool_, np.complex64, np.complex128):
        tensor = topkast.scatter(np.asarray([1, 1], dtype), support, shape=(2, 2))
        np.testing.assert_array_equal(tensor, np.asarray([[0, 1], [0, 1]], dtype))


@pytest.mark.usefixtures("in_core")
def test_options_may_be_numpy_scalars() -> None:
    """Kernels read eight bytes for each number."""
    params = {"w": np.arange(1.0, 10.0).reshape(3, 3)}
    rule = topkast.SGD(np.float32(0.5), momentum=np.float32(0.5))  # type: ignore[arg-type]
    penalty: Any = np.float32(0.25)
    tx = topkast.wrap_optimizer(rule, fwd=0.5, bwd=0.5, penalty=penalty)
    stepped, _ = tx.step({"w": np.zeros((3, 3))}, tx.init(params), params)
    np.testing.assert_array_equal(stepped["w"].ravel()[4:], params["w"].ravel()[4:] * 0.875)


def test_why_cupy_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    class CUDARuntimeError(RuntimeError):
        pass

    def no_driver() -> int:
        raise CUDARuntimeError("cudaErrorInsufficientDriver: too old")

    def cupy(count: Any) -> Any:
        runtime = SimpleNamespace(getDeviceCount=count, CUDARuntimeError=CUDARuntimeError)
        return SimpleNamespace(__version__="14.2.0", cuda=SimpleNamespace(runtime=runtime))

    monkeypatch.setitem(sys.modules, "cupy", cupy(lambda: 1))
    assert topkast_cupy.why_unavailable() is None
    for count, reason in ((lambda: 0, "none is visible"), (no_driver, "InsufficientDriver")):
        monkeypatch.setitem(sys.modules, "cupy", cupy(count))
        assert re.search(f"finds no CUDA device: .*{reason}", topkast_cupy.why_unavailable() or "")
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "cupy" in (topkast_cupy.why_unavailable() or "").lower()


@pytest.mark.parametrize(
    "line", ["raise ImportError('======\\n a page\\n of text')", "import cupy.does_not_exist"]
)
def test_broken_cupy(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    reason = topkast_cupy.why_unavailable()
    assert re.fullmatch("CuPy is installed but cannot be imported: .*", reason or "")


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_the_source_compiles_to_ptx(bits: int) -> None:
    nvrtc = find_nvrtc()
    if nvrtc is None:
        pytest.skip("needs NVRTC: pip install nvidia-cuda-nvrtc-cu12")
    program = ctypes.c_void_p()
    code = source().encode()
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, b"kernels.cu", 0, None, None)
    flags = ("--std=c++17", "--gpu-architecture=compute_80", *options(bits))
    encoded = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    failed = nvrtc.nvrtcCompileProgram(program, len(flags), encoded)
    log = ctypes.create_string_buffer(1 << 16)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert not failed, log.value.decode()
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    names = ["histogram", "choose", "count", "collect", "scatter"] + ["sgd", "adam"] * (bits > 8)
    for name in names:
        assert f".visible .entry {name}(" in ptx.value.decode()


def find_nvrtc() -> ctypes.CDLL | None:
    """Load NVIDIA's compiler from a package or from the system."""
    try:
        spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        spec = None
    folders = [Path(path) / "lib" for path in (spec and spec.submodule_search_locations) or []]
    names = [str(path) for folder in folders for path in folder.glob("libnvrtc.so*")]
    for name in [*names, "libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
