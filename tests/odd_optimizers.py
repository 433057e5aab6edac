"""Elementwise optimizers that store their state in all the ways of third-party optimizers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Odd(torch.optim.Optimizer):
    """Base class of optimizers that move weights along :meth:`direction`."""

    def __init__(self, params: Any, lr: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            self.begin(group)
            for param in group["params"]:
                if param.grad is not None:
                    param.add_(self.direction(group, param, param.grad), alpha=-group["lr"])

    def begin(self, group: dict[str, Any]) -> None:
        """Called once per group and step."""

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        raise NotImplementedError


class Flattened(Odd):
    """Stores one flat vector per tensor."""

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        mean = self.state[param].setdefault("mean", torch.zeros(param.numel()).to(param))
        mean.mul_(0.9).add_(grad.reshape(-1))
        return mean.view_as(param)


class Stacked(Odd):
    """Stores histories (k, *shape) and (*shape, k)."""

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        state = self.state[param]
        if not state:
            state["first"] = grad.new_zeros((3, *param.shape))
            state["last"] = grad.new_zeros((*param.shape, 2))
        state["first"].copy_(state["first"].roll(1, 0))
        state["first"][0] = grad
        state["last"].mul_(0.5).add_(grad.unsqueeze(-1))
        return state["first"].mean(0) + state["last"].sum(-1)


class Queue(Odd):
    """Stores a deque of past gradients, and a list in a dictionary."""

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        state = self.state[param]
        if not state:
            state["queue"] = deque([torch.zeros_like(grad)] * 2, maxlen=2)
            state["nested"] = {"means": [torch.zeros_like(grad), torch.zeros_like(grad)]}
        state["queue"].append(grad.clone())
        for mean, beta in zip(state["nested"]["means"], (0.5, 0.9), strict=True):
            mean.mul_(beta).add_(grad)
        return sum(state["queue"]) + sum(state["nested"]["means"])


class OnItself(Odd):
    """Stores moments by Parameter in an attribute, counters in attributes and by a string key."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.means: dict[Tensor, Tensor] = {}
        self.counter = 0

    def begin(self, group: dict[str, Any]) -> None:
        self.counter += 1
        group["seen"] = group.get("seen", 0) + 1
        state: Any = self.state
        everything = state["everything"]
        everything["norm"] = everything.get("norm", 0.0) + 1.0

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        mean = self.means.setdefault(param, torch.zeros_like(param))
        mean.mul_(0.9).add_(grad)
        state: Any = self.state
        rate = 1 + 1 / self.counter + 1 / group["seen"] + 1 / state["everything"]["norm"]
        return mean * rate


class Copies(Odd):
    """Stores an entry that starts at the weight (`z`), and one at a number (`step_size`)."""

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        state = self.state[param]
        if not state:
            state["z"] = param.clone()
            state["step_size"] = torch.full_like(param, 0.25)
            state["count"] = 0
        state["count"] += 1
        state["z"].add_(grad, alpha=-group["lr"])
        state["step_size"].mul_(1.1).clamp_(max=1.0)
        return grad * state["step_size"] + 0.01 * (param - state["z"])


class FirstGradient(Odd):
    """Stores entries that start at the first gradient; zeros would give another first step."""

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        state = self.state[param]
        if not state:
            state["square"] = grad * grad
            state["previous"] = grad.clone()
        direction = grad / state["square"].sqrt().clamp(min=1e-6) + grad - state["previous"]
        state["square"].mul_(0.9).addcmul_(grad, grad, value=0.1)
        state["previous"].copy_(grad)
        return direction


class Switching(Odd):
    """Has training and evaluation modes, like schedule-free optimizers."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.training = True

    @torch.no_grad()
    def eval(self) -> None:
        self._swap()
        self.training = False

    @torch.no_grad()
    def train(self) -> None:
        if not self.training:
            self._swap()
        self.training = True

    def _swap(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                average = self.state[param].get("average")
                if average is not None:
                    saved = param.clone()
                    param.copy_(average)
                    average.copy_(saved)

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        assert self.training
        average = self.state[param].setdefault("average", param.clone())
        average.lerp_(param, 0.5)
        return grad


# Optimizers whose state cannot be migrated, or that are not elementwise.


class Quantised(Odd):
    """Stores a scale for each group of 16 weights."""

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        blocks = -(-param.numel() // 16)
        self.state[param].setdefault("scales", torch.zeros(blocks))
        return grad


class OnItselfByNumber(Odd):
    """Stores gradients in an attribute, not by Parameter."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.past: list[Tensor] = []

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        self.past = [*self.past[-3:], grad.clone()]
        return grad


