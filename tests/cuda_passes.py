"""The kernels of adapters/topkast_cupy/kernels.cu, pass by pass in NumPy.

Each function has a kernel's name and arguments, after the number of blocks: arrays, int, float and
None. `state` is the State of that file, as three int64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from topkast_cupy._module import TILE

Vector = np.ndarray[Any, Any]

KEY, RANK, WRONG = range(3)

_NOT_FINITE = {1: 0x100, 2: 0x7C00, 4: 0x7F800000, 8: 0x7FF0000000000000}


def histogram(
    blocks: int,
    values: Vector,
    size: int,
    shift: int,
    bits: int,
    first: int,
    state: Vector,
    counts: Vector,
) -> None:
    keys = _keys(values[:size])
    if first:
        state[WRONG] += int((keys >= _NOT_FINITE[values.itemsize]).sum())
    known = keys if first else keys[keys >> (shift + bits) == state[KEY] >> (shift + bits)]
    digits = (known >> shift) & ((1 << bits) - 1)
    counts[: 1 << bits] += np.bincount(digits, minlength=1 << bits).astype(counts.dtype)


def choose(blocks: int, shift: int, bits: int, state: Vector, counts: Vector) -> None:
    assert blocks == 1
    bins = counts[: 1 << bits].astype(np.int64)
    from_above = bins[::-1].cumsum()
    place = int(np.searchsorted(from_above, state[RANK]))
    digit = len(bins) - 1 - place
    state[KEY] |= digit << shift
    state[RANK] -= from_above[place] - bins[digit]
    counts[: 1 << bits] = 0


def count(
    blocks: int, values: Vector, size: int, state: Vector, above: Vector, ties: Vector
) -> None:
    keys = _keys(values[:size])
    for block in range(blocks):
        tile = keys[block * TILE : (block + 1) * TILE]
        above[block] = (tile > state[KEY]).sum()
        ties[block] = (tile == state[KEY]).sum()


def collect(
    blocks: int,
    values: Vector,
    size: int,
    state: Vector,
    above: Vector,
    ties: Vector,
    indices: Vector | None,
    flags: Vector | None,
) -> None:
    keys = _keys(values[:size])
    for block in range(blocks):
        tile = keys[block * TILE : (block + 1) * TILE]
        is_above, is_tie = tile > state[KEY], tile == state[KEY]
        mine = (above[block - 1] if block else 0) + is_above.cumsum() - is_above
        equal = (ties[block - 1] if block else 0) + is_tie.cumsum() - is_tie
        chosen = is_above | (is_tie & (equal < state[RANK]))
        places = np.arange(len(tile)) + block * TILE
        if indices is not None:
            indices[(mine + np.minimum(equal, state[RANK]))[chosen]] = places[chosen]
        if flags is not None:
            flags[places] = chosen


def scatter(blocks: int, indices: Vector, values: Vector, count: int, out: Vector) -> None:
    out[indices[:count]] = values.reshape(-1)[:count]


def sgd(blocks: int, *arguments: Any) -> None:
    indices, params, values, gradients, live = _read(*arguments[:9])
    velocity, new_velocity, lr, momentum, nesterov, decay = arguments[9:]
    real = values.dtype.type
    gradients = gradients + real(decay) * values
    if velocity is not None:
        moved = _load(velocity.reshape(-1)) * real(momentum) + gradients
        new_velocity.reshape(-1)[...] = moved
        gradients = gradients + moved * real(momentum) if nesterov else moved
    params[indices[live]] = (values - real(lr) * gradients)[live]


def adam(blocks: int, *arguments: Any) -> None:
    indices, params, values, gradients, live = _read(*arguments[:9])
    mean, new_mean, square, new_square, ages, limit, factors, factor, *others = arguments[9:]
    lr, scale, root, *others = others
    beta1, beta2, eps, decay, decoupled = others
    real = values.dtype.type
    if not decoupled:
        gradients = gradients + real(decay) * values
    average = _load(mean.reshape(-1)) * real(beta1) + gradients * real(1 - beta1)
    spread = _load(square.reshape(-1)) * real(beta2) + gradients * gradients * real(1 - beta2)
    new_mean.reshape(-1)[...] = average
    new_square.reshape(-1)[...] = spread
    moved = values - real(scale) * (average / (np.sqrt(spread) / real(root) + real(eps)))
    if decoupled:
        moved = moved - real(lr * decay) * values
    if ages is not None:
        young = ages < limit
        share = (factors[ages[young] + 1] / factor[0]).astype(values.dtype)
        moved[young] = values[young] + (moved[young] - values[young]) * share
    params[indices[live]] = moved[live]


def _read(
    indices: Vector,
    forward: int,
    count: int,
    on_active: float,
    on_inactive: float,
    l1: int,
    exploring: int,
    params: Vector,
    gradients: Vector,
) -> tuple[Vector, Vector, Vector, Vector, Vector]:
    """Where B is, what is written, weights, gradients with that of the penalty, and what moves."""
    values = _load(params[indices])
    active = np.arange(count) < forward
    weights = np.where(active, on_active, on_inactive).astype(values.dtype)
    gradients = _load(gradients[indices]) + weights * (np.sign(values) if l1 else values)
    live = active | bool(exploring)
    return indices, params, values, np.where(live, gradients, values.dtype.type(0)), live


def _load(values: Vector) -> Vector:
    return values.astype(np.float32) if values.dtype == np.float16 else values


def _keys(values: Vector) -> Vector:
    """Bit patterns of magnitudes, which order as those do; int64."""
    if values.itemsize == 1:
        return values.view(np.uint8).astype(np.int64)
    unsigned = values.view(f"u{values.itemsize}")
    return (unsigned & (np.iinfo(unsigned.dtype).max >> 1)).astype(np.int64)
