"""The gradient of a sparse layer's weight outside B, in blocks of rows that are never kept.

A method that grows weights needs those with the largest gradients out of all. On a step before such
a choice, a layer records its inputs and the gradients of its outputs. From these, the gradient of a
block of rows is computed like a dense layer's, and all but its largest entries are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.grad import conv2d_weight

from topkast import MismatchError
from topkast_torch.sparse._convolutions import Window
from topkast_torch.sparse._sparse_layer import Passes

_BLOCK = 1 << 22  # entries of a block


class RecordedGradient:
    """The gradient of a weight of `shape`, from recorded inputs and gradients of outputs.

    Parameters
    ----------
    pairs
        For each backward pass since gradients were zeroed, the input and the gradient of the
        output: rows of features, or images.
    shape
        Shape of the weight.
    window, groups
        Of a convolution.
    """

    def __init__(
        self,
        pairs: Passes,
        shape: tuple[int, ...],
        window: Window | None = None,
        groups: int = 1,
    ) -> None:
        if not pairs:
            raise MismatchError(
                "a sparse layer recorded no input for the choice of its next sets: its gradient "
                "was computed by function transforms, or written by hand"
            )
        self._pairs, self._shape, self._window, self._groups = pairs, shape, window, groups

    def block(self, start: int, stop: int) -> Tensor:
        """The gradient of some rows of the weight as a matrix, (stop - start, width)."""
        first, *others = self._pairs
        total = self._block_of(*first, start, stop)
        for pair in others:
            total += self._block_of(*pair, start, stop)
        return total

    def _block_of(self, x: Tensor, grad_output: Tensor, start: int, stop: int) -> Tensor:
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
