"""The kernels as targets of ``jax.ffi``, registered once, when they are first needed."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from topkast import UnsupportedTensorError

_REMEDY = "Train masked: leave out topkast_jax.sparsify"


@functools.cache
def register() -> None:
    """Check jaxlib's header, then compile and register the kernels.

    Raises
    ------
    UnsupportedTensorError
        If numba is not installed, or if the foreign function interface of this jaxlib differs from
        the one that the kernels read.
    """
    try:
        from topkast.kernels.xla import IncompatibleHeaderError, check_header, handlers
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        raise UnsupportedTensorError(
            "sparse execution needs kernels compiled by numba: pip install 'topkast[cpu]'. "
            f"{_REMEDY}"
        ) from error
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        version = check_header(header.read_text())
    except (OSError, IncompatibleHeaderError) as error:
        raise UnsupportedTensorError(
            "sparse execution reads the call frames of XLA by their offsets, and those of jaxlib "
            f"{importlib.metadata.version('jaxlib')} are not known: {error}. {_REMEDY}, or install "
            "a jaxlib that this version of topkast supports"
        ) from None
    for name, function in handlers(version).items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")


def target(name: str, result: Any, *, aliases: dict[int, int] | None = None) -> Callable[..., Any]:
    """A function of arrays that calls a kernel, and returns one array like `result`."""
    register()
    call: Callable[..., Any] = jax.ffi.ffi_call(
        name, result, input_output_aliases=aliases, vmap_method="sequential"
    )
    return call


def like(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """The description of an array."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype)
