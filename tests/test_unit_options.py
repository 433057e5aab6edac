"""The option `block`: stacked and single tensors, the life of an optimizer, refused values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
import pytest
import topkast_torch
import torch
from libraries import Library, host
from optimizer_runs import assert_same_bits, save_and_load
from test_units import JITTED, NUMPY, TORCH, Block
from torch import nn

import topkast
from topkast import Blocks, Masks, OptionError, Support
from topkast.methods import SET, GradualPruning, RigL, Static
from topkast.testing import (
    assert_counts,
    assert_magnitude_order,
    assert_masks,
    assert_tie_order,
)

# Stacked tensors, single tensors, convolutions ---------------------------------------------------


@pytest.mark.parametrize("library", [NUMPY, TORCH, JITTED], ids=str)
def test_stacked(library: Library, rng: np.random.Generator) -> None:
    theta = rng.standard_normal((3, 8, 12)).astype(np.float32)
    theta *= np.asarray([1, 10, 0.1], np.float32)[:, None, None]
    tx = topkast.wrap_optimizer(
        topkast.AdamW(0.1), fwd=0.9, bwd=0.6, stacked="w", block=(4, 3), refresh_every=2
    )
    params = {"w": library.asarray(theta)}
    state, step = library.compile(tx.init)(params), library.compile(tx.step)
    for _ in range(4):
        params, state = step({"w": params["w"] * 0.5}, state, params)
        if int(state.updates) % 2:
            continue
        masks, weights = host(topkast.masks(state, params)["w"]), host(params["w"])
        for layer in range(3):
            layer_masks = Masks(masks.forward[layer], masks.backward[layer])
            assert_counts(layer_masks, fwd=0.9, bwd=0.6, block=(4, 3))
            for mask in layer_masks:
                assert_magnitude_order(weights[layer], mask, block=(4, 3))
    with pytest.raises(OptionError, match="each of its layers, 8 × 12"):
        topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.6, stacked="w", block=(12, 1)).init(
            {"w": theta}
        )


def test_equal_layers_are_ranked_separately() -> None:
    ones = {"w": np.ones((4, 16, 16), np.float32)}
    tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.8, stacked="w", block=(2, 2))
    masks = topkast.masks(tx.init(ones), ones)["w"]
    assert masks.forward.sum((1, 2)).tolist() == [28] * 4  # 64 - floor(57.6) units of 4
    assert not np.array_equal(masks.forward[0], masks.forward[1])


def make_torch(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    defaults: dict[str, Any] = {"fwd": 0.9, "bwd": 0.7, "refresh_every": 3, "penalty": 0.1}
    defaults["block"] = (2, 4)
    inner = torch.optim.AdamW(model.named_parameters(), 0.02)
    return model, topkast.wrap_optimizer(inner, **defaults | options)


def train_torch(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(inputs) - inputs[:, :4]).square().mean().backward()
        optimizer.step()


def test_overrides() -> None:
    overrides = {"0.weight": {"block": None}, "2.*": {"block": (4, 2), "block_score": "max"}}
    model, optimizer = make_torch(overrides=overrides)
    train_torch(model, optimizer, range(3))
    masks, theta = host(topkast.masks(optimizer)), host(topkast.dense_params(optimizer))
    assert_masks(theta["0.weight"], masks["0.weight"], fwd=0.9, bwd=0.7, name="0.weight")
    assert_masks(
        theta["2.weight"],
        masks["2.weight"],
        fwd=0.9,
        bwd=0.7,
        block=(4, 2),
        block_score="max",
        name="2.weight",
    )
    with pytest.raises(OptionError, match=r"overrides\['2.\*'\]: block must be two positive"):
        make_torch(overrides={"2.*": {"block": 4}})


def test_blocks_of_a_parameter_group() -> None:
    layers = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    groups: Any = [
        {"params": layers[0].parameters(), "block": [2, 2]},
        {"params": layers[1].weight},
    ]
    optimizer = topkast.wrap_optimizer(torch.optim.SGD(groups, 0.1), fwd=0.7, bwd=0.5)
    first, second = host(topkast.masks(optimizer)).values()
    assert_counts(first, fwd=0.7, bwd=0.5, block=(2, 2))
    with pytest.raises(AssertionError, match="parts of"):
        assert_counts(second, fwd=0.7, bwd=0.5, block=(2, 2))
    optimizer.param_groups[0]["block"] = (4, 4)
    with pytest.raises(OptionError, match="block of a parameter group was changed"):
        optimizer.step()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_convolutions(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model: Any = nn.Conv2d(4, 6, 3)
    model.to(memory_format=layout)
    optimizer = topkast.wrap_optimizer(
        torch.optim.AdamW(model.named_parameters(), 0.05),
        fwd=0.8,
        bwd=0.5,
        refresh_every=2,
        block=(2, 9),  # the filters of two outputs over one input
    )
    before = host(topkast.dense_params(optimizer)["weight"])
    backward = host(topkast.masks(optimizer)["weight"].backward)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(2, 4, 8, 8)).square().mean().backward()
        assert (host(model.weight.grad)[~backward] == 0).all()
        optimizer.step()
        theta = host(topkast.dense_params(optimizer)["weight"])
        assert (theta[~backward] == before[~backward]).all()
        assert (theta[backward] != before[backward]).all()
        masks = host(topkast.masks(optimizer)["weight"])
        assert ((host(model.weight) != 0) == masks.forward).all()
        if step % 2:
            assert_masks(theta, masks, fwd=0.8, bwd=0.5, block=(2, 9), name="weight")
        before, backward = theta, masks.backward
    assert model.weight.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("block", [(4, 8), (1, 8)], ids=str)
def test_tensors_large_enough_for_kernels(rng: np.random.Generator, block: Block) -> None:
    theta = rng.standard_normal((192, 264)).astype(np.float32)
    gradient = rng.standard_normal((192, 264)).astype(np.float32)
    param = nn.Parameter(torch.from_numpy(theta.copy()))
    options: dict[str, Any] = {"fwd": 0.6, "bwd": 0.5, "block": block, "penalty": 0.1}
    inner = torch.optim.SGD([("w", param)], 0.1)
    optimizer = topkast.wrap_optimizer(inner, **options)
    tx = topkast.wrap_optimizer(topkast.SGD(0.1), **options)
    params = {"w": theta}
    state = tx.init(params)
    for _ in range(3):
        (param * torch.from_numpy(gradient)).sum().backward()
        masks = topkast.masks(state, params)["w"]
        np.testing.assert_array_equal(host(param.grad), np.where(masks.backward, gradient, 0))
        optimizer.step()
        optimizer.zero_grad()
        params, state = tx.step({"w": gradient}, state, params)
        np.testing.assert_allclose(
            host(topkast.dense_params(optimizer)["w"]), params["w"], atol=1e-5
        )
        np.testing.assert_allclose(
            host(param), topkast.forward_params(params, state)["w"], atol=1e-5
        )


# The life of a PyTorch optimizer -----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"explore": "random", "block_score": "max"}], ids=str)
def test_a_resumed_run_continues_identically(options: dict[str, Any]) -> None:
    model, optimizer = make_torch(**options)
    train_torch(model, optimizer, range(5))
    saved, weights = save_and_load(optimizer.state_dict()), save_and_load(model.state_dict())
    train_torch(model, optimizer, range(5, 12))
    other_model, other = make_torch(**options)
    other_model.load_state_dict(weights)
    other.load_state_dict(saved)
    train_torch(other_model, other, range(5, 12))
    assert_same_bits(model.state_dict(), other_model.state_dict())
    assert_same_bits(optimizer.state_dict(), other.state_dict())


def test_copies_train_identically() -> None:
    model, optimizer = make_torch()
    train_torch(model, optimizer, range(4))
    other_model, other = copy.deepcopy((model, optimizer))
    for pair in ((model, optimizer), (other_model, other)):
        train_torch(*pair, range(4, 8))
    assert_same_bits(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize("block", [(4, 2), (1, 4), None], ids=str)
def test_a_state_dict_of_different_blocks_is_refused(block: Block | None) -> None:
    model, optimizer = make_torch()
    train_torch(model, optimizer, range(2))
    _, other = make_torch(block=block)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(topkast.StateDictError, match=r"block of 0\.weight"):
        other.load_state_dict(optimizer.state_dict())
    assert_same_bits(before, other.state_dict())


def test_exploration_stops() -> None:
    model, optimizer = make_torch(explore_until=2, refresh_every=100)
    train_torch(model, optimizer, range(2))
    before, masks = topkast.dense_params(optimizer), topkast.masks(optimizer)
    train_torch(model, optimizer, range(2, 4))
    after = topkast.dense_params(optimizer)
    for name, mask in masks.items():
        is_unchanged = after[name] == before[name]
        assert is_unchanged[~mask.forward].all()
        assert not is_unchanged[mask.forward].any()


def test_unwrap_expands_the_state_to_whole_tensors() -> None:
    model, optimizer = make_torch()
    train_torch(model, optimizer, range(4))
    masks, theta = topkast.masks(optimizer), topkast.dense_params(optimizer)
    support = optimizer.__topkast_inspect__().supports["0.weight"]
    compact = optimizer.state[model[0].weight]["exp_avg"].clone()
    assert compact.numel() == support.backward_size == masks["0.weight"].backward.sum()
    inner = topkast.unwrap(optimizer, weights="dense")
    dense = inner.state[model[0].weight]["exp_avg"]
    assert torch.equal(model[0].weight, theta["0.weight"])
    assert torch.equal(dense.view(-1)[support.entries.long()], compact.view(-1))
    assert (dense[~masks["0.weight"].backward] == 0).all()


def test_wrapping_after_dense_steps_restricts_the_state() -> None:
    torch.manual_seed(0)
    model = nn.Linear(12, 8)
    inner = torch.optim.AdamW(model.named_parameters(), 0.02)
    model(torch.randn(4, 12)).square().mean().backward()
    inner.step()
    dense = inner.state[model.weight]["exp_avg"].clone()
    optimizer = topkast.wrap_optimizer(inner, fwd=0.8, bwd=0.5, block=(2, 3))
    entries = optimizer.__topkast_inspect__().supports["weight"].entries.long()
    compact = optimizer.state[model.weight]["exp_avg"].view(-1)
    assert torch.equal(compact, dense.view(-1)[entries])


def test_averages_have_whole_blocks() -> None:
    model, optimizer = make_torch()
    average = topkast_torch.WeightAverage(optimizer, decay=0.5)
    for step in range(5):
        train_torch(model, optimizer, range(step, step + 1))
        average.update()
    flags = host(average.forward_params()["0.weight"]) != 0
    assert_counts(Masks(flags, flags), fwd=0.9, bwd=0.9, block=(2, 4))


def test_summary_counts_weights() -> None:
    model, optimizer = make_torch()
    train_torch(model, optimizer, range(3))
    first = topkast.summary(optimizer).tensors[0]
    assert (first.forward, first.backward) == (3 * 8, 8 * 8)  # of 24 units
    moved = round(first.mask_change * first.forward)
    assert moved % 8 == 0
    assert first.held_bytes > (192 + 4 * 64) * 4 + 64 * (4 + 2)  # θ, values …, entries, ages
    params = {"w": np.random.default_rng(0).standard_normal((16, 12))}
    tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.7, block=(2, 4))
    row = topkast.summary(tx.init(params), params).tensors[0]
    assert (row.forward, row.backward) == (24, 64)
    assert row.held_bytes == 8 * 4 + 64 * 4  # numbers of units, and of weights


# What is refused ---------------------------------------------------------------------------------


def _wrap(**options: Any) -> Callable[[], Any]:
    return lambda: topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.9, bwd=0.8, **options)


@pytest.mark.parametrize(
    "block", [4, "44", (4,), (4, 4, 4), (0, 4), (-1, 2), (2.0, 2), (True, 2), ("2", 2)], ids=repr
)
def test_invalid_blocks(block: Any) -> None:
    with pytest.raises(OptionError, match="block must be two positive integers"):
        _wrap(block=block)()
    with pytest.raises(OptionError, match="block must be two positive integers"):
        topkast.select(np.ones((4, 4)), fwd=0.5, bwd=0.5, block=block)


def test_numpy_integers_are_integers() -> None:
    assert _wrap(block=[np.int64(2), 3])().options.block == (2, 3)


def test_unknown_score() -> None:
    with pytest.raises(OptionError, match="block_score must be one of 'sum', 'max'"):
        _wrap(block=(2, 2), block_score="mean")()


def test_blocks_with_a_global_ranking_are_refused() -> None:
    with pytest.raises(OptionError, match="blocks are cut from the matrix of each tensor"):
        _wrap(block=(2, 2), distribution="global")()
    with pytest.raises(OptionError, match="cut from the matrix of each tensor"):
        _wrap(overrides={"w": {"block": (2, 2)}}, distribution="global")()
    _wrap(block=(1, 1), distribution="global")()


def test_indivisible_shape() -> None:
    message = (
        r"2.weight: block=\(2, 3\) does not divide its matrix, 4 × 16 .* dense='2.weight', or "
        r"rank its single weights with overrides={'2.weight': {\"block\": None}}"
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    weights = copy.deepcopy(model.state_dict())
    inner = torch.optim.AdamW(model.named_parameters(), 0.02)
    with pytest.raises(OptionError, match=message):
        topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8, block=(2, 3))
    assert_same_bits(weights, model.state_dict())
    for remedy in ({"dense": "2.weight"}, {"overrides": {"2.weight": {"block": None}}}):
        make_torch(block=(2, 3), **remedy)
    params = {"2.weight": np.ones((4, 16), np.float32)}
    for rule in (topkast.SGD(0.1), optax.sgd(0.1)):
        tx: Any = topkast.wrap_optimizer(rule, fwd=0.9, bwd=0.8, block=(2, 3))
        with pytest.raises(OptionError, match=message):
            tx.init(params)
    for sides in ((2, 3), (0, 4)):
        with pytest.raises(OptionError, match="do not divide a matrix of 4 × 16"):
            Blocks(*sides, 4, 16)


def sparse_layer(block: Block | None = None, fwd: float = 0.9, bwd: float = 0.8) -> nn.Module:
    torch.manual_seed(0)
    return topkast_torch.SparseLinear(12, 16, fwd=fwd, bwd=bwd, block=block)


def wrap_layer(layer: nn.Module, **options: Any) -> Any:
    inner = torch.optim.SGD(layer.named_parameters(), 0.1)
    return topkast.wrap_optimizer(inner, **{"fwd": 0.9, "bwd": 0.8} | options)


@pytest.mark.parametrize(
    ("layer_block", "block"), [(None, (2, 2)), ((4, 1), (2, 1)), ((4, 1), (1, 1))], ids=str
)
def test_a_sparse_layer_of_other_blocks_is_refused(layer_block: Any, block: Block) -> None:
    layer, named = sparse_layer(layer_block), {"block": block}
    pairs: list[dict[str, Any]] = [named, {"overrides": {"values": named}}]
    for options in pairs:
        with pytest.raises(OptionError, match=r"values is the weight of a SparseLinear with block"):
            wrap_layer(layer, **options)
    by_group = [{"params": [("values", layer.values)], "block": block}]
    with pytest.raises(OptionError, match="build the layer with this block, or leave the option"):
        topkast.wrap_optimizer(torch.optim.SGD(by_group, 0.1), fwd=0.9, bwd=0.8)
    optimizer = wrap_layer(layer, overrides={"values": {"block": None}}, block=block)
    assert optimizer.__topkast_inspect__().supports["values"].blocks == layer.blocks


def test_a_sparse_layer_keeps_its_block() -> None:
    layers = [sparse_layer((4, 1)) for _ in range(2)]
    optimizers = [wrap_layer(layers[0], refresh_every=2), wrap_layer(layers[1], block=(4, 1))]
    optimizers[1].param_groups[0]["refresh_every"] = 2
    for layer, optimizer in zip(layers, optimizers, strict=True):
        before = topkast.masks(optimizer)["values"].forward
        for step in range(6):
            inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            layer(inputs).square().mean().backward()
            optimizer.step()
        row = topkast.summary(optimizer).tensors[0]
        assert (row.forward, row.backward) == (4 * 5, 4 * 10)
        assert row.held_parts["indices"] == 4 * 10
        assert row.held_parts["layouts"] == layer.products.nbytes
        masks = topkast.masks(optimizer)["values"]
        assert_counts(host(masks), fwd=0.9, bwd=0.8, block=(4, 1))
        assert not torch.equal(masks.forward, before)
        held = topkast.summary(optimizer).tensors[0].held_parts["layouts"]
        assert held == layer.products.nbytes + 4 * 40  # masks computed the entries of B
    assert_same_bits(topkast.dense_params(optimizers[0]), topkast.dense_params(optimizers[1]))
    assert "fwd=0.8958, bwd=0.7917, block=(4, 1)" in repr(layers[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": RigL(), "bwd": 0.9}, "RigL chooses single weights"),
        ({"method": SET(), "bwd": 0.9}, "SET chooses single weights"),
        ({"overrides": {"values": {"method": RigL(), "bwd": 0.9}}}, "RigL chooses single weights"),
        ({"method": GradualPruning(start=0, end=9), "bwd": 0.0}, "chooses single weights"),
        ({"pattern": (2, 4), "fwd": 0.5, "bwd": 0.5}, "ranks single weights, and block="),
        ({"distribution": "global"}, "distribution='global' would move weights"),
        ({"reservoir": "seeded"}, "were drawn otherwise"),
    ],
)
def test_what_does_not_go_with_blocks_is_refused(options: dict[str, Any], message: str) -> None:
    layer = sparse_layer((4, 1), bwd=options.get("bwd", 0.9))
    with pytest.raises(OptionError, match=message):
        wrap_layer(layer, **options)


class EqualSets(Static):
    backward = "equal"


def test_a_layer_whose_sets_have_other_sizes_is_refused() -> None:
    with pytest.raises(OptionError, match=r"\|A\|, \|B\| = 5, 10, but EqualSets needs \|B\| = 5"):
        wrap_layer(sparse_layer((4, 1)), method=EqualSets(), bwd=0.9)


def test_a_layer_with_blocks_that_do_not_divide_it_is_refused() -> None:
    with pytest.raises(OptionError, match="SparseLinear: blocks of 5 × 1 do not divide a matrix"):
        sparse_layer((5, 1))
    with pytest.raises(OptionError, match="block must be two positive integers"):
        sparse_layer(4)  # type: ignore[arg-type]


def test_support_of_a_different_tensor_is_refused() -> None:
    support = topkast.select(np.ones((4, 6)), fwd=0.5, bwd=0.5, block=(2, 3))
    support.check(24, "it")
    with pytest.raises(topkast.MismatchError, match="blocks of a matrix of 4 × 6"):
        support.check(25, "it")
    with pytest.raises(topkast.MismatchError, match=r"outside of \[0, 4\)"):
        Support(np.asarray([7]), 1, Blocks(2, 3, 4, 6)).check(24, "it")


def test_assertions_detect_broken_masks() -> None:
    theta = np.asarray([[1.0, 2, 3, 4]])
    right = np.asarray([[False, False, True, True]])
    half = np.asarray([[False, True, True, False]])
    wrong = np.asarray([[True, True, False, False]])
    assert_counts(Masks(right, right), fwd=0.5, bwd=0.5, block=(1, 2))
    with pytest.raises(AssertionError, match="A has parts of 2 blocks of 1 × 2"):
        assert_counts(Masks(half, half), fwd=0.5, bwd=0.5, block=(1, 2))
    with pytest.raises(AssertionError, match=r"\|A\| is 1, expected 2 of 2 blocks"):
        assert_counts(Masks(right, right), fwd=0.0, bwd=0.0, block=(1, 2))
    with pytest.raises(AssertionError, match="kept a magnitude of 3"):
        assert_magnitude_order(theta, wrong, block=(1, 2))
    outcomes = []
    for mask in (right, wrong):
        try:
            assert_tie_order(np.ones((1, 4)), mask, block=(1, 2))
            outcomes.append(True)
        except AssertionError:
            outcomes.append(False)
    assert sorted(outcomes) == [False, True]
