"""A monitor as a callback of Lightning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from topkast import OptionError
from topkast_torch._averages import WeightAverage
from topkast_torch.callbacks._masked_averages import mask_parameters
from topkast_torch.callbacks._monitor import Every, Monitor, check_every
from topkast_torch.optimizer._optimizer import TopKASTOptimizer

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback
    except ModuleNotFoundError:
        Callback = object


class LightningCallback(Callback):  # type: ignore[misc]
    """A :class:`Monitor` for Lightning: scalars to all loggers, masks to TensorBoard.

    It finds the wrapped optimizer that ``configure_optimizers`` returned. When ``fit`` ends, the
    model and the averages of Lightning's ``EMAWeightAveraging``, ``WeightAveraging`` and
    ``StochasticWeightAveraging``, which are written to the model, are made sparse by the last sets.

    Parameters
    ----------
    every, draw_every, draw
        As for :class:`Monitor`.
    averages
        Further averages to make sparse, as for :class:`Monitor`.
    decay
        If given, the attribute `average` is a :class:`topkast_torch.WeightAverage` with this decay
        once training has started. It is updated at each update, and saved and loaded with
        Lightning's checkpoints.

    Raises
    ------
    ModuleNotFoundError
        If Lightning is not installed.
    OptionError
        If an interval is not a positive integer; at the start of training, if no optimizer is
        wrapped.

    Examples
    --------
    ``lightning.Trainer(callbacks=[topkast_torch.callbacks.LightningCallback(every=50)])``
    """

    def __init__(
        self,
        *,
        every: Every = 100,
        draw_every: int = 1000,
        draw: str | Sequence[str] | None = None,
        averages: Iterable[Any] = (),
        decay: float | None = None,
    ) -> None:
        if Callback is object:
            raise ModuleNotFoundError("LightningCallback needs Lightning: pip install lightning")
        super().__init__()
        check_every(every, draw_every)
        self.average: WeightAverage | None = None
        self._options: dict[str, Any] = {"every": every, "draw_every": draw_every, "draw": draw}
        self._averages, self._decay = list(averages), decay
        self._monitors: list[Monitor] = []
        self._saved_average: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the wrapped optimizers, and start to follow them."""
        optimizers = [one for one in trainer.optimizers if isinstance(one, TopKASTOptimizer)]
        if not optimizers:
            classes = ", ".join(type(one).__name__ for one in trainer.optimizers) or "none"
            raise OptionError(
                "LightningCallback found no optimizer that topkast.wrap_optimizer returned among "
                f"those of configure_optimizers: {classes}"
            )
        own: list[Any] = []
        if self._decay is not None:
            self.average = WeightAverage(optimizers[0], decay=self._decay)
            if self._saved_average is not None:
                self.average.load_state_dict(self._saved_average)
            own = [self.average]

        def log(scalars: dict[str, float], step: int) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=step)

        self._monitors = [
            Monitor(
                optimizer,
                log if trainer.loggers else None,
                writer=_find_writer(trainer),
                averages=[
                    *(own if number == 0 else ()),
                    *self._averages,
                    *_averages_of_callbacks(trainer),
                ],
                model=pl_module,
                prefix="topkast/" if len(optimizers) == 1 else f"topkast/{number}/",
                **self._options,
            )
            for number, optimizer in enumerate(optimizers)
        ]

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        """Log and draw what is due."""
        for monitor in self._monitors:
            monitor.step(trainer.global_step)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Make the averages sparse, and the model, to which an average may have been written."""
        for monitor in self._monitors:
            monitor.finish()
            mask_parameters(monitor._optimizer)
        self._monitors = []

    def state_dict(self) -> dict[str, Any]:
        """The average, for Lightning's checkpoints."""
        return {} if self.average is None else {"average": self.average.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the average when training starts."""
        self._saved_average = state_dict.get("average")


def _averages_of_callbacks(trainer: Any) -> list[Any]:
    """The models in which Lightning's own callbacks average."""
    models = (getattr(callback, "_average_model", None) for callback in trainer.callbacks)
    return [model for model in models if model is not None]


def _find_writer(trainer: Any) -> Any:
    """The SummaryWriter of a TensorBoardLogger, on the first process."""
    if not trainer.is_global_zero:
        return None
    writers = (logger.experiment for logger in trainer.loggers)
    return next((writer for writer in writers if hasattr(writer, "add_figure")), None)
