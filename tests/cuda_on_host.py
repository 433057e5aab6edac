"""CuPy's backend on NumPy arrays, with the kernels run on the host instead of a GPU.

The kernels are NumPy passes (cuda_passes), or the CUDA source itself, compiled by g++ with a small
shim in which the threads of a block are fibers (cuda_on_host.cpp).
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import cuda_passes
import numpy as np
import topkast_cupy
from topkast_cupy._backend import CuPyBackend
from topkast_cupy._module import options

SHIM = Path(__file__).with_name("cuda_on_host.cpp")
KERNELS = Path(topkast_cupy.__file__).with_name("kernels.cu")


class Passes:
    """The kernels as NumPy functions."""

    def launch(self, name: str, grid_size: int, *arguments: Any) -> None:
        _check(arguments)
        getattr(cuda_passes, name)(grid_size, *arguments)


class Compiled:
    """The CUDA source, compiled for the host."""

    def __init__(self, bits: int, index_bits: int) -> None:
        folder = Path(tempfile.mkdtemp(prefix="topkast-cuda-"))
        library = folder / "kernels.so"
        command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-w", *options(bits, index_bits)]
        command += [f"-I{KERNELS.parent}", str(SHIM), "-o", str(library)]
        subprocess.run(command, check=True, timeout=120)
        self._library = ctypes.CDLL(str(library))
        shutil.rmtree(folder)

    def launch(self, name: str, grid_size: int, *arguments: Any) -> None:
        _check(arguments)
        words = [_to_word(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(words))(
            *(ctypes.cast(ctypes.pointer(word), ctypes.c_void_p) for word in words)
        )
        getattr(self._library, f"run_{name}")(grid_size, addresses)


@functools.cache
def compiled(bits: int, index_bits: int) -> Compiled:
    return Compiled(bits, index_bits)


def make_backend(implementation: str) -> CuPyBackend:
    """Make CuPy's backend for NumPy arrays, with ``"passes"`` or ``"compiled"`` kernels."""
    modules: dict[str, Any] = {"passes": lambda *bits: Passes(), "compiled": compiled}
    return CuPyBackend(np, modules[implementation], lambda: "cpu")


def _check(arguments: tuple[Any, ...]) -> None:
    """Assert that arguments are contiguous arrays or 64-bit numbers, as CuPy passes to kernels."""
    for argument in arguments:
        assert argument is None or type(argument) in (int, float) or argument.flags.c_contiguous


def _to_word(argument: Any) -> Any:
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return ctypes.c_void_p(argument.ctypes.data)
