"""Bytes that training holds for one tensor, by what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from topkast._options import ReservoirKind
from topkast.analysis.costs._layers import Layer, Sets
from topkast.selection._reserve import reserve_size

_COLUMNS = ((2, 1), (4, 1), (8, 1))  # blocks that kernels multiply as they are


class Moments(NamedTuple):
    """The state of an inner optimizer: entries per weight, and whether entries have ages."""

    entries: int
    has_ages: bool


OPTIMIZERS = {
    "sgd": Moments(0, False),
    "momentum": Moments(1, False),
    "adam": Moments(2, True),
    "adamw": Moments(2, True),
}


@dataclass(frozen=True)
class Storage:
    """How a training run stores its weights.

    Attributes
    ----------
    optimizer
        The inner optimizer's state.
    is_masked
        Whether tensors stay dense in the model, by masked execution.
    keeps_resting
        Whether weights outside B keep their values.
    has_reserve
        Whether a refresh chooses among candidates.
    has_momentum
        Whether a running mean of the gradient of all weights is held.
    """

    optimizer: Moments
    is_masked: bool
    keeps_resting: bool
    has_reserve: bool
    has_momentum: bool


def dense_bytes(layer: Layer, optimizer: Moments) -> dict[str, int]:
    """Bytes of a tensor that is dense."""
    each = layer.itemsize * layer.size
    return {"values": each, "gradient": each, "state": optimizer.entries * each}


def sparse_bytes(
    layer: Layer, sets: Sets, storage: Storage, reservoir: ReservoirKind
) -> dict[str, int]:
    """Bytes of a sparsified tensor, of the kinds that :func:`topkast.summary` reports."""
    dense, each = layer.itemsize * layer.size, layer.itemsize * sets.backward
    index = 4 if layer.size < 1 << 31 else 8
    reserved = 0
    if storage.has_reserve and sets.as_one and layer.itemsize in (4, 8):
        units = layer.size * sets.units // max(sets.backward, 1)
        reserved = min(reserve_size(units, sets.units, None), units - sets.units)
    return {
        "values": each,
        "gradient": each,
        "state": storage.optimizer.entries * each,
        "indices": index * sets.units,
        "layouts": _layout_bytes(layer, sets, is_masked=storage.is_masked),
        "ages": 2 * sets.backward if storage.optimizer.has_ages else 0,
        "momentum": dense if storage.has_momentum else 0,
        "reserve": (index + layer.itemsize) * reserved,
        "reservoir": dense if storage.keeps_resting and reservoir in ("device", "host") else 0,
        "model": 2 * dense if storage.is_masked else 0,  # α, and the gradient of all weights
    }


def _layout_bytes(layer: Layer, sets: Sets, *, is_masked: bool) -> int:
    """Bytes of what is derived from the sets, to about a tenth.

    Units of 2, 4 or 8 rows and one column have a table for A and one for B∖A, with an entry for
    about every eighth unit of A. Other blocks need the flat index of each weight in B and, in
    sparse execution, its rank by block and by index. In sparse execution there are the kernels'
    layouts too, whose numbers of segments depend on the shape. The transpose of A has 6 bytes for
    each entry, and 4 for each of its segments, of about 12 entries; a first layer, whose input
    needs no gradient, does not have it. Each of the other layouts has 8
    for each segment, of about 20 entries of A. A convolution has one layout more, and for one size
    of images an offset of 4 bytes for each entry of B, and of A's transpose.
    """
    has_blocks = sets.block != (1, 1)
    if is_masked:
        return 4 * sets.backward * has_blocks
    if sets.block in _COLUMNS:
        rows = layer.shape[0] // sets.block[0]
        tables = sets.forward // sets.block[0] + 8 * rows
        return tables if layer.ndim <= 2 else tables + 4 * sets.units
    linear = 7 * sets.forward + 12 * sets.backward * has_blocks
    return linear if layer.ndim <= 2 else linear + 9 * sets.forward // 2 + 4 * sets.backward
