"""Sparse averages of weights over time: θ is averaged, then A is selected once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import topkast
from topkast import MismatchError, OptionError, methods
from topkast.adapter import RankedTensors
from topkast_torch.optimizer._optimizer import TopKASTOptimizer


class WeightAverage:
    r"""A running average of the weights θ that a wrapped optimizer trains.

    An average of forward views (``torch.optim.swa_utils.AveragedModel``, EMA callbacks) has all
    entries that were ever in A, two to four times as many as A. This class averages θ and selects
    the \|A\| largest entries of the average in :meth:`forward_params`.

    Parameters
    ----------
    optimizer
        The wrapped optimizer that :func:`topkast.wrap_optimizer` returned.
    decay
        Decay d of the average per update, in [0, 1): :math:`\bar\theta \leftarrow
        d \bar\theta + (1 - d) \theta`. None gives all updates equal weight, as in SWA.

    Raises
    ------
    OptionError
        If `optimizer` is not wrapped, or `decay` is outside [0, 1).

    Examples
    --------
    >>> import torch, topkast, topkast_torch
    >>> model = torch.nn.Linear(20, 30)
    >>> opt = topkast.wrap_optimizer(
    ...     torch.optim.SGD(model.named_parameters(), 0.1), fwd=0.9, bwd=0.8, refresh_every=1)
    >>> average = topkast_torch.WeightAverage(opt, decay=0.9)
    >>> for _ in range(5):
    ...     model(torch.ones(4, 20)).square().mean().backward()
    ...     opt.step()
    ...     average.update()
    >>> state = average.forward_params()
    >>> int((state["weight"] != 0).sum())
    60
    >>> torch.nn.Linear(20, 30).load_state_dict(state)
    <All keys matched successfully>
    """

    def __init__(self, optimizer: TopKASTOptimizer, *, decay: float | None = 0.999) -> None:
        if not isinstance(optimizer, TopKASTOptimizer):
            raise OptionError(
                "WeightAverage needs the optimizer that topkast.wrap_optimizer returned, got "
                f"{type(optimizer).__name__}"
            )
        if any(group.sharded_names() for group in optimizer._wrapper_state.groups):
            raise OptionError(
                "WeightAverage selects from whole tensors, but Parameters of this optimizer are "
                "sharded over processes: average the weights of checkpoints in one process, or "
                "wrap an optimizer that averages itself"
            )
        if decay is not None and not 0 <= decay < 1:
            raise OptionError(f"decay must be None or lie in [0, 1), got {decay!r}")
        self._optimizer, self._decay = optimizer, decay
        self._count = 0
        self._average: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the average."""
        theta: dict[str, Tensor] = topkast.dense_params(self._optimizer)
        self._count += 1
        if not self._average:
            self._average = theta
            return
        weight = 1 / self._count if self._decay is None else 1 - self._decay
        for name, value in theta.items():  # a tensor added later starts at its value
            self._average.setdefault(name, value).lerp_(value, weight)

    def dense_params(self) -> dict[str, Tensor]:
        """Copies of the averaged θ, by name.

        Raises :class:`topkast.MismatchError` before the first update.
        """
        if not self._average:
            raise MismatchError("WeightAverage has no weights yet: call update() after a step")
        return {name: tensor.clone() for name, tensor in self._average.items()}

    def forward_params(self) -> dict[str, Tensor]:
        r"""The \|A\| largest entries of each averaged tensor, zero elsewhere, by name.

        Raises :class:`topkast.MismatchError` before the first update.
        """
        average = self.dense_params()
        state = self._optimizer._wrapper_state
        for execution, param_group in self._optimizer._executions_with_options():
            count, method = execution.support.forward, execution.method
            ranked: RankedTensors = replace(execution.ranked, forward=count)
            options = state.options.override(param_group | execution.overrides)
            if method.schedules or method.needs & {"sets", "gradient"}:  # no choice by weights
                options = replace(options, method=methods.TopKAST())
            flat = ranked.flatten(average)
            support = ranked.select(flat, options)
            view = topkast.forward_view(topkast.gather(flat, support), support, shape=(len(flat),))
            average |= ranked.unflatten(view)
        return average

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of updates, for a checkpoint."""
        return {"count": self._count, "average": self.dense_params() if self._average else {}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a saved average.

        Raises :class:`topkast.StateDictError` if its tensors differ.
        """
        theta = topkast.dense_params(self._optimizer)
        average = state_dict["average"]
        shapes = {name: tuple(tensor.shape) for name, tensor in theta.items()}
        saved = {name: tuple(tensor.shape) for name, tensor in average.items()}
        if average and saved != shapes:
            raise topkast.StateDictError(
                f"the saved average has tensors {saved}, expected {shapes}"
            )
        self._count = int(state_dict["count"])
        self._average = {name: tensor.clone().to(theta[name]) for name, tensor in average.items()}
