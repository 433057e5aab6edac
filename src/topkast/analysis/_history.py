"""A record of how the sets of a network change in training."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from topkast._errors import MismatchError, OptionError, StateDictError
from topkast.analysis._change import Change, ReservoirUse, change_of, use_of
from topkast.analysis._ever_active import EverActive, bits_from_text, bits_to_text, check_keys
from topkast.analysis._sets import (
    ByTensor,
    Sets,
    TensorSets,
    check_same_tensors,
    read_sets,
    shapes_of,
)

_FORMAT = "topkast mask history 1"
T = TypeVar("T")


class MaskRecord(NamedTuple):
    """What a :class:`MaskHistory` records at one step.

    Attributes
    ----------
    step
        Number of the training step.
    change
        Change since the record before; None in the first record.
    explored
        Share of the weights that has been in A, as far as the records show.
    reservoir
        Use, since the first record, of the weights that were unused there.
    """

    step: int
    change: ByTensor[Change] | None
    explored: ByTensor[float]
    reservoir: ByTensor[ReservoirUse]

    def to_dict(self) -> dict[str, Any]:
        """Convert to built-in types, for JSON; NaN becomes None."""
        return {
            "step": self.step,
            "change": None if self.change is None else self.change.to_dict(),
            "explored": self.explored.to_dict(),
            "reservoir": self.reservoir.to_dict(),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> MaskRecord:
        """Convert back from :meth:`to_dict`."""
        change = saved["change"]
        return cls(
            saved["step"],
            None if change is None else _by_tensor(_tuple_reader(Change), change),
            _by_tensor(_number, saved["explored"]),
            _by_tensor(_tuple_reader(ReservoirUse), saved["reservoir"]),
        )


class MaskHistory:
    """Records change, use of the reservoir and exploration, in one call for each interval.

    It keeps five bits for each weight: the sets at the first and at the last record, and which
    weights have been in A.

    Attributes
    ----------
    records
        A list of :class:`MaskRecord`, one for each call of :meth:`record`.

    Examples
    --------
    >>> import numpy as np
    >>> from topkast.analysis import MaskHistory
    >>> history = MaskHistory()
    >>> history.record(0, {"w": np.asarray([True, True, False, False])})
    >>> history.record(100, {"w": np.asarray([True, False, True, False])})
    >>> last = history.records[-1]
    >>> last.step, last.change.total.forward, last.explored.total, last.reservoir.total.reservoir
    (100, 0.5, 0.75, 0.5)
    """

    def __init__(self) -> None:
        self.records: list[MaskRecord] = []
        self._ever_active = EverActive()
        self._start: Sets = {}
        self._last: Sets = {}

    def record(self, step: int, sets: Any, /, params: Any = None) -> None:
        """Record the sets at a training step.

        Parameters
        ----------
        step
            Number of the step, larger than that of the record before.
        sets
            A wrapped optimizer or masks; see :mod:`topkast.analysis`.
        params
            The weights, needed with a functional state and with supports.

        Raises
        ------
        OptionError
            If `step` is no whole number, or not larger than the last one.
        MismatchError
            If tensors or shapes differ from the first record's, if the masks are not boolean, or if
            A is empty everywhere.
        """
        if int(step) != step:
            raise OptionError(f"step={step!r}: expected the number of a step, a whole number")
        if self.records and step <= self.records[-1].step:
            raise OptionError(
                f"step={step!r}: expected a step after the last record's, {self.records[-1].step}"
            )
        now = read_sets(sets, params)
        start = self._start or now
        if self.records:
            check_same_tensors(shapes_of(start), now, names=("the first record", "this one"))
        used = {
            name: self._ever_active.bits.get(name, tensor.forward) | tensor.forward
            for name, tensor in now.items()
        }
        change = change_of(self._last, now) if self.records else None
        reservoir = use_of(start, used, now)
        self._ever_active.update(now)
        self._start, self._last = start, now
        explored = self._ever_active.explored
        self.records.append(MaskRecord(int(step), change, explored, reservoir))

    def to_dict(self) -> dict[str, Any]:
        """Convert the records to built-in types, for JSON."""
        return {
            "format": _FORMAT,
            "shapes": {name: list(tensor.shape) for name, tensor in self._start.items()},
            "records": [record.to_dict() for record in self.records],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the records to a JSON file; :meth:`read` reads them.

        The file has no sets, so nothing can be added to it: see :meth:`state_dict`.
        """
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[MaskRecord]:
        """Read the records of a file from :meth:`save`.

        Raises :class:`topkast.MismatchError` if the file is no such file.
        """
        try:
            saved = json.loads(Path(path).read_text())
            if saved["format"] == _FORMAT:
                return [MaskRecord.from_dict(record) for record in saved["records"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise MismatchError(f"{path} is no file of mask records: pass one that MaskHistory wrote")

    def state_dict(self) -> dict[str, Any]:
        """Return the state in built-in types, for a checkpoint in any format."""
        sets = {
            f"{when}_{which}": bits_to_text({n: getattr(t, which) for n, t in tensors.items()})
            for when, tensors in (("start", self._start), ("last", self._last))
            for which in ("forward", "backward")
        }
        records = [record.to_dict() for record in self.records]
        return {"records": records, "ever_active": self._ever_active.state_dict(), **sets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one from :meth:`state_dict`.

        Raises :class:`topkast.StateDictError` if it is none, or if it is damaged.
        """
        names = [
            f"{when}_{which}" for when in ("start", "last") for which in ("forward", "backward")
        ]
        check_keys(state, {"records", "ever_active", *names})
        ever_active = EverActive()
        ever_active.load_state_dict(state["ever_active"])
        shapes = ever_active.shapes
        start_forward, start_backward, last_forward, last_backward = (
            bits_from_text(state, name, shapes) for name in names
        )
        try:
            records = [MaskRecord.from_dict(record) for record in state["records"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise StateDictError(f"the records of the state dict are damaged: {error!r}") from None
        self._start = {
            n: TensorSets(s, start_forward[n], start_backward[n]) for n, s in shapes.items()
        }
        self._last = {
            n: TensorSets(s, last_forward[n], last_backward[n]) for n, s in shapes.items()
        }
        self.records, self._ever_active = records, ever_active


def _by_tensor(read: Callable[[Any], T], saved: Mapping[str, Any]) -> ByTensor[T]:
    tensors = {name: read(value) for name, value in saved["tensors"].items()}
    return ByTensor(tensors, read(saved["total"]))


def _tuple_reader(make: Callable[..., T]) -> Callable[[Any], T]:
    return lambda saved: make(**{name: _number(value) for name, value in saved.items()})


def _number(saved: float | None) -> float:
    return math.nan if saved is None else saved
