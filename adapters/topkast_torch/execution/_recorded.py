"""The gradient of a sparse layer's weight outside B, in blocks of rows that are never kept.

A method that grows weights needs those with the largest gradients out of all. On a step before such
a choice, a layer records its inputs and the gradients of its outputs. From these, the gradient of a
block of rows is computed like a dense layer's, and all but its largest entries are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.grad import conv2d_weight

from topkast_torch.execution._masked_execution import NEVER, make_stamp
from topkast_torch.sparse._convolutions import Window
from topkast_torch.sparse._sparse_layer import Passes

_BLOCK = 1 << 22  # entries of a block


class Recording:
    """The products of a layer in backward passes, as far as the gradient of its values has them.

    A backward pass that accumulates no gradient (``torch.autograd.grad``) leaves nothing, and one
    whose gradient was zeroed without a step is dropped.
    """

    def __init__(self) -> None:
        self._passes: Passes = []
        self._running: dict[int, Passes] = {}  # of passes that have not ended, by number
        self._stamp = NEVER  # of the gradient that has the passes

    def add(self, grad: Tensor | None, x: Tensor, grad_output: Tensor | None) -> None:
        """Record a product of the running backward pass; `grad` is the gradient before it.

        Without `grad_output`, `x` is a gradient of the dense weight.
        """
        self._drop_zeroed(grad)
        number = torch._C._current_graph_task_id()
        if number not in self._running:
            self._running[number] = []
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._running.pop(number, None))  # at its end
        pair = x.detach(), None if grad_output is None else grad_output.detach()
        self._running[number].append(pair)

    def accept(self, grad: Tensor) -> None:
        """Keep the products of the running backward pass, which was accumulated into `grad`."""
        running = self._running.get(torch._C._current_graph_task_id(), [])
        self._passes += running
        running.clear()
        self._stamp = make_stamp(grad)

    def passes_in(self, grad: Tensor) -> Passes:
        """The passes whose gradient is in `grad`."""
        self._drop_zeroed(grad)
        return self._passes

    def _drop_zeroed(self, grad: Tensor | None) -> None:
        if not self._passes or (grad is not None and make_stamp(grad) == self._stamp):
            return
        if grad is None or not bool(grad.any()):
            self._passes = []


class RecordedGradient:
    """The gradient of a weight of `shape`, from recorded inputs and gradients of outputs.

    Parameters
    ----------
    pairs
        For each product in a backward pass since gradients were zeroed, the input and the gradient
        of the output: rows of features, or images. For each use of the dense weight, its gradient
        and None.
    shape
        Shape of the weight.
    like
        A tensor of the weight's dtype and device.
    window, groups
        Of a convolution.
    """

    def __init__(
        self,
        pairs: Passes,
        shape: tuple[int, ...],
        like: Tensor,
        window: Window | None = None,
        groups: int = 1,
    ) -> None:
        self._pairs, self._shape, self._like = pairs, shape, like
        self._window, self._groups = window, groups

    def block(self, start: int, stop: int) -> Tensor:
        """The gradient of some rows of the weight as a matrix, (stop - start, width)."""
        total = self._like.new_zeros(stop - start, math.prod(self._shape[1:]))
        for pair in self._pairs:
            total += self._block_of(*pair, start, stop)
        return total

    def _block_of(self, x: Tensor, grad_output: Tensor | None, start: int, stop: int) -> Tensor:
        if grad_output is None:
            return x[start:stop].reshape(stop - start, -1)
        if self._window is None:
            return grad_output[:, start:stop].T @ x
        (top, bottom), (left, right) = self._window.margins
        images = pad(x, (left, right, top, bottom))
        rows, channels = self._shape[:2]
        group_rows = rows // self._groups
        parts = []
        for group in range(start // group_rows, -(-stop // group_rows)):
            first, last = max(start, group * group_rows), min(stop, (group + 1) * group_rows)
            gradient = conv2d_weight(
                images[:, group * channels : (group + 1) * channels],
                (last - first, *self._shape[1:]),
                grad_output[:, first:last],
                stride=self._window.stride,
                dilation=self._window.dilation,
            )
            parts.append(gradient.reshape(last - first, -1))
        return torch.cat(parts)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """First flat index and gradient (entries,) of each block of rows."""
        rows, width = self._shape[0], math.prod(self._shape[1:])
        step = max(1, _BLOCK // max(width, 1))
        for start in range(0, rows, step):
            yield start * width, self.block(start, min(start + step, rows)).reshape(-1)
