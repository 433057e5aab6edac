"""The option `pattern` in the life of a PyTorch optimizer; methods; what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import topkast_torch
import torch
from libraries import host
from optimizer_runs import assert_same_bits, save_and_load
from optimizer_runs import train as train_torch
from test_patterns import TWO_OF_FOUR, group_counts
from torch import nn

import topkast
from topkast import Masks, Support
from topkast.methods import Method, TopKAST, View
from topkast.testing import assert_counts, assert_masks

# The life of a PyTorch optimizer -----------------------------------------------------------------


def make_torch(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    defaults: dict[str, Any] = TWO_OF_FOUR | {"refresh_every": 3, "penalty": 0.1}
    inner = torch.optim.AdamW(model.named_parameters(), 0.02)
    return model, topkast.wrap_optimizer(inner, **defaults | options)


def assert_exact_model(model: Any, optimizer: Any) -> None:
    for name, masks in host(topkast.masks(optimizer)).items():
        assert_counts(masks, **TWO_OF_FOUR)
        layer = model.get_submodule(name.rpartition(".")[0])
        assert ((host(layer.weight) != 0) == masks.forward).all()


@pytest.mark.parametrize("options", [{}, {"explore": "random"}, {"refresh_every": 1}], ids=str)
def test_masked_and_sparse_layers(options: dict[str, Any]) -> None:
    masked, masked_opt = make_torch(**options)
    sparse, sparse_opt = make_torch(**options)
    report = topkast.sparsify(sparse, sparse_opt)
    assert {layer.execution for layer in report.layers} == {"sparse"}
    before = topkast.masks(sparse_opt)["0.weight"].forward
    for step in range(12):
        for model, optimizer in ((masked, masked_opt), (sparse, sparse_opt)):
            train_torch(model, optimizer, range(step, step + 1))
            assert_exact_model(model, optimizer)
    for name, masks in topkast.masks(masked_opt).items():
        for first, second in zip(masks, topkast.masks(sparse_opt)[name], strict=True):
            assert torch.equal(first, second)
    assert not torch.equal(before, topkast.masks(sparse_opt)["0.weight"].forward)


@pytest.mark.parametrize("kind", ["host", "disk", "seeded"])
def test_reservoirs(kind: Any, tmp_path: Path) -> None:
    options = {"reservoir_path": tmp_path} if kind == "disk" else {}
    pairs = []
    for extra in ({}, {"reservoir": kind, **options}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
        topkast_torch.generate_weights(model)
        inner = torch.optim.AdamW(model.named_parameters(), 0.02)
        all_options: dict[str, Any] = TWO_OF_FOUR | {"refresh_every": 3, "penalty": 0.1} | extra
        optimizer = topkast.wrap_optimizer(inner, **all_options)
        train_torch(model, optimizer, range(7))
        assert_exact_model(model, optimizer)
        pairs.append((model, optimizer))
    (model, optimizer), (other_model, other) = pairs
    assert_same_bits(model.state_dict(), other_model.state_dict())
    for name, theta in topkast.dense_params(optimizer).items():
        assert torch.equal(theta, topkast.dense_params(other)[name])


def test_convolutions() -> None:
    torch.manual_seed(0)
    model: Any = nn.Conv2d(4, 6, 2)
    model.to(memory_format=torch.channels_last)
    inner = torch.optim.AdamW(model.named_parameters(), 0.05)
    optimizer = topkast.wrap_optimizer(inner, **TWO_OF_FOUR, refresh_every=2)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(2, 4, 8, 8)).square().mean().backward()
        optimizer.step()
        assert group_counts(host(model.weight) != 0, 4) == {2}
    theta = host(topkast.dense_params(optimizer)["weight"])
    assert_masks(theta, host(topkast.masks(optimizer)["weight"]), **TWO_OF_FOUR, name="weight")


@pytest.mark.parametrize("sparse", [False, True], ids=["masked", "sparse"])
@pytest.mark.parametrize("options", [{}, {"explore": "random"}], ids=str)
def test_a_resumed_run_continues_identically(options: dict[str, Any], sparse: bool) -> None:
    model, optimizer = make_torch(**options)
    other_model, other = make_torch(**options)
    if sparse:
        topkast.sparsify(model, optimizer)
        topkast.sparsify(other_model, other)
    train_torch(model, optimizer, range(5))
    saved, weights = save_and_load(optimizer.state_dict()), save_and_load(model.state_dict())
    train_torch(model, optimizer, range(5, 12))
    other_model.load_state_dict(weights)
    other.load_state_dict(saved)
    train_torch(other_model, other, range(5, 12))
    assert_exact_model(other_model, other)
    assert_same_bits(model.state_dict(), other_model.state_dict())
    assert_same_bits(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    "options", [{"pattern": None}, {"fwd": 0.5, "bwd": 0.25, "pattern": (4, 8)}], ids=str
)
def test_a_state_dict_of_another_pattern_is_refused(options: dict[str, Any]) -> None:
    """The numbers of weights in A and B are the same in all three."""
    make = {"overrides": {"0.weight": {"pattern": None}}}  # its rows have 12 weights
    _, optimizer = make_torch(**make)
    _, other = make_torch(**make, **options)
    for first, second in ((optimizer, other), (other, optimizer)):
        before = copy.deepcopy(second.state_dict())
        with pytest.raises(topkast.StateDictError, match=r"size of the groups of 2\.weight"):
            second.load_state_dict(first.state_dict())
        assert_same_bits(before, second.state_dict())


def test_a_state_dict_with_uneven_groups_is_refused() -> None:
    _, optimizer = make_torch()
    saved = copy.deepcopy(optimizer.state_dict())
    indices = saved["state"][0]["topkast"]["indices"]
    active = indices[:96]  # 2 of each of 48 groups
    (outside,) = set(range(4)) - set(active[:2].tolist()) - set(indices[96:].tolist())
    active[2] = outside  # the first group has three weights of A now, and the second has one
    active.copy_(active.sort().values)
    with pytest.raises(topkast.StateDictError, match="equally many units of A in each group of 4"):
        optimizer.load_state_dict(saved)


def test_copies_averages_and_summary() -> None:
    model, optimizer = make_torch()
    average = topkast_torch.WeightAverage(optimizer, decay=0.5)
    for step in range(5):
        train_torch(model, optimizer, range(step, step + 1))
        average.update()
    for tensor in (average.forward_params()[name] for name in ("0.weight", "2.weight")):
        assert group_counts(host(tensor) != 0, 4) == {2}
    row = topkast.summary(optimizer).tensors[0]
    assert (row.forward, row.backward) == (96, 144)
    other_model, other = copy.deepcopy((model, optimizer))
    for pair in ((model, optimizer), (other_model, other)):
        train_torch(*pair, range(5, 8))
    assert_same_bits(optimizer.state_dict(), other.state_dict())


def test_overrides() -> None:
    overrides = {
        "0.weight": {"pattern": None, "fwd": 0.9, "bwd": 0.8},
        "2.*": {"fwd": 0.75},
        "*.weight": {"bwd": 0.5},
        "2.weight": {"pattern": (2, 8)},
    }
    model, optimizer = make_torch(overrides=overrides)
    train_torch(model, optimizer, range(4))
    masks = host(topkast.masks(optimizer))
    assert masks["0.weight"].forward.sum() == 20  # 192 - floor(172.8)
    assert_counts(masks["2.weight"], fwd=0.75, bwd=0.5, pattern=(2, 8))
    with pytest.raises(topkast.OptionError, match=r"overrides\['2.\*'\]: pattern must be two"):
        make_torch(overrides={"2.*": {"pattern": 4}, "0.*": {"fwd": 0.5}})
    with pytest.raises(topkast.OptionError, match=r"overrides\['2.\*'\]: pattern=\(2, 4\) keeps"):
        make_torch(overrides={"2.*": {"fwd": 0.9}})
    with pytest.raises(topkast.OptionError, match=r"overrides of '2.weight': pattern=\(2, 8\)"):
        make_torch(overrides={"2.*": {"fwd": 0.5}, "2.weight": {"pattern": (2, 8)}})


def test_pattern_of_a_parameter_group() -> None:
    layers = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    groups: Any = [
        {"params": layers[0].parameters(), "pattern": [1, 2], "fwd": 0.5, "bwd": 0.0},
        {"params": layers[1].weight},
    ]
    optimizer = topkast.wrap_optimizer(torch.optim.SGD(groups, 0.1), fwd=0.75, bwd=0.5)
    first, second = host(topkast.masks(optimizer)).values()
    assert_counts(first, fwd=0.5, bwd=0.0, pattern=(1, 2))
    assert_counts(second, fwd=0.75, bwd=0.5)
    optimizer.param_groups[0]["pattern"] = (2, 4)
    with pytest.raises(topkast.OptionError, match="pattern of a parameter group was changed"):
        optimizer.step()


def test_optimizers_of_layers_that_are_sparse_already() -> None:
    model, optimizer = make_torch()
    topkast.sparsify(model, optimizer)
    train_torch(model, optimizer, range(4))
    topkast.unwrap(optimizer)
    inner = torch.optim.AdamW(model.named_parameters(), 0.02)
    again = topkast.wrap_optimizer(inner, **TWO_OF_FOUR, refresh_every=1)
    for step in range(3):
        train_torch(model, again, range(step, step + 1))
        assert_exact_model(model, again)
    for fwd, bwd in ((0.5, 0.25), (0.9, 0.8)):
        layer = topkast_torch.SparseLinear(12, 16, fwd=fwd, bwd=bwd)
        inner = torch.optim.AdamW(layer.named_parameters(), 0.02)
        with pytest.raises(topkast.OptionError, match=r"values is the weight of a SparseLinear.*"):
            topkast.wrap_optimizer(inner, **TWO_OF_FOUR)


# Methods -----------------------------------------------------------------------------------------


class Claiming(Method):
    """A method that claims to respect groups; whether it does is an argument."""

    by_group = True

    def __init__(self, *, honest: bool) -> None:
        self.honest = honest

    def choose(self, view: View, /) -> Support:
        assert view.group_size is not None
        size, groups = view.group_size, len(view.weights) // view.group_size
        if not self.honest:
            return Support(np.arange(view.backward), view.forward)
        first, second = view.forward // groups, view.backward // groups
        starts = np.arange(groups)[:, None] * size
        return Support.of(
            (starts + np.arange(first)).ravel(), (starts + np.arange(first, second)).ravel()
        )


def test_methods_of_your_own() -> None:
    theta = np.ones((4, 8))

    class Largest(TopKAST):
        def choose(self, view: View, /) -> Support:
            return super().choose(view)

    def init(method: Method) -> Support:
        tx = topkast.wrap_optimizer(topkast.SGD(0.1), **TWO_OF_FOUR, method=method)
        support: Support = tx.init({"w": theta}).supports["w"]
        return support

    assert init(Claiming(honest=True)).active.tolist()[:4] == [0, 1, 4, 5]
    with pytest.raises(topkast.MismatchError, match="Claiming chose for w does not hold equally"):
        init(Claiming(honest=False))
    with pytest.raises(topkast.OptionError, match=r"Largest does not choose by groups.*by_group"):
        init(Largest())


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [2, "24", (2,), (2, 4, 8), (0, 4), (5, 4), (-1, 4), (2.0, 4), (True, 4), ("2", 4)],
    ids=repr,
)
def test_invalid_patterns(pattern: Any) -> None:
    with pytest.raises(topkast.OptionError, match="pattern must be two integers n and m"):
        topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.25, pattern=pattern)
    with pytest.raises(topkast.OptionError, match="pattern must be two integers n and m"):
        topkast.select(np.ones((4, 4)), fwd=0.5, bwd=0.25, pattern=pattern)


def test_numpy_integers_are_integers() -> None:
    pattern: Any = [np.int64(2), 4]
    tx = topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.25, pattern=pattern)
    assert tx.options.pattern == (2, 4)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"fwd": 0.6}, r"pattern=\(2, 4\) keeps 2 of each 4 .* fwd=0.6 was given: pass fwd=0.5"),
    (
        {"bwd": 0.3},
        r"bwd=0.3 keeps 2.8 of each 4 weights .* pass bwd=0.25 \(3 of 4\) or bwd=0.5 \(2 of 4\)",
    ),
    (
        {"fwd": 2 / 3, "bwd": 0.5, "pattern": (1, 3)},
        r"bwd=0.3333333333 \(2 of 3\) or bwd=0.6666666667 \(1 of 3\)",
    ),
    ({"block": (1, 4)}, r"pattern=\(2, 4\) ranks single weights, and block=\(1, 4\) whole blocks"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(topkast.OptionError, match=message):
        topkast.wrap_optimizer(topkast.SGD(0.1), **TWO_OF_FOUR | options)
    with pytest.raises(topkast.OptionError, match=message):
        topkast.select(np.ones((4, 12)), **TWO_OF_FOUR | options)
    with pytest.raises(topkast.OptionError, match=message):
        make_torch(**options)


@pytest.mark.parametrize("distribution", ["erk", "global"])
def test_distributions(distribution: Any) -> None:
    message = rf"pattern=\(2, 4\) cannot be combined with distribution='{distribution}'"
    with pytest.raises(topkast.OptionError, match=message):
        topkast.wrap_optimizer(topkast.SGD(0.1), **TWO_OF_FOUR, distribution=distribution)
    own: dict[str, Any] = {"pattern": (2, 4)}
    options: dict[str, Any] = {"fwd": 0.5, "bwd": 0.25, "overrides": {"w": own}}
    with pytest.raises(topkast.OptionError, match=message):
        topkast.wrap_optimizer(topkast.SGD(0.1), **options, distribution=distribution)


def test_rows_that_groups_do_not_divide() -> None:
    message = (
        r"0.weight: pattern=\(4, 8\) needs rows of a multiple of 8 weights, but they have 12 .* "
        r"dense='0.weight', or .* overrides={'0.weight': {\"pattern\": None}}"
    )
    with pytest.raises(topkast.OptionError, match=message):
        make_torch(pattern=(4, 8))
    params = {"0.weight": np.ones((16, 12), np.float32)}
    for rule in (topkast.SGD(0.1), optax.sgd(0.1)):
        tx: Any = topkast.wrap_optimizer(rule, fwd=0.5, bwd=0.25, pattern=(4, 8))
        with pytest.raises(topkast.OptionError, match=message):
            tx.init(params)
    for remedy in ({"dense": "0.weight"}, {"overrides": {"0.weight": {"pattern": None}}}):
        make_torch(pattern=(4, 8), **remedy)
    with pytest.raises(topkast.OptionError, match="params: pattern"):
        topkast.select(np.ones(8), **TWO_OF_FOUR)  # a vector has rows of one weight


def test_a_state_of_another_pattern_is_refused() -> None:
    params = {"w": np.arange(32.0).reshape(4, 8)}
    patterns: list[Any] = [(2, 4), (4, 8), None]
    first, second, third = (
        topkast.wrap_optimizer(topkast.SGD(0.1), fwd=0.5, bwd=0.25, pattern=pattern)
        for pattern in patterns
    )
    for one, other in ((first, second), (first, third), (third, first)):
        with pytest.raises(topkast.MismatchError, match="wrap with the `pattern`"):
            other.step(params, one.init(params), params)
    tx = topkast.wrap_optimizer(optax.sgd(0.1), **TWO_OF_FOUR)
    other_tx = topkast.wrap_optimizer(optax.sgd(0.1), fwd=0.5, bwd=0.25)
    leaves = {"w": jnp.asarray(params["w"])}
    with pytest.raises(topkast.MismatchError, match="wrap with the `pattern`"):
        jax.jit(other_tx.step)(leaves, tx.init(leaves), leaves)


def test_checks_of_supports() -> None:
    theta = np.arange(16.0).reshape(2, 8)
    support = topkast.select(theta, **TWO_OF_FOUR)
    support.check(16, "it")
    whole = topkast.select(theta, fwd=0.5, bwd=0.25)
    whole.check(16, "it")
    with pytest.raises(topkast.MismatchError, match=r"units of A in each group of 4"):
        whole.in_groups(4).check(16, "it")
    uneven = Support.of(np.asarray([0, 1, 4, 5]), np.asarray([2, 3]))
    with pytest.raises(topkast.MismatchError, match=r"units of B∖A in each group of 4"):
        uneven.in_groups(4).check(8, "it")
    Support(np.zeros(0, np.int32), 0, None, 4).check(0, "it")


def test_assertions_detect_broken_masks() -> None:
    theta = np.asarray([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    right = np.asarray([[0, 0, 1, 1], [0, 0, 1, 1]], dtype=bool)
    largest = theta > 4
    swapped = np.asarray([[0, 0, 1, 1], [0, 1, 0, 1]], dtype=bool)
    options: dict[str, Any] = {"fwd": 0.5, "bwd": 0.5, "pattern": (2, 4)}
    assert_masks(theta, Masks(right, right), **options)
    with pytest.raises(AssertionError, match="group 0 has 0 weights of A, expected 2 of 4; 2"):
        assert_masks(theta, Masks(largest, largest), **options)
    with pytest.raises(AssertionError, match=r"kept a magnitude of 6\.0 and dropped one of 7"):
        assert_masks(theta, Masks(swapped, swapped), **options)
    outcomes = []
    ones = np.ones((1, 4))
    for kept in ([0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]):
        mask = np.isin(np.arange(4), kept)[None, :]
        try:
            assert_masks(ones, Masks(mask, mask), **options)
            outcomes.append(True)
        except AssertionError:
            outcomes.append(False)
    assert sum(outcomes) == 1
