"""Kernels on the threads of XLA, without waiting for a thread that has not started.

A handler runs on one thread of a pool, and asks the pool to run helpers. A handler that waited for
a helper in the queue of a busy pool might wait for itself. So the caller runs the kernel until no
work item is left, then closes the record, and waits for those helpers only that are inside the
kernel. A helper that finds the record closed leaves at once; whoever is last releases the record.
"""

from __future__ import annotations

from typing import Any

from numba import njit, types

from topkast.kernels.runtime._barrier import yield_core
from topkast.kernels.runtime._compile import kernel
from topkast.kernels.xla._frame import count_threads, schedule, words
from topkast.kernels.xla._native import (
    add_atomically,
    allocate,
    call_kernel,
    link,
    release,
    symbol_address,
)

_STATE, _REFERENCES = 0, 8  # byte offsets in a record; kernel and arguments follow
_RECORD_BYTES = 32
_CLOSED = 1 << 40  # in the state, beside the number of helpers inside the kernel
_SPINS = 256  # reads of the state before the thread yields to another one

_help_address = symbol_address("topkast_xla_help")


def link_threads() -> None:
    """Link the function that helpers run."""
    link("topkast_xla_help", _help.address)


@njit  # type: ignore[untyped-decorator]
def _drop(record: Any) -> None:
    if add_atomically(record + _REFERENCES, -1) == 1:
        release(record)


@kernel(types.void(types.intp))
def _help(record: Any) -> None:
    """Run the kernel of a record, unless the record is closed."""
    if add_atomically(record + _STATE, 1) < _CLOSED:
        fields = words(record, 4)
        call_kernel(fields[2], fields[3])
    add_atomically(record + _STATE, -1)
    _drop(record)


@njit  # type: ignore[untyped-decorator]
def run(frame: Any, function: Any, arguments: Any, threads: Any) -> None:
    """Run the kernel at an address on its arguments, on at most `threads` threads.

    The first word of the arguments counts work items, as in
    :func:`topkast.kernels.runtime._pool.run`.
    """
    words(arguments, 1)[0] = 0
    helpers = threads - 1
    if helpers < 1:
        call_kernel(function, arguments)
        return
    record = allocate(_RECORD_BYTES)
    fields = words(record, 4)
    fields[0], fields[1], fields[2], fields[3] = 0, helpers + 1, function, arguments
    for _ in range(helpers):
        if not schedule(frame, _help_address(), record):
            add_atomically(record + _REFERENCES, -1)
    call_kernel(function, arguments)
    state, spins = add_atomically(record + _STATE, _CLOSED) + _CLOSED, 0
    while state != _CLOSED:
        spins += 1
        if spins > _SPINS:
            yield_core()
        state = add_atomically(record + _STATE, 0)
    _drop(record)


@njit  # type: ignore[untyped-decorator]
def threads_for(frame: Any, items: Any) -> Any:
    """Number of threads for a number of work items."""
    return min(count_threads(frame), items) if items > 1 else 1