class InAnObject(Odd):
    """Stores an opaque object in the state."""

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        self.state[param].setdefault("object", object())
        return grad


class WithoutStateDict(Odd):
    """Has a state dict of its own form."""

    def state_dict(self) -> Any:
        return {"weights": []}

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        return grad


class CountsInAnObject(Odd):
    """Makes an object that no state dict can hold at its first step."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.counter: object = None

    def begin(self, group: dict[str, Any]) -> None:
        self.counter = object()

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        return grad


class ByShape(Odd):
    """Scales by the row length, which a compact vector does not have."""

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        return grad / param.shape[-1]


class Late(Odd):
    """Uses rows, but only after 30 steps."""

    def begin(self, group: dict[str, Any]) -> None:
        group["seen"] = group.get("seen", 0) + 1

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        return grad - grad.mean(0) if group["seen"] > 30 and param.dim() > 1 else grad


class OnLongAxes(Odd):
    """Uses rows, but only of tensors with more than 200 rows."""

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        return grad - grad.mean(0) if param.dim() > 1 and param.shape[0] > 200 else grad


class OnThreeDimensions(Odd):
    """Uses the first axis, but only of tensors with three dimensions."""

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        return grad - grad.mean(0) if param.dim() == 3 else grad


class StandsStill(Odd):
    """Moves nothing, so that the probe cannot observe it."""

    def direction(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Any:
        return torch.zeros_like(grad)


class WrittenInConstructor(torch.optim.Optimizer):
    """Writes its state before the first step."""

    def __init__(self, params: Any, lr: float = 0.1, start: float = 0.0) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["momentum"] = torch.full_like(param, start)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                momentum = self.state[param]["momentum"]
                momentum.mul_(0.9).add_(param.grad)
                param.data.sub_(momentum, alpha=group["lr"])


class MaskedInConstructor(WrittenInConstructor):
    """Writes a mask of the smallest weights before the first step, as SaRA does."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        for param, state in self.state.items():
            state["mask"] = param.detach().abs() < 0.1

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = param.grad * self.state[param]["mask"]
        super().step()


class WrittenToAttribute(torch.optim.Optimizer):
    """Writes to a dictionary of its own, by Parameter, before the first step."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        (group,) = self.param_groups
        self.momenta = {param: torch.zeros_like(param) for param in group["params"]}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            momentum = self.momenta[param]
            momentum.mul_(0.9).add_(param.grad)
            param.data.sub_(momentum, alpha=0.1)


WRAPPED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "flattened": Flattened,
    "stacked": Stacked,
    "queue": Queue,
    "on itself": OnItself,
    "copies": Copies,
    "first gradient": FirstGradient,
    "switching": Switching,
    "state of the constructor": lambda params: WrittenInConstructor(params, start=0.01),
}
REFUSED: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], str]] = {
    "quantised": (Quantised, "Quantised keeps scales"),
    "on itself by number": (
        OnItselfByNumber,
        "OnItselfByNumber keeps values per weight in its attr",
    ),
    "in an object": (InAnObject, "InAnObject keeps object for each tensor"),
    "without state dict": (
        WithoutStateDict,
        "WithoutStateDict has a state dict without 'state' and 'param_groups'",
    ),
    "counts in an object": (
        CountsInAnObject,
        "CountsInAnObject changes its attribute counter at each step: it is a object",
    ),
    "by shape": (ByShape, "ByShape does not treat a tensor as a bag"),
    "late": (Late, "Late does not treat a tensor as a bag"),
    "mask of the constructor": (
        MaskedInConstructor,
        r"dense gradient: KeyError: 'mask'\. Entries that the constructor writes",
    ),
    "attribute of the constructor": (
        WrittenToAttribute,
        r"dense gradient: KeyError: Parameter containing\. Entries that the constructor writes",
    ),
    "stands still": (StandsStill, "StandsStill did not move a tensor"),
}
