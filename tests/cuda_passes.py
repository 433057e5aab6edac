"""The kernels of adapters/topkast_cupy/kernels.cu, pass by pass in NumPy.

Each function has the name and the arguments of a kernel, after the number of thread blocks: arrays,
int, float and None. `state` is the kernels' State, as three int64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from topkast_cupy._module import TILE

Vector = np.ndarray[Any, Any]

KEY, RANK, NON_FINITE = range(3)

_NOT_FINITE = {1: 0x100, 2: 0x7C00, 4: 0x7F800000, 8: 0x7FF0000000000000}


def histogram(
    grid_size: int,
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
        state[NON_FINITE] += int((keys >= _NOT_FINITE[values.itemsize]).sum())
    if not first:
        keys = keys[keys >> (shift + bits) == state[KEY] >> (shift + bits)]
    digits = (keys >> shift) & ((1 << bits) - 1)
    counts[: 1 << bits] += np.bincount(digits, minlength=1 << bits).astype(counts.dtype)


def choose(grid_size: int, shift: int, bits: int, state: Vector, counts: Vector) -> None:
    assert grid_size == 1
    bins = counts[: 1 << bits].astype(np.int64)
    from_above = bins[::-1].cumsum()
    position = int(np.searchsorted(from_above, state[RANK]))
    digit = len(bins) - 1 - position
    state[KEY] |= digit << shift
    state[RANK] -= from_above[position] - bins[digit]
    counts[: 1 << bits] = 0


def count(
    grid_size: int, values: Vector, size: int, state: Vector, above: Vector, ties: Vector
) -> None:
    keys = _keys(values[:size])
    for tile in range(grid_size):
        tile_keys = keys[tile * TILE : (tile + 1) * TILE]
        above[tile] = (tile_keys > state[KEY]).sum()
        ties[tile] = (tile_keys == state[KEY]).sum()


def collect(
    grid_size: int,
    values: Vector,
    size: int,
    state: Vector,
    above: Vector,
    ties: Vector,
    indices: Vector | None,
    flags: Vector | None,
) -> None:
    keys = _keys(values[:size])
    for tile in range(grid_size):
        tile_keys = keys[tile * TILE : (tile + 1) * TILE]
        is_above, is_tie = tile_keys > state[KEY], tile_keys == state[KEY]
        before_above = (above[tile - 1] if tile else 0) + is_above.cumsum() - is_above
        before_ties = (ties[tile - 1] if tile else 0) + is_tie.cumsum() - is_tie
        selected = is_above | (is_tie & (before_ties < state[RANK]))
        tile_indices = np.arange(len(tile_keys)) + tile * TILE
        if indices is not None:
            positions = before_above + np.minimum(before_ties, state[RANK])
            indices[positions[selected]] = tile_indices[selected]
        if flags is not None:
            flags[tile_indices] = selected


def scatter(grid_size: int, indices: Vector, values: Vector, count: int, out: Vector) -> None:
    out[indices[:count]] = values.reshape(-1)[:count]


def sgd(grid_size: int, *arguments: Any) -> None:
    indices, params, values, gradients, moves = _read(*arguments[:9])
    velocity, new_velocity, lr, momentum, nesterov, weight_decay = arguments[9:]
    real = values.dtype.type
    gradients = gradients + real(weight_decay) * values
    if velocity is not None:
        next_velocity = _load(velocity.reshape(-1)) * real(momentum) + gradients
        new_velocity.reshape(-1)[...] = next_velocity
        gradients = gradients + next_velocity * real(momentum) if nesterov else next_velocity
    params[indices[moves]] = (values - real(lr) * gradients)[moves]


def adam(grid_size: int, *arguments: Any) -> None:
    indices, params, values, gradients, moves = _read(*arguments[:9])
    mean, new_mean, square, new_square, ages, limit, factors, factor, *shared = arguments[9:]
    lr, scale, root, beta1, beta2, eps, weight_decay, decoupled = shared
    real = values.dtype.type
    if not decoupled:
        gradients = gradients + real(weight_decay) * values
    next_mean = _load(mean.reshape(-1)) * real(beta1) + gradients * real(1 - beta1)
    next_square = _load(square.reshape(-1)) * real(beta2) + gradients * gradients * real(1 - beta2)
    new_mean.reshape(-1)[...] = next_mean
    new_square.reshape(-1)[...] = next_square
    moved = values - real(scale) * (next_mean / (np.sqrt(next_square) / real(root) + real(eps)))
    if decoupled:
        moved = moved - real(lr * weight_decay) * values
    if ages is not None:
        young = ages < limit
        share = (factors[ages[young] + 1] / factor[0]).astype(values.dtype)
        moved[young] = values[young] + (moved[young] - values[young]) * share
    params[indices[moves]] = moved[moves]


def _read(
    indices: Vector,
    forward: int,
    count: int,
    on_active: float,
    on_exploring: float,
    l1: int,
    exploring: int,
    params: Vector,
    gradients: Vector,
) -> tuple[Vector, Vector, Vector, Vector, Vector]:
    """Indices of B, output, weights on B, gradients with the penalty, and flags of what moves."""
    values = _load(params[indices])
    active = np.arange(count) < forward
    factors = np.where(active, on_active, on_exploring).astype(values.dtype)
    gradients = _load(gradients[indices]) + factors * (np.sign(values) if l1 else values)
    moves = active | bool(exploring)
    return indices, params, values, np.where(moves, gradients, values.dtype.type(0)), moves


def _load(values: Vector) -> Vector:
    return values.astype(np.float32) if values.dtype == np.float16 else values


def _keys(values: Vector) -> Vector:
    """Bit patterns of magnitudes, which have the same order; int64."""
    if values.itemsize == 1:
        return values.view(np.uint8).astype(np.int64)
    unsigned = values.view(f"u{values.itemsize}")
    return (unsigned & (np.iinfo(unsigned.dtype).max >> 1)).astype(np.int64)
