"""Trials of a PyTorch optimizer for the core's probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import Parameter

from topkast import UnsupportedOptimizerError
from topkast.adapter import (
    HostArray,
    HostArrays,
    Traits,
    beta_pairs,
    check_joint,
    check_permutation,
    observe,
)
from topkast_torch.inner._fresh import (
    class_name,
    make_fresh_optimizer,
    take_step,
    with_moving_weights,
)
from topkast_torch.inner._inner_state import Layout, Start, entries_of, reset_entries, walk
from topkast_torch.inner._learn_layout import device_of


def probe(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    shapes: Sequence[tuple[int, ...]],
    *,
    joint: bool,
) -> None:
    """Raise :class:`UnsupportedOptimizerError` unless permuting coordinates permutes the update.

    `shapes` are those of a group's sparsified tensors; `joint` says whether they are ranked
    together, as one vector.
    """
    largest: dict[int, tuple[int, ...]] = {}
    for shape in shapes:
        current = largest.setdefault(len(shape), shape)
        if sorted(shape, reverse=True)[:2] > sorted(current, reverse=True)[:2]:
            largest[len(shape)] = shape

    def start_trial(params: HostArrays) -> Trial:
        return Trial(optimizer, group, params)

    for shape in largest.values():
        check_permutation(start_trial, {"": shape}, class_name(optimizer))
    if joint:
        check_joint(start_trial, ["first", "second"], "joint", class_name(optimizer))


def probe_parts(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> None:
    """Raise :class:`UnsupportedOptimizerError` unless parts of a tensor may be stepped alone."""
    name = class_name(optimizer)
    try:
        check_joint(
            lambda params: Trial(optimizer, group, params), ["first", "second"], "joint", name
        )
    except UnsupportedOptimizerError:
        raise UnsupportedOptimizerError(
            f"{name} steps a tensor by norms or other numbers of the whole tensor, but each "
            "process holds a part of the sharded ones: choose an elementwise optimizer, as AdamW"
        ) from None


def find_traits(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], layout: Layout, dimensions: int
) -> Traits:
    """How the optimizer moves weights with `dimensions` dimensions, apart from their decay."""
    if isinstance(group.get("weight_decay"), (int, float)):
        group = {**group, "weight_decay": 0.0}
    pairs = beta_pairs(betas_of(group))
    arguments = {"": pairs}, {"": dimensions}
    return observe(lambda params: Trial(optimizer, group, params, layout), *arguments)[""]


def betas_of(group: Mapping[str, Any]) -> tuple[float, ...]:
    """The β of an optimizer's moving averages, from its options; empty if it has none."""
    for names in (("betas",), ("beta1", "beta2"), ("b1", "b2")):
        values = [group.get(name) for name in names]
        if names == ("betas",) and isinstance(values[0], (tuple, list)):
            values = list(values[0])
        if len(values) > 1 and all(isinstance(value, (int, float)) for value in values):
            return tuple(map(float, values))  # type: ignore[arg-type]
    return ()


class Trial:
    """A fresh optimizer for the tensors of one trial; see :class:`topkast._probe.Trial`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        group: Mapping[str, Any],
        params: HostArrays,
        layout: Layout | None = None,
    ) -> None:
        group = with_moving_weights(group)
        self._optimizer, self._layout, self._device = optimizer, layout, device_of(group)
        self._params = {key: Parameter(self._tensor(array)) for key, array in params.items()}
        self._fresh = make_fresh_optimizer(optimizer, group, list(self._params.values()))

    def step(self, grads: HostArrays) -> list[HostArrays]:
        before = {key: param.detach().clone() for key, param in self._params.items()}
        copies = {key: self._copies(param) for key, param in self._params.items()}
        for key, param in self._params.items():
            param.grad = self._tensor(grads[key])
        take_step(self._optimizer, self._fresh, self._device)
        moved = {key: [param.detach() - before[key]] for key, param in self._params.items()}
        for key, param in self._params.items():
            after = self._copies(param)
            earlier = copies[key] or [before[key]] * len(after)  # created in this step
            moved[key] += [
                new.view(param.shape) - old.view(param.shape)
                for old, new in zip(earlier, after, strict=True)
            ]
        return [
            {key: step.double().cpu().numpy() for key, step in zip(moved, steps, strict=True)}
            for steps in zip(*moved.values(), strict=True)
        ]

    def renew(self, entrants: HostArray) -> None:
        assert self._layout is not None
        positions = torch.from_numpy(entrants).nonzero().view(-1).to(self._device)
        for param in self._params.values():
            entries = entries_of(self._fresh, param, self._layout.stores)
            reset_entries(entries, self._layout, param, positions)

    def _copies(self, param: Parameter) -> list[torch.Tensor]:
        """Copies of the entries that started at the weights and have their size."""
        if self._layout is None:
            return []
        entries = entries_of(self._fresh, param, self._layout.stores)
        return [
            entry.detach().clone()
            for path, entry in walk(entries)
            if isinstance(self._layout.starts.get(path), Start) and entry.numel() == param.numel()
        ]

    def _tensor(self, array: HostArray) -> torch.Tensor:
        # Keeps the precision of `array`: double where rounding must not matter.
        return torch.from_numpy(np.asarray(array)).to(self._device, copy=True)
