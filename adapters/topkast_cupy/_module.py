"""The CUDA source, compiled for each width of weights and launched on the current stream."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any, Protocol

THREADS = 256  # threads of a thread block
TILE = 4096  # consecutive entries that a thread block counts or collects
MAX_BINS = 2048  # bins of a histogram


class Module(Protocol):
    """The kernels of kernels.cu, compiled for one width of weights and one of indices."""

    def launch(self, name: str, grid_size: int, *arguments: Any) -> None:
        """Launch a kernel on `grid_size` thread blocks; arguments: arrays, int, float or None."""


def source() -> str:
    """Read the CUDA source."""
    return (files("topkast_cupy") / "kernels.cu").read_text()


def options(bits: int, index_bits: int = 32) -> list[str]:
    """Compiler options that define the widths of weights and of indices, in bits."""
    sizes = {
        "VALUE_BITS": bits,
        "INDEX_BITS": index_bits,
        "THREADS": THREADS,
        "TILE": TILE,
        "MAX_BINS": MAX_BINS,
    }
    return [f"-D{name}={size}" for name, size in sizes.items()]


class CudaModule:
    """Kernels that NVRTC compiles at the first launch on each device."""

    def __init__(self, bits: int, index_bits: int) -> None:
        import cupy

        compiler_options = ("--std=c++17", *options(bits, index_bits))
        self._module = cupy.RawModule(code=source(), options=compiler_options)

    def launch(self, name: str, grid_size: int, *arguments: Any) -> None:
        pointers = tuple(0 if argument is None else argument for argument in arguments)
        self._module.get_function(name)((grid_size,), (THREADS,), pointers)


def why_unavailable() -> str | None:
    """Explain in one sentence why CuPy cannot be used; None if it can.

    Without a GPU, CuPy can be imported but fails at its first array.

    Returns
    -------
    str or None
        The reason, if any.

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
            return _describe_import_error(error)
        return (
            "CuPy is not installed: pip install 'topkast[cupy]' for CUDA 12, "
            "'topkast[cupy13]' for CUDA 13"
        )
    except ImportError as error:
        return _describe_import_error(error)
    try:
        if cupy.cuda.runtime.getDeviceCount():
            return None
        reason = "none is visible"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        reason = str(error)
    return f"CuPy {cupy.__version__} is installed but finds no CUDA device: {reason}"


def _describe_import_error(error: ImportError) -> str:
    """Shorten CuPy's message, which fills a page, to one line."""
    reason = " ".join(str(error.__cause__ or error).split())
    return f"CuPy is installed but cannot be imported: {reason}"


@functools.cache
def cuda_module(bits: int, index_bits: int) -> CudaModule:
    """The kernels for widths of weights and of indices, in bits."""
    return CudaModule(bits, index_bits)
