"""A plan: the stages of one parallel region, laid out once and run with other addresses each time.

The stages of a plan are records of int64 in a row, so a call copies them, writes the addresses of
its tensors, and enters the compiled code once. Copies are the call's own: threads may run a plan at
the same time.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, types

from topkast.backends._threads import default_threads
from topkast.kernels._packing import PACK, pack_tiles
from topkast.kernels._products import MULTIPLY, multiply_tiles
from topkast.kernels._sampling import SAMPLE, sample_entries
from topkast.kernels.chains._sums import SUM, sum_rows
from topkast.kernels.runtime._arguments import define_record
from topkast.kernels.runtime._barrier import wait_until_done
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.runtime._pool import run_at, scratch_at
from topkast.kernels.runtime._vector import as_pointer, fetch_add
from topkast.kernels.units._multiply import multiply_tiles_of_units
from topkast.kernels.units._sample import sample_units_of_tiles
from topkast.kernels.units._scatter import scatter_units_of_tiles
from topkast.kernels.units._sizes import ARGUMENTS

_ARGUMENTS = {
    "pack": PACK,
    "sum": SUM,
    "multiply": MULTIPLY,
    "sample": SAMPLE,
    "unit multiply": ARGUMENTS,
    "unit scatter": ARGUMENTS,
    "unit sample": ARGUMENTS,
}
_KINDS = {name: number for number, name in enumerate(_ARGUMENTS)}
_PACK, _SUM, _MULTIPLY = (_KINDS[name] for name in ("pack", "sum", "multiply"))
_UNIT_MULTIPLY, _UNIT_SCATTER = _KINDS["unit multiply"], _KINDS["unit scatter"]

_HEADER = define_record("kind", "waits_for", "also_waits_for", "entered", "left")
_WORDS = max(len(dtype.names or ()) for dtype in _ARGUMENTS.values())  # of a stage's arguments
_STAGE_BYTES = 8 * (len(_HEADER.names or ()) + _WORDS)
_HEADER_BYTES = _HEADER.itemsize
_ENTERED, _LEFT = (int(_HEADER.fields[name][1]) for name in ("entered", "left"))  # type: ignore[index]

# Vectors that a single thread multiplies in the time that a parallel region costs.
_MIN_WORK = 1 << 13


class Slot(NamedTuple):
    """An address that each call passes, by name, plus a constant number of bytes.

    ``"scratch"`` is the name of scratch memory, which :meth:`Plan.run` provides: `offset` bytes for
    each thread lie before it. Stages that may run at the same time need offsets of their own.
    """

    name: str
    offset: int = 0


class Stage(NamedTuple):
    """Work items of one kernel.

    Attributes
    ----------
    kernel
        ``"pack"``, ``"sum"``, ``"multiply"`` or ``"sample"``, or ``"unit multiply"``,
        ``"unit scatter"`` or ``"unit sample"``: a plan has no products of both kinds.
    arguments
        Numbers and slots, by name.
    work
        Number of vectors that are multiplied or moved, roughly.
    waits_for
        Numbers of the earlier stages, counted from 0, that must be done before; two at most. What
        these waited for is done then too.
    """

    kernel: str
    arguments: dict[str, int | Slot]
    work: int
    waits_for: tuple[int, ...] = ()


class Plan:
    """Stages for all threads, and the slots to fill at each call.

    Parameters
    ----------
    stages
        The stages, in order.
    slots
        Names of the addresses that :meth:`run` takes, in order.
    dtype
        float32 or float64.
    scratch_bytes
        Bytes of scratch memory that each thread needs.

    Raises
    ------
    TypeError
        If the arguments of a stage lack a name, or have one that its kernel does not know.
    ValueError
        If a stage waits for more than two others, or for one that does not come before it.
    """

    def __init__(
        self, stages: Sequence[Stage], slots: Sequence[str], dtype: Any, *, scratch_bytes: int = 0
    ) -> None:
        numbers = [len(stages)]
        self._slots: list[tuple[int, int, int]] = []  # position, number of the slot, offset
        self._scratch: list[tuple[int, int]] = []  # position and offset
        self._scratch_bytes = scratch_bytes
        for position, stage in enumerate(stages):
            if len(stage.waits_for) > 2 or not all(0 <= n < position for n in stage.waits_for):
                raise ValueError(
                    f"stage {position} can wait for at most two earlier stages, got "
                    f"{stage.waits_for}"
                )
            first, second = (*(number + 1 for number in stage.waits_for), 0, 0)[:2]
            numbers += [_KINDS[stage.kernel], first, second, 0, 0]
            names = _ARGUMENTS[stage.kernel].names or ()
            arguments = {"next_item": 0, "next_thread": 0, **stage.arguments}
            if arguments.keys() != set(names):
                wrong = sorted({*names} ^ {*arguments})
                raise TypeError(f"arguments {wrong} of a {stage.kernel} stage are wrong or missing")
            for name in names:
                argument = arguments[name]
                if isinstance(argument, Slot):
                    slot, offset = argument
                    if slot == "scratch":
                        self._scratch.append((len(numbers), offset))
                    else:
                        self._slots.append((len(numbers), slots.index(slot), offset))
                    argument = 0
                numbers.append(argument)
            numbers += [0] * (_WORDS - len(names))
        self._numbers = array("q", numbers)
        self._is_small = sum(stage.work for stage in stages) < _MIN_WORK
        has_units = any(stage.kernel.startswith("unit") for stage in stages)
        kernels = (
            (_units_single, _units_double) if has_units else (_weights_single, _weights_double)
        )
        self._kernel = kernels[0] if np.dtype(dtype) == np.float32 else kernels[1]

    def run(self, addresses: Sequence[int]) -> None:
        """Run all stages with the addresses of the slots, in the order of their names."""
        threads = 1 if self._is_small else default_threads()
        numbers = self._numbers[:]
        if self._scratch:
            scratch = scratch_at(threads * self._scratch_bytes)
            for position, offset in self._scratch:
                numbers[position] = scratch + threads * offset
        for position, slot, offset in self._slots:
            numbers[position] = addresses[slot] + offset
        run_at(self._kernel, numbers.buffer_info()[0], threads)


@njit  # type: ignore[untyped-decorator]
def _multiply_weights(kind: Any, arguments: Any, dtype: Any) -> None:
    if kind == _MULTIPLY:
        multiply_tiles(arguments, dtype)
    else:
        sample_entries(arguments, dtype)


@njit  # type: ignore[untyped-decorator]
def _multiply_units(kind: Any, arguments: Any, dtype: Any) -> None:
    if kind == _UNIT_MULTIPLY:
        multiply_tiles_of_units(arguments, dtype)
    elif kind == _UNIT_SCATTER:
        scatter_units_of_tiles(arguments, dtype)
    else:
        sample_units_of_tiles(arguments, dtype)


def _make_run(multiply: Any) -> Any:
    """A function that runs all stages, those of products by `multiply`."""

    def run(address: Any, dtype: Any) -> None:
        count = carray(as_pointer(address), 1, np.int64)[0]
        first = address + 8
        for number in range(count):
            stage = first + number * _STAGE_BYTES
            header = carray(as_pointer(stage), 1, _HEADER)[0]
            kind = header.kind
            for awaited_number in (header.waits_for, header.also_waits_for):
                if awaited_number:
                    awaited = first + (awaited_number - 1) * _STAGE_BYTES
                    wait_until_done(awaited + _ENTERED, awaited + _LEFT)
            fetch_add(stage + _ENTERED)  # before it takes an item
            arguments = stage + _HEADER_BYTES
            if kind == _PACK:
                pack_tiles(arguments, dtype)
            elif kind == _SUM:
                sum_rows(arguments, dtype)
            else:
                multiply(kind, arguments, dtype)
            fetch_add(stage + _LEFT)

    # numba links compiled code by the function's name: of two cached functions that share one, a
    # process may run the wrong one.
    run.__qualname__ = f"_run_{multiply.__name__}"
    return njit(run)


_run_weights, _run_units = _make_run(_multiply_weights), _make_run(_multiply_units)

_KERNEL = types.void(types.intp)


@kernel(_KERNEL)
def _weights_single(address: Any) -> None:
    _run_weights(address, np.float32)


@kernel(_KERNEL)
def _weights_double(address: Any) -> None:
    _run_weights(address, np.float64)


@kernel(_KERNEL)
def _units_single(address: Any) -> None:
    _run_units(address, np.float32)


@kernel(_KERNEL)
def _units_double(address: Any) -> None:
    _run_units(address, np.float64)
