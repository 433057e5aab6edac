"""The share of weights that was ever in A."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from topkast._errors import MismatchError, StateDictError
from topkast.analysis._sets import (
    Bits,
    ByTensor,
    Flags,
    check_same_tensors,
    count,
    read_sets,
    shapes_of,
    shares_by_tensor,
    unpack,
)
from topkast.selection._distribution import Shape


class EverActive:
    r"""Tracks which weights have been in A at some time, with one bit for each weight.

    The share of all weights that has been in A, :math:`R_s = |\bigcup_t A_t| / n`, is the in-time
    over-parameterisation rate of Liu et al. (2021, `arXiv:2102.02887
    <https://arxiv.org/abs/2102.02887>`_).

    Attributes
    ----------
    updates
        Number of calls of :meth:`update`.
    bits
        The weights that have been in A, as :func:`numpy.packbits` packs them, by tensor.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.analysis import EverActive
    >>> ever_active = EverActive()
    >>> ever_active.update(np.asarray([True, False, False, False]))
    >>> ever_active.update(np.asarray([False, False, True, False]))
    >>> ever_active.explored.total
    0.5

    To resume, keep the state with the checkpoint:

    >>> resumed = EverActive()
    >>> resumed.load_state_dict(ever_active.state_dict())
    >>> resumed.masks()[""]
    array([ True, False,  True, False])
    """

    def __init__(self) -> None:
        self.updates = 0
        self._shapes: dict[str, Shape] = {}
        self.bits: dict[str, Bits] = {}

    def update(self, sets: Any, /, params: Any = None) -> None:
        """Add the weights that are in A now.

        The first call decides which tensors are tracked. Call it at least once for each refresh.

        Parameters
        ----------
        sets
            A wrapped optimizer or masks; see :mod:`topkast.analysis`.
        params
            The weights, needed with a functional state and with supports.

        Raises
        ------
        MismatchError
            If tensors or shapes differ from the first call's, or if the masks are not boolean.
        """
        now = read_sets(sets, params)
        if not self.updates:
            self._shapes = shapes_of(now)
            self.bits = {name: tensor.forward.copy() for name, tensor in now.items()}
        else:
            check_same_tensors(self._shapes, now, names=("the first update", "this one"))
            for name, tensor in now.items():
                self.bits[name] |= tensor.forward
        self.updates += 1

    @property
    def explored(self) -> ByTensor[float]:
        """Share of the weights that has been in A, by tensor and in all.

        Raises :class:`topkast.MismatchError` before the first update.
        """
        if not self.updates:
            raise MismatchError("nothing has been tracked: call update first")
        counts = {
            name: [(count(bits), math.prod(self._shapes[name]))] for name, bits in self.bits.items()
        }
        return shares_by_tensor(float, counts)

    def masks(self) -> dict[str, Flags]:
        """Return boolean arrays of the weights that have been in A, by name."""
        return {name: unpack(bits, self._shapes[name]) for name, bits in self.bits.items()}

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of the tracked tensors, by name."""
        return dict(self._shapes)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in built-in types, for a checkpoint in any format.

        The bits are in base64: a byte for six weights.
        """
        return {
            "updates": self.updates,
            "shapes": {name: list(shape) for name, shape in self._shapes.items()},
            "ever_active": bits_to_text(self.bits),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one from :meth:`state_dict`.

        Raises :class:`topkast.StateDictError` if it is none, or if it is damaged.
        """
        check_keys(state, {"updates", "shapes", "ever_active"})
        try:
            shapes = {name: tuple(map(int, shape)) for name, shape in state["shapes"].items()}
            updates = int(state["updates"])
        except (TypeError, ValueError, AttributeError) as error:
            raise StateDictError(f"the shapes of the state dict are damaged: {error!r}") from None
        self.bits = bits_from_text(state, "ever_active", shapes)
        self._shapes, self.updates = shapes, updates


def check_keys(state: Mapping[str, Any], keys: set[str]) -> None:
    """Raise :class:`StateDictError` if a state dict lacks one of the keys."""
    missing = keys - set(state)
    if missing:
        raise StateDictError(
            f"the state dict lacks {', '.join(sorted(map(repr, missing)))}: pass what state_dict() "
            "returned"
        )


def bits_to_text(bits: Mapping[str, Bits]) -> dict[str, str]:
    """Convert sets to base64."""
    return {name: base64.b64encode(array.tobytes()).decode() for name, array in bits.items()}


def bits_from_text(
    state: Mapping[str, Any], key: str, shapes: Mapping[str, Shape]
) -> dict[str, Bits]:
    """Read a set of each tensor from a state dict."""
    saved = state[key]
    if not isinstance(saved, Mapping):
        raise StateDictError(f"{key!r} of the state dict is no mapping: it is damaged")
    if set(saved) != set(shapes):
        raise StateDictError(
            f"{key!r} of the state dict has the tensors {sorted(saved)}, but its shapes are of "
            f"{sorted(shapes)}: it is damaged"
        )
    bits = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        try:
            array = np.frombuffer(base64.b64decode(saved[name], validate=True), dtype=np.uint8)
        except (ValueError, TypeError):
            array = np.zeros(0, dtype=np.uint8)
        unused = -size % 8
        if array.size != (size + 7) // 8 or (unused and int(array[-1]) & ((1 << unused) - 1)):
            raise StateDictError(
                f"{key!r} of {name!r} in the state dict is not base64 of {size} bits, as the shape "
                f"{shape} requires: it is damaged"
            )
        bits[name] = array.copy()
    return bits
