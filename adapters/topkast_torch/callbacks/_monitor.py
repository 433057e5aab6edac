"""Follow a wrapped optimizer through training: logs, pictures of masks, averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import nn

import topkast
from topkast import OptionError
from topkast.adapter import check_patterns, matches
from topkast_torch._averages import WeightAverage
from topkast_torch.callbacks._masked_averages import find_averaged, find_wrapper, mask_average

Log: TypeAlias = Callable[[dict[str, float], int], Any]
Every: TypeAlias = int | Literal["refresh"]


class Monitor:
    """Log a flat summary, draw masks to TensorBoard and end averages sparse, in any loop.

    Call :meth:`step` after each step of the optimizer, and :meth:`finish` when training has ended.
    Between logs a call costs microseconds. Of several processes, one should log: pass `log` and
    `writer` there only.

    Parameters
    ----------
    optimizer
        The wrapped optimizer, or the optimizer of another library that holds it, such as
        Accelerate's.
    log
        Function ``log(scalars, step)`` that takes a dictionary of numbers: ``wandb.log``,
        ``accelerator.log``, ``mlflow.log_metrics``. None: ``writer.add_scalar``, if there is a
        writer.
    writer
        ``torch.utils.tensorboard.SummaryWriter``, or an object with its ``add_figure``.
    every
        Number of updates between logs; ``"refresh"``: at each refresh.
    draw_every
        Number of updates between pictures of the masks, after those at the first call.
        Pictures need matplotlib: ``pip install 'topkast[analysis]'``.
    draw
        Names or globs of the tensors to draw; None: all sparse tensors.
    averages
        Averages of the model's weights. :meth:`step` updates each
        :class:`topkast_torch.WeightAverage`; :meth:`finish` makes the others sparse
        (:func:`mask_average`).
    model
        Passed to :func:`mask_average`.
    prefix
        Of the names that are logged.

    Raises
    ------
    OptionError
        If the optimizer is not wrapped, an interval is not a positive integer, `draw` matches no
        tensor, or `log` and `writer` lack what is called.
    MismatchError
        If an average does not belong to the optimizer.

    Examples
    --------
    >>> import torch, topkast
    >>> from topkast_torch.callbacks import Monitor
    >>> model = torch.nn.Linear(20, 30)
    >>> opt = torch.optim.SGD(model.named_parameters(), 0.1)
    >>> opt = topkast.wrap_optimizer(opt, fwd=0.9, bwd=0.8)
    >>> average = torch.optim.swa_utils.AveragedModel(model)
    >>> monitor = Monitor(
    ...     opt, lambda scalars, step: print(step, *scalars), every=2, averages=[average])
    >>> for _ in range(4):
    ...     model(torch.ones(4, 20)).square().mean().backward()
    ...     opt.step()
    ...     average.update_parameters(model)
    ...     monitor.step()
    2 topkast/updates topkast/mask_change/weight topkast/empty_rows/weight
    4 topkast/updates topkast/mask_change/weight topkast/empty_rows/weight
    >>> monitor.finish()
    >>> int((average.module.weight != 0).sum()) <= 60
    True
    """

    def __init__(
        self,
        optimizer: Any,
        log: Log | None = None,
        *,
        writer: Any = None,
        every: Every = 100,
        draw_every: int = 1000,
        draw: str | Sequence[str] | None = None,
        averages: Iterable[Any] = (),
        model: nn.Module | None = None,
        prefix: str = "topkast/",
    ) -> None:
        self._optimizer = find_wrapper(optimizer)
        self._state = self._optimizer._wrapper_state
        check_every(every, draw_every)
        if log is not None and not callable(log):
            raise OptionError(
                f"log must be a function (scalars, step), such as wandb.log, got "
                f"{type(log).__name__}"
            )
        if writer is not None and not hasattr(writer, "add_figure"):
            raise OptionError(
                "writer must have add_figure, as torch.utils.tensorboard.SummaryWriter, got "
                f"{type(writer).__name__}"
            )
        check_patterns(topkast.masks(self._optimizer), "draw", draw)
        self._log, self._writer, self._prefix = log, writer, prefix
        self._every, self._draw_every, self._draw = every, draw_every, draw
        averages = list(averages)
        self._weight_averages = [one for one in averages if isinstance(one, WeightAverage)]
        self._averages = [one for one in averages if not isinstance(one, WeightAverage)]
        self._model = model
        for average in self._averages:
            find_averaged(average, self._optimizer, model)
            self._state.warned = True  # finish() does what the DenseAverageWarning asks for
        self._updates, self._refreshes = self._state.updates, self._state.refreshes
        self._has_drawn = False

    def step(self, step: int | None = None) -> None:
        """Log and draw what is due; call after each step of the optimizer.

        A call after no update, as in accumulation or where a scaler skipped a step, does nothing.

        Parameters
        ----------
        step
            Passed to `log` and `writer`; None: the number of updates.
        """
        updates, before = self._state.updates, self._updates
        if updates == before:
            return
        self._updates = updates
        for average in self._weight_averages:
            average.update()
        step = updates if step is None else step
        if self._is_due(before):
            self.log(step)
        if self._writer is not None and (
            not self._has_drawn or updates // self._draw_every > before // self._draw_every
        ):
            self.draw(step)

    def log(self, step: int) -> None:
        """Log the summary now: what :meth:`topkast.Summary.scalars` returns."""
        scalars = topkast.summary(self._optimizer).scalars()
        named = {self._prefix + name: value for name, value in scalars.items()}
        if self._log is not None:
            self._log(named, step)
        elif hasattr(self._writer, "add_scalar"):
            for name, value in named.items():
                self._writer.add_scalar(name, value, step)

    def draw(self, step: int) -> None:
        """Draw the masks now, with :func:`topkast.plot.mask`."""
        from topkast import plot

        self._has_drawn = True
        for name, masks in topkast.masks(self._optimizer).items():
            if self._draw is None or matches(name, self._draw):
                figure = plot.mask(_on_host({name: masks}), name=name)
                self._writer.add_figure(f"{self._prefix}mask/{name}", figure, step)

    def finish(self) -> None:
        """Make the averages sparse by the last sets; call when training has ended."""
        for average in self._averages:
            mask_average(average, self._optimizer, model=self._model)

    def _is_due(self, before: int) -> bool:
        if self._log is None and self._writer is None:
            return False
        if self._every == "refresh":
            refreshes, self._refreshes = self._refreshes, self._state.refreshes
            return self._refreshes != refreshes
        return self._updates // self._every > before // self._every


def check_every(every: Any, draw_every: Any) -> None:
    """Raise :class:`topkast.OptionError` unless the intervals are positive integers."""
    for name, value in (("every", every), ("draw_every", draw_every)):
        if name == "every" and value == "refresh":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            expected = " or 'refresh'" if name == "every" else ""
            raise OptionError(f"{name} must be a positive integer{expected}, got {value!r}")


def _on_host(masks: Mapping[str, topkast.Masks]) -> dict[str, topkast.Masks]:
    return {
        name: topkast.Masks(*(mask.cpu() for mask in tensor_masks))
        for name, tensor_masks in masks.items()
    }
