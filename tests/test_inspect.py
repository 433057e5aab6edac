"""Inspection: summaries report the true counts and bytes."""

from __future__ import annotations

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from libraries import Library
from torch import nn

import topkast
from topkast.testing import to_numpy


def test_summary_counts_the_masks_and_converts_to_json() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    optimizer = topkast.wrap_optimizer(
        torch.optim.Adam(model.named_parameters(), 0.05), fwd=0.9, bwd=0.8, refresh_every=2
    )
    before = topkast.masks(optimizer)
    for step in range(2):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(5, 30, generator=generator)).square().sum().backward()
        optimizer.step()
    after = topkast.masks(optimizer)
    table = topkast.summary(optimizer)
    rows = {row.name: row for row in table.tensors}
    for name, mask in after.items():
        row = rows[name]
        assert row.forward == int(mask.forward.sum())
        assert row.backward == int(mask.backward.sum())
        assert row.forward_sparsity == 1 - row.forward / mask.forward.numel()
        entered = int((mask.forward & ~before[name].forward).sum())
        assert entered > 0
        assert row.mask_change == entered / row.forward
    assert json.loads(json.dumps(table.to_dict()))["updates"] == 2
    text = str(table)
    assert "0.weight" in text
    assert "20×30" in text
    assert text.count("\n") == len(rows) + 2


def test_bytes_held_by_torch_equal_the_sizes_of_its_tensors() -> None:
    layer = nn.Linear(100, 50, bias=False)
    optimizer = topkast.wrap_optimizer(torch.optim.Adam(layer.named_parameters()), fwd=0.9, bwd=0.8)
    layer(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    (row,) = topkast.summary(optimizer).tensors
    inner = 4 + 2 * 4 * 1000  # Adam's step, and two moments of |B| = 1000 float32
    weights = 2 * 4 * 1000 + 4 * 5000  # values, their gradient, θ
    index = 4 * 1000 + 2 * 1000  # B, ages
    reserve, remainder = divmod(row.held_bytes - (inner + weights + index), 4 + 4)
    assert remainder == 0  # an index and a weight for each of its entries
    assert 1024 <= reserve < 1200


def test_bytes_held_by_a_functional_state(library: Library) -> None:
    params = {"w": library.asarray(np.ones((10, 10), dtype=np.float32))}
    state = topkast.wrap_optimizer(topkast.Adam(), fwd=0.9, bwd=0.8).init(params)
    (row,) = topkast.summary(state, params).tensors
    index = to_numpy(state.supports["w"].indices).itemsize
    assert row.held_bytes == 20 * (4 + 4 + index + 2)  # moments, index, age


def test_inspecting_changes_nothing() -> None:
    layer = nn.Linear(10, 10)
    optimizer = topkast.wrap_optimizer(torch.optim.SGD(layer.parameters(), 0.1), fwd=0.5, bwd=0.5)
    first = topkast.dense_params(optimizer)
    first["0.0"].zero_()
    topkast.masks(optimizer)["0.0"].forward.zero_()
    assert int(torch.count_nonzero(topkast.dense_params(optimizer)["0.0"])) == 100
    assert int(topkast.masks(optimizer)["0.0"].forward.sum()) == 50


def test_loggers_get_the_same_quantities_while_a_has_all_weights() -> None:
    """Methods that begin dense, or have dense phases, have sets at all times."""
    method = topkast.methods.ACDC(warm_up=2, sparse=2, dense=2, end=6)
    tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0, method=method, refresh_every=2)
    params = {"w": np.random.default_rng(0).standard_normal((4, 4)), "b": np.ones(4)}
    state, active = tx.init(params), []
    for _ in range(8):
        summary = topkast.summary(state, params)
        assert summary.scalars().keys() == {"updates", "mask_change/w", "empty_rows/w"}
        assert {row.name: row.has_sets for row in summary.tensors} == {"w": True, "b": False}
        active.append(summary.tensors[0].forward)
        grads = {name: np.ones_like(param) for name, param in params.items()}
        params, state = tx.step(grads, state, params)
    assert active == [16, 16, 8, 8, 16, 16, 8, 8]


@pytest.mark.parametrize("rule", [topkast.Adam(1e-3), optax.adam(1e-3)], ids=["arrays", "optax"])
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"v": (10, 10)}, r"the state has the sets of w, but params only v"),
        ({"w": (3, 6)}, r"w has 18 entries in params, but \|B\| = 20 in the state"),
    ],
    ids=["name", "size"],
)
def test_params_of_another_state_are_refused(
    rule: Any, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    tx = topkast.wrap_optimizer(rule, fwd=0.9, bwd=0.8)
    state = tx.init({"w": jnp.ones((10, 10))})
    others = {name: jnp.ones(shape) for name, shape in shapes.items()}
    for function in (topkast.summary, topkast.masks, topkast.dense_params):
        with pytest.raises(topkast.MismatchError, match=message):
            function(state, others)
    with pytest.raises(topkast.MismatchError, match=message):
        topkast.forward_params(others, state)
