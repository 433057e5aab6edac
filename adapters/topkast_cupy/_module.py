"""The CUDA source, compiled for one size of number and launched on the stream of the moment."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any, Protocol

THREADS = 256  # of a block
TILE = 4096  # consecutive entries that a block counts or collects
MOST_BINS = 2048  # of a histogram


class Module(Protocol):
    """The kernels of kernels.cu, compiled for one width of weights and one of indices."""

    def launch(self, name: str, blocks: int, *arguments: Any) -> None:
        """Start a kernel on so many blocks. Arguments are arrays, 0-d arrays, int, float, None."""


def source() -> str:
    """What is compiled."""
    return (files("topkast_cupy") / "kernels.cu").read_text()


def options(bits: int, index_bits: int = 32) -> list[str]:
    """The compiler's definitions for widths of weights and of indices, in bits."""
    sizes = {
        "VALUE_BITS": bits,
        "INDEX_BITS": index_bits,
        "THREADS": THREADS,
        "TILE": TILE,
        "MOST_BINS": MOST_BINS,
    }
    return [f"-D{name}={size}" for name, size in sizes.items()]


class CudaModule:
    """Compiled by NVRTC at the first launch, and once for each device."""

    def __init__(self, bits: int, index_bits: int) -> None:
        import cupy

        told = ("--std=c++17", *options(bits, index_bits))
        self._module = cupy.RawModule(code=source(), options=told)

    def launch(self, name: str, blocks: int, *arguments: Any) -> None:
        given = tuple(0 if argument is None else argument for argument in arguments)
        self._module.get_function(name)((blocks,), (THREADS,), given)


def why_unavailable() -> str | None:
    """Why CuPy cannot be used here, as one sentence; None where it can.

    Without a GPU CuPy can be imported, and the first array that it makes fails.

    Returns
    -------
    str or None

    Examples
    --------
    >>> import topkast_cupy
    >>> if topkast_cupy.why_unavailable():
    ...     import numpy as xp
    ... else:
    ...     import cupy as xp
    """
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            return _broken(error)
        return (
            "CuPy is not installed: pip install 'topkast[cupy]' for CUDA 12, "
            "'topkast[cupy13]' for CUDA 13"
        )
    except ImportError as error:
        return _broken(error)
    try:
        if cupy.cuda.runtime.getDeviceCount():
            return None
        error_text = "none is visible"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        error_text = str(error)
    return f"CuPy {cupy.__version__} is installed and finds no CUDA device: {error_text}"


def _broken(error: ImportError) -> str:
    """In one line; CuPy's own message is a page."""
    reason = " ".join(str(error.__cause__ or error).split())
    return f"CuPy is installed and cannot be imported: {reason}"


@functools.cache
def cuda_module(bits: int, index_bits: int) -> CudaModule:
    """The kernels for widths of weights and of indices, in bits."""
    return CudaModule(bits, index_bits)
