"""The same optimizers for each framework, including some that the library itself lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import optax
import torch
from array_api_compat import array_namespace

import topkast
from topkast import reference

Vector = np.ndarray[Any, Any]


@dataclass
class ReferenceLion:
    """Lion as a :class:`topkast.reference.Rule`."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self.moments: dict[str, Any] = {"mean": 0}

    def change(self, theta: Vector, gradient: Vector) -> Vector:
        (beta1, beta2), mean = self.betas, self.moments["mean"]
        direction = np.sign(beta1 * mean + (1 - beta1) * gradient)
        self.moments = {"mean": beta2 * mean + (1 - beta2) * gradient}
        return np.asarray(-self.lr * (direction + self.weight_decay * theta))

    def maturity(self, steps: Any) -> Any:
        return 1


@dataclass
class ReferenceRMSprop:
    """RMSprop as a :class:`topkast.reference.Rule`."""

    lr: float
    decay: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        self.moments: dict[str, Any] = {"square": 0}

    def change(self, theta: Vector, gradient: Vector) -> Vector:
        square = self.decay * self.moments["square"] + (1 - self.decay) * gradient**2
        self.moments = {"square": square}
        return np.asarray(-self.lr * gradient / (np.sqrt(square) + self.eps))

    def maturity(self, steps: Any) -> Any:
        return 1


class _ByName(NamedTuple):
    """A rule for arrays by name, whose state is one moment for each array."""

    change: Callable[[Any, Any, Any], tuple[Any, Any]]  # gradient, moment, weights

    def init(self, params: dict[str, Any], /) -> dict[str, Any]:
        return {name: array_namespace(param).zeros_like(param) for name, param in params.items()}

    def update(
        self, grads: dict[str, Any], state: dict[str, Any], params: dict[str, Any], /
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        pairs = {name: self.change(grads[name], state[name], params[name]) for name in grads}
        displacements = {name: displacement for name, (displacement, _) in pairs.items()}
        return displacements, {name: moment for name, (_, moment) in pairs.items()}


def lion(lr: float, weight_decay: float) -> Any:
    def change(grad: Any, mean: Any, param: Any) -> tuple[Any, Any]:
        direction = array_namespace(grad).sign(0.9 * mean + 0.1 * grad)
        return -lr * (direction + weight_decay * param), 0.99 * mean + 0.01 * grad

    return _ByName(change)


def rmsprop(lr: float) -> Any:
    def change(grad: Any, square: Any, param: Any) -> tuple[Any, Any]:
        square = 0.99 * square + 0.01 * grad * grad
        return -lr * grad / (array_namespace(grad).sqrt(square) + 1e-8), square

    return _ByName(change)


class TorchLion(torch.optim.Optimizer):
    """Lion for PyTorch."""

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                mean = state.setdefault("mean", torch.zeros_like(param))
                direction = (0.9 * mean + 0.1 * param.grad).sign()
                param.add_(direction + group["weight_decay"] * param, alpha=-group["lr"])
                mean.mul_(0.99).add_(param.grad, alpha=0.01)


class Rule(NamedTuple):
    """The same optimizer for each framework."""

    reference: Callable[[], Any]
    arrays: Callable[[], Any]
    torch: Callable[[Any], Any]
    optax: Callable[[], Any]


RULES = {
    "sgd": Rule(
        lambda: reference.SGD(0.05),
        lambda: topkast.SGD(0.05),
        lambda params: torch.optim.SGD(params, 0.05),
        lambda: optax.sgd(0.05),
    ),
    "sgd-momentum": Rule(
        lambda: reference.SGD(0.05, momentum=0.9),
        lambda: topkast.SGD(0.05, momentum=0.9),
        lambda params: torch.optim.SGD(params, 0.05, momentum=0.9),
        lambda: optax.sgd(0.05, momentum=0.9),
    ),
    "adam": Rule(
        lambda: reference.AdamW(0.02, weight_decay=0.0),
        lambda: topkast.Adam(0.02),
        lambda params: torch.optim.Adam(params, 0.02),
        lambda: optax.adam(0.02),
    ),
    "adamw-decay": Rule(
        lambda: reference.AdamW(0.02, weight_decay=0.1),
        lambda: topkast.AdamW(0.02, weight_decay=0.1),
        lambda params: torch.optim.AdamW(params, 0.02, weight_decay=0.1),
        lambda: optax.adamw(0.02, weight_decay=0.1),
    ),
    "lion": Rule(
        lambda: ReferenceLion(0.01, weight_decay=0.1),
        lambda: lion(0.01, 0.1),
        lambda params: TorchLion(params, 0.01, 0.1),
        lambda: optax.lion(0.01, weight_decay=0.1),
    ),
    "rmsprop": Rule(
        lambda: ReferenceRMSprop(0.01),
        lambda: rmsprop(0.01),
        lambda params: torch.optim.RMSprop(params, 0.01),
        lambda: optax.rmsprop(0.01, decay=0.99, eps_in_sqrt=False),
    ),
}
