"""Options: every bad value raises an error that names it, and `dense` keeps the right tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import topkast
from topkast import OptionError
from topkast._options import Options
from topkast._patterns import kept_dense
from topkast.methods import Mixed, TopKAST

BAD: list[tuple[dict[str, Any], str]] = [
    ({"fwd": 0.5, "bwd": 0.6}, "bwd must not exceed fwd, got bwd=0.6 and fwd=0.5"),
    ({"fwd": 1.0}, r"fwd is a sparsity, .* must lie in \[0, 1\), got 1.0"),
    ({"fwd": -0.1}, "fwd"),
    ({"bwd": -0.1}, "bwd"),
    ({"fwd": float("nan")}, "fwd"),
    ({"fwd": 90}, "fwd"),
    ({"fwd": "0.9"}, "fwd"),
    ({"fwd": True}, "fwd"),
    ({"fwd": None}, "fwd"),
    ({"refresh_every": 0}, "refresh_every must be an integer of at least 1"),
    ({"refresh_every": 2.5}, "refresh_every"),
    ({"refresh_every": True}, "refresh_every"),
    ({"penalty": -1e-4}, "penalty"),
    ({"penalty": float("inf")}, "penalty"),
    ({"penalty_kind": "l3"}, "penalty_kind must be one of 'l2', 'l1', got 'l3'"),
    ({"explore": "gradient"}, "explore must be one of"),
    ({"explore_until": -1}, "explore_until"),
    ({"explore_until": 1.5}, "explore_until"),
    ({"distribution": "ER"}, "distribution must be one of"),
    ({"seed": -1}, "seed"),
    ({"dense": 3}, "dense must be a name or glob"),
    ({"dense": [1, 2]}, "dense must be a name or glob"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_bad_value_is_named_and_nothing_changed(options: dict[str, Any], message: str) -> None:
    layer = torch.nn.Linear(8, 8)
    before = layer.weight.detach().clone()
    inner = torch.optim.AdamW(layer.parameters())
    for optimizer in (inner, topkast.Adam()):
        with pytest.raises(topkast.OptionError, match=message):
            topkast.wrap_optimizer(optimizer, **{"fwd": 0.9, "bwd": 0.8} | options)
    assert torch.equal(layer.weight, before)
    assert inner.param_groups[0]["params"][0] is layer.weight


def test_option_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="fwd"):
        topkast.select(np.ones(3), fwd=2, bwd=0)


TENSORS = {
    "body.weight": np.zeros((4, 4)),
    "body.bias": np.zeros(4),
    "head.weight": np.zeros((2, 4)),
    "empty": np.zeros((0, 3)),
    "scale": np.zeros(()),
}


@pytest.mark.parametrize(
    ("dense", "sparse"),
    [
        (None, {"body.weight", "head.weight"}),
        ("head.*", {"body.weight"}),
        ("head.weight", {"body.weight"}),
        (["head.*", "body.*"], set()),
        (lambda name, tensor: tensor.shape[0] == 2, {"body.weight"}),
        (True, set()),
        (False, {"body.weight", "body.bias", "head.weight"}),
    ],
)
def test_dense_option_selects_tensors(dense: Any, sparse: set[str]) -> None:
    assert set(TENSORS) - kept_dense(TENSORS, dense) == sparse


def test_pattern_that_matches_nothing_is_an_error() -> None:
    # An optimizer built from parameters() knows no names, and would silently ignore 'head.*'.
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    inner = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(topkast.OptionError, match=r"'head\.\*' matches none.*named_parameters"):
        topkast.wrap_optimizer(inner, fwd=0.5, bwd=0.5, dense="head.*")


def test_pattern_needs_to_match_in_one_group_only() -> None:
    # The usual split into weights with decay and biases without.
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    named = list(model.named_parameters())
    groups: Any = [
        {"params": [pair for pair in named if pair[1].dim() > 1]},
        {"params": [pair for pair in named if pair[1].dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = topkast.wrap_optimizer(
        torch.optim.AdamW(groups), fwd=0.5, bwd=0.5, dense="1.weight"
    )
    assert list(topkast.masks(optimizer)) == ["0.weight"]
    head = torch.nn.Linear(4, 4)
    pairs = [(f"head.{name}", param) for name, param in head.named_parameters()]
    optimizer.add_param_group({"params": pairs})
    assert list(topkast.masks(optimizer)) == ["0.weight", "head.weight"]


def test_a_group_replaces_what_differs() -> None:
    options = Options(fwd=0.9, bwd=0.8, refresh_every=1, penalty=1.0, method=TopKAST())
    group = options.for_group()
    assert options.override(group | {"method": options.method, "lr": 0.1}) is options
    changed = options.override(group | {"refresh_every": 5, "method": Mixed(by_magnitude=0.5)})
    assert changed == replace(options, refresh_every=5, method=Mixed(by_magnitude=0.5))
    for name in ("refresh_every", "penalty"):  # equal to 1, but no number
        with pytest.raises(OptionError, match=name):
            options.override(group | {name: True})


@pytest.mark.parametrize(
    "option",
    [{"power": 2.0}, {"stacked": "weight"}, {"overrides": {}}, {"seed": 1}, {"probe": False}],
    ids=lambda option: next(iter(option)),
)
def test_a_group_cannot_set_options_of_the_whole_optimizer(option: dict[str, Any]) -> None:
    (name,) = option
    layer, later = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    before = layer.weight.detach().clone()
    group: Any = {"params": list(layer.named_parameters())}
    with pytest.raises(OptionError, match=f"a parameter group cannot set {name}"):
        topkast.wrap_optimizer(torch.optim.SGD([group | option], 0.1), fwd=0.9, bwd=0.8)
    assert torch.equal(layer.weight, before)
    optimizer = topkast.wrap_optimizer(torch.optim.SGD([group], 0.1), fwd=0.9, bwd=0.8)
    added: Any = {"params": list(later.named_parameters("later"))}
    with pytest.raises(OptionError, match=f"a parameter group cannot set {name}"):
        optimizer.add_param_group(added | option)
    assert len(optimizer.param_groups) == 1


class SeededSGD(torch.optim.SGD):
    """An optimizer with an option of its own that is called `seed`."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.defaults["seed"] = 0
        for group in self.param_groups:
            group.setdefault("seed", 0)


def test_a_group_may_set_the_inner_optimizers_option_of_the_same_name() -> None:
    layer = torch.nn.Linear(8, 8)
    inner = SeededSGD([{"params": list(layer.named_parameters()), "seed": 3}], 0.1)
    optimizer = topkast.wrap_optimizer(inner, fwd=0.9, bwd=0.8)
    assert optimizer.param_groups[0]["seed"] == 3
