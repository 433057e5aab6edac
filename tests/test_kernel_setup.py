"""Setup and failures of the kernels: no cache, an edited file, an interrupt, no numba."""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core.codegen import get_host_cpu_features
from numba.core.dispatcher import Dispatcher

import topkast
import topkast.kernels
from topkast.backends import _threads
from topkast.kernels import (
    _gather,
    _layout_arrays,
    _packing,
    _plane_products,
    _planes,
    _products,
    _sampling,
)
from topkast.kernels.runtime import _arguments, _pool
from topkast.kernels.runtime._compile import FolderLocator, Kernel
from topkast.kernels.runtime._lanes import HAS_LANES, LANES
from topkast.testing import assert_same_support

PACKAGE = Path(topkast.__file__).parent
ROOT = Path(__file__).parents[1]


def run(code: str, folder: Path | str) -> str:
    """Output of a new process that imports from `folder`, or several, and has no home."""
    completed = subprocess.run(
        [sys.executable, "-B", "-c", code],
        capture_output=True,
        text=True,
        timeout=200,
        env={"PYTHONPATH": str(folder), "HOME": "/dev/null", "PATH": ""},
    )
    assert not completed.returncode, completed.stderr
    return completed.stdout


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The kernels' folder without compiled files, in a package without other modules."""
    ignored = shutil.ignore_patterns("__pycache__", "__init__.py")
    shutil.copytree(PACKAGE / "kernels", tmp_path / "kernels", ignore=ignored)
    return tmp_path


def test_without_a_folder_for_the_cache_each_process_compiles(copied: Path) -> None:
    for folder in ("kernels", "kernels/runtime"):
        (copied / folder / "__pycache__").write_text("in the way, even of an administrator")
    (copied / "kernels/odd.py").write_text("""
from kernels.runtime._compile import can_cache, compiled, kernel

assert not can_cache()

@compiled
def double(x):
    return 2 * x

@kernel("int64(int64)")
def twice(x):
    return double(x)
""")
    code = "from kernels.odd import double, twice; print(double(21), twice.ctypes(21))"
    assert run(code, copied) == "42 42\n"


ODD = """
import errno
from numba.core import caching
from kernels.runtime._compile import can_cache, compiled, kernel

assert can_cache()

@compiled
def double(x):
    return 2 * x

@kernel("int64(int64)")
def twice(x):
    return double(x)

def fill_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")
"""


def test_a_full_disk_stops_no_kernel(copied: Path) -> None:
    (copied / "kernels/odd.py").write_text(ODD)
    code = """
from kernels.odd import caching, double, fill_disk, twice
caching.IndexDataCacheFile._save_data = fill_disk
print(double(21), twice.ctypes(21))
"""
    assert run(code, copied) == "42 42\n"


def test_older_code_is_not_run_after_a_full_disk(copied: Path) -> None:
    """numba writes the index of the new code before the code, which found no room."""
    code = "from kernels.odd import caching, double, fill_disk, twice\n"
    fill, call = "caching.IndexDataCacheFile.", "print(double(21), twice.ctypes(21))"
    (copied / "kernels/odd.py").write_text(ODD)
    assert run(code + call, copied) == "42 42\n"
    (copied / "kernels/odd.py").write_text(ODD.replace("2 * x", "3 * x"))
    assert run(f"{code}{fill}_save_data = fill_disk; {call}", copied) == "63 63\n"
    assert run(code + call, copied) == "63 63\n"
    for file in (copied / "kernels/__pycache__").glob("odd.*.nbi"):
        file.write_bytes(b"")  # damaged, and no room for another one
    assert run(f"{code}{fill}_open_for_write = fill_disk; {call}", copied) == "63 63\n"


