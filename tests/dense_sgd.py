"""SGD with momentum under Top-KAST on dense tensors, written from the paper: an oracle of loops."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor


class DenseTopKAST(torch.optim.SGD):
    """Keeps θ, A and B as dense tensors and masks everything; the model holds α between steps."""

    def __init__(self, params: Any, *, lr: float, momentum: float, **options: Any) -> None:
        self.updates = 0
        self.sets: dict[Tensor, dict[str, Tensor]] = {}
        super().__init__(params, lr=lr, momentum=momentum)
        self.defaults |= options
        for group in self.param_groups:
            self._begin(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "fwd" in self.defaults:
            self._begin(self.param_groups[-1])

    def _begin(self, group: dict[str, Any]) -> None:
        for name, value in self.defaults.items():
            group.setdefault(name, value)
        for param in group["params"]:
            if sum(size > 1 for size in param.shape) > 1:
                self.sets[param] = {"theta": param.detach().clone()}
                self._choose(param, group)

    def _choose(self, param: Tensor, group: dict[str, Any]) -> None:
        sets, size = self.sets[param], param.numel()
        order = sets["theta"].flatten().abs().argsort(descending=True)
        for name, sparsity in (("A", group["fwd"]), ("B", group["bwd"])):
            count = max(1, size - math.floor(Fraction(str(sparsity)) * size))
            mask = torch.zeros(size, dtype=torch.bool)
            mask[order[:count]] = True
            sets[name] = mask.view(param.shape)
        param.data = torch.where(sets["A"], sets["theta"], 0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                self._update(param, group)
        if any(param.grad is not None for group in self.param_groups for param in group["params"]):
            self.updates += 1
            for group in self.param_groups:
                for param in self.sets.keys() & set(group["params"]):
                    self._refresh(param, group)
        return loss

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        sets = self.sets.get(param)
        theta = param.detach().clone()
        if sets is not None:  # what others wrote on A counts
            theta = sets["theta"] = torch.where(sets["A"], theta, sets["theta"])
        if param.grad is None:
            return
        gradient = param.grad + group["weight_decay"] * theta
        if sets is not None:
            weight = sets["A"] + (sets["B"] & ~sets["A"]) / (1 - group["fwd"])
            gradient = (gradient + group["penalty"] * weight * theta) * sets["B"]
        state = self.state[param]
        state["mean"] = group["momentum"] * state.get("mean", 0) + gradient
        step = gradient + group["momentum"] * state["mean"] if group["nesterov"] else state["mean"]
        theta = theta - group["lr"] * step
        if sets is None:
            param.data = theta
        else:
            sets["theta"] = torch.where(sets["B"], theta, sets["theta"])
            param.data = torch.where(sets["A"], sets["theta"], 0)

    def _refresh(self, param: Tensor, group: dict[str, Any]) -> None:
        if self.updates % group["refresh_every"] == 0:
            old = self.sets[param]["B"]
            self._choose(param, group)
            if "mean" in self.state[param]:
                self.state[param]["mean"] *= old & self.sets[param]["B"]

    def restrict_gradients(self) -> None:
        """Zero gradients outside B, as the library does after each backward pass."""
        for param, sets in self.sets.items():
            if param.grad is not None:
                param.grad *= sets["B"]

    def thetas(self) -> list[Tensor]:
        """θ of all Parameters in order."""
        return [
            self.sets[param]["theta"] if param in self.sets else param.detach()
            for group in self.param_groups
            for param in group["params"]
        ]
