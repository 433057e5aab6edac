"""The format of files of A: what is in the metadata, and what indices must satisfy.

A sparse tensor ``name`` is stored as ``name.values`` and ``name.indices``. The metadata has

- ``format``: :data:`FILE_FORMAT`;
- ``shapes``: the shape of each sparse tensor, by name;
- ``same``: the name under which a shared tensor is stored, by its other names;
- ``layers``: type and options of each layer that :mod:`topkast.inference` knows, by name;
- ``sequence``: the names of all layers in the order of their calls, if the model is a sequence.

All but the format are JSON.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from topkast._adapters import name_extra
from topkast._errors import MismatchError

FILE_FORMAT = "topkast-forward-1"
MAX_ENTRIES_PER_VALUE = 1 << 20  # a small file must not make us allocate a huge tensor

T = TypeVar("T")


class FileContents(NamedTuple):
    """The metadata of a file."""

    shapes: dict[str, tuple[int, ...]]
    same: dict[str, str]
    layers: dict[str, dict[str, Any]]
    sequence: tuple[str, ...] | None


def read_file(path: Any, framework: str, read: Callable[[Any, FileContents], T]) -> T:
    """Open a file and read it by `read`, from the open file and its metadata.

    Raises :class:`topkast.MismatchError` if the file is damaged or of another format.
    """
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(path, framework=framework) as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            if metadata.get("format") != FILE_FORMAT:
                raise MismatchError(
                    f"{path} was not written by topkast_torch.save_forward: its format is "
                    f"{metadata.get('format')!r}, expected {FILE_FORMAT!r}"
                )
            return read(file, _read_contents(metadata))
    except MismatchError:
        raise
    except safetensors.SafetensorError as error:
        raise MismatchError(
            f"{path} is damaged, or no safetensors file: {error}. Write it again with "
            "topkast_torch.save_forward"
        ) from error
    except OSError as error:
        if str(path) in str(error):
            raise
        raise OSError(f"{path} cannot be read: {error}") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise MismatchError(
            f"{path} is not a valid file of topkast_torch.save_forward: {error}"
        ) from error


def import_safetensors(submodule: str = "") -> Any:
    """Import safetensors; raises an error that names the extra if it is not installed."""
    try:
        return importlib.import_module(f"safetensors.{submodule}" if submodule else "safetensors")
    except ModuleNotFoundError as error:
        what = "files of the forward view need"
        raise name_extra(error, what, "safetensors", "safetensors") from None


def check_entries(
    name: str, shape: tuple[int, ...], values_shape: tuple[int, ...], indices: NDArray[Any]
) -> None:
    """Raise ValueError unless there is one value for each index, and the indices fit the shape."""
    size = math.prod(shape)
    if len(values_shape) != 1 or indices.shape != values_shape:
        raise ValueError(
            f"{name} has values of shape {values_shape} and indices of shape {indices.shape}, "
            "expected one index per value"
        )
    if indices.dtype not in (np.int32, np.int64):
        raise ValueError(f"the indices of {name} must be int32 or int64, got {indices.dtype}")
    if len(indices) and not (
        bool((indices[1:] > indices[:-1]).all()) and indices[0] >= 0 and indices[-1] < size
    ):
        raise ValueError(f"the indices of {name} must ascend in [0, {size})")
    if size > MAX_ENTRIES_PER_VALUE * max(len(indices), 1):
        raise ValueError(
            f"{name} has {len(indices)} values for a weight of shape {shape}, more than "
            f"{MAX_ENTRIES_PER_VALUE} entries for each value"
        )


def _read_contents(metadata: Mapping[str, str]) -> FileContents:
    shapes = {
        name: _read_shape(name, shape) for name, shape in _read_object(metadata, "shapes").items()
    }
    same = _read_object(metadata, "same", "{}")
    layers = _read_object(metadata, "layers", "{}")
    sequence = json.loads(metadata.get("sequence", "null"))
    if sequence is not None and not (
        isinstance(sequence, list) and all(name in layers for name in sequence)
    ):
        raise ValueError(f"its metadata entry 'sequence' names layers that it lacks: {sequence!r}")
    return FileContents(shapes, same, layers, None if sequence is None else tuple(sequence))


def _read_object(metadata: Mapping[str, str], name: str, default: str = "null") -> dict[str, Any]:
    content = json.loads(metadata.get(name, default))
    if not isinstance(content, dict):
        raise ValueError(f"its metadata entry {name!r} must be a JSON object, got {content!r}")
    return content


def _read_shape(name: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(
        type(length) is int and length >= 0 for length in shape
    ):
        raise ValueError(f"the shape of {name} must be a list of lengths, got {shape!r}")
    return tuple(shape)
