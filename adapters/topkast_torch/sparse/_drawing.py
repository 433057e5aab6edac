"""The first weights and sets of a sparse layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from topkast import Blocks, MismatchError, Support, select
from topkast.adapter import choose_first, exact_fraction, kept_count
from topkast.reservoirs import Reservoir
from topkast_torch._reservoirs import TensorReservoir
from topkast_torch.sparse._sparse_layer import SparseLayer, replace_data


def set_undrawn(
    layer: SparseLayer,
    shape: tuple[int, ...],
    blocks: Blocks | None,
    *,
    fwd: float,
    bwd: float,
    like: Tensor,
) -> None:
    """Set values and indices of the right sizes, without content, on the device of `like`."""
    size = math.prod(shape) if blocks is None else blocks.count
    densities = [1 - exact_fraction(sparsity) for sparsity in (fwd, bwd)]
    forward, backward = (kept_count(size, density) for density in densities)
    dtype = torch.int32 if size < 1 << 31 else torch.int64
    indices = torch.zeros(backward, dtype=dtype, device=like.device)
    support = Support(indices, forward, blocks)
    values = like.new_empty((1,) * (len(shape) - 1) + (support.backward_size,))
    layer.set_sparse(Parameter(values), support, shape)
    layer.density = float(densities[0])


def draw_dense(layer: SparseLayer, theta: Tensor, *, fwd: float, bwd: float) -> None:
    """Select a layer's sets from the weights `theta`, and store its values and reservoir."""
    flat, support = theta.reshape(-1), select(theta, fwd=fwd, bwd=bwd, block=layer.block)
    _store(layer, support, flat.index_select(0, support.entries), TensorReservoir(flat))


def draw_streamed(layer: SparseLayer, reservoir: Reservoir) -> None:
    """Select a layer's sets from a reservoir that holds all weights, chunk by chunk."""
    counts = layer.active_count, layer.support.backward
    chosen = choose_first(reservoir, counts, blocks=layer.blocks)
    if chosen is None:
        raise MismatchError("too few of the initial weights are nonzero")
    exchange, selection = chosen
    indices = torch.from_numpy(exchange.support.indices).to(layer.values.device)
    values = torch.from_numpy(exchange.values).to(layer.values.device)
    _store(layer, Support(indices, counts[0], layer.blocks), values, reservoir)
    layer.selection = selection


def _store(layer: SparseLayer, support: Support, values: Tensor, reservoir: Reservoir) -> None:
    shape = layer.values.shape
    replace_data(layer.values, values.view(shape))
    layer.set_support(support.in_blocks(layer.blocks), is_valid=True)
    layer.reservoir, layer.selection = reservoir, None