@pytest.mark.parametrize(("suffix", "damage"), [(".nbi", b""), (".nbc", b"no pickle")])
def test_a_damaged_cache_is_written_anew(copied: Path, suffix: str, damage: bytes) -> None:
    (copied / "kernels/odd.py").write_text(ODD)
    code = """
from kernels.odd import double, twice
print(double(21), twice.ctypes(21), sum(double.stats.cache_hits.values()))
"""
    assert run(code, copied) == "42 42 0\n"
    files = list((copied / "kernels/__pycache__").glob(f"odd.*{suffix}"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(damage)
    assert [run(code, copied) for _ in range(2)] == ["42 42 0\n", "42 42 1\n"]


def test_kernels_in_a_zip_file_are_not_cached(tmp_path: Path) -> None:
    """There is no folder to hash, so that a cache would not notice another version."""
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", PACKAGE.parent, "topkast")
    code = """
import numpy as np, topkast.kernels
from topkast.kernels.runtime._compile import can_cache
flat, indices, out = np.arange(4, dtype="float32"), np.array([2], "int32"), np.zeros(1, "float32")
topkast.kernels.gather(flat, indices, out)
print(out, can_cache())
"""
    assert run(code, Path(packed)) == "[2.] False\n"


def test_the_cache_notices_edits_of_every_file(copied: Path) -> None:
    """A kernel calls functions from several files."""
    code = """
from pathlib import Path
from kernels.runtime import _compile
hash_sources = _compile._hash_sources.__wrapped__
folder = Path(_compile.__file__).parent.parent
stamps = [hash_sources()]
for path in folder.rglob("*.py"):
    path.write_text(path.read_text() + "# edited\\n")
    stamps.append(hash_sources())
for name in ("_new.py", "new.py", "__init__.py", "new.txt", "runtime/new.py"):
    assert not (folder / name).exists()
    (folder / name).write_text("")
    stamps.append(hash_sources())
(folder / "new.py").rename(folder / "renamed.py")
stamps.append(hash_sources())
(folder / "_new.py").unlink()
stamps.append(hash_sources())
print(len(stamps), len(set(stamps)))
"""
    count = 1 + len(list((copied / "kernels").rglob("*.py"))) + 5 + 2
    assert run(code, copied) == f"{count} {count}\n"


def test_a_file_that_is_added_makes_the_next_process_compile(copied: Path) -> None:
    """The cache is only valid for an unchanged folder."""
    (copied / "kernels/odd.py").write_text("""
from kernels.runtime._compile import can_cache, compiled

assert can_cache()

@compiled
def double(x):
    return 2 * x

print(double(21), sum(double.stats.cache_hits.values()))
""")
    code = "import kernels.odd"
    assert [run(code, copied) for _ in range(2)] == ["42 0\n", "42 1\n"]
    (copied / "kernels/new.py").write_text("")
    assert [run(code, copied) for _ in range(2)] == ["42 0\n", "42 1\n"]


def test_arguments_of_kernels_go_by_name() -> None:
    """A missing or an additional argument cannot be read as another one."""
    slots = _arguments.define_arguments("first", "second")
    assert slots.names == ("next_item", "next_thread", "first", "second")
    record = _arguments.fill_record(slots, second=2, first=1, next_thread=0, next_item=0)
    assert record.tolist() == [0, 0, 1, 2]
    for wrong in ({"first": 1}, {"first": 1, "third": 3}, {"first": 1, "second": 2, "third": 3}):
        with pytest.raises(TypeError, match=r"second|third"):
            _arguments.fill_record(slots, next_item=0, next_thread=0, **wrong)


def test_addresses_of_arrays() -> None:
    """Of those that ctypes can take a buffer of, and of all others."""
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    grid = np.zeros((4, 6), np.int16)
    arrays: list[Any] = [
        grid,
        grid[1:],
        grid[:, 1:],
        grid.T,
        frozen,
        np.zeros(0),
        np.ones((), bool),
    ]
    for array in arrays:
        assert _pool.address_of(array) == array.ctypes.data


def test_kernels_need_neither_pytorch_nor_an_adapter() -> None:
    code = """
import sys
import topkast.kernels
print(sorted({"torch", "jax", "topkast_torch", "topkast_jax", "topkast_cupy"} & {*sys.modules}))
"""
    assert run(code, PACKAGE.parent) == "[]\n"


def test_entry_points_are_cached_by_the_hash_of_the_folder() -> None:
    """The functions that an entry point calls are compiled into it."""
    modules = _layout_arrays, _plane_products, _gather, _packing, _planes, _products, _sampling
    entries = [value for module in modules for value in vars(module).values()]
    compiled = [value._compiled for value in entries if isinstance(value, Kernel)]
    compiled += [value for value in entries if hasattr(getattr(value, "_cache", None), "_impl")]
    assert {"_single", "_double"} <= {function.__name__[-7:] for function in compiled}
    assert all(isinstance(function._cache._impl.locator, FolderLocator) for function in compiled)


def test_no_two_compiled_functions_share_a_name() -> None:
    """Of cached functions of one name, a process may run the other one: numba links by name."""
    functions = {}
    for info in pkgutil.walk_packages(topkast.kernels.__path__, "topkast.kernels."):
        for entry in vars(importlib.import_module(info.name)).values():
            if isinstance(entry, Dispatcher):
                functions[entry.py_func] = f"{entry.__module__}.{entry.py_func.__qualname__}"
    assert len(functions) > 30
    assert len(set(functions.values())) == len(functions)


def test_kernels_are_compiled_when_they_are_needed() -> None:
    code = """
from topkast.kernels import _gather
import numpy as np, topkast.kernels
assert "_compiled" not in vars(_gather._put_single)
topkast.kernels.put(np.zeros(1, "float32"), np.zeros(1, "int32"), np.ones(1, "float32"))
print("_compiled" in vars(_gather._put_single), "_compiled" in vars(_gather._put_double))
"""
    assert run(code, PACKAGE.parent) == "True False\n"


def test_an_interrupt_waits_for_the_threads() -> None:
    """Threads write to memory that the caller frees."""

    class Interrupted(Future[None]):
        def exception(self, timeout: float | None = None) -> BaseException | None:
            if not self.done():
                self.set_result(None)
                raise KeyboardInterrupt
            return None

    futures = [Interrupted(), Interrupted()]
    with pytest.raises(KeyboardInterrupt):
        _threads.wait_for(list(futures))
    assert all(future.done() for future in futures)


def test_an_error_in_a_thread_is_raised() -> None:
    failed: Future[None] = Future()
    failed.set_exception(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        _threads.wait_for([failed])


@pytest.mark.parametrize(
    ("missing", "code", "extra"),
    [
        ("numba", "import topkast.kernels", "cpu"),
        ("hypothesis", "import topkast.testing; topkast.testing.weights()", "testing"),
        ("jax", "import topkast_jax", "jax"),
        ("matplotlib", "import topkast; topkast.plot", "analysis"),
        ("optax", "import topkast_jax", "jax"),
        ("safetensors", "import topkast.inference; topkast.inference.load('a')", "safetensors"),
        ("torch", "import topkast_torch", "torch"),
        ("torch", "import topkast_torch.callbacks", "torch"),
    ],
)
def test_the_error_names_the_extra_of_a_missing_package(
    missing: str, code: str, extra: str
) -> None:
    program = f"""
import sys
sys.modules[{missing!r}] = None
try:
    {code}
except ModuleNotFoundError as error:
    print(error)
"""
    folders = f"{PACKAGE.parent}:{ROOT / 'adapters'}"
    assert f"pip install 'topkast[{extra}]'" in run(program, folders)


@pytest.mark.parametrize(
    ("hidden", "code"),
    [
        ("jax", "import topkast_jax"),
        ("matplotlib", "import topkast; topkast.plot"),
        ("mine", "import topkast; topkast._adapters.load(ENTRY)"),
    ],
)
def test_a_file_with_the_name_of_a_package_is_not_a_missing_extra(
    tmp_path: Path, hidden: str, code: str
) -> None:
    """An installation would not help."""
    (tmp_path / f"{hidden}.py").touch()
    program = f"""
from importlib.metadata import EntryPoint
ENTRY = EntryPoint("mine", "mine.gone:wrap", "topkast.adapters")
try:
    {code}
except (ImportError, TypeError) as error:
    print(error)
"""
    printed = run(program, f"{tmp_path}:{PACKAGE.parent}:{ROOT / 'adapters'}")
    assert printed
    assert "install" not in printed


THIRD_PARTY_BACKEND = """
from topkast.backends.numpy import NumPyBackend

class Counting(NumPyBackend):
    calls = 0

    def largest_first(self, *arguments):
        self.calls += 1
        return super().largest_first(*arguments)

    def host(self, array):
        return None

BACKEND = Counting()

def load():
    return BACKEND
"""


def test_a_third_party_backend_is_found_by_the_name_of_its_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend of CuPy is found in the same way."""
    described = tmp_path / "backend_of_somebody-1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1\n")
    (described / "entry_points.txt").write_text("[topkast.backends]\nsomearrays = somebackend:load")
    (tmp_path / "somebackend.py").write_text(THIRD_PARTY_BACKEND)
    monkeypatch.syspath_prepend(tmp_path)
    array_type: Any = type("SomeArray", (np.ndarray,), {"__module__": "somearrays.core"})
    derived: Any = type("Derived", (array_type,), {"__module__": "mine"})
    import somebackend  # type: ignore[import-not-found]

    tx = topkast.wrap_optimizer(topkast.AdamW(0.1), fwd=0.9, bwd=0.8, refresh_every=2)
    theta = np.random.default_rng(0).standard_normal((20, 30))
    runs = []
    for view_type in (np.ndarray, array_type, derived):
        params = {"w": theta.view(view_type)}
        state = tx.init(params)
        for _ in range(4):
            params, state = tx.step({"w": params["w"] * 2}, state, params)
        runs.append((np.asarray(params["w"]), state.supports["w"]))
    assert somebackend.BACKEND.calls == 6  # at the start and at two refreshes, for two libraries
    for weights, support in runs[1:]:
        np.testing.assert_array_equal(weights, runs[0][0])
        assert_same_support(support, runs[0][1])


_NUMBA_VARIABLES = {"NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX"}


@pytest.mark.skipif(bool(_NUMBA_VARIABLES & {*os.environ}), reason="numba was told otherwise")
def test_the_widest_registers_are_used() -> None:
    features = {*get_host_cpu_features().split(",")}
    lanes = 16 if {"+avx512f", "+avx512bw", "+avx512vl"} <= features else 8
    assert (lanes == 16 or "+avx2" in features, lanes) == (HAS_LANES, LANES)


@pytest.mark.slow  # compiles the kernels of a refresh anew
@pytest.mark.parametrize("excluded", ["avx512", "avx"])
def test_registers_of_other_processors(excluded: str) -> None:
    """The tests of candidates, as on a processor whose registers have fewer lanes, or none."""
    features = get_host_cpu_features().split(",")
    names = tuple(f"+{one}" for one in ("avx512", "avx2") if one.startswith(excluded))
    left = [one.replace("+", "-") if one.startswith(names) else one for one in features]
    if left == features:
        pytest.skip(f"this processor has no {excluded}")
    environment = os.environ | {"NUMBA_CPU_FEATURES": ",".join(left)}
    environment.pop("TOPKAST_HYPOTHESIS_PROFILE", None)
    code = "from topkast.kernels.runtime._lanes import *; print(HAS_LANES and LANES)"
    found = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert found.strip() == ("8" if "+avx2" in left else "False")
    tests = str(Path(__file__).with_name("test_kernel_candidates.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    subprocess.run(command, env=environment, check=True, timeout=1200)
