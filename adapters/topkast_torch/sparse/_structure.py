"""The sets of a sparse layer as entries of a state dict, and checks of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from topkast import Blocks, MismatchError, OptionError, Support

STRUCTURE = ("indices", "active_count", "shape")  # entries of a state dict besides the values
BLOCK = "block"  # another one, of layers whose units are blocks


def with_version(indices: Tensor) -> Tensor:
    """Indices whose writes are counted, as those made in inference mode are not."""
    if not indices.is_inference():
        return indices
    with torch.inference_mode(mode=False):
        return indices.clone()


def blocks_of_weight(
    layer: str, shape: tuple[int, ...], block: tuple[int, int] | None
) -> Blocks | None:
    """Divide a weight into blocks; raises :class:`topkast.OptionError` if that is not possible."""
    if block in (None, (1, 1)):
        return None
    rows, *others = shape
    try:
        return Blocks(*block, rows, math.prod(others))
    except OptionError as error:
        raise OptionError(f"{layer}: {error}") from None


def read_structure(
    layer: str, state_dict: Mapping[str, Any], prefix: str
) -> tuple[Support, tuple[int, ...]]:
    """The sets and the shape of a weight in a state dict; raises if their types are wrong."""
    names = [name for name in (*STRUCTURE, BLOCK) if name != BLOCK or prefix + BLOCK in state_dict]
    for name in names:
        entry = state_dict[prefix + name]
        if not isinstance(entry, Tensor):
            raise MismatchError(f"{prefix + name} must be a tensor, got {type(entry).__name__}")
        if entry.is_floating_point():
            raise MismatchError(f"{prefix + name} must have an integer dtype, got {entry.dtype}")
    indices, count, lengths, *sides = (state_dict[prefix + name] for name in names)
    if (count.dim(), lengths.dim()) != (0, 1):
        raise MismatchError(
            f"{layer}: active_count and shape must be a number and a vector, but the state dict "
            f"has tensors of shape {tuple(count.shape)} and {tuple(lengths.shape)}"
        )
    shape, blocks = tuple(lengths.tolist()), None
    for block in sides:
        if block.shape != (2,):
            raise MismatchError(
                f"{layer}: block must be two numbers, but the state dict has a tensor of shape "
                f"{tuple(block.shape)}"
            )
        try:
            blocks = blocks_of_weight("a block that does not fit", shape, tuple(block.tolist()))
        except OptionError as error:
            raise MismatchError(f"{layer}: the state dict has {error}") from None
    return Support(indices, int(count), blocks), shape


def check_sets(name: str, support: Support, shape: tuple[int, ...], count: int) -> None:
    """Raise :class:`topkast.MismatchError` unless the sets fit a weight and its values."""
    support.check(math.prod(shape), name)
    if support.backward_size != count:
        raise MismatchError(
            f"{name} has {support.backward} indices of {describe_units(support.blocks)} for "
            f"{count} values"
        )


def check_dense(name: str, inputs: Any) -> None:
    """Raise :class:`topkast.MismatchError` unless the input of a layer is a dense tensor."""
    if not isinstance(inputs, Tensor):
        raise MismatchError(
            f"{name} takes a torch.Tensor, got {type(inputs).__module__}."
            f"{type(inputs).__qualname__}: convert the input"
        )
    if inputs.layout != torch.strided or inputs.is_nested:
        raise MismatchError(
            f"{name} takes a dense tensor, got "
            f"{'a nested one' if inputs.is_nested else inputs.layout}: convert the input, with "
            "to_dense() or to_padded_tensor()"
        )


def describe_units(blocks: Blocks | None) -> str:
    return "single weights" if blocks is None else f"blocks of {blocks.rows} × {blocks.columns}"
