"""Run a model forward on an example, to look at its layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from topkast import OptionError


def run_example(model: nn.Module, example: Any) -> None:
    """Run the model on an input or a tuple of inputs, in evaluation mode, which changes nothing.

    Raises :class:`topkast.OptionError` if the model does not accept the example.
    """
    training = {module: module.training for module in model.modules()}
    try:
        with torch.enable_grad():
            model.eval()  # keeps running statistics unchanged
            model(*example) if isinstance(example, (tuple, list)) else model(example)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"the model cannot compute with the example: {error}") from error
    finally:
        for module, flag in training.items():
            module.training = flag


@contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks at the end."""
    handles = list(hooks)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
