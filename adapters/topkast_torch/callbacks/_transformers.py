"""A monitor as a callback of the Trainer of Transformers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from topkast_torch.callbacks._monitor import Every, Monitor, check_every

try:
    from transformers import TrainerCallback
except ModuleNotFoundError:
    TrainerCallback = object


class TransformersCallback(TrainerCallback):  # type: ignore[misc]
    """A :class:`Monitor` for the ``Trainer`` of Transformers: scalars through ``Trainer.log``.

    So they reach ``state.log_history`` and everything in ``report_to``. Masks are drawn if
    TensorBoard is among it, or to `writer`.

    Parameters
    ----------
    trainer
        The ``Trainer``, which has the wrapped optimizer in ``optimizers=``.
    writer, every, draw_every, draw, averages
        As for :class:`Monitor`.

    Raises
    ------
    ModuleNotFoundError
        If Transformers is not installed.
    OptionError
        If an interval is not a positive integer; at the start of training, if the optimizer is not
        wrapped.

    Examples
    --------
    ``trainer.add_callback(topkast_torch.callbacks.TransformersCallback(trainer, every=50))``
    """

    def __init__(
        self,
        trainer: Any,
        *,
        writer: Any = None,
        every: Every = 100,
        draw_every: int = 1000,
        draw: str | Sequence[str] | None = None,
        averages: Iterable[Any] = (),
    ) -> None:
        if TrainerCallback is object:
            raise ModuleNotFoundError(
                "TransformersCallback needs Transformers: pip install transformers"
            )
        check_every(every, draw_every)
        self._trainer, self._writer = trainer, writer
        self._options: dict[str, Any] = {
            "every": every,
            "draw_every": draw_every,
            "draw": draw,
            "averages": list(averages),
        }
        self._monitor: Monitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to follow the optimizer."""
        trainer = self._trainer
        writer = self._writer
        if writer is None:
            callbacks = trainer.callback_handler.callbacks
            writers = (getattr(callback, "tb_writer", None) for callback in callbacks)
            writer = next((one for one in writers if hasattr(one, "add_figure")), None)
        self._monitor = Monitor(
            trainer.optimizer,
            lambda scalars, step: trainer.log(scalars),
            writer=writer,
            model=trainer.model,
            **self._options,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log and draw what is due."""
        if self._monitor is not None:
            self._monitor.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the averages sparse."""
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
