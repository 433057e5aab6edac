"""The update rules for plain arrays, against PyTorch's optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from libraries import Library

import topkast
from topkast.testing import to_numpy

PAIRS: dict[str, tuple[Any, Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": (topkast.SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (topkast.SGD(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "nesterov": (
        topkast.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "adam": (topkast.Adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
    "adam-decay": (
        topkast.Adam(0.01, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.01, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.1),
    ),
    "adam-without-memory": (
        topkast.Adam(0.01, betas=(0.0, 0.0)),
        lambda p: torch.optim.Adam(p, 0.01, betas=(0.0, 0.0)),
    ),
    "adamw": (topkast.AdamW(0.01), lambda p: torch.optim.AdamW(p, 0.01)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_rule_equals_the_torch_optimizer(
    any_library: Library, x64: None, name: str, rng: np.random.Generator
) -> None:
    rule, build = PAIRS[name]
    start = rng.standard_normal((5, 4))
    param = torch.nn.Parameter(torch.asarray(start.copy()))
    optimizer = build([param])
    params = {"w": any_library.asarray(start)}
    state = rule.init(params)
    update = any_library.compile(rule.update)
    for _ in range(20):
        grad = rng.standard_normal((5, 4))
        param.grad = torch.asarray(grad)
        optimizer.step()
        updates, state = update({"w": any_library.asarray(grad)}, state, params)
        params = topkast.apply_updates(params, updates)
        np.testing.assert_allclose(
            to_numpy(params["w"]), param.detach().numpy(), rtol=1e-9, atol=1e-12
        )


def test_first_steps_of_adam_are_exact_in_single_precision(library: Library) -> None:
    # 1 - 0.999 in float32 has an error of 1e-5, as do the first steps of optax's Adam.
    grad = np.asarray([0.5, -2.0, 1e-3], dtype=np.float32)
    params = {"w": library.asarray(np.zeros(3, dtype=np.float32))}
    rule = topkast.Adam(1.0, eps=0.0)
    updates, _ = rule.update({"w": library.asarray(grad)}, rule.init(params), params)
    np.testing.assert_allclose(to_numpy(updates["w"]), [-1, 1, -1], rtol=1e-6)


def test_learning_rate_may_be_a_function_of_the_step(library: Library) -> None:
    params = {"w": library.asarray(np.zeros((2, 2)))}
    grads = {"w": library.asarray(np.ones((2, 2)))}
    tx = topkast.wrap_optimizer(
        topkast.SGD(lambda step: 0.5 ** int(step)), fwd=0.0, bwd=0.0, penalty=0.0
    )
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        params = topkast.apply_updates(params, updates)
    np.testing.assert_allclose(to_numpy(params["w"]), -1.75)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: topkast.SGD(-0.1), "lr must be a finite number"),
        (lambda: topkast.SGD(float("nan")), "lr"),
        (lambda: topkast.SGD(0.1, momentum=1.0), "momentum"),
        (lambda: topkast.SGD(0.1, nesterov=True), "nesterov=True needs momentum"),
        (lambda: topkast.Adam(betas=(0.9, 1.0)), "betas"),
        (lambda: topkast.Adam(eps=-1.0), "eps"),
        (lambda: topkast.AdamW(weight_decay=-1.0), "weight_decay"),
    ],
)
def test_bad_hyperparameters(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(topkast.OptionError, match=message):
        make()
